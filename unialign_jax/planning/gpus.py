"""NVIDIA GPUs that are not here, for XLA's GPU compiler, which runs on any machine (the package jax-cuda12-plugin).

The compiler takes a GPU's limits as a text (`stream_executor.GpuTargetConfigProto`). It never refuses a program for its
memory, and asks neither cuDNN nor NCCL: what it cannot see is in docs/gpu.md.
"""

import dataclasses
import importlib.util
import re

import jax
from jax.experimental import topologies

from unialign_jax.files import first_line
from unialign_jax.parallel import hardware

INSTALL = "pip install 'jax-cuda12-plugin==0.10.2' 'nvidia-cuda-nvcc-cu12==12.9.86'"
GPUS_OF_A_HOST, MOST_HOSTS = 8, 128
CONTEXT = 0.6 * 2**30  # that the CUDA context takes, an assumption
SHARE = 0.95  # of the rest, which JAX takes for its arrays (XLA_CLIENT_MEM_FRACTION, set by train.py)
CUDNN_VERSION = 91000  # taken where cuDNN is not installed; JAX's Python asks for it, the compiler does not


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler is told of a GPU, beside the figures in `hardware.CHIPS`.

    Sources: the CUDA programming guide's table of compute capabilities, and NVIDIA's data sheets.
    """

    kind: str  # CUDA's name of the device, jax.Device.device_kind
    capability: tuple[int, int]
    multiprocessors: int
    fpus: int  # float32 units of a multiprocessor
    threads: int  # most on a multiprocessor
    shared_memory: int  # bytes of a multiprocessor
    shared_memory_block: int  # most of a block
    l2_cache: int  # bytes
    clock: float  # GHz

    @property
    def chip(self) -> hardware.Chip:
        return hardware.find_chip(self.kind)


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 233472, 232448, 132644864, 1.965),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41),
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 102400, 101376, 50331648, 2.04),
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1024, 65536, 65536, 4194304, 1.59),
}

TARGET = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.chip.memory_bandwidth:.0f}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.chip.memory:.0f}
  shared_memory_per_block_optin: {gpu.shared_memory_block}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} feature_extension: {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  name: "{gpu.kind}"
}}
platform_name: "CUDA"
device_description_str: "{gpu.kind}"
"""


def room(kind: str) -> int:
    """The bytes of a GPU, such as "h100", that programs may take: this project's number; the compiler has none."""
    return int(SHARE * (GPUS[kind].chip.memory - CONTEXT))


def roomier(kind: str) -> str | None:
    """The GPU that comes next by its memory; None if there is none."""
    larger = [other for other in GPUS if room(other) > 1.05 * room(kind)]
    return min(larger, key=room, default=None)


def usable_bytes(device: jax.Device) -> int:
    """`room` of a device of `gpu_devices`."""
    return room(next(kind for kind, gpu in GPUS.items() if gpu.kind == device.device_kind))


def is_gpu(topology: str) -> bool:
    """Whether a topology's name is one of GPUs."""
    return topology.partition(":")[0] in GPUS


def split_gpus(topology: str) -> tuple[str, int, int]:
    """ "h100:2x8" -> ("h100", 2 hosts, 8 GPUs of each); "h100" and "h100:1" are one. Raises ValueError for others."""
    kind, colon, grid = topology.partition(":")
    match = re.fullmatch(r"(?:([1-9][0-9]{0,3})x)?([1-9][0-9]{0,3})", grid if colon else "1")
    if not match:
        raise ValueError(f"topology is {topology!r}, expected such as {kind}:1, {kind}:8 or {kind}:2x8")
    hosts, gpus = int(match[1] or 1), int(match[2])
    if gpus > GPUS_OF_A_HOST or hosts > MOST_HOSTS:
        raise ValueError(
            f"topology is {topology!r}: a host has 1 to {GPUS_OF_A_HOST} GPUs, and hosts are at most {MOST_HOSTS} "
            f"(two hosts of eight: {kind}:2x8)"
        )
    if hosts > 1 and not GPUS[kind].chip.network:
        raise ValueError(f"topology is {topology!r}: several hosts of {kind} are not planned, they have no InfiniBand")
    return kind, hosts, gpus


def larger(topology: str) -> str | None:
    """The name of the next more GPUs: "h100:1" -> "h100:8" -> "h100:2x8"; None if there are none."""
    kind, hosts, gpus = split_gpus(topology)
    if gpus < GPUS_OF_A_HOST:
        return f"{kind}:{f'{hosts}x' * (hosts > 1)}{GPUS_OF_A_HOST}"
    return f"{kind}:{2 * hosts}x{gpus}" if GPUS[kind].chip.network and 2 * hosts <= MOST_HOSTS else None


def gpu_devices(topology: str) -> list[jax.Device]:
    """Devices to compile for, in the order of their hosts (`process_index`).

    Must be called before JAX opens another platform than the CPU. Raises ValueError for an unknown topology, and where
    the compiler is not installed.
    """
    kind, hosts, gpus = split_gpus(topology)
    if jax.config.jax_platforms != "cpu":
        raise ValueError("GPUs that are not here are planned by a process on the CPU: set JAX_PLATFORMS=cpu")
    if missing := missing_packages():
        raise ValueError(f"XLA's GPU compiler is not installed ({' and '.join(missing)}): {INSTALL}")
    do_without_cudnn()
    gpu = GPUS[kind]
    features = "ACCELERATED_FEATURES" if gpu.capability >= (9, 0) else "NONE"
    options = {"target_config": TARGET.format(gpu=gpu, features=features), "topology": f"1x{hosts}x{gpus}"}
    try:
        devices = topologies.get_topology_desc(topology_name="", platform="cuda", **options).devices
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"topology {topology}: XLA's GPU compiler does not start: {first_line(error)}") from None
    return list(devices)


def missing_packages() -> list[str]:
    """The packages of XLA's GPU compiler, and of NVIDIA's assembler, that are not installed."""
    modules = {"jax-cuda12-plugin": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
    modules["nvidia-cuda-nvcc-cu12"] = ("nvidia.cuda_nvcc", "nvidia.cu13")
    return [name for name, known in modules.items() if not any(map(is_installed, known))]


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def do_without_cudnn() -> None:
    """Lets attention by cuDNN be traced where cuDNN is not installed: JAX asks it for its version (privately)."""
    from jax._src.cudnn import fused_attention_stablehlo

    try:
        fused_attention_stablehlo.check_cudnn_version()
    except RuntimeError:
        fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION
