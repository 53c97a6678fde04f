"""The table of kinds: what is not in it is refused everywhere, and a new row disturbs nothing."""

import dataclasses
import hashlib

import pytest

from unialign_jax.data import jsonl, kinds, records, streams
from unialign_jax.data.records import Record
from unialign_jax.data.shapes import tasks
from unialign_jax.data.sources import rows
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.training import config as config_lib

# Of the first four records of each kind at 32 px, made before the kinds had numbers.
RECORDS = {
    "text_to_image": "7941aa3c33fde288",
    "edit": "bbcc1f66cc7f58dc",
    "perception": "8126b6e9b05cee82",
    "personalization": "a12b1221b579270d",
    "vqa": "b0a10377f49f62aa",
}


@pytest.fixture(params=["first", "last"])
def new_kind(request):
    """A kind that nothing else knows, at either end of the table."""
    row = {"sketch": kinds.Kind("a sketch", ("image", "caption"), "caption", True, 0, ())}
    table = row | kinds.KINDS if request.param == "first" else kinds.KINDS | row
    before = dict(kinds.KINDS)
    kinds.KINDS.clear()
    kinds.KINDS.update(table)
    yield "sketch"
    kinds.KINDS.clear()
    kinds.KINDS.update(before)


def digest(kind):
    found = hashlib.sha256()
    for index in range(4):
        record = tasks.shapes_record(kind, 0, index, image_size=32, teacher_width=16)
        values = [getattr(record, field.name) for field in dataclasses.fields(record)]
        found.update(repr(tuple(v.tobytes() if hasattr(v, "tobytes") else v for v in values)).encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("kind", RECORDS)
def test_shapes_are_what_they_were(kind):
    assert digest(kind) == RECORDS[kind]


def test_a_new_kind_disturbs_nothing(new_kind, tmp_path, refuses):
    assert {kind: digest(kind) for kind in RECORDS} == RECORDS
    assert tasks.write_shapes(tmp_path / "world", 1, image_size=16) == dict.fromkeys(RECORDS, True)
    refuses(lambda: tasks.shapes_record(new_kind, 0, 0), "sketch", "shapes has")
    refuses(lambda: rows.check_kind(new_kind), "sketch", "cannot be read from files", "write_records")
    # What works from the table alone, works.
    records.write_records(tmp_path / "own", [Record("a", b"x", caption="c")], kind=new_kind)
    assert records.read_metadata(tmp_path / "own").kind == new_kind
    assert config_lib.stream(new_kind, "x").num_conditions == 0
    texts = streams.encode_texts(Record("a", b"x", caption="a red star"), new_kind, load_tokenizer(), 8)
    assert (texts["prompt_ids"] == texts["text_ids"]).all() and texts["text_is_target"].all()


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["audio", "", None, 3, ["vqa"], {"vqa": 1}, "VQA", "vqa "])
def test_unknown_kinds_are_refused(kind, refuses, tmp_path):
    """Never read as another kind."""
    record = Record("a", b"x", caption="c", question="q", answer="a")
    refuses(lambda: kinds.has_image_pass(kind), "unknown kind", "text_to_image")
    refuses(lambda: streams.encode_texts(record, kind, load_tokenizer(), 8), "unknown kind")
    refuses(lambda: records.write_records(tmp_path / "d", [record], kind=kind), "unknown kind")
    refuses(lambda: rows.check_kind(kind), "unknown kind")
    refuses(lambda: streams.StreamConfig("s", kind, "x"), "stream s: unknown kind")
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
def test_an_unknown_kind_in_a_configuration(small_config):
    config = small_config("stage1")
    name = next(iter(config_lib.active_streams(config)))
    config.streams[name].kind = "audio"
    problems = config_lib.config_problems(config)
    assert len(problems) == 1 and f"streams.{name}.kind is 'audio', expected one of text_to_image, edit" in problems[0]
    assert config_lib.stream("audio", "x").num_conditions == 0


def test_the_table_agrees_with_the_others():
    fields = {field.name for field in dataclasses.fields(Record)}
    for kind in kinds.KINDS.values():
        assert set(kind.fields) <= fields and kind.prompt in kind.fields
        assert ("conditions" in kind.fields) == (kind.num_conditions > 0)
        assert set(kind.tasks) <= set(kinds.TASKS)
    assert set(kinds.TASKS) == {task for kind in kinds.KINDS.values() for task in kind.tasks}
    assert set(jsonl.READERS) == set(tasks.STREAMS) == set(kinds.KINDS)
    defaults = {name: kind.num_conditions for name, kind in kinds.KINDS.items()}
    assert defaults == {"text_to_image": 0, "edit": 1, "perception": 1, "personalization": 3, "vqa": 0}
    assert [name for name in kinds.KINDS if not kinds.has_image_pass(name)] == ["vqa"]
