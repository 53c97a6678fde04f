"""launch/train.py and runs on bad input: one clear line, a non-zero exit, nothing lost."""

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.data.records import METADATA_FILE, open_records, write_records
from unialign_jax.parallel import processes
from unialign_jax.training.checkpoints import Checkpoints
from unialign_jax.training.config import read_config
from unialign_jax.training.loop import Trainer, train
from unialign_jax.training.metrics import read_metrics
from unialign_jax.training.run_lock import only_run_in
from unialign_jax.training.samples import Sampler

ROOT = Path(__file__).resolve().parents[2]
STAGE = f"{ROOT}/configs/stage1.py:tiny"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def numbers(rows):
    """Metric rows without what the clock and the machine say."""
    clock = ("per_second", "seconds_per_step", "wait_share", "peak_gb")
    return [{key: value for key, value in row.items() if not any(part in key for part in clock)} for row in rows]


def run(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def config(small_config):
    """A function changes -> the configuration of a run of six text-only steps, checkpoints at 3 and 6."""

    def make(**changes):
        config = small_config("stage3", **changes)
        for name, stream in config.streams.items():
            stream.weight = 1.0 if name == "vqa" else 0.0
        return config

    return make


@pytest.fixture(scope="module")
def finished_run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    run(config(), workdir)
    return workdir


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of that run, free to be damaged."""
    return shutil.copytree(finished_run, tmp_path / "finished")


# The command line


@pytest.fixture
def main(monkeypatch):
    """launch/train.py's main in this process: good for all that ends before a device is asked for."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "unialign_jax")]
    levels = [logger.level for logger in loggers]
    spec = importlib.util.spec_from_file_location("train_command", ROOT / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.main
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: the following arguments are required: --config, --workdir; --help explains"),
        ([f"--config={STAGE}"], "error: the following arguments are required: --workdir; --help explains"),
        (["--workdir={tmp}/run"], "error: the following arguments are required: --config; --help explains"),
        ([f"--config={STAGE}", "--workdir={tmp}/run", "--workers=3"], "error: unrecognized arguments: --workers=3"),
        (["--config=configs/stage9.py", "--workdir={tmp}/run"], "error: there is no stage file configs/stage9.py"),
        ([f"--config={STAGE[:-5]}:big", "--workdir={tmp}/run"], "unknown size 'big'"),
        (
            [f"--config={STAGE}", "--workdir={tmp}/run", "--config.batch_size=abc"],
            "batch_size is 'abc', expected a whole",
        ),
        ([f"--config={STAGE}", "--config.batchsize", "4", "--workdir", "{tmp}/run"], "(nearest: batch_size)"),
        (["--config.seed", "--config", STAGE, "--workdir={tmp}/run"], "seed has no value: write seed=VALUE"),
    ],
)
def test_a_bad_command_line(main, capsys, tmp_path, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    said = capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")
    assert stop.value.code not in (0, None)
    assert said.startswith("error: ") and expected in said
    assert "Traceback" not in said and len(said.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_help_teaches(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for part in ("--config=configs/stage1.py:tiny", "--config.KEY=VALUE", "--workdir", "SIGTERM"):
        assert part in said


@pytest.fixture
def fails(monkeypatch):
    """A function error -> a run that fails with it, in one process and, with `last_words`, in one of several."""

    class LastWords:
        def take_back(self):
            pass

    def fail(error, several=False):
        def train(*_, **__):
            raise error

        def end(status):
            raise SystemExit(status)

        monkeypatch.setattr("unialign_jax.training.loop.train", train)
        monkeypatch.setattr(processes, "start", lambda *_, **__: LastWords() if several else None)
        monkeypatch.setattr(processes, "prepare_memory", lambda environ: None)
        monkeypatch.setattr(os, "_exit", end)

    return fail


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nBufferAssignment:")


@pytest.mark.parametrize("several", [False, True])
def test_out_of_memory_is_one_line_that_says_what_to_change(main, capsys, fails, several):
    fails(FULL, several)
    with pytest.raises(SystemExit) as stop:
        main([f"--config={STAGE}", "--workdir=run"])
    said = capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")
    assert isinstance(stop.value.code, str) or stop.value.code == 1
    assert said.strip() == (
        "error: the memory does not suffice (RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.). Raise "
        "--config.accumulation, so that fewer samples are held at once, or set --config.model.remat=block; for TPUs, "
        f"what fits is found by `python launch/plan.py --config={STAGE} --search`"
    )


def test_other_errors_of_the_runtime_keep_their_traceback_in_one_process(main, fails):
    fails(jax.errors.JaxRuntimeError("INTERNAL: a kernel failed"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        main([f"--config={STAGE}", "--workdir=run"])


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), 75, "most likely because another was lost (UNAVAIL"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: expected 3 buffers"), 1, "error: INVALID_ARGUMENT: expected 3"),
        (FloatingPointError("loss is nan"), 1, "error: loss is nan"),
    ],
)
def test_how_one_of_several_processes_ends(main, capsys, fails, error, status, expected):
    fails(error, several=True)
    with pytest.raises(SystemExit) as stop:
        main([f"--config={STAGE}", "--workdir=run"])
    said = capsys.readouterr().err
    assert stop.value.code == status and expected in said.splitlines()[-1]
    assert ("Traceback" in said) == ("INVALID_ARGUMENT" in said)


def command(*arguments, **options):
    process = [sys.executable, ROOT / "launch" / "train.py", "--noprogress", *arguments]
    done = subprocess.run(process, capture_output=True, text=True, timeout=300, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def test_unknown_keys_as_a_process(tmp_path):
    code, out, err = command(f"--config={STAGE}", f"--workdir={tmp_path}/run", "--config.batchsize=1", "--config.sed=2")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "error: the configuration cannot run:",
        "  unknown key batchsize (nearest: batch_size)",
        "  unknown key sed (nearest: seed)",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_missing_data_and_a_mesh_that_does_not_fit_as_processes(tmp_path):
    code, out, err = command(f"--config={STAGE}", f"--workdir={tmp_path}/run", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "error: the data cannot be used: stream text_to_image: data folder data/shapes/text_to_image does not exist: "
        "write it first, see `python launch/prepare_data.py --help`",
    ]
    mesh = ("--config.mesh.tensor=3", "--config.batch_size=7", "--config.accumulation=2")
    code, out, err = command(f"--config={STAGE}", f"--workdir={tmp_path}/run", *mesh)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "error: the configuration cannot run:",
        "  mesh tensor=3 does not fit 1 devices: sizes multiply to that, and one may be -1, the rest",
        "  batch_size 7 is not divisible by 2 (accumulation 2): the nearest that fits is 8",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_architecture_as_a_process(finished, shapes_dir):
    """The tiny stage does not fit the smaller run: the folder is left as it is, and only our own lines are shown."""
    before = contents(finished)
    changes = [f"streams.text_to_image.path={shapes_dir}/text_to_image", "data.max_epochs_warning=0"]
    changes += ["heads.teacher_width=16"]
    given = [f"--config.{change}" for change in changes]
    code, out, err = command(f"--config={STAGE}", f"--workdir={finished}", *given)
    assert (code, out) == (1, "")
    mesh, line = err.splitlines()
    assert "mesh fsdp=" in mesh or "mesh of one device" in mesh
    assert line.startswith(f"error: {finished}/checkpoints/6 holds another architecture than this configuration: ")
    assert "expected (" in line and "more leaves. Choose another --workdir" in line
    assert contents(finished) == before


# Data


def bad_data_folders(shapes_dir, folder):
    """name -> a data folder that cannot be used, and what must be said of it."""
    (folder / "empty").mkdir(parents=True)
    version = shutil.copytree(shapes_dir / "perception", folder / "version")
    text = (version / METADATA_FILE).read_text()
    (version / METADATA_FILE).write_text(text.replace('"version": 1', '"version": 99'))
    short = shutil.copytree(shapes_dir / "vqa", folder / "short")
    shard = next(short.glob("*.array_record*"))
    os.truncate(shard, shard.stat().st_size // 2)
    return {
        "text_to_image": (folder / "nowhere", "does not exist: write it first"),
        "edit": (folder / "empty", "is empty: write it first"),
        "perception": (version, "holds records of version 99, this code reads version 1"),
        "personalization": (shapes_dir / "edit", "holds edit records, the stream's kind is personalization"),
        "vqa": (short, "copy or write the folder again"),
    }


def test_everything_wrong_with_the_data_is_said_at_once(small_config, shapes_dir, tmp_path):
    config = small_config("stage3")
    folders = bad_data_folders(shapes_dir, tmp_path / "data")
    for name, (path, _) in folders.items():
        config.streams[name].path = str(path)
    with pytest.raises(ValueError) as error:
        run(config, tmp_path / "run")
    first, *lines = str(error.value).splitlines()
    assert first == "the data cannot be used:" and len(lines) == 5
    for name, (path, expected) in folders.items():
        (line,) = (line for line in lines if line.startswith(f"  stream {name}: "))
        assert expected in line and str(path) in line
    assert not (tmp_path / "run").exists()


def test_streams_without_data_or_with_another_teacher(small_config, tmp_path):
    config = small_config("stage2", streams__edit__path="", streams__perception__path="")
    with pytest.raises(ValueError) as error:
        run(config, tmp_path / "run")
    assert str(error.value).splitlines()[1:] == [
        "  streams.edit has no data: set streams.edit.path, or its weight to 0",
        "  streams.perception has no data: set streams.perception.path, or its weight to 0",
    ]
    with pytest.raises(ValueError, match="has features of width 16, the alignment heads expect 24; train without .*=0"):
        run(small_config(heads__teacher_width=24), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def damaged_copy(source, folder, damaged):
    """The same records with the images of those at `damaged` cut short."""
    records = open_records(source)

    def copies():
        for index in range(len(records)):
            record = records[index]
            if index in damaged:
                record = type(record)(**(vars(record) | {"image": record.image[: len(record.image) // 2]}))
            yield record

    write_records(folder, copies(), kind=records.metadata.kind)
    return [records[index].key for index in damaged]


@pytest.mark.slow
def test_undecodable_records_are_replaced_counted_and_logged(config, shapes_dir, tmp_path, caplog):
    damaged = (3, 17, 18)
    keys = damaged_copy(shapes_dir / "vqa", tmp_path / "data", damaged)
    # Five batches of eight read each of the 40 records once; rows are kept for their sake whatever log_every says.
    settings = config(streams__vqa__path=str(tmp_path / "data"), num_steps=5, log_every=100, data__max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        run(settings, tmp_path / "one")
    rows = read_metrics(tmp_path / "one")
    assert sum(row["replaced_records"] for row in rows) == 3
    for key in keys:
        assert caplog.text.count(f"key {key!r}") == 1
    run(settings, tmp_path / "two")
    assert numbers(read_metrics(tmp_path / "two")) == numbers(rows)

    settings.data.max_bad_fraction = 0.002  # two of the first thousand
    with pytest.raises(ValueError, match="3 of .* records could not be decoded, more than data.max_bad_fraction 0.002"):
        run(settings, tmp_path / "strict")
    assert not list((tmp_path / "strict" / "checkpoints").glob("5"))


@pytest.mark.slow
def test_a_folder_of_nothing_but_damaged_records(config, shapes_dir, tmp_path):
    damaged_copy(shapes_dir / "vqa", tmp_path / "data", range(40))
    with pytest.raises(ValueError, match="stream vqa: record .* cannot be decoded: write the folder again") as error:
        run(config(streams__vqa__path=str(tmp_path / "data")), tmp_path / "run")
    assert "\n" not in str(error.value)


# Folders of runs


@pytest.mark.slow
def test_a_half_written_checkpoint_and_the_run_goes_on_as_it_would_have(config, finished_run, finished, caplog):
    for path in (finished / "checkpoints" / "6").glob("state/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.INFO, "unialign_jax"):
        state = run(config(), finished)
    assert "checkpoints/6 cannot be read: " in caplog.text and f"resuming {finished} at step 3" in caplog.text
    assert numbers(read_metrics(finished)) == numbers(read_metrics(finished_run))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["3", "6", "damaged-6"]
    whole = run(config(), finished_run)
    jax.tree.map(np.testing.assert_array_equal, state, whole)


@pytest.mark.slow
def test_when_all_checkpoints_are_damaged_the_folder_stays_as_it_is(config, finished):
    for path in (finished / "checkpoints").glob("*/state/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    before = contents(finished)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the checkpoints \[6, 3\] can be read; nothing was changed"):
            run(config(seed=1), finished)
        assert contents(finished) == before


@pytest.mark.slow
def test_a_changed_configuration_is_said(config, finished, caplog):
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        run(config(seed=7, optimizer__learning_rate=0.5, samples__count=0), finished)
    said = [record.getMessage() for record in caplog.records if "configuration changed" in record.getMessage()]
    assert said == [
        "configuration changed since the run began: optimizer.learning_rate from 0.002 to 0.5",
        "configuration changed since the run began: seed from 0 to 7",
    ]
    assert not list(finished.glob("*.tmp"))


@pytest.mark.slow
def test_a_torn_config_json_is_not_written_over(config, finished):
    """It names the encoders and the tokenizer that the run was made with."""
    (finished / "config.json").write_bytes((finished / "config.json").read_bytes()[:100])
    before = contents(finished)
    with pytest.raises(ValueError, match="config.json is damaged .*; bring it back, or remove it and name frozen_from"):
        run(config(), finished)
    assert contents(finished) == before


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(config, finished, refuses):
    with only_run_in(finished):
        before = contents(finished)
        other = config(seed=1, num_steps=9)
        refuses(lambda: run(other, finished), f"{finished} is in use: process {os.getpid()} on host")
        assert contents(finished) == before
    assert int(run(config(), finished).step) == 6


@pytest.mark.slow
def test_a_broken_row_of_metrics_does_not_stop_a_resume(config, finished, caplog):
    path = finished / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:1], b"\xff\xfe\n", *rows[2:]]))
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        run(config(num_steps=7), finished)
    assert [row["step"] for row in read_metrics(finished)] == [1, 3, 4, 5, 6, 7]
    assert (finished / "metrics.jsonl.broken").read_bytes() == b"\xff\xfe\n"
    assert f"{path}: 1 rows cannot be read (lines 2)" in caplog.text


def test_a_workdir_that_is_a_file(config, tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(OSError, match="the run's folder .* cannot be made"):
        run(config(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.slow
def test_a_nan_parameter_stops_the_run_and_is_not_saved(config, tmp_path, monkeypatch):
    initial = Trainer.init_state

    def poisoned(self):
        state = initial(self)
        kernel = state.params["heads"]["text_out"]["kernel"]
        state.params["heads"]["text_out"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
        return state

    monkeypatch.setattr(Trainer, "init_state", poisoned)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1 in stream vqa; losses: .*intrinsic_modal nan"):
        run(config(checkpoint__every=1), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert read_metrics(tmp_path) == [] and (tmp_path / "config.json").is_file()


@pytest.mark.slow
def test_a_nan_on_the_way_leaves_the_checkpoint_before_it(config, finished_run, tmp_path, monkeypatch):
    put, count = Trainer.put_batch, [0]

    def poisoned(self, batch):
        count[0] += 1
        if count[0] == 5:
            batch = batch | {"teacher_text": np.full_like(batch["teacher_text"], np.nan)}
        return put(self, batch)

    monkeypatch.setattr(Trainer, "put_batch", poisoned)
    with pytest.raises(FloatingPointError, match="loss is nan at step 5 in stream vqa"):
        run(config(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert numbers(read_metrics(tmp_path)) == numbers(read_metrics(finished_run))[:4]
    monkeypatch.undo()  # and with the cause gone the same folder goes on
    run(config(), tmp_path)
    assert numbers(read_metrics(tmp_path)) == numbers(read_metrics(finished_run))


@pytest.mark.slow
def test_a_signal_while_the_last_save_is_written_waits_for_it(config, tmp_path, monkeypatch):
    """On a pod a preemption reaches the hosts seconds apart: one's own signal may come when all have stopped."""
    taken, closed = [], []
    close, put = Checkpoints.close, Trainer.put_batch

    def stop_early(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(Trainer, "put_batch", put)
        return put(self, batch)

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        close(self)
        closed.append(True)

    def outside(number, _):
        taken.append(signal.Signals(number))

    monkeypatch.setattr(Trainer, "put_batch", stop_early)
    monkeypatch.setattr(Checkpoints, "close", interrupted)
    before = {number: signal.signal(number, outside) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            run(config(), tmp_path)
        assert {number: signal.getsignal(number) for number in before} == dict.fromkeys(before, outside)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not taken and closed
    assert stop.value.code == 128 + signal.SIGTERM  # what it stopped for
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.slow
def test_every_stage_has_the_whole_time_before_a_run_counts_as_stuck(config, tmp_path, monkeypatch):
    told, alive = [], "alive"

    @contextlib.contextmanager
    def timer(seconds):
        told.append(f"begin {seconds}")
        yield lambda: told.append(alive)
        told.append("end")

    def watch(where, name):
        original = getattr(where, name)

        def watched(*arguments, **options):
            told.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(where, name, watched)

    monkeypatch.setattr(processes, "ending_when_stuck", timer)
    stages = {
        Checkpoints: ("restore_latest", "save", "close"),
        Trainer: ("__init__", "init_state", "init_frozen", "compile_step", "put_batch"),
        Sampler: ("is_written",),
    }
    for where, names in stages.items():
        for name in names:
            watch(where, name)
    monkeypatch.setattr(Sampler, "write", lambda self, *_: told.append("write") or [])
    changes = {"num_steps": 2, "checkpoint__every": 1, "samples__every": 1, "samples__count": 1}
    train(config(**changes), tmp_path, progress=False, devices=jax.devices()[:1], stuck_timeout=7)
    prepared = ["__init__", alive, "restore_latest", alive, "init_state", alive, "init_frozen", alive, "compile_step"]
    steps = [alive, "put_batch", alive, "save", alive, "write", alive, "put_batch", alive, "save", alive]
    ended = [alive, "save", alive, "is_written", "write", alive, "close", "end"]
    assert told == ["begin 7", alive, *prepared, *steps, *ended]


@pytest.mark.slow
def test_pictures_that_one_process_does_not_see_are_written_by_all(config, finished, monkeypatch):
    written = []
    monkeypatch.setattr(processes, "anywhere", lambda condition: True)  # as when another process has found it so
    monkeypatch.setattr(Sampler, "is_written", lambda self, step: True)
    monkeypatch.setattr(Sampler, "write", lambda self, step, *_: written.append(step) or [])
    monkeypatch.setattr(Checkpoints, "restore_latest", restored_alone(Checkpoints.restore_latest, monkeypatch))
    run(config(samples__count=1), finished)
    assert written == [6]


def restored_alone(restore, monkeypatch):
    """Restoring, which asks the other processes too, as one process does it."""

    def alone(self, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(processes, "anywhere", lambda condition: condition)
            return restore(self, *arguments)

    return alone


def test_stages_read_from_the_command_line_as_from_python():
    config = read_config(STAGE, ["samples.count=0"])
    assert config.samples.count == 0 and config.name == "stage1"
