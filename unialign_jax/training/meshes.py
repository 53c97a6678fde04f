"""The mesh for a machine: what a configuration leaves open is chosen by what fits and by the shape of the torus.

All of `config.mesh` 0, the default, leaves it open. Then the devices of anything but a known TPU slice split weights
and state (`fsdp`), which needs least memory. On a TPU slice the weights that compute are repeated, and only the state
is split (ZeRO-1), as soon as that fits by the arithmetic below: gathering weights in every pass would bound a step of
few samples a chip. Each axis that gradients are scattered over lies along one axis of the torus:

    data      the longest axis
    encoder   up to 4 along another: the frozen text encoder's all-reduces grow with it
    replica   the rest, and the slices

The arithmetic is of bytes a chip: weights and as much again for gradients, encoders, state, and activations that grow
with the samples. It is a guess, held against the memory on the chip's data sheet, some 5% less than the compiler gives
(v5e: 16.0e9 of 16.9e9 bytes); `launch/plan.py` asks the compiler.
"""

import dataclasses
import math

import jax
import numpy as np

from unialign_jax.data.kinds import has_image_pass
from unialign_jax.parallel import hardware
from unialign_jax.parallel.sharding import AXES, complete_mesh_shape, count_slices, mesh_sizes
from unialign_jax.training.state import Networks, init_frozen, init_params

ENCODER = 4  # chips that share a text encoder
# What the backward pass finds of a block, in widths of its tokens: inputs and outputs of everything; the outputs of
# matmuls and the block's input; that input; nothing, since it is in the host's memory.
SAVED = {"none": 28, "dots": 10, "block": 1, "offload": 0}
LOGITS = 3  # float32 copies of the text logits: values, softmax, gradient
AUTOENCODER_MAPS = 6  # of the widest kind that live at once


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices as far as a mesh is concerned; `chip` and `grid` only where they are whole slices of a known TPU."""

    devices: int
    kind: str
    chip: hardware.Chip | None = None
    grid: tuple[int, ...] = ()  # chips along each axis of a slice's torus
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a training step holds in bytes, before a mesh divides it."""

    weights: float  # of the trained networks, as they compute
    block: float  # of those, one block's
    state: float
    text_encoder: float
    text_block: float
    autoencoder: float
    activations: dict[str, float]  # of one sample, {remat policy: bytes}, of the stream with most tokens


@dataclasses.dataclass(frozen=True)
class Choice:
    """Sizes of all axes of a mesh, and the reason in words."""

    sizes: dict[str, int]
    reason: str

    def __str__(self):
        return f"mesh {format_mesh(self.sizes)}: {self.reason}"


def format_mesh(sizes: dict[str, int]) -> str:
    """ "replica=4, data=16", the axes that have more than one device."""
    return ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "of one device"


def is_open(mesh: dict[str, int]) -> bool:
    """Whether a configuration leaves its mesh to be chosen."""
    return not any(mesh.values())


def mesh_for(config, devices, networks: Networks, needs: Needs | None = None) -> Choice:
    """The mesh of a configuration on some devices: as it says, or chosen.

    Args: `needs`: of `read_needs`, which is asked when they are not given.
    Raises ValueError for a mesh that does not fit the devices.
    """
    if not is_open(config.mesh):
        sizes = complete_mesh_shape(mesh_sizes(config.mesh), len(devices))
        return Choice(dict(zip(AXES, sizes, strict=True)), "as given")
    machine = read_machine(devices)
    if machine.chip and needs is None:
        needs = read_needs(config, networks)
    return choose_mesh(machine, config.batch_size, config.accumulation, config.model.remat, needs)


def read_machine(devices) -> Machine:
    """Finds the torus in the devices' coordinates."""
    kind = devices[0].device_kind
    chip = hardware.find_chip(kind)
    slices = count_slices(devices)
    if chip is None or not chip.axes:
        return Machine(len(devices), kind, slices=slices)
    coordinates = np.array([device.coords for device in devices])[:, : chip.axes]
    grid = tuple(int(side) for side in np.ptp(coordinates, axis=0) + 1)
    if math.prod(grid) * slices != len(devices):  # some chips of a slice, or two devices a chip
        return Machine(len(devices), kind, slices=slices)
    return Machine(len(devices), kind, chip, grid, slices)


def choose_mesh(machine: Machine, batch_size: int, accumulation: int, remat: str, needs: Needs | None) -> Choice:
    """The mesh for a machine that trains with `batch_size` samples a step in `accumulation` micro-batches.

    Only a machine whose chip is known asks for the `needs`.
    """
    if machine.chip is None:
        place = f"chosen for {machine.devices} x {machine.kind}"
        return Choice(_split(machine.devices, machine.slices), f"{place}, weights and state are split over all")
    several = f"{machine.slices} slices of " if machine.slices > 1 else ""
    place = f"chosen for {several}{'x'.join(map(str, machine.grid))} {machine.chip.name}"
    if machine.devices == 1:
        return Choice(_split(1, 1), place)

    sizes = repeating(machine.grid, machine.slices)
    samples = batch_size / accumulation / machine.devices
    need = estimate(needs, sizes, samples, remat)
    figures = f"by arithmetic {need / 1e9:.1f} of {machine.chip.memory / 1e9:.0f} GB a chip"
    if need <= machine.chip.memory:
        return Choice(sizes, f"{place}, weights are repeated and the state is split: {figures}")
    return Choice(
        _split(machine.devices, machine.slices),
        f"{place}, weights and state are split, since repeated weights would need {figures}",
    )


def _split(devices, slices):
    return dict.fromkeys(AXES, 1) | {"replica": slices, "fsdp": devices // slices}


def repeating(grid: tuple[int, ...], slices: int) -> dict[str, int]:
    """The mesh that repeats the weights that compute, on slices of a torus."""
    *others, data = sorted(grid)
    # Of the other axes the shortest that has 4 chips, or else the longest.
    encoder = next((side for side in others if side % ENCODER == 0), max(others))
    encoder = math.gcd(encoder, ENCODER)
    replica = slices * math.prod(grid) // (data * encoder)
    return dict.fromkeys(AXES, 1) | {"replica": replica, "data": data, "encoder": encoder}


def estimate(needs: Needs, sizes: dict[str, int], samples: float, remat: str) -> float:
    """Bytes that a chip of a mesh holds in a step of micro-batches with `samples` a chip (at least one)."""
    split = sizes["fsdp"] * sizes["tensor"]
    gathered = 2 * (2 * needs.block + needs.text_block) if sizes["fsdp"] > 1 else 0  # this block, and the next
    return (
        2 * needs.weights / split
        + gathered
        + needs.text_encoder / (split * sizes["encoder"])
        + needs.autoencoder
        + needs.state / (split * sizes["data"] * sizes["encoder"])
        + max(samples, 1) * needs.activations[remat]
    )


def read_needs(config, networks: Networks) -> Needs:
    """Counts a configuration's parameters, from their shapes alone, and its activations."""
    params = jax.eval_shape(lambda: init_params(networks, jax.random.key(0)))
    frozen = jax.eval_shape(lambda: init_frozen(networks))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    model, itemsize = networks.transformer.config, np.dtype(networks.transformer.config.dtype).itemsize
    weights = itemsize * count(params)
    text_encoder = bytes_of(frozen["text_encoder"])
    averaged = count(params["transformer"]) if config.ema_decay else 0
    return Needs(
        weights=weights,
        block=itemsize * count(params["transformer"]["blocks"]) / model.depth,
        state=4 * (3 * count(params) + averaged),
        text_encoder=text_encoder,
        text_block=text_encoder / networks.text_encoder.config.depth,
        autoencoder=bytes_of(frozen["autoencoder"]),
        activations={remat: sample_activations(config, networks, remat) for remat in SAVED},
    )


def sample_activations(config, networks: Networks, remat: str) -> float:
    """Bytes that one sample of the stream with most tokens takes: of encoding it, or of its way back, what is more."""
    model, autoencoder = networks.transformer.config, networks.autoencoder.config
    streams = [stream for stream in config.streams.values() if stream.weight > 0]
    images = 1 + max((stream.num_conditions for stream in streams), default=0)
    passes = 2 if any(has_image_pass(stream.kind) for stream in streams) else 1
    itemsize = np.dtype(model.dtype).itemsize
    target = (config.image_size / autoencoder.downsample_factor / model.patch_size) ** 2
    tokens = (images + passes - 1) * target + passes * config.text_length
    width = tokens * model.width * itemsize
    saved = model.depth * SAVED[remat] * width
    block = 2 * SAVED["none"] * width  # with its gradients
    logits = LOGITS * 4 * config.text_length * model.vocab_size
    maps = 0.0
    if autoencoder.kind == "kl":
        maps = AUTOENCODER_MAPS * images * config.image_size**2 * autoencoder.block_widths[0]
        maps *= np.dtype(autoencoder.dtype).itemsize
    return max(maps, saved + max(block, logits))
