"""Real processes over loopback, with gloo between their CPU devices."""

import contextlib
import errno
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unialign_jax.parallel import processes
from unialign_jax.training.checkpoints import Checkpoints
from unialign_jax.training.loop import train
from unialign_jax.training.metrics import read_metrics
from unialign_jax.training.run_lock import only_run_in
from unialign_jax.training.state import TrainState

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
AGAIN = "The same command resumes from the last checkpoint, on this or another number of processes"
PATIENCE = 300  # seconds that a machine busy with other things may take


@contextlib.contextmanager
def running(count, command, logs: Path):
    """`count` processes of command(coordinator, process_id); none of them outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    # Four compilations on two cores take as long as the optimisation they do; results differ by rounding.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "XLA_", "JAX_"))}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": quick}
    started = []
    try:
        for index in range(count):
            with open(f"{logs}.{index}.log", "w") as log:
                arguments = [sys.executable, *command(coordinator, index)]
                started.append(subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environ))
        yield started
    finally:
        for process in started:
            process.kill()  # stopped ones too
            process.wait()


def wait_until(condition, started, logs):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended = [process.returncode for process in started if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, "\n".join(said(logs, i) for i in range(len(started)))
        time.sleep(0.02)


def said(logs, index) -> str:
    return Path(f"{logs}.{index}.log").read_text()


def rows(workdir):
    with contextlib.suppress(FileNotFoundError, ValueError):  # not there, or its last line is being written
        return read_metrics(workdir)
    return []


def test_many_processes_are_one_run_through_a_loss_and_a_stop(small_config, changes_of, shapes_dir, tmp_path):
    """Four processes, one killed; two go on, one gets SIGTERM; one goes on: the numbers of one that did it all."""
    config = small_config(checkpoint__every=4, num_steps=1000)
    workdir = tmp_path / "run"
    overrides = [*changes_of(config), "data.num_threads=1"]
    overrides.append(f"streams.text_to_image.path={shapes_dir}/text_to_image")

    def command(count, *mesh):
        def arguments(coordinator, index):
            yield from (ROOT / "launch" / "train.py", f"--config={ROOT}/configs/stage1.py:tiny", "--noprogress")
            yield from (f"--workdir={workdir}", *(f"--config.{override}" for override in (*overrides, *mesh)))
            yield from (f"--coordinator={coordinator}", f"--num-processes={count}", f"--process-id={index}")
            yield "--heartbeat-timeout=60"

        return arguments

    # Data parallel and tensor parallel: two and two processes read the same rows.
    four = tmp_path / "four"
    with running(4, command(4, "mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2"), four) as started:
        saved = workdir / "checkpoints" / "4"
        wait_until(lambda: len(rows(workdir)) >= 6 and saved.is_dir(), started, four)
        started[2].kill()
        for index in (0, 1, 3):
            assert started[index].wait(PATIENCE) in (75, -signal.SIGABRT)  # ours, or JAX's own
            wait_until(lambda index=index: AGAIN in said(four, index), [], four)
            last = said(four, index).splitlines()[-1]
            assert last.startswith("error: this process ") and "another was lost" in last
    of_four = rows(workdir)

    two = tmp_path / "two"
    # The state split, and gradients in rings between the processes; both take part in the samples, one writes them.
    samples = ("samples.every=2", "samples.count=3", "samples.steps=1", "samples.caption_steps=1")
    with running(2, command(2, "mesh.data=2", *samples), two) as started:
        wait_until(lambda: "resuming" in said(two, 0), started, two)
        wait_until(lambda: 3 <= len(rows(workdir)) != len(of_four), started, two)
        began = len(rows(workdir))
        wait_until(lambda: len(rows(workdir)) > began + 2, started, two)
        started[1].send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE) for process in started] == [128 + signal.SIGTERM] * 2, said(two, 0)
    stopped = rows(workdir)[-1]["step"]
    assert all(f"stopped by SIGTERM at step {stopped}, saved" in said(two, index) for index in range(2))
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    written = {path.suffix for path in (workdir / "samples").iterdir()}
    assert written == {".png", ".md"}

    config.num_steps = stopped + 2
    train(config, workdir, progress=False, devices=jax.devices()[:1])
    train(config, tmp_path / "whole", progress=False, devices=jax.devices()[:1])
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in rows(workdir)] == list(range(1, stopped + 3))
    for found in (of_four, rows(workdir)):
        for row, expected in zip(found, whole, strict=False):
            for name in ("loss", "flow_matching", "masked_text", "cross_modal", "intrinsic_modal", "gradient_norm"):
                message = f"step {row['step']} {name}"
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=message)


SILENT = """
import os, sys, time
from unialign_jax.parallel import processes

assert processes.start(os.environ, sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout=5)
vote = processes.DelayedMax()
while True:
    vote(0)
    print("step", flush=True)
    time.sleep(0.05)
"""


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_falls_silent_ends_the_others(silent, tmp_path):
    """Stopped, not killed: its connections stay open, only its heartbeats are missing. Process 0 counts them."""
    logs = tmp_path / "log"

    def command(coordinator, index):
        return "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SILENT}", coordinator, str(index)

    with running(2, command, logs) as started:
        wait_until(lambda: all(said(logs, index).count("step") > 2 for index in range(2)), started, logs)
        started[silent].send_signal(signal.SIGSTOP)
        other = 1 - silent
        assert started[other].wait(PATIENCE) != 0
        wait_until(lambda: "error: this process ended before the run did" in said(logs, other), [], logs)
        assert "JAX distributed service detected fatal errors" in said(logs, other)


SEEN = """
import logging, os, sys
import jax
import jax.numpy as jnp
import numpy as np
from unialign_jax.parallel import processes
from pathlib import Path
from unialign_jax.training.checkpoints import Checkpoints, agreed
from unialign_jax.training.run_lock import only_run_in
from unialign_jax.training.state import TrainState

index, folders = int(sys.argv[2]), sys.argv[3:]
logging.basicConfig(level=logging.WARNING, format="%(message)s")
last_words = processes.start(os.environ, sys.argv[1], 2, index)
everywhere = jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("device",)), jax.P())
like = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), {}, {}, ())


def refused(call):
    try:
        call()
    except (OSError, ValueError) as error:
        print("refused:", error, flush=True)
    else:
        print("taken", flush=True)


assert processes.from_first([7, 8, 9] if index == 0 else [5]) == [7, 8, 9]
assert processes.from_first([] if index == 0 else [5]) == []
assert agreed("folder", "torn" if index else None) == ("torn" if index else "another process cannot read it")
short = Checkpoints(folders[index])  # process 1 does not see what process 0 does
refused(lambda: short.restore_latest(like))
more = Checkpoints(folders[1 - index])  # process 1 sees what process 0 does not
state = more.restore_latest(like)
print("restored", int(state.step), flush=True)
refused(lambda: more.save(state, 2))
renamed = Checkpoints(folders[2])
refused(lambda: renamed.restore_latest(like))
refused(lambda: only_run_in(Path(folders[2])).__enter__())  # the test is in it
last_words.take_back()
"""


def test_processes_that_see_different_checkpoints_refuse_them_together(tmp_path):
    """As with a listing that one host has kept. Each would take what it sees: states of two steps in one run."""
    for name, steps in (("both", (1, 2)), ("old", (1,)), ("renamed", (3,))):
        checkpoints = Checkpoints(tmp_path / name)
        for step in steps:
            checkpoints.save(TrainState(jnp.int32(step), {}, {}, ()), step)
        checkpoints.close()
    (tmp_path / "renamed" / "checkpoints" / "3").rename(tmp_path / "renamed" / "checkpoints" / "4")
    logs = tmp_path / "log"

    def command(coordinator, index):
        folders = [str(tmp_path / name) for name in ("both", "old", "renamed")]
        return "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SEEN}", coordinator, str(index), *folders

    with only_run_in(tmp_path / "renamed"), running(2, command, logs) as started:
        assert [process.wait(PATIENCE) for process in started] == [0, 0], said(logs, 0) + said(logs, 1)
    for index, (own, other) in enumerate((([1, 2], [1]), ([1], [1, 2]))):
        first, restored, second, third, fourth = (
            line for line in said(logs, index).splitlines() if line.startswith(("refused", "restored", "taken"))
        )
        assert f"process 0 sees the checkpoints [1, 2], another not all of them (this one: {own})" in first
        assert "--workdir must be on a file system that all hosts see alike" in first
        assert restored == "restored 1"
        assert f"process 0 sees no checkpoint 2, another does (this one: {other})" in second
        assert "/4 holds the state of another step (in this process 3)" in third
        assert f"renamed is in use: process {os.getpid()} on host {socket.gethostname()}, since " in fourth
    assert "folder: process 1 cannot read it (torn); agreeing with the others may take 5 minutes" in said(logs, 1)


LOST_IN_A_SAVE = """
import importlib.util, os, signal, sys
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from unialign_jax.training import loop
from unialign_jax.training.checkpoints import Checkpoints
from unialign_jax.training.state import TrainState

root, coordinator, index, workdir = sys.argv[1:]
spec = importlib.util.spec_from_file_location("command", root + "/launch/train.py")
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)


def train(*_, **__):
    "Two saves of 64 MB, of which one process does not live to see the second written."
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
    place = jax.NamedSharding(mesh, jax.P("device"))
    values = np.random.default_rng(0).normal(size=2**24).astype(np.float32)
    state = TrainState(jax.make_array_from_callback(values.shape, place, lambda i: values[i]), {}, {}, ())
    with ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=5)):  # not ten minutes
        checkpoints = Checkpoints(workdir)
    checkpoints.save(state, 1)
    checkpoints.save(state, 2)
    if index == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(state, 3)


loop.train = train
command.main([
    f"--config={root}/configs/stage1.py:tiny", f"--workdir={workdir}", f"--coordinator={coordinator}",
    "--num-processes=2", f"--process-id={index}",
])
"""


def test_a_process_lost_in_a_save_is_told_as_in_every_other_case(tmp_path):
    """The one that is left waits in vain for the other's part, before it hears of its end."""
    logs = tmp_path / "log"

    def command(coordinator, index):
        script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOST_IN_A_SAVE}"
        return "-c", script, str(ROOT), coordinator, str(index), str(tmp_path / "run")

    with running(2, command, logs) as started:
        assert [process.wait(PATIENCE) for process in started] == [75, -signal.SIGKILL], said(logs, 0)
    last = said(logs, 0).splitlines()[-1]
    assert (
        last.startswith("error: this process cannot continue, most likely because another was lost (") and AGAIN in last
    )
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("[0-9]")) == ["1"]


def test_a_coordinator_that_does_not_answer(tmp_path):
    logs = tmp_path / "log"

    def command(coordinator, index):
        start = f"processes.start({{}}, {coordinator!r}, 2, 1, initialization_timeout=1)"
        return (
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom unialign_jax.parallel import processes\n{start}",
        )

    with running(1, command, logs) as (process,):
        assert process.wait(PATIENCE) != 0
        wait_until(lambda: "another was lost or could not be reached" in said(logs, 0), [], logs)


def test_nobody_waits_where_there_is_one_process():
    assert not processes.start({})
    assert not processes.start({}, "localhost:1", 1, 0)
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}  # a shell within an allocation
    assert not processes.start(job)
    assert not processes.in_slurm_step(job | {"SLURM_STEP_NODELIST": "a", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"})
    assert processes.in_slurm_step(job | {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_LOCALID": "0"})
    assert processes.anywhere(True) and not processes.anywhere(False)


def test_a_lost_process_is_told_from_other_errors():
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    saving = OSError("the checkpoint could not be written")
    assert not processes.lost_another(saving)
    saving.__cause__ = lost
    assert processes.lost_another(lost) and processes.lost_another(saving)
    assert processes.lost_another(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"))
    assert not processes.lost_another(ValueError("stream vqa: record 3 cannot be decoded"))
    assert not processes.lost_another(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected 3 buffers"))


def wrapped_by_a_save(error, workdir):
    checkpoints = Checkpoints(workdir)
    with pytest.raises(OSError, match="the checkpoint could not be written") as wrapped, checkpoints._writing():
        raise error
    return wrapped.value


def test_waiting_in_vain_in_a_save_is_a_lost_process_and_a_full_disk_is_not(tmp_path):
    """What Orbax raises when another process does not come to its barriers; the same class tells of a disk's errno."""
    in_vain = TimeoutError("Timeout waiting at barrier '[op=2.state] save_and_finalize'. The original error was: ...")
    chained = TimeoutError("ChainedFuture completed 2/3 futures but timed out after 3.28 seconds.")
    chained.__cause__ = in_vain
    for error in (in_vain, chained, TimeoutError("Timed out after 600 seconds."), TimeoutError()):
        assert processes.lost_another(error) and processes.lost_another(wrapped_by_a_save(error, tmp_path))
    for number in (errno.ETIMEDOUT, errno.ENOSPC, errno.EIO):
        disk = OSError(number, os.strerror(number), "checkpoints/3")
        assert not processes.lost_another(disk) and not processes.lost_another(wrapped_by_a_save(disk, tmp_path))


def test_memory_that_does_not_suffice_is_told_from_a_lost_process():
    with pytest.raises(jax.errors.JaxRuntimeError) as found:
        jnp.zeros(2**46, jnp.uint8).block_until_ready()
    wrapped = OSError("the checkpoint could not be written")
    wrapped.__cause__ = found.value
    for error in (
        found.value,
        wrapped,
        jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ):
        assert "out of memory" in processes.out_of_memory(error).lower()
        assert not processes.lost_another(error)
    # tensorstore's, of a full disk
    assert processes.out_of_memory(ValueError("RESOURCE_EXHAUSTED: No space left on device")) is None
    assert processes.out_of_memory(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")) is None


def test_training_takes_a_gpu_but_for_what_the_environment_says():
    for given in ({}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}):
        environ = dict(given)
        processes.take_gpu_memory(environ)
        assert environ == (given or {"XLA_CLIENT_MEM_FRACTION": "0.95"})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these options")
def test_freed_memory_stays_with_the_process():
    """In a process of its own, since the settings stay."""
    code = """
import resource
import numpy as np
from unialign_jax.parallel import processes
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
processes.keep_freed_memory()
faults()
print(faults())
"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(printed) < 100  # of 16,384 pages


@pytest.mark.parametrize(
    ("environ", "metadata", "expected"),
    [
        ({}, {}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, True),
        ({}, {"worker-network-endpoints": "unknown:unknown:10.0.0.2"}, False),
        ({}, {"worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"}, True),
        ({}, {"worker-network-endpoints": "x:y:10.0.0.2", "tpu-env": "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '4'\n"}, True),
    ],
)
def test_when_a_tpu_host_is_one_of_several(environ, metadata, expected):
    assert processes.on_tpu_pod(environ, lambda name: metadata.get(name, "")) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "go together"),
        (("localhost", 2, 0), "expected HOST:PORT"),
        (("localhost:1", 2, 2), "--process-id is 2, expected 0 to 1"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.start({}, *arguments)


def test_rows_follow_from_the_devices_not_from_the_process_number():
    """On a TPU the mesh follows the torus: a host's rows may be in pieces, and on several of its devices."""
    pieces = {"a": (slice(6, 8),), "b": (slice(0, 2),), "c": (slice(6, 8),)}
    host = SimpleNamespace(addressable_devices_indices_map=lambda shape: pieces)
    mine = processes.local_rows(host, 8)
    np.testing.assert_array_equal(mine, [0, 1, 6, 7])

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2)[::-1], ("data", "tensor"))
    sharding = NamedSharding(mesh, P("data"))
    values = np.arange(8 * 3).reshape(8, 3)
    everything = processes.local_rows(sharding, 8)
    np.testing.assert_array_equal(everything, range(8))
    np.testing.assert_array_equal(processes.put_rows(sharding, 8, everything, values), values)
    # The one piece of code that picks a device's rows out of what the host has read:
    host = SimpleNamespace()
    found = {}

    def collect(shape, _, piece):
        found.update({name: piece(index) for name, index in pieces.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", collect)
        processes.put_rows(host, 8, mine, values[mine])
    np.testing.assert_array_equal(found["a"], values[6:8])
    np.testing.assert_array_equal(found["b"], values[:2])
