"""What clumsy newcomers and attackers give to train.py: stage file, keys, folder. One line each, nothing changed."""

import logging
import os
import sys
from pathlib import Path

import jax
import pytest

from unialign_jax.training import loop
from unialign_jax.training.loop import train, write_config

ROOT = Path(__file__).resolve().parents[2]
STAGE = f"{ROOT}/configs/stage1.py:tiny"

pytestmark = pytest.mark.bad_input


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The command adds to the import path and sets what is logged."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("unialign_jax.parallel.processes.prepare_memory", lambda environ: None)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "unialign_jax")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


RECIPE = "from unialign_jax.configs.base import paper_config, stream\n\n\ndef get_config(size):\n    "
FILLED = "c = paper_config()\n    c.num_steps = 1\n    c.streams.a = stream('vqa', 'data')\n    "
WHOLE = RECIPE + FILLED + "{}\n    return c"

STAGE_FILES = {
    "empty": ("", "it has no function get_config"),
    "a letter": ("Dear all,\nplease train.", "invalid syntax"),
    "not closed": ("x = (", "was never closed"),
    "NUL": ("\0", "null bytes"),
    "not UTF-8": (b"# \xff\xfe\n", "gives no configuration"),
    "JSON": ('{"get_config": null}', "line 1: NameError"),
    "a constant": ("get_config = 3", "no function get_config"),
    "no argument": ("def get_config():\n    return 1", "takes 0 positional arguments"),
    "an unknown module": ("import nowhere", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
    "division": ("def get_config(size):\n    return 1 / 0", "line 2: ZeroDivisionError"),
    "an error without words": ("def get_config(size):\n    raise ValueError", "line 2: ValueError"),
    "an error of many lines": ("raise RuntimeError('first\\nsecond')", "line 1: RuntimeError: first"),
    "the end of the process": ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
    "recursion": ("def get_config(size):\n    return get_config(size)", "RecursionError"),
    "None": ("def get_config(size):\n    pass", "get_config returns NoneType, expected a ConfigDict"),
    "a dict": ("def get_config(size):\n    return {'batch_size': 1}", "get_config returns dict"),
    "an empty configuration": (
        "from ml_collections import ConfigDict\n\n\ndef get_config(size):\n    return ConfigDict()",
        "the configuration cannot run",
    ),
    "streams of text": (WHOLE.format("del c.streams; c.streams = 'a'"), "cannot run:"),
    "no streams": (WHOLE.format("del c.streams"), "missing key streams"),
    "a stream of text": (WHOLE.format("del c.streams['a']; c.streams['a'] = 'data'"), "cannot run:"),
    "a key without place": (WHOLE.format("c.batchsize = 4"), "unknown key batchsize (nearest: batch_size)"),
    "a missing key": (WHOLE.format("del c.batch_size"), "missing key batch_size"),
    "text for a number": (WHOLE.format("c.batch_size = '8'"), "TypeError"),
    "text after all": (
        WHOLE.format("del c.batch_size; c.batch_size = '8'"),
        "batch_size is '8', expected a whole number",
    ),
    "a number of half": (WHOLE.format("del c.batch_size; c.batch_size = 8.5"), "batch_size is '8.5', expected a whole"),
    "a truth for a number": (WHOLE.format("del c.num_steps; c.num_steps = True"), "num_steps is 'True', expected"),
    "none for a text": (WHOLE.format("c.init_from = None"), "init_from is 'None', expected a string"),
    "a list for a number": (WHOLE.format("del c.seed; c.seed = [1]"), "seed is "),
    "numbers for expressions": (WHOLE.format("c.optimizer.freeze = (1, 2)"), "optimizer.freeze is (1, 2), expected"),
    "a stream's weight of text": (
        WHOLE.format("c.streams.a = stream('vqa', 'data'); del c.streams.a.weight; c.streams.a.weight = 'all'"),
        "streams.a.weight is 'all', expected a number",
    ),
}


@pytest.mark.parametrize("name", STAGE_FILES)
def test_a_stage_file_that_gives_no_configuration(command_refuses, tmp_path, name):
    source, words = STAGE_FILES[name]
    path = tmp_path / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    command_refuses("train", [f"--config={path}", f"--workdir={tmp_path}/run"], words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("", "there is no stage file"),
        (":tiny", "there is no stage file"),
        ("{tmp}", "is a folder"),
        ("{tmp}/nowhere.py", "there is no stage file"),
        ("{tmp}/pipe", "there is no stage file"),
        ("/dev/zero", "there is no stage file"),
        ("n\0ul", "there is no stage file"),
        ("\udcff.py", "there is no stage file"),
        ("x" * 5000, "there is no stage file"),
        (f"{STAGE}y", "unknown size 'tinyy'"),
        (f"{STAGE}:tiny", "unknown size 'tiny:tiny'"),
        (f"{ROOT}/README.md", "gives no configuration"),
    ],
)
def test_a_stage_that_is_not_there(command_refuses, tmp_path, reference, words):
    os.mkfifo(tmp_path / "pipe")
    reference = reference.replace("{tmp}", str(tmp_path))
    command_refuses("train", [f"--config={reference}", f"--workdir={tmp_path}/run"], words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batch_size=", "batch_size is '', expected a whole number"),
        ("batch_size=eight", "expected a whole number"),
        ("batch_size=8.0", "batch_size is '8.0', expected a whole number"),
        ("batch_size=0x8", "expected a whole number"),
        ("batch_size=-8", "batch_size is -8, expected at least 1"),
        ("batch_size=1e3", "expected a whole number"),
        ("batch_size=nan", "expected a whole number"),
        ("batch_size=" + "9" * 30, "a number of more than 20 digits, expected -2147483647 to 2147483647"),
        ("batch_size=" + "9" * 5000, "999…', expected a whole number"),
        ("num_steps=3000000000", "num_steps is 3000000000, expected"),
        ("seed=-1", "seed is -1, expected 0 to 4294967295"),
        ("seed=1180591620717411303424", "expected 0 to 4294967295"),
        ("checkpoint.keep_every=" + "9" * 4000, "a number of more than 20 digits"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate is inf"),
        ("optimizer.learning_rate=fast", "expected a number"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay is inf, expected a finite number"),
        ("sigma.mean=nan", "sigma.mean is nan, expected a finite number"),
        ("samples.guidance_scale=inf", "samples.guidance_scale is inf, expected a finite number"),
        ("data.max_bad_fraction=nan", "data.max_bad_fraction is nan"),
        ("parity.decay_1d=yes", "parity.decay_1d is 'yes', expected true or false"),
        ("parity.decay_1d=", "expected true or false"),
        ("optimizer.freeze=(", "no regular expression"),
        ("optimizer.freeze=" + "(" * 5000, "no regular expression"),
        ("optimizer.freeze=a{99999999999999}", "no regular expression"),
        ("optimizer.freeze=(1,2)", "expected a tuple of str"),
        ("model.remat=all", "model.remat is 'all', expected one of"),
        ("model.depth=0", "model.depth is 0"),
        ("text_length=1", "text_length is 1"),
        ("optimizer=1", "optimizer is a group of keys"),
        ("streams.text_to_image.kind=video", "streams.text_to_image.kind is 'video'"),
        ("streams.text_to_image.kind=\udcff", "streams.text_to_image.kind is"),
        ("streams.video.path=x", "unknown key streams.video.path"),
        ("=1", "unknown key"),
        (".=1", "unknown key"),
        ("\udcff=1", "unknown key"),
        ("batch_size.x=1", "unknown key batch_size.x"),
        ("__class__=1", "unknown key __class__"),
        ("init_weights=", "init_weights is '', expected one of"),
    ],
    ids=lambda text: text[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_key_that_cannot_be(command_refuses, tmp_path, change, words):
    command_refuses("train", [f"--config={STAGE}", f"--workdir={tmp_path}/run", f"--config.{change}"], words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("init_from={tmp}/nowhere", "nowhere"),
        ("init_from=n\0ul", "init_from"),
        ("tokenizer={tmp}/nowhere", "nowhere"),
        ("streams.text_to_image.path={tmp}/nowhere", "nowhere does not exist"),
        ("streams.text_to_image.path=n\0ul", "stream text_to_image"),
        ("streams.text_to_image.path=\udcff", "stream text_to_image"),
        ("streams.text_to_image.path={tmp}/file", "stream text_to_image"),
    ],
    ids=lambda text: text[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_path_that_leads_nowhere(command_refuses, tmp_path, shapes_dir, change, words):
    (tmp_path / "file").write_text("precious")
    data = f"--config.streams.text_to_image.path={shapes_dir}/text_to_image"
    small = ("--config.image_size=32", "--config.heads.teacher_width=16", "--config.model.depth=1", data)
    arguments = [f"--config={STAGE}", f"--workdir={tmp_path}/run", "--noprogress", *small]
    arguments += ["--config.model.tap_depth=1", f"--config.{change.replace('{tmp}', str(tmp_path))}"]
    command_refuses("train", arguments, words)
    assert (tmp_path / "file").read_text() == "precious" and not list(tmp_path.glob("run/*.json*"))


@pytest.fixture
def small(small_config):
    config = small_config(num_steps=1)
    return config


@pytest.mark.parametrize(
    "workdir", ["", "gs://bucket", "gs://bucket/../run", "s3://bucket/run", "{tmp}/file", "{tmp}/file/x", "n\0ul"]
)
def test_a_folder_that_a_run_cannot_have(refuses, small, tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "Trainer", lambda *_: None)
    (tmp_path / "file").write_text("precious")
    refuses(lambda: start(small, workdir.replace("{tmp}", str(tmp_path))), "the run's folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "precious"


def start(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


@pytest.mark.parametrize("place", ["checkpoints", "config.json", "run.lock"])
@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "device"])
def test_something_else_where_a_run_writes(refuses, small, tmp_path, monkeypatch, place, kind):
    """Refused before the first step."""
    if (place, kind) in {("checkpoints", "folder"), ("run.lock", "file")}:
        kind = "dangling"
    path = tmp_path / place
    make = {
        "file": lambda: path.write_text("precious"),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to(tmp_path / "nowhere" / "x"),
    }
    make[kind]()
    monkeypatch.setattr(loop, "Trainer", lambda *_: None)  # none of it is reached
    refuses(lambda: start(small, tmp_path), str(path))
    assert os.path.lexists(path) and (kind != "file" or path.read_text() == "precious")


CONFIGS = {
    "empty": b"",
    "half": b'{"name": "stage1", ',
    "a list": b"[]",
    "text": b'"stage1"',
    "null": b"null",
    "a number": b"3",
    "not UTF-8": b'{"name": "\xff"}',
    "NUL": b"\0" * 100,
    "deep": b'{"a": ' + b"[" * 100_000,
    "many digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "a tokenizer of numbers": b'{"tokenizer": 5}',
    "a tokenizer in a list": b'{"tokenizer": ["a"]}',
    "a bundle that is an object": b'{"frozen_from": {}}',
    "a bundle that is null": b'{"frozen_from": null}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("whose", ["its own", "the one before"])
def test_a_run_whose_config_json_is_none(refuses, small_config, tmp_path, text, whose):
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.json").write_bytes(text)
    own = tmp_path / ("before" if whose == "its own" else "run")
    config = small_config(num_steps=1, init_from="" if whose == "its own" else str(tmp_path / "before"))
    refuses(lambda: start(config, own), f"{tmp_path}/before/config.json is damaged (")
    assert (tmp_path / "before" / "config.json").read_bytes() == text
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"batch_size": {}, "model": 3, "streams": [], "seed": NaN}',
        b'{"model": ' + b'{"a": ' * 300 + b"1" + b"}" * 301,
        b'{"optimizer": {"freeze": ' + b"[" * 300 + b"]" * 300 + b"}}",
    ],
    ids=["other types", "deep objects", "deep lists"],
)
def test_another_configuration_before_is_told_line_by_line(small, tmp_path, text, caplog):
    (tmp_path / "config.json").write_bytes(text)
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        write_config(small, tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert told and all(line.startswith("configuration changed since the run began: ") for line in told)
    assert not any("\n" in line or len(line) > 700 for line in told)
