"""What the builder refuses: sources, options, folders, and sheets that reviewers filled in. One line each."""

import csv
import json
import shutil

import pytest

from unialign_jax.evaluation.building import ingest, review, settings, stages
from unialign_jax.evaluation.building.settings import Settings

from .conftest import write_picture

pytestmark = pytest.mark.bad_input


# Sources


@pytest.fixture
def coco(small, tmp_path):
    shutil.copytree(small.coco, tmp_path / "coco")
    return tmp_path / "coco"


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda coco: shutil.rmtree(coco / "annotations"), ["instances_val2017.json", "cocodataset.org"]),
        (lambda coco: (coco / "annotations/captions_val2017.json").unlink(), ["captions_val2017.json", "no such file"]),
        (lambda coco: (coco / "val2017/000000000003.jpg").unlink(), ["lacks 1 of 12 images", "000000000003.jpg"]),
        (lambda coco: (coco / "annotations/instances_val2017.json").write_text('{"images": [{"id'), ["is not JSON"]),
        (lambda coco: (coco / "annotations/instances_val2017.json").write_text('{"images": []}'), ["'categories'"]),
        (
            lambda coco: change_json(
                coco / "annotations/instances_val2017.json",
                lambda content: content["images"][0].update(file_name="../annotations/instances_val2017.json"),
            ),
            ["leads out of val2017/"],
        ),
    ],
)
def test_coco_that_is_not_whole(coco, spoil, words, refuses):
    spoil(coco)
    refuses(lambda: ingest.read_coco(str(coco), "val2017"), *words)


@pytest.mark.parametrize(
    "line, words",
    [
        ({"path": "a.jpg"}, ["line 1", "no `image`"]),
        ({"image": "b.jpg"}, ["line 1", "b.jpg", "no such file"]),
        ({"image": "a.jpg", "captions": "a dog", "classes": "dog"}, ["classes is 'dog'"]),
        ({"image": "a.jpg", "captions": [3]}, ["captions is [3]"]),
        ({"image": "a.jpg", "license": 4}, ["license is 4"]),
        ([], ["line 1", "expected an object"]),
        (None, ["lists no image"]),
    ],
)
def test_lists_that_are_wrong(tmp_path, line, words, refuses):
    write_picture(tmp_path / "a.jpg", 0, size=(40, 40))
    (tmp_path / "list.jsonl").write_text("" if line is None else json.dumps(line))
    refuses(lambda: ingest.read_list(tmp_path / "list.jsonl"), *words)


def test_a_folder_without_images_and_images_twice(tmp_path, refuses):
    refuses(lambda: ingest.read_folder(tmp_path), "holds no image")
    write_picture(tmp_path / "a.jpg", 0, size=(40, 40))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    refuses(lambda: ingest.read_folder(tmp_path), "a.txt", "not UTF-8")
    (tmp_path / "a.txt").write_text(" a  dog\n")
    [row] = rows = ingest.read_folder(tmp_path)
    assert row["captions"] == ["a dog"] and row["key"] == f"{tmp_path.name}/a.jpg" and row["classes"] is None
    refuses(lambda: ingest.check_unique(rows + rows), "is there twice")


def test_images_that_cannot_be_read_are_rejected_with_a_reason(build, coco, tmp_path):
    (coco / "val2017/000000000001.jpg").write_bytes(b"no image")
    (coco / "val2017/000000000002.jpg").write_bytes((coco / "val2017/000000000003.jpg").read_bytes())
    folder = tmp_path / "set"
    assert build(f"--output={folder}", f"--coco={coco}", "--min-side=32", "--until=filter") == 0
    rejected = {row["key"][-2:]: row["reasons"] for row in stages.read_rows(folder / "filter/rejected.jsonl")}
    assert set(rejected) == {"01", "03"} and rejected["01"][0].startswith("unreadable: ")
    assert rejected["03"] == ["duplicate: the same file as coco/000000000002"]


def test_licenses_are_kept_and_others_left_out(build, coco, tmp_path):
    folder = tmp_path / "set"
    options = [f"--output={folder}", f"--coco={coco}", "--until=ingest"]
    assert build(*options, "--licenses=4,Public domain") == 0
    kept = stages.read_rows(folder / "ingest/images.jsonl")
    assert len(kept) == 6 and {row["license_url"] for row in kept} == {"http://cc/by/2.0/"}
    assert len(stages.read_rows(folder / "ingest/rejected.jsonl")) == 6
    assert build(*options, "--licenses=") == 0
    assert len(stages.read_rows(folder / "ingest/images.jsonl")) == 12


# Options and folders


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["no images are named", "--coco"]),
        (["--coco=nowhere"], ["nowhere", "no such file"]),
        (["--images=nowhere"], ["nowhere", "no such file"]),
        (["--min-side=0"], ["--min-side is 0", "1 to"]),
        (["--max-clipped=nan"], ["--max-clipped is nan"]),
        (["--clusters=16"], ["--clusters is 16"]),
        (["--min-aspect=2"], ["--min-aspect is 2.0, more than --max-aspect, 1.33"]),
        (["--seed=-1"], ["--seed is -1"]),
        (["--until=freeze"], ["--until", "freeze"]),
        (["import-review"], ["import-review and --review=CSV go together"]),
        (["--review=a.csv"], ["import-review and --review=CSV go together"]),
        (["freeze"], ["is no builder's folder"]),
    ],
)
def test_options_that_cannot_be(command_refuses, tmp_path, options, words):
    command_refuses("evaluate", ["build-semgen", f"--output={tmp_path / 'set'}", *options], *words)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--embedder="], ["--embedder is not given"]),
        (["--embedder=nowhere"], ["--embedder is ", "/nowhere"]),
        ([], ["the model that drafts is not named", "--judge"]),
        (["--judge=http://127.0.0.1:1/v1"], ["--judge-model=NAME"]),
        (["--judge=localhost", "--judge-model=x"], ["--judge is 'localhost'", "a URL"]),
        (["--exclude=coco/no"], ["--exclude names 'coco/no'"]),
        (["--templates=nowhere"], ["nowhere", "no such file"]),
        (["--clusters=15", "--per-cluster=10"], ["12 images", "15 clusters with 10 each"]),
        (["--min-side=49"], ["the filters leave no image of 12", "side 12"]),
        (["--licenses=Mine"], ["none of 12 images has a license"]),
    ],
)
def test_stages_that_cannot_be_done(command_refuses, small, tmp_path, options, words):
    command_refuses("evaluate", ["build-semgen", f"--output={tmp_path / 'set'}", *small.options, *options], *words)


def test_folders_of_something_else(command_refuses, tmp_path, small):
    (tmp_path / "notes.txt").write_text("mine")
    command_refuses("evaluate", ["build-semgen", f"--output={tmp_path}"], "holds what was not written")
    (tmp_path / "settings.json").write_text('{"suite": "geneval"}')
    command_refuses("evaluate", ["build-semgen", f"--output={tmp_path}"], "is not of this command")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_settings_are_kept_and_checked(tmp_path, refuses):
    given = Settings(images=("a", "b"), min_side=300)
    settings.save(tmp_path, given)
    assert settings.load(tmp_path) == given
    (tmp_path / "settings.json").write_text(
        json.dumps({"format": settings.FORMAT, "settings": {"min_side": "many", "images": ["a"]}})
    )
    refuses(lambda: settings.check(settings.load(tmp_path)), "--min-side is 'many', expected a number")


def test_a_folder_that_is_in_use(build, command_refuses, small, tmp_path):
    import fcntl

    folder = tmp_path / "set"
    assert build(f"--output={folder}", *small.options, "--until=ingest") == 0
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command_refuses("evaluate", ["build-semgen", f"--output={folder}"], "written by another process")


def test_freeze_and_import_need_the_stages_as_they_were(build, command_refuses, small, model, tmp_path):
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options, f"--judge={model.url}", "--judge-model=fake"]
    assert build(*options, "--until=draft") == 0
    command_refuses("evaluate", ["build-semgen", "freeze", options[0]], "the stage validate is to be done first")
    assert build(*options) == 0
    command_refuses(
        "evaluate", ["build-semgen", "freeze", options[0], "--seed=3"], "--seed cannot be changed by freeze"
    )
    items = folder / "validate/items.jsonl"
    items.write_text(items.read_text().replace("two red", "two blue"))
    command_refuses("evaluate", ["build-semgen", "freeze", "--draft", options[0]], "validate/items.jsonl was changed")
    assert build(*options) == 0
    chosen = stages.read_rows(folder / "select/images.jsonl")[0]
    photo = small.coco / "val2017" / f"{chosen['key'][5:]}.jpg"
    before = photo.read_bytes()
    try:
        photo.write_bytes(before + b"\0")
        command_refuses(
            "evaluate", ["build-semgen", "freeze", "--draft", options[0]], "has changed since it was ingested"
        )
    finally:
        photo.write_bytes(before)
    assert not (folder / "benchmark").exists()


# Sheets


ITEMS = {
    f"1/{group}": {
        "item": f"1/{group}",
        "group": group,
        "key": "coco/1",
        "draft_id": f"{number:012d}",
        "text": text,
        "parts": {"edits": text.split("|")} if group == "edit_multi" else {},
        "flags": [],
    }
    for number, (group, text) in enumerate(
        {
            "t2i_long": "A dog.",
            "t2i_complex": "",
            "edit_multi": "Add a.|Move b.|Cut c.",
            "edit_complex": "Swap d.",
        }.items()
    )
}
GOOD = {"item": "1/t2i_long", "draft_id": "000000000000", "prompt": "A dog.", "decision": "accept", "editor": "Ada"}


def row_of(**change):
    return dict.fromkeys(review.COLUMNS, "") | GOOD | change


def test_a_good_row():
    found = review.read_row(row_of(decision="edit", text=" A  cat. ", reason="no dog"), ITEMS, False)
    assert (found.text, found.reason, found.editor) == ("A cat.", "no dog", "Ada")
    assert review.read_row(row_of(decision=""), ITEMS, True) is None
    multi = {"item": "1/edit_multi", "draft_id": "000000000002", "prompt": "Add a.\r\nMove b.\r\nCut c."}
    found = review.read_row(row_of(**multi, decision="edit", text="Add x\nMove y\n\nCut z!"), ITEMS, False)
    assert found.text == "Add x. Move y. Cut z!" and found.edits == ("Add x.", "Move y.", "Cut z!")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"item": "2/t2i_long"}, ["'2/t2i_long' is no item"]),
        ({"item": ""}, ["'' is no item"]),
        ({"draft_id": "000000000001"}, ["sheet is of another draft", "expected 000000000000"]),
        ({"prompt": "A cat."}, ["the column prompt was changed", "decide edit"]),
        ({"decision": ""}, ["no decision", "accept, edit, reject"]),
        ({"decision": "Accept"}, ["decision is 'Accept'"]),
        ({"editor": " "}, ["no editor"]),
        ({"editor": "A" * 1001}, ["editor has 1,001 characters"]),
        ({"decision": "reject"}, ["rejected without a reason"]),
        ({"text": "A cat."}, ["text is filled in", "accept, not edit"]),
        ({"decision": "edit"}, ["text is empty"]),
        ({"decision": "edit", "text": "A  dog."}, ["text is the draft"]),
        ({"decision": "edit", "text": "=1"}, ["begins with =, which a spreadsheet"]),
        ({"item": "1/t2i_complex", "draft_id": "000000000001", "prompt": ""}, ["accepted, but there is no draft"]),
        (
            {"item": "1/edit_multi", "draft_id": "000000000002", "prompt": "Add a. Move b. Cut c.", "decision": "edit",
             "text": "Add a. Move b."},
            ["has 2 edits, expected exactly three"],
        ),
    ],
)  # fmt: skip
def test_rows_that_are_wrong(change, words, refuses):
    refuses(lambda: review.read_row(row_of(**change), ITEMS, False), *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["the columns []"]),
        (b"item;draft_id;image\r\n", ["the columns", "item,draft_id"]),
        (b"\xff\xfei\0t\0", ["is not UTF-8"]),
        (b'item,draft_id\r\n"open', ["no CSV file"]),
    ],
)
def test_files_that_are_no_sheets(tmp_path, content, words, refuses):
    (tmp_path / "sheet.csv").write_bytes(content)
    refuses(lambda: list(review.read_sheet(tmp_path / "sheet.csv", ITEMS, False)), *words)


def test_nothing_is_taken_of_sheets_with_a_wrong_row(tmp_path):
    """Every wrong row is named; good rows of the same sheets are not taken until all are."""
    stages.write_rows(tmp_path / "items.jsonl", ITEMS.values())
    (tmp_path / "validate").mkdir()
    (tmp_path / "items.jsonl").rename(tmp_path / "validate/items.jsonl")
    build = stages.Build(tmp_path, Settings())

    def sheet(name, *rows):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, review.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    good = row_of()
    other = row_of(item="1/edit_complex", draft_id="000000000003", prompt="Swap d.")
    paths = [sheet("one.csv", good, other | {"editor": ""}), sheet("two.csv", good)]
    with open(paths[1], "a") as file:
        file.write("1/t2i_long,x\r\n,,,,,,,,\r\n")  # a short row, and an empty one, which counts for nothing
    problems = review.import_sheets(build, paths)
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"{paths[0]}, line 3", f"{paths[1]}, line 2", f"{paths[1]}, line 3"]  # fmt: skip
    assert "no editor" in problems[0] and "decided twice" in problems[1] and "2 columns, expected 9" in problems[2]
    assert not (tmp_path / "review").exists()
    assert review.import_sheets(build, [sheet("one.csv", good)]) == []
    assert review.import_sheets(build, [sheet("two.csv", other)]) == []
    assert review.summary(build) == "review: accept 2, edit 0, reject 0, open 2"
