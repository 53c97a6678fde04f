"""A whole set, from 400 synthetic images in COCO's form and 150 photographs to a frozen folder, as a user makes it."""

import collections
import csv
import hashlib
import json
import shutil
import subprocess

import pytest

from unialign_jax.evaluation.building import stages
from unialign_jax.evaluation.building.drafting import GROUPS

from .conftest import SHARED, filled

pytestmark = pytest.mark.slow
SPOILT = {
    3: {"cells": 2},  # blurred: two colours a side
    7: {"size": (420, 300)},
    12: {"high": 30},  # dark
}


@pytest.fixture(scope="module")
def sources(make_coco, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    options = [f"--coco={make_coco(folder / 'coco', 400, spoil=SPOILT)}"]
    if (SHARED / "photos").is_dir():
        lines = map(json.loads, (SHARED / "semgen_bench.jsonl").read_text().splitlines())
        rows = [
            {"image": f"{SHARED.resolve()}/photos/{line['image_id']}.jpg", "caption": line["t2i_complex"]}
            for line in lines
        ]
        (folder / "photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options += [f"--images={folder / 'photos.jsonl'}", "--image-license=Flickr, see COCO"]
    return options


@pytest.fixture(scope="module")
def made(build, sources, model, tmp_path_factory):
    """The builder's folder as it is when reviewers get their sheet."""
    folder = tmp_path_factory.mktemp("built") / "set"
    options = ["--embedder=histogram", f"--judge={model.url}", "--judge-model=fake-72B", "--seed=5"]
    assert build(f"--output={folder}", *sources, *options) == 0
    return folder


def rows_of(folder, name):
    return stages.read_rows(folder / name)


def sheets(folder):
    return sorted((folder / "review").glob("sheet-*.csv"), key=lambda path: path.stat().st_mtime_ns)


def test_what_is_filtered_and_chosen(made):
    ingested, kept = rows_of(made, "ingest/images.jsonl"), rows_of(made, "filter/images.jsonl")
    rejected = {row["key"]: " ".join(row["reasons"]) for row in rows_of(made, "filter/rejected.jsonl")}
    assert len(ingested) == 400 + 150 * (SHARED / "photos").is_dir() == len(kept) + len(rejected)
    for number, word in ((3, "blur"), (7, "side: 300"), (7, "aspect: 1.400"), (12, "exposure: mean grey")):
        assert word in rejected[f"coco/{number + 1:012d}"]
    chosen = rows_of(made, "select/images.jsonl")
    assert [row["image_id"] for row in chosen] == list(range(1, 151))
    assert collections.Counter(row["cluster"]["id"] for row in chosen) == dict.fromkeys(range(15), 10)
    assert len({row["key"] for row in chosen}) == 150 and {row["key"] for row in chosen} <= {row["key"] for row in kept}
    assert all(row["cluster"]["label"] for row in chosen if row["dataset"] == "COCO val2017")
    assert {"clusters.png", "contact_sheet.png"} <= {path.name for path in (made / "select").iterdir()}


@pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="../shared/data has no photographs")
def test_the_official_photographs_pass_but_for_six_that_are_small_and_few_that_are_blurred(made):
    reasons = [row["reasons"] for row in rows_of(made, "filter/rejected.jsonl") if row["key"].startswith("photos/")]
    assert sum(any(reason.startswith("side") for reason in found) for found in reasons) == 6
    assert sum(any(reason.startswith("aspect") for reason in found) for found in reasons) == 0
    assert len(reasons) <= 15


def test_each_stage_says_what_went_in_and_came_out(made):
    before = None
    for name in stages.NAMES:
        manifest = json.loads((made / name / "manifest.json").read_text())
        assert manifest["stage"] == name and manifest["outputs"]
        for file, digest in manifest["outputs"].items():
            assert hashlib.sha256((made / name / file).read_bytes()).hexdigest() == digest
        for file, digest in manifest["inputs"].items():
            assert hashlib.sha256((made / file).read_bytes()).hexdigest() == digest
        assert name == "ingest" or any(file.startswith(tuple(stages.NAMES[: stages.NAMES.index(name)])) for file in
                                       manifest["inputs"])  # fmt: skip
        before = manifest
    assert before["sheet"] == sheets(made)[0].stem


def test_the_model_was_asked_once_for_each_draft_with_the_image_and_json_mode(made, model):
    assert model.groups == dict.fromkeys(("t2i_long", "t2i_complex", "edit_multi", "edit_complex", "rubric"), 150)
    assert set(model.asked.values()) == {1}
    path, body, text, headers = next(entry for entry in model.bodies if '"edits"' in entry[2])
    assert path == "/v1/chat/completions" and body["response_format"] == {"type": "json_object"}
    assert body["temperature"] == 0.7 and body["model"] == "fake-72B"
    drafts = rows_of(made, "draft/drafts.jsonl")
    assert len(drafts) == 600 and all(draft["text"] for draft in drafts)
    assert [draft["group"] for draft in drafts[:4]] == list(GROUPS)


def test_prompts_that_keep_the_rules_have_no_flags(made):
    items = rows_of(made, "validate/items.jsonl")
    assert len(items) == 600 and not [row["flags"] for row in items if row["flags"]]


def test_the_sheet_has_every_prompt_and_the_page_every_picture(made):
    [sheet] = sheets(made)
    with open(sheet, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 600 and {row["decision"] for row in rows} == {""}
    page = sheet.with_suffix(".html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 150 and page.count("<tr data-item=") == 600


def test_the_page_saves_the_sheet(made, tmp_path):
    """What its script makes of the page's own data, filled in, is the sheet with that, as import-review reads it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node to run the page's script")
    [sheet] = sheets(made)
    filled_in = {
        "3/t2i_long": {"decision": "edit", "text": 'A "big", dog\n', "reason": ""},
        "4/t2i_long": {"reason": "?"},
    }
    script = """
        const [page, filled, target] = process.argv.slice(1);
        const text = require("fs").readFileSync(page, "utf-8");
        const blocks = [...text.matchAll(/<script[^>]*>([^]*?)<\\/script>/g)].map((found) => found[1]);
        const { columns, rows } = JSON.parse(blocks[0]);
        eval(blocks[1].replace('"use strict";', ""));
        require("fs").writeFileSync(target, sheetText(columns, rows, JSON.parse(filled), "Ada"));
    """
    arguments = [sheet.with_suffix(".html"), json.dumps(filled_in), tmp_path / "saved.csv"]
    subprocess.run([node, "-e", script, *arguments], check=True)

    def decide(row):
        return (
            {"editor": "Ada"} | filled_in[row["item"]]
            if row["item"] == "3/t2i_long"
            else filled_in.get(row["item"], {})
        )

    expected = filled(sheet, tmp_path / "expected.csv", decide)
    found = [
        list(csv.reader(open(path, encoding="utf-8-sig", newline=""))) for path in (tmp_path / "saved.csv", expected)
    ]
    assert found[0] == found[1] and len(found[0]) == 601


def test_a_second_call_does_nothing_and_asks_nothing(made, build, model, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    model.forget()
    assert build(f"--output={made}") == 0
    said = capsys.readouterr().out
    assert said.count("done before") == len(stages.NAMES) and not model.asked
    assert {path: path.stat().st_mtime_ns for path in before} == before


def accept(row):
    return {"decision": "accept", "editor": "Ada"}


def test_from_review_to_the_frozen_set(made, build, model, command_refuses, tmp_path, capsys):
    """In the order of a real review: 599 prompts of 600, an edit and a rejection, a new draft, and the frozen set."""
    output = f"--output={made}"
    freeze = ["build-semgen", "freeze", output]
    command_refuses("evaluate", freeze, "all 600 prompts", "600 are not reviewed")
    target = made / "benchmark"
    assert build("freeze", "--draft", output) == 0
    assert {line["status"] for line in rows_of(target, "semgen_bench.jsonl")} == {"machine_draft"}
    assert {line["refinement"]["status"] for line in rows_of(target, "semgen_bench.jsonl")} == {"pending"}

    def decide(row):
        if row["item"] == "42/edit_multi":
            return {}
        if row["item"] == "7/t2i_complex":
            return {"decision": "reject", "editor": "Ada", "reason": "it is dull"}
        if row["item"] == "9/edit_multi":
            text = "Add a hat.\nRemove the dog.\n Paint the wall blue"
            return {"decision": "edit", "editor": "Bo", "text": text, "reason": "clearer"}
        return accept(row)

    [sheet] = sheets(made)
    everything = filled(sheet, tmp_path / "first.csv", decide)
    command_refuses("evaluate", ["build-semgen", "import-review", output, f"--review={everything}"], "1 row")
    assert not (made / "review/decisions.jsonl").exists()
    assert build("import-review", output, f"--review={everything}", "--partial") == 0
    assert "accept 597, edit 1, reject 1, open 1" in capsys.readouterr().out
    command_refuses("evaluate", freeze, "1 are not reviewed (42/edit_multi)", "1 are rejected", "7/t2i_complex")

    model.forget()
    assert build(output) == 0
    assert model.groups == {"t2i_complex": 1}
    assert "it is dull" in model.bodies[0][2] and "turned down" in model.bodies[0][2]
    second = sheets(made)[-1]
    with open(second, encoding="utf-8-sig", newline="") as file:
        assert {row["item"] for row in csv.DictReader(file)} == {"42/edit_multi", "7/t2i_complex"}
    rest = filled(second, tmp_path / "second.csv", lambda row: accept(row) if row["item"].startswith("7/") else {})
    assert build("import-review", output, f"--review={rest}", "--partial") == 0
    command_refuses("evaluate", freeze, "1 are not reviewed (42/edit_multi)")  # one of 600
    assert build("import-review", output, f"--review={filled(second, tmp_path / 'third.csv', accept)}") == 0
    assert build("freeze", output) == 0

    lines = rows_of(target, "semgen_bench.jsonl")
    assert len(lines) == 150 and {line["status"] for line in lines} == {"human_refined"}
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install jsonschema")
    schema = jsonschema.Draft202012Validator(json.loads((target / "schema.json").read_text()))
    chosen = rows_of(made, "select/images.jsonl")
    for number, (line, image) in enumerate(zip(lines, chosen, strict=True), start=1):
        schema.validate(line)
        assert list(line)[:6] == ["image_id", "image_path", *GROUPS]  # the official keys, in their order
        assert line["image_id"] == number and line["image_path"] == f"images/{number}.jpg"
        found = (target / line["image_path"]).read_bytes()
        assert hashlib.sha256(found).hexdigest() == line["source"]["sha256"] == image["sha256"]
    ninth = lines[8]
    assert ninth["edit_multi"] == "Add a hat. Remove the dog. Paint the wall blue."
    assert ninth["edit_multi_list"] == ["Add a hat.", "Remove the dog.", "Paint the wall blue."]
    assert ninth["refinement"]["status"] == "edited" and ninth["refinement"]["editor"] == "Ada, Bo"
    assert list(ninth["refinement"]["before"]) == ["edit_multi"] and "clearer" in ninth["refinement"]["reason"]
    assert lines[6]["generation"]["attempts"] == {"t2i_long": 1, "t2i_complex": 2, "edit_multi": 1, "edit_complex": 1}
    with open(target / "ATTRIBUTION.csv", newline="") as file:
        attribution = list(csv.DictReader(file))
    assert len(attribution) == 150 and all(row["license"] and row["sha256"] for row in attribution)
    readme = (target / "README.md").read_text()
    assert "597" not in readme and "599 accepted, 1 edited" in readme and "Ada, Bo" in readme
    command_refuses("evaluate", freeze, "exists already", "--overwrite")


def test_the_suite_reads_the_frozen_set(made):
    from unialign_jax.evaluation.suite import Request
    from unialign_jax.evaluation.suites import find_suite

    if not (made / "benchmark").is_dir():
        pytest.skip("the set is frozen by another test of this file")
    suite, extra = find_suite("semgen"), {}
    suite.add_arguments(lambda name, **options: extra.update({name[2:].replace("-", "_"): options.get("default")}))
    items = suite.items(Request(data=made / "benchmark", output=made / "scores", extra=extra))
    assert len(items) == 600
    assert collections.Counter(item.group for item in items) == dict.fromkeys(GROUPS, 150)
    prompts = {line[group] for line in rows_of(made, "benchmark/semgen_bench.jsonl") for group in GROUPS}
    assert {item.text for item in items} == prompts
