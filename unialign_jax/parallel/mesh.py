"""The device mesh: its axes, how it lies in a TPU slice's torus, and which one suits a machine.

All axes but the last two split the batch. They differ in what they do to weights:

    replica   repeats everything: between slices, over their network, or between parts of one large slice
    data      repeats the compute weights, splits the state: master weights, optimizer, average (ZeRO-1)
    state     as data, along another axis of the torus
    encoder   as state, but also splits the frozen text encoder's heads and hidden widths (and not its batch)
    fsdp      splits weights and state; a block's weights are gathered when the block runs
    context   as data for weights and state; splits the tokens of a sample, and in attention its heads; not the batch
    tensor    splits heads and hidden widths of weights and activations; not the batch

On few chips memory is the limit: use fsdp. On many chips with few samples each, the weight all-gathers would dominate:
use data. XLA reduce-scatters only along one axis of the torus, so that an axis of the mesh should lie along one:
`choose_mesh` takes replica=4, data=16, state=2, encoder=2 on v5e:16x16. All axes are Auto: `jax.jit` partitions over
them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from unialign_jax.parallel import hardware

AXES = ("replica", "data", "state", "encoder", "fsdp", "context", "tensor")
SECOND_AXIS = 4  # chips along the torus axis of "state" and "encoder", at most
TEXT_ENCODER_GROUPS = (1, 2, 4)  # chips that share one copy of the text encoder; fewer sum less, and hold more


def make_mesh(
    devices: Sequence | None = None,
    *,
    replica: int = 1,
    data: int = 1,
    state: int = 1,
    encoder: int = 1,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
) -> Mesh:
    """A mesh over the devices, by default all; one axis may be -1 and takes the remaining devices.

    A mesh has the axis `context` only where that is larger than 1.

    With several TPU slices `replica` must be a multiple of their number: only that axis crosses the network between
    them. On GPUs the devices of a host are neighbours, so that the first axis larger than 1 crosses hosts.
    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = complete_mesh_shape((replica, data, state, encoder, fsdp, context, tensor), len(devices))
    named = {name: size for name, size in zip(AXES, sizes, strict=True) if name != "context" or size > 1}
    names, sizes = tuple(named), tuple(named.values())
    slices = count_slices(devices)
    if sizes[0] % slices:
        raise ValueError(f"mesh replica={sizes[0]}, but there are {slices} slices: give a multiple of {slices}")
    if math.prod(sizes) == 1:  # mesh_utils would look up the topology of all devices
        grid = np.array(devices).reshape(sizes)
    elif slices > 1:
        inside, across = (sizes[0] // slices, *sizes[1:]), (slices,) + (1,) * (len(sizes) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def complete_mesh_shape(sizes: Sequence[int], device_count: int) -> tuple[int, ...]:
    """Replaces a -1 in `sizes` (in the order of AXES) by the remaining devices. Raises ValueError when that fails."""
    shape = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size != 1) or "of one device"
    unknown = [i for i, size in enumerate(sizes) if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {shape}: sizes are positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if device_count % known or (not unknown and known != device_count):
        raise ValueError(
            f"mesh {shape} does not fit {device_count} devices: sizes multiply to that, and one may be -1, the rest"
        )
    return tuple(device_count // known if size == -1 else size for size in sizes)


def mesh_sizes(mesh: dict[str, int]) -> tuple[int, ...]:
    """A configuration's mesh, {axis: size}, in the order of AXES; an axis that is missing or 0 has size 1."""
    return tuple(mesh.get(name, 0) or 1 for name in AXES)


def format_mesh(sizes: dict[str, int]) -> str:
    """ "replica=4, data=16", the axes that have more than one device."""
    return ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "of one device"


def count_slices(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices among the devices; 1 for GPUs, where JAX gives each host a slice_index."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def axes_without_wraparound(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes without a wrap-around link: their first and last devices are no neighbours in the torus."""
    chip = hardware.find_chip(mesh.devices.flat[0].device_kind)
    if chip is None or not chip.axes:
        return ()
    places = np.array([device.coords[: chip.axes] for device in mesh.devices.flat])
    sides = np.ptp(places, axis=0) + 1
    closed = hardware.rings(chip.name, sides)[: chip.axes]
    places = places.reshape(*mesh.devices.shape, chip.axes)
    found = []
    for number, name in enumerate(mesh.axis_names):
        along = np.moveaxis(places, number, 0).reshape(mesh.shape[name], -1, chip.axes)[:, 0]
        steps = np.abs(along[0] - along[-1])
        if np.where(closed, np.minimum(steps, sides - steps), steps).sum() > 1:
            found.append(name)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that a mesh is chosen for; `chip` and `grid` are set only for whole slices of a known TPU."""

    devices: int
    kind: str
    chip: hardware.Chip | None = None
    grid: tuple[int, ...] = ()  # chips along each axis of a slice's torus
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class MeshChoice:
    """The sizes of all axes of a mesh, and the reason in words."""

    sizes: dict[str, int]
    reason: str

    def __str__(self):
        return f"mesh {format_mesh(self.sizes)}: {self.reason}"


def read_topology(devices: Sequence[jax.Device]) -> Topology:
    """Reads the torus from the devices' coordinates."""
    kind = devices[0].device_kind
    chip = hardware.find_chip(kind)
    slices = count_slices(devices)
    if chip is None or not chip.axes:
        return Topology(len(devices), kind, slices=slices)
    coordinates = np.array([device.coords for device in devices])[:, : chip.axes]
    grid = tuple(int(side) for side in np.ptp(coordinates, axis=0) + 1)
    if math.prod(grid) * slices != len(devices):  # a part of a slice, or two devices per chip
        return Topology(len(devices), kind, slices=slices)
    return Topology(len(devices), kind, chip, grid, slices)


def choose_mesh(topology: Topology, bytes_per_chip: Callable[[dict[str, int]], float]) -> MeshChoice:
    """The mesh for a machine: ZeRO-1 on TPU slices where `bytes_per_chip(sizes)` fits the memory, else fsdp.

    Of the ZeRO-1 meshes it is the one with the smallest text-encoder group that fits. It fits if ROOM of
    what the compiler may use stays free.
    """
    split = dict.fromkeys(AXES, 1) | {"replica": topology.slices, "fsdp": topology.devices // topology.slices}
    if topology.chip is None:
        place = f"chosen for {topology.devices} x {topology.kind}"
        return MeshChoice(split, f"{place}, weights and state are split over all")
    several = f"{topology.slices} slices of " if topology.slices > 1 else ""
    place = f"chosen for {several}{'x'.join(map(str, topology.grid))} {topology.chip.name}"
    if topology.devices == 1:
        return MeshChoice(split, place)

    for group in TEXT_ENCODER_GROUPS:
        sizes = zero1_mesh(topology.grid, topology.slices, group)
        need = bytes_per_chip(sizes)
        figures = f"by arithmetic {need / 1e9:.1f} of {topology.chip.usable / 1e9:.1f} GB a chip"
        if need <= (1 - hardware.ROOM) * topology.chip.usable:
            return MeshChoice(sizes, f"{place}, weights are repeated and the state is split: {figures}")
    return MeshChoice(split, f"{place}, weights and state are split, since repeated weights would need {figures}")


def zero1_mesh(grid: tuple[int, ...], slices: int, group: int) -> dict[str, int]:
    """The mesh that repeats the compute weights and splits the state, on slices of a torus.

    Gradients are reduce-scattered over two axes of the torus:

        data            the longest axis
        state, encoder  up to 4 chips along another; of those up to `group`, neighbours, share one text encoder
        replica         all other chips, and the slices
    """
    *others, data = sorted(grid)
    # The shortest of the other axes whose length is a multiple of 4, or else the longest.
    second = next((side for side in others if side % SECOND_AXIS == 0), max(others))
    second = math.gcd(second, SECOND_AXIS)
    encoder = math.gcd(second, group)
    replica = slices * math.prod(grid) // (data * second)
    sizes = {"replica": replica, "data": data, "state": second // encoder, "encoder": encoder}
    return dict.fromkeys(AXES, 1) | sizes
