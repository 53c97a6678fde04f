"""The mesh of a configuration: as it says, or chosen by the bytes that a training step holds per chip.

A configuration whose `mesh` is all 0, the default, leaves the choice open. Devices that are not a known TPU slice then
split weights and state (`fsdp`), which needs least memory. A TPU slice repeats the compute weights and splits only the
state (ZeRO-1) if the arithmetic below says that this fits: with few samples per chip, gathers would dominate.
The text encoder is then whole on every chip, or shared by the fewest chips that have room for it: their sums are the
largest part of the communication that does not overlap.

The arithmetic per chip: encoders, state, weights, gradients and their sums over micro-batches, and activations that
grow with the samples. Its constants are fitted to what the compilers for TPUs and for GPUs planned, and hold within 10%
of that (tests/training/test_meshes.py). It is compared with the memory that the compiler may use, less ROOM
(parallel/hardware.py); `launch/plan.py` asks the compiler.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from unialign_jax.data.kinds import has_image_pass
from unialign_jax.parallel.mesh import AXES, MeshChoice, choose_mesh, complete_mesh_shape, mesh_sizes, read_topology
from unialign_jax.parallel.sharding import FEW_ROWS, path_string
from unialign_jax.training.state import Networks, init_frozen, init_params

# Activations saved per block, in units of one [tokens, width] array in the compute dtype; fitted. none: every input and
# output, many in float32; dots: matmul outputs and the block input; block: the block input; offload: none on the device
# (it goes to host memory).
SAVED = {
    "tpu": {"none": 50, "dots": 14, "block": 1, "offload": 0},
    "gpu": {"none": 45, "dots": 10, "block": 1, "offload": 0},
}
WORKING = {"tpu": 50, "gpu": 28}  # the same units, of the block whose backward pass runs; fitted
SUMS = {"tpu": 3.0, "gpu": 1.5}  # float32 copies of the gradients, beside the micro-batch's; fitted
# The shares of what the blocks have saved, and of the running block's, that are there when the gradients of all weights
# are; fitted. "paired": both passes of a sample are one forward, as without condition images.
KEPT = {"tpu": (0.8, 0.6), "tpu, paired": (0.28, 1.33), "gpu": (0.6, 0.6), "gpu, paired": (0.6, 0.6)}
ALWAYS = 5e8  # bytes of everything else; fitted
AUTOENCODER_MAPS = 3  # feature maps at the resolution of the image that are alive at once


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The bytes that a training step holds, before a mesh divides them."""

    weights: float  # of the trained networks, in their compute dtype; with adapters the base, as it is held
    gradients: float  # of the weights, in their compute dtype; none with adapters
    few_rows: float  # of the weights, those that stay split as the state is (parallel/few_rows.py)
    block: float  # of one of their blocks
    state: float
    text_encoder: float
    text_block: float
    autoencoder: float
    sums: float  # of the gradients over micro-batches
    # {remat policy: bytes} of one sample of the stream with most tokens: all, and those beside all weights' gradients
    activations: dict[str, tuple[float, float]]


def is_open(mesh: dict[str, int]) -> bool:
    """Whether a configuration leaves its mesh to be chosen."""
    return not any(mesh.values())


def mesh_for(
    config: Any, devices: Sequence[jax.Device], networks: Networks, memory: StepMemory | None = None
) -> MeshChoice:
    """The mesh of a configuration on some devices. Raises ValueError for a mesh that does not fit them.

    Args:
      memory: of `step_memory`, computed where needed when None.
    """
    if not is_open(config.mesh):
        sizes = complete_mesh_shape(mesh_sizes(config.mesh), len(devices))
        return MeshChoice(dict(zip(AXES, sizes, strict=True)), "as given")

    def bytes_per_chip(sizes):
        samples = config.batch_size / config.accumulation / len(devices)
        needs = memory or step_memory(config, networks, devices[0].platform)
        return estimate(needs, sizes, samples, config.model.remat, config.accumulation)

    return choose_mesh(read_topology(devices), bytes_per_chip)


def estimate(memory: StepMemory, sizes: dict[str, int], samples: float, remat: str, accumulation: int) -> float:
    """The bytes per chip of a mesh in a step of micro-batches with `samples` per chip (at least one).

    Chips along `context` share their samples, and split the tokens of each.

    Activations are most when the forward pass ends. Without accumulation, weights that were gathered are then there
    twice (found in the compiled programs); and the gradients of all weights meet a part of the activations, which is
    more where the samples are few.
    """
    split, context = sizes["fsdp"] * sizes["tensor"], sizes.get("context", 1)  # stored plans may lack an axis
    pieces = split * context * sizes["data"] * sizes.get("state", 1) * sizes["encoder"]
    gathered = 2 * (2 * memory.block + memory.text_block) if sizes["fsdp"] > 1 else 0  # this block, and the next
    weights, gradients, again = memory.weights / split, memory.gradients / split, 0.0
    activations, kept = (max(samples, 1) * number / context for number in memory.activations[remat])
    if split * context == 1 and pieces > 1 and memory.gradients:  # weights are gathered whole
        weights, gradients = (size - memory.few_rows * (1 - 1 / pieces) for size in (weights, gradients))
        again = weights
    if accumulation > 1:
        working = weights + activations + memory.sums / pieces
    else:
        working = weights + max(activations + again, gradients + kept)
    frozen = memory.text_encoder / (split * sizes["encoder"]) + memory.autoencoder
    return memory.state / pieces + frozen + gathered + working + ALWAYS


def step_memory(config: Any, networks: Networks, platform: str) -> StepMemory:
    """Counts a configuration's parameters, from their shapes alone, and its activations.

    Args:
      platform: of the devices, "tpu" or "gpu"; another counts as "tpu".
    """
    platform = platform if platform in SAVED else "tpu"
    params = jax.eval_shape(lambda: init_params(networks, jax.random.key(0)))
    frozen = jax.eval_shape(lambda: init_frozen(networks))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    model, itemsize = networks.transformer.config, np.dtype(networks.transformer.config.dtype).itemsize
    # Adapters are a small part of the base, which lies with the frozen networks.
    weights = bytes_of(frozen["base"]) if networks.lora else itemsize * count(params)
    blocks = bytes_of(frozen["base"]["blocks"]) if networks.lora else itemsize * count(params["transformer"]["blocks"])
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if FEW_ROWS.search(path_string(path))]
    text_encoder = bytes_of(frozen["text_encoder"])
    averaged = count(params["transformer"]) if config.ema_decay else 0
    return StepMemory(
        weights=weights,
        gradients=0 if networks.lora else weights,
        few_rows=0 if networks.lora else itemsize * count(kernels),
        block=blocks / model.depth,
        state=4 * (3 * count(params) + averaged),
        text_encoder=text_encoder,
        text_block=text_encoder / networks.text_encoder.config.depth,
        autoencoder=bytes_of(frozen["autoencoder"]),
        sums=SUMS[platform] * 4 * count(params),
        activations={remat: sample_activations(config, networks, remat, platform) for remat in SAVED[platform]},
    )


def sample_activations(config: Any, networks: Networks, remat: str, platform: str) -> tuple[float, float]:
    """The bytes of one sample of the stream with most tokens.

    Returns the larger of its encoding and its backward pass, and what is there beside the gradients of all weights.
    """
    model, autoencoder = networks.transformer.config, networks.autoencoder.config
    streams = [stream for stream in config.streams.values() if stream.weight > 0]
    images = 1 + max((stream.num_conditions for stream in streams), default=0)
    passes = 2 if any(has_image_pass(stream.kind) for stream in streams) else 1
    itemsize = np.dtype(model.dtype).itemsize
    target = (config.image_size / autoencoder.downsample_factor / model.patch_size) ** 2
    tokens = (images + passes - 1) * target + passes * config.text_length
    width = tokens * model.width * itemsize
    saved, working = model.depth * SAVED[platform][remat] * width, WORKING[platform] * width
    of_saved, of_working = KEPT[platform + (", paired" if passes == 2 and images == 1 else "")]
    maps = 0.0
    if autoencoder.kind == "kl":
        maps = AUTOENCODER_MAPS * images * config.image_size**2 * autoencoder.block_widths[0]
        maps *= np.dtype(autoencoder.dtype).itemsize
    return max(maps, saved + working), of_saved * saved + of_working * working
