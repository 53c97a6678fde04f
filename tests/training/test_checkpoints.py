"""Checkpoints: saved whole or passed over, and nothing is lost when one cannot be read."""

import logging
import os
import random
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.integrity import checksums
from unialign_jax.training.checkpoints import Checkpoints, damage
from unialign_jax.training.runs import latest_step, load_params
from unialign_jax.training.state import TrainState


def make_state(step, width=4):
    """A state in the shape of a real one, told apart by its step."""
    keys = iter(jax.random.split(jax.random.key(step), 4))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    transformer = {"embed": {"kernel": draw(width, 300), "bias": draw(width)}}
    heads = {"image_out": {"kernel": draw(7, 3)}}
    params = {"transformer": transformer, "heads": heads}
    moments = jax.tree.map(lambda x: x * 0.5, params)
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda x: x + 1, transformer), ({"mu": moments},))


def abstract(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def restore(run, like=None):
    checkpoints = Checkpoints(run)
    state = checkpoints.restore_latest(abstract(make_state(0) if like is None else like))
    checkpoints.close()
    return state


def contents(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints at 3 and 6."""
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run)
    for step in (3, 6):
        checkpoints.save(make_state(step), step)
    checkpoints.close()
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that run, free to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def test_the_newest_comes_back_bit_for_bit(run):
    before = contents(run)
    state = restore(run)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(6))
    assert contents(run) == before


def test_an_empty_folder_has_none(tmp_path):
    assert restore(tmp_path) is None


def test_the_newest_ones_and_every_nth_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        checkpoints.save(make_state(step), step)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [4, 8, 9]


def remove(pattern):
    def damage(checkpoint):
        for path in list(checkpoint.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def change(pattern, make_bytes):
    def damage(checkpoint):
        paths = [path for path in checkpoint.glob(pattern) if path.is_file()]
        assert paths
        for path in paths:
            path.write_bytes(make_bytes(path.read_bytes()))

    return damage


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGES = {
    "no marker": remove("commit_success.txt"),
    "no metadata": remove("state/_METADATA"),
    "half the metadata": change("state/_METADATA", lambda b: b[: len(b) // 2]),
    "no manifest": remove("state/manifest.ocdbt"),
    "half the manifest": change("state/manifest.ocdbt", lambda b: b[: len(b) // 2]),
    "no data": remove("state/**/d"),
    "half the data": change("state/**/d/*", lambda b: b[: len(b) // 2]),
    "all but a byte of the data": change("state/**/d/*", lambda b: b[:-1]),
    "empty data": change("state/**/d/*", lambda b: b""),
    "zeroed data": change("state/**/d/*", lambda b: bytes(len(b))),
    "no state": remove("state"),
    "an empty folder": remove("*"),
    "a flipped bit in a value": lambda checkpoint: flip(values(checkpoint), 3000),
    "a flipped bit in the metadata": lambda checkpoint: flip(checkpoint / "state/_METADATA", 300),
    "a flipped bit in the shardings": lambda checkpoint: flip(checkpoint / "state/_sharding", 300),
    "no checksums and a flipped bit in the shardings": lambda checkpoint: (
        (checkpoint / checksums.RECORD).unlink(),
        flip(checkpoint / "state/_sharding", 300),
    ),
    "no checksums and half the data": lambda checkpoint: (
        (checkpoint / checksums.RECORD).unlink(),
        DAMAGES["half the data"](checkpoint),
    ),
}


def values(checkpoint):
    """The file that holds most of the arrays."""
    return max(checkpoint.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.bad_input
@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_and_kept(run, harm, caplog):
    newest = run / "checkpoints" / "6"
    harm(newest)
    damaged = contents(newest)
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        state = restore(run)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("unialign_jax")]
    assert told[0].startswith(f"{newest} cannot be read: ") and told[1].endswith("/6 is kept as damaged-6")
    assert not any("\n" in line for line in told)
    assert contents(run / "checkpoints" / "damaged-6") == damaged

    # Its step can be saved again, and is then the newest.
    checkpoints = Checkpoints(run)
    checkpoints.save(make_state(6), 6)
    checkpoints.close()
    assert int(restore(run).step) == 6
    assert contents(run / "checkpoints" / "damaged-6") == damaged


def test_every_flipped_bit_is_found_in_files_of_every_kind(run):
    checkpoint, draw = run / "checkpoints" / "6", random.Random(0)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt"}
    assert damage(checkpoint) is None
    for path in (*files, *(values(checkpoint) for _ in range(10))):
        bit = draw.randrange(path.stat().st_size * 8)
        flip(path, bit)
        reason = damage(checkpoint)
        name = path.relative_to(checkpoint).as_posix()
        assert reason and (name in reason or name == checksums.RECORD), name
        flip(path, bit)
    assert damage(checkpoint) is None


def test_without_checksums_damaged_metadata_are_no_other_architecture(run):
    checkpoint, draw = run / "checkpoints" / "6", random.Random(0)
    (checkpoint / checksums.RECORD).unlink()
    for name in ("state/_METADATA", "state/_sharding"):
        for _ in range(4):
            bit = draw.randrange((checkpoint / name).stat().st_size * 8)
            flip(checkpoint / name, bit)
            assert damage(checkpoint)
            flip(checkpoint / name, bit)
    assert damage(checkpoint) is None


def test_a_checkpoint_without_checksums_is_used_and_said(run, caplog):
    """Written by an earlier version, or the process was killed between the save and the record."""
    (run / "checkpoints" / "6" / checksums.RECORD).unlink()
    before = contents(run)
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        jax.tree.map(np.testing.assert_array_equal, restore(run), make_state(6))
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("unialign_jax")]
    assert told == f"{run}/checkpoints/6 has no checksums, so flipped bits in it would not be found"
    assert contents(run) == before


def test_checksums_are_there_when_the_next_save_or_the_end_comes(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(make_state(step), step)
    assert checksums.is_recorded(tmp_path / "checkpoints" / "1")
    checkpoints.close()
    assert checksums.difference(tmp_path / "checkpoints" / "2") is None


def test_checksums_that_cannot_be_taken_are_an_error(tmp_path, monkeypatch, refuses):
    def record(folder):
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr(checksums, "record", record)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), 1)
    refuses(checkpoints.close, "the checkpoint could not be written", "Input/output error")


@pytest.mark.slow
def test_saves_leave_no_descriptors_and_no_threads(tmp_path):
    checkpoints, state, found = Checkpoints(tmp_path), make_state(1), []
    for step in range(1, 31):
        checkpoints.save(state, step)
        found.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    checkpoints.close()
    for before, after in zip(found[5], found[-1], strict=True):
        assert after < before + 12, found  # a save under way has some; left behind, 24 saves would leave 72 and 24


def test_the_newest_that_is_not_damaged_is_exported(run, caplog):
    (run / "config.json").write_text("{}")
    assert latest_step(run, verify=True) == 6
    flip(values(run / "checkpoints" / "6"), 3000)
    assert latest_step(run, verify=True) == 3
    assert "checkpoints/6 cannot be read (state/" in caplog.text


def test_damaged_twice_both_are_kept(run):
    for expected in ("damaged-6", "damaged-6-2"):
        DAMAGES["half the data"](run / "checkpoints" / "6")
        assert int(restore(run).step) == 3
        assert (run / "checkpoints" / expected).is_dir()
        checkpoints = Checkpoints(run)
        checkpoints.save(make_state(6), 6)
        checkpoints.close()


def test_what_a_killed_save_leaves_is_passed_over(run, caplog):
    checkpoints = run / "checkpoints"
    (checkpoints / "6").rename(checkpoints / "6.orbax-checkpoint-tmp")
    shutil.copytree(checkpoints / "3", checkpoints / "9.orbax-checkpoint-tmp-17")
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        state = restore(run)
    assert int(state.step) == 3
    assert "ignoring unfinished checkpoints 6.orbax-checkpoint-tmp, 9.orbax-checkpoint-tmp-17" in caplog.text
    again = Checkpoints(run)
    again.save(make_state(6), 6)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, restore(run), make_state(6))


def test_when_all_are_damaged_nothing_is_touched(run):
    for step in ("3", "6"):
        DAMAGES["half the data"](run / "checkpoints" / step)
    before = contents(run)
    for _ in range(2):  # starting again does not turn it into a new run
        with pytest.raises(ValueError, match=r"none of the checkpoints \[6, 3\] can be read; nothing was changed"):
            restore(run)
        assert contents(run) == before


def test_another_architecture_is_refused_leaf_by_leaf(run):
    before = contents(run)
    other = make_state(0, width=5)
    del other.params["heads"]["image_out"]
    other.params["heads"]["text_out"] = jnp.zeros(3)
    with pytest.raises(ValueError) as error:
        restore(run, other)
    message = str(error.value)
    assert message.startswith(f"{run}/checkpoints/6 holds another architecture than this configuration: ")
    for part in (
        "ema/embed/bias: expected (5,), found (4,)",
        "params/heads/image_out/kernel: expected nothing, found (7, 3)",
        "params/heads/text_out: expected (3,), found nothing",
        "params/transformer/embed/kernel: expected (5, 300), found (4, 300)",
    ):
        assert part in message
    assert "Choose another --workdir" in message and "\n" not in message
    assert contents(run) == before


def test_many_differences_are_counted(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    many = TrainState(jnp.int32(1), {f"layer{i:02}": jnp.zeros(2) for i in range(30)}, {}, ())
    checkpoints.save(many, 1)
    checkpoints.close()
    with pytest.raises(ValueError, match="and 22 more leaves"):
        restore(tmp_path, many._replace(params={}))


def test_a_full_disk_is_one_line_and_the_checkpoint_before_survives(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), 1)
    checkpoints.close()
    checkpoints, large = Checkpoints(tmp_path), make_state(2, width=100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match="the checkpoint could not be written: .*File too large") as error:
            checkpoints.save(large, 2)
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and "tensorstore_spec" not in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), make_state(1))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="the run's folder .* cannot be made .*: choose another"):
        Checkpoints(os.path.join(tmp_path, place))
    assert (tmp_path / "file").read_text() == "precious"


def params_like(width=4):
    return abstract(make_state(0, width)).params


def test_another_runs_parameters(saved):
    raw = load_params(saved, params_like())
    jax.tree.map(np.testing.assert_array_equal, raw, make_state(6).params)
    averaged = load_params(saved, params_like(), "ema")
    jax.tree.map(np.testing.assert_array_equal, averaged["transformer"], make_state(6).ema)
    jax.tree.map(np.testing.assert_array_equal, averaged["heads"], make_state(6).params["heads"])


def test_another_runs_parameters_that_cannot_be_had(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="init_from: .*/nowhere is no run's folder"):
        load_params(tmp_path / "nowhere", params_like())
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="init_from: .* holds no whole checkpoint"):
        load_params(tmp_path / "new", params_like())
    with pytest.raises(
        ValueError, match=r"does not fit this configuration: .*embed/bias: expected \(5,\), found \(4,\)"
    ):
        load_params(run, params_like(width=5))
    DAMAGES["half the data"](run / "checkpoints" / "6")
    with pytest.raises(ValueError, match="/6 cannot be read: .*Remove it to start from the checkpoint before it"):
        load_params(run, params_like())
    shutil.rmtree(run / "checkpoints" / "6")
    flip(values(run / "checkpoints" / "3"), 3000)
    with pytest.raises(ValueError, match="/3 cannot be read: .* its checksum differs"):
        load_params(run, params_like())


def test_no_average_to_start_from(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1)._replace(ema={}), 1)
    checkpoints.close()
    with pytest.raises(ValueError, match="keeps no EMA; use init_weights=raw"):
        load_params(tmp_path, params_like(), "ema")
