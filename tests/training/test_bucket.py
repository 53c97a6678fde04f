"""A run in a bucket: an emulator of Google Cloud Storage, reached by Orbax and gcsfs as the real one is."""

import contextlib
import functools
import itertools
import json
import logging
import os
import socket
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.conversion.exporting import bundle_from_run
from unialign_jax.files import places
from unialign_jax.inference.opening import ModelSource
from unialign_jax.training import run_folder, runs
from unialign_jax.training.checkpoints import Checkpoints, damage
from unialign_jax.training.loop import train
from unialign_jax.training.metrics import Recorder
from unialign_jax.training.run_folder import RunFolder
from unialign_jax.training.run_lock import ObjectLock
from unialign_jax.training.state import TrainState

pytestmark = pytest.mark.slow
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def bucket():
    """The emulator's client, with an empty bucket of the name "bucket"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which the emulator does not speak
        gcsfs = pytest.importorskip("gcsfs", reason="needs gcsfs, of requirements-test.txt")
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
        server.start()
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://localhost:{port}")
        import fsspec

        for scheme in ("gs", "gcs"):
            patch.setitem(fsspec.config.conf, scheme, {"token": "anon", "use_listings_cache": False})
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield places.client(places.place("gs://bucket/run"))
        server.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def fresh(bucket):
    """A folder of the test's own in the bucket."""
    return f"gs://bucket/{next(NUMBERS)}"


def names(bucket, folder):
    root = folder.removeprefix("gs://")
    return sorted(name.removeprefix(root + "/") for name in bucket.find(root))


def make_state(step):
    params = {"transformer": {"kernel": jax.random.normal(jax.random.key(step), (4, 300))}, "heads": {}}
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda x: x + 1, params["transformer"]), ())


def restore(folder):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), make_state(0))
    checkpoints = Checkpoints(folder)
    state = checkpoints.restore_latest(abstract)
    checkpoints.close()
    return state


@pytest.fixture
def saved(fresh):
    """A folder with the checkpoints 3 and 6."""
    checkpoints = Checkpoints(fresh)
    for step in (3, 6):
        checkpoints.save(make_state(step), step)
    checkpoints.close()
    return fresh


def kill_while_saving(bucket, folder):
    bucket.rm_file(f"{folder}/commit_success.txt")
    bucket.rm_file(f"{folder}/checksums.json")


def cut(bucket, folder):
    largest = max(bucket.find(folder), key=bucket.size)
    bucket.pipe_file(largest, bucket.cat_file(largest)[:-1])


def lose_values(bucket, folder):
    bucket.rm_file(f"{folder}/checksums.json")
    for name in bucket.glob(f"{folder}/state/**/d/*"):
        bucket.rm_file(name)


def change(bucket, folder):
    largest = max(bucket.find(folder), key=bucket.size)
    data = bytearray(bucket.cat_file(largest))
    data[100] ^= 1
    bucket.pipe_file(largest, bytes(data))


HARMS = {
    "killed while it was saved": (kill_while_saving, "ignoring unfinished checkpoints 6", ["3", "6"]),
    "an object is missing": (
        lambda bucket, folder: bucket.rm_file(f"{folder}/state/_METADATA"),
        "_METADATA is missing",
        ["3", "damaged-6"],
    ),
    "no checksums and no values": (lose_values, "cannot be read", ["3", "damaged-6"]),
    "an object is cut": (cut, "bytes, expected", ["3", "damaged-6"]),
    "a flipped bit": (change, "its checksum differs", ["3", "damaged-6"]),
}


def test_checkpoints_come_back_and_the_oldest_goes(bucket, saved):
    checkpoints = Checkpoints(saved)
    checkpoints.save(make_state(7), 7)
    checkpoints.close()
    assert runs.saved_steps(places.place(saved) / "checkpoints") == [7, 6]
    assert damage(places.place(saved) / "checkpoints/6") is None
    bucket.rm_file(f"{saved}/checkpoints/6/checksums.json")  # without them its values are looked at
    assert damage(places.place(saved) / "checkpoints/6") is None
    jax.tree.map(np.testing.assert_array_equal, restore(saved), make_state(7))


@pytest.mark.parametrize(("harm", "words", "left"), HARMS.values(), ids=HARMS)
def test_the_newest_whole_checkpoint_comes_back(bucket, saved, caplog, harm, words, left):
    harm(bucket, f"{saved}/checkpoints/6")
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        state = restore(saved)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    assert words in caplog.text and ("cannot be read" in caplog.text) == (left[-1] == "damaged-6")
    assert sorted({name.split("/")[1] for name in names(bucket, saved)}) == left


def test_a_step_whose_save_was_killed_is_saved_again(bucket, saved):
    kill_while_saving(bucket, f"{saved}/checkpoints/6")
    checkpoints = Checkpoints(saved)
    checkpoints.save(make_state(6), 6)
    checkpoints.close()
    assert int(restore(saved).step) == 6


CLOCK = {"images_per_second", "seconds_per_step", "tflops_per_second_per_device", "data_wait_share", "host_peak_gb"}


def start(config, workdir):
    return train(config, workdir, progress=False, devices=jax.devices()[:1])


def rows(text):
    """The rows of a metrics.jsonl without what the clock says."""
    return [{k: v for k, v in json.loads(row).items() if k not in CLOCK} for row in text.splitlines()]


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_with_the_numbers_of_a_local_one(
    bucket, fresh, small_config, tmp_path, monkeypatch, caplog
):
    config = small_config(num_steps=5, checkpoint__every=2)
    start(config, tmp_path / "local")
    expected = rows((tmp_path / "local/metrics.jsonl").read_text())
    assert [row["step"] for row in expected] == [1, 2, 3, 4, 5]

    class Killed(BaseException):
        pass

    def die(recorder, *arguments, add=Recorder.add):
        if recorder.steps_seen == 3:  # after the checkpoint of step 2
            raise Killed
        recorder.steps_seen += 1
        add(recorder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "steps_seen", 0, raising=False)
        patch.setattr(Recorder, "add", die)
        patch.setattr(RunFolder, "_try_to_upload", lambda folder: None)  # nothing at the end, as after a SIGKILL
        with pytest.raises(Killed):
            start(config, fresh)
    left = names(bucket, fresh)
    assert {"config.json", "metrics.jsonl", "checkpoints/2/commit_success.txt"} <= set(left)
    assert rows(bucket.cat_file(f"{fresh}/metrics.jsonl").decode()) == expected[:2]

    config.samples.every = 100
    with caplog.at_level(logging.INFO, "unialign_jax"):
        state = start(config, fresh)
    assert f"resuming {fresh} at step 2" in caplog.text
    assert rows(bucket.cat_file(f"{fresh}/metrics.jsonl").decode()) == expected
    history = json.loads(bucket.cat_file(f"{fresh}/config_history.jsonl"))
    assert (history["step"], history["changes"][0]["key"]) == (2, "samples.every")
    left = names(bucket, fresh)
    assert sum("events.out.tfevents" in name for name in left) == 2  # one of each start
    assert "run.lock" not in left and not any(".partial" in name for name in left)

    source = ModelSource(fresh)
    assert (source.run.step, source.run.weights, source.run.name) == (5, "ema", fresh)
    kernel = dict(source.run.leaves("transformer"))["text_head/kernel"]
    np.testing.assert_array_equal(kernel, state.ema["text_head"]["kernel"])
    bundle_from_run(tmp_path / "bundle", fresh, weights="ema")
    assert dict(bundle.read_leaves(tmp_path / "bundle", "transformer"))["text_head/kernel"].shape == kernel.shape
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    jax.tree.map(np.testing.assert_array_equal, runs.load_params(fresh, abstract), state.params)


def test_one_run_at_a_time(bucket, fresh, caplog, refuses, monkeypatch):
    path, held = places.place(fresh) / "run.lock", functools.partial(ObjectLock.held, patience=0.2, interval=0.01)
    with held(path) as lock:
        stopped = threading.Event()
        beating = threading.Thread(target=lambda: [lock.beat() for _ in iter(lambda: stopped.wait(0.01), True)])
        beating.start()
        refuses(lambda: held(path).__enter__(), f"{fresh} is in use: process {os.getpid()} on host", "Wait for that")
        stopped.set()
        beating.join()
        assert json.loads(bucket.cat_file(str(path)))["token"] == lock._token
        # Silent for longer than the patience of another: its host may be gone.
        with held(path) as other:
            assert json.loads(bucket.cat_file(str(path)))["token"] == other._token
            refuses(lock.beat, f"{fresh} was taken by process {os.getpid()}", "saves nothing more")
    assert not bucket.exists(str(path))
    # What a killed process of this host left is taken at once.
    gone = subprocess.Popen(["true"])
    gone.wait()
    bucket.pipe_file(str(path), json.dumps({"host": socket.gethostname(), "pid": gone.pid, "token": "x"}).encode())
    with ObjectLock.held(path):
        pass
    assert not bucket.exists(str(path))


def test_files_are_uploaded_whole_and_only_when_they_change(bucket, fresh, monkeypatch, caplog):
    monkeypatch.setattr(run_folder, "BEAT", 0.02)
    before = ["checkpoints/3/state/x", "events.out.tfevents.1.host", "metrics.jsonl", "samples/0.md", "samples/0.png"]
    for name in before:
        bucket.pipe_file(f"{fresh}/{name}", b"x")
    with contextlib.ExitStack() as stack:
        folder = RunFolder(fresh, stack)
        stack.enter_context(folder.taken())
        assert sorted(path.name for path in folder.local.rglob("*")) == ["0.md", "metrics.jsonl", "samples"]
        (folder.local / "a.txt").write_text("one")
        wait_for(lambda: bucket.exists(f"{fresh}/a.txt"))  # by itself
        written = bucket.info(f"{fresh}/a.txt")["mtime"]
        (folder.local / "b.txt").write_text("two")
        (folder.local / ".b.txt.1.partial").write_text("half")
        folder.upload()
        assert names(bucket, fresh) == sorted([*before, "a.txt", "b.txt", "run.lock"])
        assert bucket.info(f"{fresh}/a.txt")["mtime"] == written

        def fails(*_, **__):
            raise OSError("no network")

        with monkeypatch.context() as patch:
            patch.setattr(bucket, "pipe_file", fails)
            (folder.local / "b.txt").write_text("three")
            with pytest.raises(OSError, match=f"{fresh} cannot be reached .no network"):
                folder.upload()
            wait_for(lambda: "no network" in caplog.text)  # and the run continues
    assert bucket.cat_file(f"{fresh}/b.txt") == b"three"
    assert not folder.local.exists()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.bad_input
def test_what_is_no_run_in_the_bucket_is_told(bucket, fresh, refuses, small_config):
    refuses(lambda: ModelSource(fresh), f"{fresh} is no run's folder", "file system")
    refuses(lambda: runs.latest_step(fresh), fresh, "is no run's folder")
    refuses(lambda: start(small_config(init_from=fresh), "gs://bucket/new"), fresh, "no run's folder")
    refuses(lambda: start(small_config(), "gs://nobody/run"), "gs://nobody/run", "cannot be reached")
    refuses(lambda: ModelSource("s3://bucket/run"), "s3://bucket/run", "expected a path or gs://BUCKET/FOLDER")
    bucket.pipe_file(f"{fresh}/config.json", b"{")
    refuses(lambda: start(small_config(), fresh), f"{fresh}/config.json is damaged")
