"""The accelerators' data sheets: one table of peaks, memories and networks, for planning and MFU."""

import dataclasses
import math
import re
from collections.abc import Sequence

SOURCES = (
    'Google Cloud\'s "TPU v4", "v5e", "v5p" and "v6e" system architecture pages (peak, memory, chips and network cards '
    'of a host) and "How to Scale Your Model", jax-ml.github.io/scaling-book (links of the interconnect, DCN of a '
    "chip). v4's DCN is not in them: taken to be v5p's. GPUs: NVIDIA's data sheets, dense bf16."
)
GPU_SOURCES = (
    "NVIDIA's data sheets, dense; of T4, which has no bf16, the float32 peak. NVLink one way is half of the sheet's "
    "number; L4 and T4: PCIe. InfiniBand: a card for each GPU as in DGX A100 (200 Gb/s), H100, H200 and B200 (400). "
    "Memory is what CUDA reports for the device."
)


MATMUL_SHARE = 0.85  # of the peak that large matmuls reach on TPU, an assumption

ROOM = 0.03  # share of a chip's usable memory that plans leave free


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. Bandwidths are in bytes/s, and 0 where this project does not use them."""

    name: str
    kinds: tuple[str, ...]  # regular expressions, found in a `jax.Device.device_kind`
    peak: float  # FLOP/s of dense bf16 matmuls
    memory: float = 0  # bytes of HBM
    memory_bandwidth: float = 0
    link: float = 0  # one way: of one interconnect link; of a GPU all NVLink links together, or its PCIe slot
    axes: int = 0  # of the torus, in which a chip has two links along each; 0: a GPU
    wrap: int = 0  # an axis has wrap-around links if its length is a multiple of this (in 3-D: if all lengths are)
    network: float = 0  # between slices (of GPUs: hosts), one way, per chip: its share of the host's
    matrix_unit: int = 0  # rows of the systolic array: a matmul that sums over fewer numbers leaves rows idle
    cores: int = 1  # per chip, as Google Cloud's names count them: v4-8 is 4 chips
    usable: float = 0  # bytes of HBM that the compiler gives to a program; of TPUs, libtpu 0.0.42's number
    int8: float = 1  # speed of int8 matmuls, in units of `peak`
    fp8: float = 1  # of e4m3 matmuls
    matmul_share: float = MATMUL_SHARE  # of the peak that large matmuls reach, an assumption
    attention_share: float = 1.0  # of what large matmuls reach, an assumption; on TPU `matrix_unit` says it


# On GPUs large bf16 matmuls stay further below the data sheet's peak, because their power limits the clock, and fused
# attention with heads of width 64 further still. Both are assumptions.
GPU_SHARES = {"matmul_share": 0.7, "attention_share": 0.6}

CHIPS = (
    Chip("v6e", ("TPU v6",), 918e12, 32e9, 1.64e12, 9e10, 2, 16, 12.5e9, 256, usable=31.25 * 2**30, int8=2),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 8.1e11, 4.5e10, 2, 16, 3.125e9, 128, 1, 15.75 * 2**30, 2),
    Chip("v5p", ("TPU v5",), 459e12, 95e9, 2.765e12, 9e10, 3, 4, 6.25e9, 128, 2, usable=95.74 * 2**30, int8=2),
    Chip("v4", ("TPU v4",), 275e12, 32e9, 1.2e12, 4.5e10, 3, 4, 6.25e9, 128, 2, usable=30.75 * 2**30),
    Chip("H100 PCIe", ("H100 PCIe",), 756e12),
    Chip("H100", ("H100",), 989e12, 84_942_979_072, 3.352e12, 4.5e11, network=5e10, int8=2, fp8=2, **GPU_SHARES),
    Chip("H200", ("H200",), 989e12, 150_754_820_096, 4.8e12, 4.5e11, network=5e10, int8=2, fp8=2, **GPU_SHARES),
    Chip("A100 40 GB", ("A100.*40GB",), 312e12, 42_505_273_344, 1.555e12, 3e11, network=2.5e10, int8=2, **GPU_SHARES),
    Chip("A100 80 GB", ("A100",), 312e12, 85_100_068_864, 2.039e12, 3e11, network=2.5e10, int8=2, **GPU_SHARES),
    Chip("B200", ("B200",), 2250e12, 192e9, 8e12, 9e11, network=5e10, int8=2, fp8=2, **GPU_SHARES),
    Chip("L4", (r"\bL4$",), 121e12, 23.6e9, 3e11, 3.2e10, int8=2, fp8=2, **GPU_SHARES),
    Chip("T4", (r"\bT4$",), 8.1e12, 15.64e9, 3.2e11, 1.6e10, int8=16, **GPU_SHARES),
)

MOST_CHIPS = {2: 256, 3: 8960}  # per slice, by the number of axes of its torus


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None when unknown, as for a CPU."""
    return next((chip for chip in CHIPS if any(re.search(kind, device_kind) for kind in chip.kinds)), None)


def topology_name(name: str) -> str:
    """The compiler's name of a slice, from that name or from Google Cloud's: "v4-128" -> "v4:4x4x4".

    v4-N and v5p-N count cores, two per chip; v5e-N (v5litepod-N) and v6e-N count chips. The grid is the most cubic one
    that the cloud offers by default: powers of two, the longest axis last. Raises ValueError for any other name.
    """
    if match := re.fullmatch(r"(v4|v5e|v5p|v6e):([0-9]{1,4}(?:x[0-9]{1,4}){1,2})", name):
        chip = next(chip for chip in CHIPS if chip.name == match[1])
        sides, most = list(map(int, match[2].split("x"))), MOST_CHIPS[chip.axes]
        if len(sides) < chip.axes or sides[chip.axes :] not in ([], [1]) or not 1 <= math.prod(sides) <= most:
            raise ValueError(f"topology is {name!r}: a {chip.name} slice has {chip.axes} sides and 1 to {most:,} chips")
        return name
    match = re.fullmatch(r"(v4|v5litepod|v5e|v5p|v6e)-([0-9]{1,9})", name)
    if not match:
        raise ValueError(f"topology is {name!r}, expected such as v4:4x4x4 or v4-128, v5e-256, v5p-128, v6e-64, h100:8")
    kind, number = "v5e" if match[1] == "v5litepod" else match[1], int(match[2])
    chip = next(chip for chip in CHIPS if chip.name == kind)
    chips = number // chip.cores
    power = chips.bit_length() - 1
    smallest, largest = (4, 4096) if chip.axes == 3 else (1, 256)
    if number % chip.cores or chips != 2**power or not smallest <= chips <= largest:
        counted = f"{chip.cores * smallest} to {chip.cores * largest}" + (" cores" if chip.cores > 1 else " chips")
        raise ValueError(f"topology is {name!r}: {kind} slices named so have {counted}, a power of two")
    sides = [2 ** ((power + axis) // chip.axes) for axis in range(chip.axes)]
    sides = [2, 2, 1] if sides == [1, 2, 2] else sides
    return f"{kind}:{'x'.join(map(str, sides))}"


def larger_slice(topology: str) -> str | None:
    """Google Cloud's name of the slice with twice the chips, "v5e-16" or "v5e:4x4" -> "v5e-32"; None if there is none.

    The slice after one chip has four.
    """
    grid = topology_name(topology)
    chip = next(chip for chip in CHIPS if chip.name == grid.split(":")[0])
    name = f"{chip.name}-{max(4, 2 * chips_of(grid)) * chip.cores}"
    try:
        topology_name(name)
    except ValueError:
        return None
    return name


def chips_of(topology: str) -> int:
    """The number of chips of a slice "v4:4x4x4"."""
    return math.prod(map(int, topology.split(":")[1].split("x")))


def rings(name: str, sides: Sequence[int]) -> list[bool]:
    """Whether each axis of a slice's grid has wrap-around links; of 3-D tori only whole cubes have them."""
    chip = next(chip for chip in CHIPS if chip.name == name)
    closed = [size % chip.wrap == 0 for size in sides[: chip.axes]]
    if chip.axes == 3:
        closed = [all(closed)] * 3
    return closed + [False] * (3 - len(closed))
