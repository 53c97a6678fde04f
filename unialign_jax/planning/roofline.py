"""The time of a training step on paper: a roofline. Arithmetic from the compiled program, not measured.

    time = max(compute, HBM, overlapped ICI) + exposed ICI + DCN

compute   FLOPs of the model and of recomputation, at the chip's `matmul_share` of the peak; the text encoder's matmuls
          at that of 8 bits where its inputs are rounded too (w8a8, fp8). On TPU attention reaches
          head_width / matrix_unit of that, because its sums over the head width fill only that share of the matrix
          unit, on GPUs `attention_share`; its backward kernels compute the scores again
HBM       compute weights read by each pass, gradients written and read (of kernels that stay split, the chip's part),
          the state read and written, temporaries written and read once. Intermediate results that are written and
          read again are not counted
ICI       bytes that a chip receives in each collective, over the links of its group: every axis of the torus that
          the group spans, in both directions where the axis closes to a ring. Permutes and the pieces of an all-to-all
          take the shortest route, and the busiest link counts.
          Concurrent permutes in one direction share links; the two directions of an axis run in parallel. A collective
          is overlapped if the compiler made it asynchronous (start/done, or split over fusions), otherwise exposed. The
          gradient reductions of parallel/gradients.py are overlapped up to the length of the blocks' backward pass,
          the gathers of weights beside the text encoder's layers up to the length of those, and the other gathers of
          weights up to that of the autoencoder; the excess, and the last block's reduction, are exposed
DCN       bytes between slices over a chip's share of its host's network. Between TPU slices the sums of the blocks'
          gradients run beside the backward pass of the next block: they are overlapped as far as the ICI leaves time of
          that pass. Other bytes are exposed

On GPUs NVLink stands for ICI, all links of a GPU together, and InfiniBand between hosts for DCN.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unialign_jax.data.kinds import has_image_pass
from unialign_jax.models import flops
from unialign_jax.parallel import hardware
from unialign_jax.parallel.sharding import partition_spec, path_string, stays_split
from unialign_jax.planning.collectives import Collective
from unialign_jax.training.state import Networks

# Matmuls of the backward kernel in units of the forward's two: the scores again, and four gradients.
ATTENTION_BACKWARD = 2.5
# Forward passes that a remat policy repeats in the backward pass: (of the blocks' matmuls, of attention).
RECOMPUTED = {"none": (0, 0), "dots": (0, 1), "block": (1, 1), "offload": (1, 1)}

EIGHT_BITS = {"w8a8": "int8", "fp8": "fp8"}  # {way to quantize: the chip's speed at it}

# The permutes inside the scan of parallel/gradients.py; the reduction of the last block comes after the scan.
IN_BLOCKS = re.compile(r"shard_map/while/body/.*ppermute$")
# The gathers of weights in `parallel.sharding.params_for_compute`, by what they overlap with.
BESIDE = {
    "text encoder": re.compile(r"TextEncoder\)?/while/body/.*squeeze$"),
    "autoencoder": re.compile(r"jvp\(\)/(convert_element_type|sharding_constraint)$"),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One step on one chip: `flops` of the model itself, without recomputation; the other parts in seconds.

    `dcn` is the exposed part.
    """

    flops: float
    peak_flops: float  # of the chip, per second
    compute: float
    hbm: float
    ici_overlapped: float
    ici_exposed: float
    dcn: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.ici_overlapped) + self.ici_exposed + self.dcn

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.peak_flops

    @property
    def mfu_overlapped(self) -> float:
        """The MFU if all communication overlapped with compute: the bound of better overlap."""
        seconds = max(self.compute, self.hbm, self.ici_overlapped + self.ici_exposed, self.dcn)
        return self.flops / seconds / self.peak_flops


def step_work(config: ConfigDict, networks: Networks, stream: ConfigDict, chips: int) -> dict[str, Any]:
    """FLOPs of a step per chip: of the "model", and with recomputation those in "matmul" and in "attention".

    "w8a8" or "fp8" has the text encoder's matmuls, if they multiply numbers of 8 bits; "matmul" is then without them.
    "parts" has the same of the blocks' "backward" pass, of the "text encoder" and of the "autoencoder".
    """
    model, text_encoder = networks.transformer.config, networks.text_encoder.config
    image_pass = has_image_pass(stream.kind)
    size = tuple(stream.get("bucket", ())) or (config.image_size, config.image_size)
    sample = flops.training_sample_flops(
        model,
        text_encoder,
        networks.autoencoder.config,
        networks.heads.config if config.loss_weights.intrinsic_modal else None,
        image_size=size,
        text_length=config.text_length,
        num_conditions=stream.num_conditions,
        image_pass=image_pass,
        cached_latents=config.data.cached_latents,
    )
    latents = [side // networks.autoencoder.config.downsample_factor for side in size]
    passes = [stream.num_conditions, 0] if image_pass else [0]  # condition images of each pass
    tokens = [(1 + conditions) * math.prod(latents) / model.patch_size**2 + config.text_length for conditions in passes]
    forward_attention = sum(model.depth * flops.attention(n, model.width) for n in tokens)
    forward = sum(
        flops.mmdit_forward(
            model,
            latent_size=latents,
            text_length=config.text_length,
            num_conditions=conditions,
            velocity_head=False,
        )
        for conditions in passes
    )
    blocks, attention = RECOMPUTED[config.model.remat]
    samples = config.batch_size / chips
    forward_matmul = forward - forward_attention
    length, heads = config.text_length, text_encoder.num_heads * text_encoder.head_width
    of_texts = samples * len(passes) * flops.text_encoder_forward(text_encoder, text_length=length)
    attention_of_texts = samples * len(passes) * text_encoder.depth * flops.attention(length, heads)
    is_rounded = config.quantize_text_encoder in EIGHT_BITS
    matmul_of_texts = {config.quantize_text_encoder if is_rounded else "matmul": of_texts - attention_of_texts}
    eight_bits = matmul_of_texts if is_rounded else {}
    images, side = 1 + stream.num_conditions, math.sqrt(math.prod(size))
    of_images = images * flops.autoencoder_encode(networks.autoencoder.config, image_size=side)
    of_images = 0.0 if config.data.cached_latents else of_images
    # Where the chips that share samples (mesh.context) cannot divide their images, each encodes all of them.
    context = max(config.mesh.context, 1)
    group = samples * context * max(config.mesh.tensor, 1) / config.accumulation
    repeated = (context - 1) * of_images if group * images % context else 0.0
    return {
        **eight_bits,
        "model": samples * sample,
        "matmul": samples * (sample - 3 * forward_attention + blocks * forward_matmul + repeated)
        - sum(eight_bits.values()),
        "attention": samples * forward_attention * (1 + ATTENTION_BACKWARD + attention),
        "parts": {
            "backward": {
                "matmul": samples * (2 + blocks) * forward_matmul,
                "attention": samples * forward_attention * (ATTENTION_BACKWARD + attention),
            },
            "text encoder": {"matmul": 0.0, "attention": attention_of_texts} | matmul_of_texts,
            "autoencoder": {"matmul": samples * of_images, "attention": 0.0},
        },
    }


def compute_seconds(work: dict[str, float], chip: hardware.Chip, head_width: int) -> float:
    filled = min(1.0, head_width / chip.matrix_unit) if chip.matrix_unit else chip.attention_share
    eight_bits = sum(work.get(mode, 0.0) / getattr(chip, kind) for mode, kind in EIGHT_BITS.items())
    return (work["matmul"] + eight_bits + work["attention"] / filled) / (chip.peak * chip.matmul_share)


def held_bytes(tree: Any) -> int:
    """Bytes per device of a tree of ShapeDtypeStructs with shardings, without padding."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def hbm_bytes(config: ConfigDict, state: Any, frozen: Any, mesh: jax.sharding.Mesh, temporaries: int) -> float:
    """Bytes that a chip reads and writes of its memory in a step; see the module's formula."""
    weights = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        path, shape = path_string(path), leaf.shape
        if stays_split(path, shape, mesh):
            shape = jax.NamedSharding(mesh, partition_spec(path, shape, mesh, state=True)).shard_shape(shape)
        weights += 2 * math.prod(shape) / mesh.shape["tensor"]
    passes = 2 + RECOMPUTED[config.model.remat][0]
    repeated = config.accumulation * (passes * weights + held_bytes(frozen))
    return repeated + 2 * weights + 2 * held_bytes(state) + 2 * temporaries


def link_seconds(
    collectives: list[Collective],
    chip: hardware.Chip,
    devices: list,
    slice_of: np.ndarray,
    parts: dict[str, float],
) -> tuple[float, float]:
    """Seconds on the links inside a slice, or inside a host of GPUs: (overlapped, exposed)."""
    if chip.axes:
        return ici_seconds(collectives, chip, devices, slice_of, parts)
    seconds = {True: 0.0, False: 0.0}
    for collective in collectives:
        inside = collective.received - collective.received_across(slice_of)
        seconds[collective.overlaps] += inside / chip.link
    return seconds[True], seconds[False]


def ici_seconds(
    collectives: list[Collective],
    chip: hardware.Chip,
    devices: list,
    slice_of: np.ndarray,
    parts: dict[str, float],
) -> tuple[float, float]:
    """Seconds on the interconnect of a TPU slice: (overlapped, exposed).

    Args:
      slice_of: [devices], the slice of each.
      parts: seconds of compute of "parts" in `step_work`, with which gathers and reductions overlap.
    """
    coordinates = np.array([getattr(device, "coords", (0, 0, 0)) for device in devices])
    shape = coordinates.max(axis=0) + 1
    overlapped, exposed, gathers = 0.0, 0.0, dict.fromkeys(BESIDE, 0.0)
    in_blocks, after_blocks, other = {}, {}, {}  # overlapped permutes, {(axis, direction): seconds}
    for collective in collectives:
        if collective.between_slices:
            continue
        if collective.kind == "collective-permute":
            inside = slice_of[collective.groups[:, 0]] == slice_of[collective.groups[:, 1]]
            flows = link_flows(chip, coordinates[collective.groups[inside]], shape)
            busy = {way: collective.times * collective.sent * count / chip.link for way, count in flows.items()}
            if not collective.overlaps:
                exposed += max(busy.values(), default=0.0)
                continue
            is_reduction = collective.name.endswith("/ppermute")
            together = other if not is_reduction else in_blocks if IN_BLOCKS.search(collective.name) else after_blocks
            for way, seconds in busy.items():
                together[way] = together.get(way, 0.0) + seconds
            continue
        if collective.kind == "all-to-all":
            pairs = np.array([pair for group in collective.groups for pair in itertools.permutations(group, 2)])
            pairs = pairs[slice_of[pairs[:, 0]] == slice_of[pairs[:, 1]]]
            piece = collective.times * collective.sent / collective.groups.shape[1]
            flows = link_flows(chip, coordinates[pairs], shape).values()
            seconds = piece * max(flows, default=0) / chip.link
            overlapped += seconds if collective.overlaps else 0.0
            exposed += 0.0 if collective.overlaps else seconds
            continue
        inside = collective.received - collective.received_across(slice_of)
        if inside > 0:
            # A group over several slices exchanges inside each of them: take the first group's part in its first slice.
            group = collective.groups[0]
            group = group[slice_of[group] == slice_of[group[0]]]
            seconds = inside / group_bandwidth(chip, coordinates[group], shape)
            part = next((part for part, names in BESIDE.items() if names.search(collective.name)), None)
            if collective.overlaps and collective.kind == "all-gather" and part:
                gathers[part] += seconds
                continue
            overlapped += seconds if collective.overlaps else 0.0
            exposed += 0.0 if collective.overlaps else seconds
    limited = gathers | {"backward": both_ways(in_blocks)}
    for part, seconds in limited.items():
        overlapped += min(seconds, parts[part])
        exposed += max(0.0, seconds - parts[part])
    return overlapped + both_ways(other), exposed + both_ways(after_blocks)


def dcn_seconds(
    collectives: list[Collective], chip: hardware.Chip, slice_of: np.ndarray, times: int, room: float
) -> float:
    """Exposed seconds on the network between slices, or between hosts of GPUs.

    Args:
      times: how often a step runs the backward pass of a block; between slices, what runs as often belongs to it.
      room: seconds of that pass beside which nothing else is overlapped.
    """
    if not chip.network:
        return 0.0
    across = [(collective.received_across(slice_of) / chip.network, collective) for collective in collectives]
    in_blocks = sum(seconds for seconds, found in across if found.between_slices and found.times >= times)
    return sum(seconds for seconds, _ in across) - min(in_blocks, room)


def both_ways(busy: dict[tuple[int, int], float]) -> float:
    """Seconds of permutes {(axis, +1 or -1): seconds}: one axis after the other, both directions of it in parallel."""
    axes = {axis for axis, _ in busy}
    return sum(max(busy.get((axis, way), 0.0) for way in (1, -1)) for axis in axes)


def group_bandwidth(chip: hardware.Chip, coordinates: np.ndarray, shape: Sequence[int]) -> float:
    """Bytes/s that each chip of a group receives over the axes of the torus that the group spans.

    An axis gives a link in one direction, or in both where the group is a whole axis that closes to a ring. A group
    that takes every n-th chip shares its links with n - 1 other groups.

    Args:
      coordinates: int [members, axes], the places of the group's chips.
      shape: chips of the slice along each axis.
    """
    rings = hardware.rings(chip.name, shape)
    total = 0.0
    for axis in range(chip.axes):
        places = np.unique(coordinates[:, axis])
        if len(places) > 1:
            stride = (places[-1] - places[0]) / (len(places) - 1)
            ring = rings[axis] and len(places) * stride == shape[axis]
            total += chip.link * (2 if ring else 1) / stride
    return total or chip.link


def link_flows(chip: hardware.Chip, pairs: np.ndarray, shape: Sequence[int]) -> dict[tuple[int, int], int]:
    """Messages on the busiest link of each direction, {(axis, +1 or -1): count}, on the shortest routes.

    Args:
      pairs: int [pairs, 2, axes], from where to where; a message travels along one axis after the other.
      shape: chips of the slice along each axis.
    """
    rings = hardware.rings(chip.name, shape)
    links = {}
    for start, end in np.asarray(pairs):
        place = start.copy()
        for axis in range(chip.axes):
            steps = int(end[axis] - start[axis])
            if rings[axis] and 2 * abs(steps) > shape[axis]:
                steps -= int(np.sign(steps)) * int(shape[axis])
            for _ in range(abs(steps)):
                link = (axis, int(np.sign(steps)), *place)
                links[link] = links.get(link, 0) + 1
                place[axis] = (place[axis] + np.sign(steps)) % shape[axis]
    return {way: max(n for link, n in links.items() if link[:2] == way) for way in {link[:2] for link in links}}
