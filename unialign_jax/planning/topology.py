"""TPU slices and GPUs that are not here, and their compilers, which run on any machine (of GPUs: gpus.py)."""

import math
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from unialign_jax.parallel import hardware
from unialign_jax.planning import gpus

GIB = 2**30


class DoesNotFit(ValueError):
    """The compiler found no room in the chip's memory; `needed` is the bytes that it names, or None."""

    def __init__(self, message: str, needed: int | None = None):
        super().__init__(message)
        self.needed = needed


def split_name(topology: str) -> tuple[int, str]:
    """ "4xv5e-256" -> (4, "v5e-256"): the number of slices, and one of them. Raises ValueError for other names."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(v.+)", topology)
    hardware.topology_name(match[2] if match else topology)
    return int(match[1] or 1), match[2]


def count_chips(name: str) -> int:
    """The chips of a slice or the GPUs of a topology, "v5e-256" or "h100:2x8". Raises ValueError for other names."""
    if gpus.is_gpu(name):
        _, hosts, count = gpus.split_gpus(name)
        return hosts * count
    return hardware.chips_of(hardware.topology_name(name))


def larger(name: str) -> str | None:
    """The name of the next larger slice, or of more GPUs; None if there is none."""
    return gpus.larger(name) if gpus.is_gpu(name) else hardware.larger_slice(name)


def topology_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices to compile for, of one or several slices such as "v5e:1x1" or "v4-128" (see `hardware.topology_name`), or
    of GPUs such as "h100:8".

    Raises ValueError when the compiler is missing or has no such topology.
    """
    if gpus.is_gpu(name):
        if num_slices > 1:
            raise ValueError(f"topology {name} has no slices: several hosts are h100:2x8")
        return gpus.gpu_devices(name)
    name = hardware.topology_name(name)
    kind, grid = name.split(":")
    sides, options = list(map(int, grid.split("x"))), {}
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if num_slices > 1:
        options["num_slices"] = num_slices
    if any(rings := hardware.rings(kind, sides)):
        options["wrap"] = rings
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # otherwise each chip counts as two devices
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (RuntimeError, NotImplementedError) as error:
        if "not installed" in str(error):
            raise ValueError(
                "the TPU compiler is not installed: pip install 'libtpu==0.0.42.*' (that is jax 0.10.2's; "
                "for another jax the version that pip install --dry-run 'jax[tpu]' names)"
            ) from None
        raise ValueError(f"topology {name}: {str(error).splitlines()[0][:200]}") from None


def usable_bytes(device: jax.Device) -> int | None:
    """The memory that the compiler may use on a device, read from its refusal of a program that is too large.

    None where the compiler names no number. The compiler for GPUs refuses nothing: `gpus.usable_bytes` has a number.
    """
    if device.platform == "gpu":
        return gpus.usable_bytes(device)
    place = jax.sharding.SingleDeviceSharding(device)
    try:
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=place)).compile()
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(r"available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm", str(error)):
            return round(float(match[1] or match[2]) * GIB)
    return None


def compile_program(lowered: jax.stages.Lowered, name: str) -> jax.stages.Compiled:
    """Compiles a program, which errors call `name`. Raises DoesNotFit when the compiler runs out of memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(name, str(error)) from None


def out_of_memory(name: str, message: str) -> DoesNotFit:
    """The compiler's error message in one line, with its numbers."""
    flat = " ".join(message.split())
    whole = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+\w) hbm", flat)
    part = re.search(r"HLO temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+\w)\)", flat)
    match = whole or part
    if not match:
        return DoesNotFit(f"{name} does not fit: {flat[:300]}")
    needed = round(float(match[1][:-1]) * 2 ** (10 * (1 + "KMGT".index(match[1][-1]))))
    alone = "" if whole else ", for temporaries alone"
    return DoesNotFit(f"{name} does not fit: it needs {match[1]} of {match[2]}{alone}", needed)
