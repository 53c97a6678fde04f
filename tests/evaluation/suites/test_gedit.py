"""GEdit-Bench: every form of its data, sizes and layout, what the judge sees, the two aggregates, bad data."""

import csv
import io
import json
import math

import pytest
from PIL import Image

from unialign_jax.data.endpoint import Endpoint
from unialign_jax.evaluation.judging import Journal, Judge
from unialign_jax.evaluation.suite import Request, Score, Scorer
from unialign_jax.evaluation.suites import gedit
from unialign_jax.evaluation.suites.gedit import GEdit, fitting_size, official_size

EXTRA = {"viescore_prompts": None, "results": None, "language": "en"}


@pytest.fixture
def data(make_data, tmp_path):
    make_data("gedit", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def rows(data):
    """The rows of the data, as the Parquet file has them."""
    import pyarrow.parquet as pq

    return pq.read_table(data / "data" / "train-00000-of-00001.parquet").to_pylist()


@pytest.fixture
def make_request(data, tmp_path):
    """A function (changes) -> a request of the data."""

    def make(**changes):
        extra = EXTRA | {"viescore_prompts": str(data / "prompts")} | changes.pop("extra", {})
        return Request(**{"data": data, "output": tmp_path / "run", "extra": extra} | changes)

    return make


def saved(rows, folder):
    """What `DatasetDict.save_to_disk` writes."""
    import pyarrow as pa

    (folder / "train").mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "train/data-00000-of-00001.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "train/state.json").write_text(json.dumps(state))
    return folder


def plain(rows, folder):
    """metadata.jsonl and pictures beside it."""
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for row in rows:
            names = {}
            for column in ("input_image", "input_image_raw"):
                names[column] = f"{row['key']}_{column}.png"
                (folder / names[column]).write_bytes(row[column]["bytes"])
            file.write(json.dumps(row | names) + "\n")
    return folder


@pytest.mark.parametrize("form", ["folder", "parquet", "saved", "plain"])
def test_every_form_of_the_data_gives_the_same_run(form, data, rows, make_request, tmp_path):
    path = {
        "folder": lambda: data,
        "parquet": lambda: data / "data" / "train-00000-of-00001.parquet",
        "saved": lambda: saved(rows, tmp_path / "saved"),
        "plain": lambda: plain(rows, tmp_path / "plain"),
    }[form]()
    request, suite = make_request(data=path), GEdit()
    items = suite.items(request)
    assert [(item.id, item.group, item.text, item.facts["intersection"]) for item in items] == [
        ("color_alter/en/a1", "color_alter", "change a1", True),
        ("text_change/en/b1", "text_change", "change b1", False),
    ]
    [job] = items[0].jobs
    assert (job["id"], job["task"], job["instruction"]) == ("fullset/color_alter/en/a1", "edit", "change a1")
    suite.prepare(request, items)
    with Image.open(request.made / "fullset/color_alter/en/a1_SRCIMG.png") as image:
        assert image.size == (40, 30)  # input_image, as it is
        assert image.tobytes() == Image.open(io.BytesIO(rows[0]["input_image"]["bytes"])).tobytes()
    with Image.open(job["image"]) as image:
        assert image.size == (608, 448)  # input_image_raw
    assert len(list(request.output.rglob("*.png"))) == 4
    assert suite.files(request) and all(path.is_file() for path in suite.files(request))


def test_the_other_language(make_request):
    [item] = GEdit().items(make_request(extra={"language": "cn"}))
    assert item.jobs[0]["id"] == "fullset/color_alter/cn/a2"


def test_the_official_command(make_request, tmp_path):
    command = GEdit().official_command(make_request())
    assert f"--model_name=model --save_path={tmp_path / 'run'} --backbone=gpt4o --language=en" in command
    assert GEdit().official_command(make_request(extra={"language": "cn"})) is None


@pytest.mark.parametrize(
    "size, official, fitting",
    [
        ((512, 512), (512, 512), (512, 512)),
        ((1024, 1024), (512, 512), (512, 512)),
        ((640, 480), (608, 448), (592, 448)),  # 591.2 by 443.4: 576 * 448 = 258,048 is too few
        ((480, 640), (480, 576), (448, 592)),
        ((1000, 500), (768, 352), (720, 368)),  # 724.1 by 362.0: 736 * 352 = 259,072 is too few
        ((800, 500), (608, 416), (640, 400)),  # 647.6 by 404.8: 640 * 416 = 266,240 is too many
    ],
)
def test_sizes_by_hand(size, official, fitting):
    """512 * 512 = 262,144 pixels; the official width is moved by 32 once the rounded area is not that."""
    assert fitting_size(size) == fitting
    assert official_size(size) == official


def test_sizes_that_the_user_names(make_request):
    assert gedit.edit_size(make_request(options={"height": 32, "width": 64}), (640, 480)) == (64, 32)
    assert gedit.edit_size(make_request(options={"height": 32}), (640, 480)) == (32, 32)
    assert gedit.edit_size(make_request(mode="corrected"), (640, 480)) == fitting_size((640, 480))


def test_the_judge_sees_source_and_edit_at_one_size(make_request, chat_server, judge_answer, tmp_path):
    chat_server.name_of = json.dumps
    chat_server.behave = lambda name, times: (200, {}, chat_server.answer(judge_answer(json.loads(name))))
    request, suite = make_request(options={"height": 32, "width": 32}), GEdit()
    items = suite.items(request)
    suite.prepare(request, items)
    for item in items:
        Image.new("RGB", (32, 32), "green").save(request.made / f"{item.jobs[0]['id']}.png")
    judge = Judge(Endpoint(chat_server.url, "m"), Journal(tmp_path / "j.jsonl"))
    try:
        scores = suite.score(request, items, {}, Scorer(judge))
    finally:
        judge.close()
    assert [score.values for score in scores] == [{"SC": 8, "PQ": 4, "O": pytest.approx(math.sqrt(32))}] * 2
    assert scores[0].images == ("model/fullset/color_alter/en/a1_SRCIMG.png", "judged/color_alter/en/a1.png")
    with Image.open(request.output / scores[0].images[1]) as image:
        assert image.size == (40, 30)
    contents = [body["messages"][0]["content"] for _, _, body in chat_server.requests]
    kinds = sorted([part["type"] for part in content] for content in contents)
    assert kinds == [["text", "image_url"], ["text", "image_url", "image_url"], ["text", "image_url", "image_url"]]
    folder = request.output / "official/model/gpt4o/eval_results_new"
    with open(folder / "model_text_change_gpt_score.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row == {
        "source_image": str(request.made / "fullset/text_change/en/b1_SRCIMG.png"),
        "edited_image": str(request.made / "fullset/text_change/en/b1.png"),
        "instruction": "change b1",
        "sementics_score": "8",
        "quality_score": "4",
        "intersection_exist": "False",
        "instruction_language": "en",
    }
    found = suite.score(make_request(extra={"results": str(folder)}), items, {}, Scorer())
    assert [score.values for score in found] == [score.values for score in scores]


def test_figures_by_hand():
    def score(name, group, semantics, quality, shared):
        values = {"SC": semantics, "PQ": quality, "O": math.sqrt(semantics * quality)}
        return Score(name, group, values, facts={"intersection": shared})

    scores = [
        score("a", "color_alter", 4, 9, True),
        score("b", "color_alter", 1, 4, False),
        score("c", "color_alter", 9, 9, True),
        score("d", "text_change", 0, 10, True),
        Score("e", "text_change", {}, failed="no", facts={"intersection": True}),
    ]
    for mode in ("official", "corrected"):
        figures = GEdit().figures(scores, mode)
        expected = {
            "color_alter/SC": 14 / 3,
            "color_alter/PQ": 22 / 3,
            "color_alter/O": 17 / 3,
            "text_change/O": 0,
            "SC": 7 / 3,
            "O": 17 / 6,  # of groups, not 17 / 4 of items
            "color_alter/O_intersection": 7.5,
            "text_change/O_intersection": 0,
            "O_intersection": 3.75,
        }
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-9)


# Bad input


def written(rows, folder, name="train-00000-of-00001.parquet"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, words",
    [
        ({"task_type": "dance"}, ["task_type 'dance'", "background_change"]),
        ({"key": ""}, ["no text in key"]),
        ({"key": "../../../escaped"}, ["id is", "expected a file name"]),
        ({"instruction": None}, ["no text in instruction"]),
    ],
)
def test_rows_that_are_none(rows, make_request, tmp_path, refuses, change, words):
    folder = written([rows[0] | change, *rows[1:]], tmp_path / "bad")
    refuses(lambda: GEdit().items(make_request(data=folder)), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.bad_input
def test_data_that_cannot_be_used(rows, make_request, tmp_path, refuses):
    suite = GEdit()
    refuses(lambda: suite.items(make_request(data=tmp_path / "nowhere")), "does not exist", "GEdit-Bench")
    (tmp_path / "empty").mkdir()
    refuses(lambda: suite.items(make_request(data=tmp_path / "empty")), "no Parquet files", "metadata.jsonl")
    (tmp_path / "list.csv").write_text("a,b\n")
    refuses(lambda: suite.items(make_request(data=tmp_path / "list.csv")), "neither a Parquet file")
    folder = written(rows, tmp_path / "part", "train-00000-of-00003.parquet")
    refuses(lambda: suite.items(make_request(data=folder)), "has 1 of 3 files", "download the rest")
    folder = written([*rows, rows[0]], tmp_path / "twice")
    refuses(lambda: suite.items(make_request(data=folder)), "color_alter/en/a1 for the second time")
    folder = written([{"prompt": "a"}], tmp_path / "other")
    refuses(lambda: suite.items(make_request(data=folder)), "columns missing", "GEdit-Bench")
    folder = written(rows, tmp_path / "cut")
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    refuses(lambda: suite.items(make_request(data=folder)), "Parquet file is broken")
    broken = rows[0] | {"input_image": {"bytes": b"no image", "path": None}}
    request = make_request(data=written([broken, *rows[1:]], tmp_path / "image"))
    refuses(lambda: suite.prepare(request, suite.items(request)), "cannot be decoded", "train-00000-of-00001.parquet:1")
    refuses(lambda: suite.items(make_request(extra={"language": "fr"})), "no instruction in fr")
