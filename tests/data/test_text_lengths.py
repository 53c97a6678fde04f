"""What a text length cuts, told at the start of a run."""

import logging

import numpy as np
import pytest

from unialign_jax.data import streams, text_lengths
from unialign_jax.data.kinds import KINDS
from unialign_jax.data.records import Record, write_records
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.text_lengths import TextLengths, cuts_of, look_at
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.training import loop


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def open_stream(folder, records, kind, tokenizer, length, **options):
    write_records(folder, records, kind=kind)
    return Stream(StreamConfig("mine", kind, str(folder), text_length=length, **options), tokenizer)


def test_captions_and_instructions(tmp_path, tokenizer):
    records = [
        Record(f"k{i}", b"x", (b"y",), caption="red " * (4 + i % 2), instruction="blue " * (1 + 8 * (i == 7)))
        for i in range(10)
    ]
    stream = open_stream(tmp_path / "d", records, "edit", tokenizer, 5, num_conditions=1)
    captions, instructions = cuts_of(stream)
    assert captions == (
        "stream mine: 5 of 10 captions do not fit text_length 5 and are cut: 5 of 45 tokens (11%) are lost; "
        'k1 ends after "red red red red"'
    )
    assert "1 of 10 instructions do not fit" in instructions and 'k7 ends after "blue blue blue blue"' in instructions
    # What is counted is what the stream does.
    decoded = [tokenizer.decode(streams.encode_texts(record, "edit", tokenizer, 5)["text_ids"]) for record in records]
    cut = [text != record.caption.strip() for text, record in zip(decoded, records, strict=True)]
    assert sum(cut) == 5


def test_questions_and_answers(tmp_path, tokenizer):
    records = [
        Record("long answer", b"x", question="red?", answer="blue " * 30),
        Record("long question", b"x", question="red " * 30 + "star?", answer="no"),
        Record("short", b"x", question="red?", answer="no"),
    ]
    stream = open_stream(tmp_path / "d", records, "vqa", tokenizer, 20)
    questions, answers = cuts_of(stream)
    assert "1 of 3 questions do not fit" in questions
    assert 'long question becomes "Q: red red red' in questions and 'red star? A:"' in questions
    assert "1 of 3 answers do not fit" in answers and 'long answer ends after "… blue blue' in answers
    lost = len(tokenizer.token_ids("Q: red? A: ")) + 30 - 19
    assert f"{lost} of {30 + 1 + 1} tokens" in answers


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_where_nothing_is_cut(shapes_dir, tokenizer, kind):
    count = KINDS[kind].num_conditions
    stream = Stream(StreamConfig("s", kind, str(shapes_dir / kind), num_conditions=count, text_length=32), tokenizer)
    assert cuts_of(stream) == []
    assert len(look_at(stream).lines()) == (1 if kind == "text_to_image" else 2)
    assert TextLengths(kind, tokenizer).lines() == [], "of no texts"


def test_a_large_set_is_looked_at_in_evenly_spaced_places(tmp_path, tokenizer, monkeypatch):
    records = [Record(f"k{i}", b"x", caption="red " * (1 + i // 250)) for i in range(1000)]
    stream = open_stream(tmp_path / "d", records, "text_to_image", tokenizer, 4)
    seen = []
    read = type(stream.records).__getitem__
    monkeypatch.setattr(type(stream.records), "__getitem__", lambda self, i: seen.append(i) or read(self, i))
    (line,) = cuts_of(stream)
    assert len(seen) == text_lengths.LOOKED_AT and set(np.diff(seen)) <= {3, 4} and seen[0] == 0
    assert "64 of 256 captions" in line and line.endswith("(of 256 records looked at, evenly spaced among 1,000)")


@pytest.mark.bad_input
def test_damaged_records_are_left_out(tmp_path, tokenizer):
    records = [Record(f"k{i}", b"x", caption="red " * 10) for i in range(6)]
    stream = open_stream(tmp_path / "d", records, "text_to_image", tokenizer, 4)
    (shard,) = (tmp_path / "d").glob("*array_record*")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert cuts_of(stream) == []


def test_a_run_says_what_is_cut(small_config, caplog):
    """As its data are opened, before anything is compiled."""
    config = small_config("stage1", text_length=8)
    (name,) = (name for name, stream in config.streams.items() if stream.weight > 0)
    with caplog.at_level(logging.WARNING, logger=loop.__name__):
        loop.Trainer(config)
    (line,) = [record.getMessage() for record in caplog.records if "do not fit" in record.getMessage()]
    assert line.startswith(f"stream {name}: ") and "of 40 captions do not fit text_length 8" in line
    assert "--config.text_length" in line


@pytest.mark.bad_input
def test_a_stream_is_named_once(small_config):
    config = small_config("stage1")
    name = next(name for name, stream in config.streams.items() if stream.weight > 0)
    config.streams[name].path = "nowhere"
    with pytest.raises(ValueError) as raised:
        loop.open_streams(config, load_tokenizer())
    line = str(raised.value)
    assert "\n" not in line and f"stream {name}: data folder nowhere does not exist" in line
    assert line.count("stream ") == 1
