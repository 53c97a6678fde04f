"""The `memory` part of launch/benchmark.py: the planned memory of a training step beside that of a real run.

    python launch/benchmark.py memory
    python launch/benchmark.py memory --mesh=fsdp=4,tensor=2 --remat=dots --config.model.depth=4
    python launch/benchmark.py memory --platform=gpu --config.batch_size=4 --config.image_size=512

On CPUs the run has --devices virtual ones, and "real" is the growth of the process's resident memory, from before the
first array is made to the peak during two steps. On an accelerator it is the peak that the devices report since the
start of the process: "real is of" says whether the steps had that peak, or the initialisation, which the plan leaves
out. The plan is one device's peak by `planning.step.plan_step` times their number. Each case has its own process.
"""

import argparse
import ctypes
import os
import re
import sys
import tempfile
from pathlib import Path

from unialign_jax.benchmarks.sample import answer, call_alone

STEPS = 2
PATIENCE = 300  # seconds
# Stage 1, small enough for a few GB and large enough that the runtime's own memory is negligible: 47 M trained
# parameters, with T5, VAE and average; their state is about as large as the activations.
MEDIUM = (
    "image_size=256",
    "text_length=64",
    "batch_size=8",
    "model.depth=8",
    "model.num_heads=6",
    "model.head_width=64",
    "model.text_width=512",
    "model.vocab_size=8000",
    "heads.hidden_width=256",
    "heads.teacher_width=256",
    "text_encoder.vocab_size=8000",
    "text_encoder.width=512",
    "text_encoder.mlp_width=1280",
    "text_encoder.num_heads=8",
    "text_encoder.depth=4",
    "autoencoder.block_widths=(32,32,64,64)",
    "model.dtype=float32",  # XLA's CPU compiler cannot sum bfloat16 over devices
    "text_encoder.dtype=float32",
    "autoencoder.dtype=float32",
)


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--config", default="configs/stage1.py", help="stage file, default %(default)s, on CPUs made small"
    )
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu", help="default %(default)s")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices, default %(default)s")
    parser.add_argument(
        "--mesh",
        action="append",
        metavar="AXIS=N,...",
        help="axes of a mesh, may be repeated; default fsdp=8 and replica=2,data=2,encoder=2, on accelerators fsdp=-1",
    )
    parser.add_argument("--remat", default="none,block", help="policies to try, default %(default)s")


def benchmark_memory(arguments: argparse.Namespace) -> dict:
    """A table with a row for each mesh and policy. Raises ValueError for a case that cannot run."""
    from unialign_jax.inference.options import check_whole
    from unialign_jax.training.config import config_problems, read_config

    cpu = arguments.platform == "cpu"
    check_whole("--devices", arguments.devices, 1, 1024)
    meshes = arguments.mesh or (["fsdp=8", "replica=2,data=2,encoder=2"] if cpu else ["fsdp=-1"])
    cases = []
    for mesh in meshes:
        for remat in arguments.remat.split(","):
            changes = [*(MEDIUM if cpu else ()), *arguments.changes, *mesh_changes(mesh), f"model.remat={remat}"]
            config = read_config(arguments.config, changes)
            if problems := config_problems(config, arguments.devices if cpu else None):
                raise ValueError("the configuration cannot run: " + "; ".join(problems))
            settings = {"config": arguments.config, "changes": changes}
            cases.append((mesh, remat, settings | {"platform": arguments.platform, "devices": arguments.devices}))
    rows = []
    for mesh, remat, settings in cases:
        print(f"measuring mesh {mesh}, remat {remat} ...", file=sys.stderr, flush=True)
        rows.append({"mesh": mesh, "remat": remat} | call_alone("memory", "plan_and_run", settings))
    return {"memory, GB over all devices": rows}


def mesh_changes(text: str) -> list[str]:
    """ "fsdp=4,tensor=2" -> that mesh as changes to a configuration; the other axes are 1."""
    from unialign_jax.parallel.mesh import AXES

    sizes = dict.fromkeys(AXES, "1")
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|\d+", size):
            raise ValueError(f"--mesh is {text!r}, expected sizes of {', '.join(AXES)}, such as fsdp=4,tensor=2")
        sizes[axis] = size
    return [f"mesh.{axis}={size}" for axis, size in sizes.items()]


# In a process of its own


def plan_and_run(settings: dict) -> dict:
    """The plan's parts, its sum and the memory of a run, in GB over all devices."""
    import jax

    from unialign_jax.benchmarks.step import Setup, peak_of
    from unialign_jax.parallel import processes
    from unialign_jax.planning.step import plan_step
    from unialign_jax.training.config import active_streams, read_config

    processes.take_gpu_memory(os.environ)  # as in training
    on_cpu = settings["platform"] == "cpu"
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(settings["platform"], settings["platform"]))
    if on_cpu:
        prepare_cpu(settings["devices"])
    config = read_config(settings["config"], settings["changes"])
    stream = next(iter(active_streams(config)))

    setup = Setup(config, stream, jax.devices())
    with tempfile.TemporaryDirectory() as cache:  # compiled once, for the plan and for the run
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        step = plan_step(config, jax.devices(), stream)
        program, makers = setup.compile_step(), setup.compile_makers()
    sizes = {name: getattr(step.memory, name) for name in ("parameters", "optimizer", "frozen", "batch", "temporaries")}
    planned = {name: step.chips * size / 1e9 for name, size in (sizes | {"plan": step.memory.peak}).items()}

    before = resident()
    state, frozen, batch = (make() for make in makers)
    jax.block_until_ready((state, frozen, batch))
    made = 0 if on_cpu else peak_bytes()
    resident()
    for _ in range(STEPS):
        state, metrics = program(state, frozen, batch)
        jax.block_until_ready(metrics)
    real = status("VmHWM") - before if on_cpu else peak_bytes()
    return planned | {
        "real": real / 1e9,
        "plan / real": planned["plan"] / (real / 1e9),
        "real is of": "the step" if on_cpu else peak_of(made, real),
    }


def peak_bytes() -> int:
    """The sum of the devices' own peaks in bytes since the process began."""
    import jax

    return sum(device.memory_stats()["peak_bytes_in_use"] for device in jax.local_devices())


def prepare_cpu(devices: int) -> None:
    """Sets up this process, before JAX looks for devices, so that its memory is that of the arrays."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    # Two steps in flight on more devices than cores could wait for each other's collectives for ever. So could the
    # collectives of one step, each of which holds a thread of XLA's pool on every device: 8 a device were too few.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ["NPROC"] = str(64 * devices)
    # Devices that share few cores may wait long for one another: XLA ends a process that waits for 40 s.
    patience = f"--xla_cpu_collective_call_terminate_timeout_seconds={PATIENCE}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}"
    # Freed memory must go back to the system, not stay in the allocator (M_MMAP_THRESHOLD of glibc's malloc.h).
    ctypes.CDLL(None).mallopt(-3, 2**20)


def resident() -> int:
    """The resident bytes of this process now; the kernel's count of their peak starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """A size in bytes from /proc/self/status."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    answer((plan_and_run,))
