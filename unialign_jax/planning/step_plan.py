"""What a training step needs of chips that are not here: the real step, compiled ahead of time, and a roofline.

    time = max(compute, HBM, overlapped ICI) + exposed ICI + DCN

compute   the model's FLOPs and those of recomputation at MATMUL_SHARE of the peak; attention at head_width /
          matrix_unit of that, for its sums over the head width leave the rest of the matrix unit idle, and with what
          its backward kernels compute twice
HBM       compute weights read by each pass over them, gradients written and read, the state read and written,
          temporaries written and read once: what is written and read again in between is not seen
ICI       bytes that a chip receives, by collective, over the links that its group has: each axis of the torus that the
          group spans, both ways where it closes to a ring. A permute takes its shortest way; overlapped ones share
          the links of a way along an axis, and the two ways run at once. Overlapped is what the compiler runs beside
          other work (it has a start and an end, or is split over fusions), exposed the rest; of the sums of the
          blocks' gradients (gradients.py) also what is longer than the backward pass of the blocks, and the last
DCN       bytes between slices over a chip's share of its host's network, never overlapped

These are arithmetic, not measurements.
"""

import dataclasses
import math
import re

import jax
import numpy as np

from unialign_jax.models import flops
from unialign_jax.parallel import hardware, sharding
from unialign_jax.planning.collectives import KINDS, Collective, read_collectives
from unialign_jax.planning.sampling_plan import GIB
from unialign_jax.training.config import active_streams, build_configs, config_problems, listed
from unialign_jax.training.meshes import mesh_for
from unialign_jax.training.optimizer import make_optimizer
from unialign_jax.training.state import Networks, abstract_frozen, abstract_state
from unialign_jax.training.step import batch_shapes, has_image_pass, lower_train_step, make_train_step

MATMUL_SHARE = 0.85  # of peak that large matmuls reach, an assumption
# Matmuls of the backward kernel in units of the two of the forward: the scores again, and four gradients.
ATTENTION_BACKWARD = 2.5
# A policy's recomputation in the backward pass: a whole forward of the blocks, or of attention alone.
RECOMPUTED = {"none": (0, 0), "dots": (0, 1), "block": (1, 1), "offload": (1, 1)}

# The permutes of parallel/gradients.py inside its scan, without the sum of the last block's gradients after it.
IN_BLOCKS = re.compile(r"shard_map/while/body/.*ppermute$")


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A compiled step on one chip. Memory in bytes, `flops` the model's own of a step, times in seconds."""

    stream: str
    chips: int
    mesh: dict  # {axis: size}
    mesh_reason: str
    batch_size: int
    accumulation: int
    remat: str
    parameters: int  # the float32 masters
    optimizer: int  # moments, average, step
    frozen: int
    batch: int
    temporaries: int  # compute weights, activations, gradients, and what the compiler puts beside them
    code: int
    usable: int | None
    flops: float
    # From here the roofline, None where hardware.py does not know the chip's networks, as of CPUs and GPUs.
    compute: float | None
    hbm: float | None
    ici_overlapped: float | None
    ici_exposed: float | None
    dcn: float | None
    peak_flops: float | None
    bytes_inside: dict  # {kind of collective: bytes received from this slice}
    bytes_across: dict  # from other slices

    @property
    def peak(self) -> int:
        parts = (self.parameters, self.optimizer, self.frozen, self.batch, self.temporaries, self.code)
        return sum(parts)

    @property
    def fits(self) -> bool:
        return self.usable is None or self.peak <= self.usable

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.ici_overlapped) + self.ici_exposed + self.dcn

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.peak_flops

    @property
    def mfu_overlapped(self) -> float:
        """The same if all communication could run beside the compute: what better overlap could reach."""
        seconds = max(self.compute, self.hbm, self.ici_overlapped + self.ici_exposed, self.dcn)
        return self.flops / seconds / self.peak_flops

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds


class DoesNotFit(ValueError):
    """The compiler could not place the step in the chip's memory; `needed` is the bytes it says, or None."""

    def __init__(self, message: str, needed: int | None = None):
        super().__init__(message)
        self.needed = needed


def plan_step(config, devices, name: str, *, usable=None, dump=None, chip=None) -> StepPlan:
    """Compiles the step of the stream `name` of a configuration for the devices of a topology.

    Args:
      usable: bytes that the compiler may use on a device.
      dump: a file for the optimised HLO, or None.
      chip: whose bandwidths count; the devices' own when None.

    Raises ValueError for a configuration that cannot run there, DoesNotFit when the compiler finds no room.
    """
    problems = config_problems(config, len(devices))
    if problems:
        raise ValueError(listed("the configuration cannot run", problems))
    networks = Networks.create(*build_configs(config, devices[0].platform))
    choice = mesh_for(config, devices, networks)
    mesh = sharding.make_mesh(**choice.sizes, devices=devices)
    networks = networks.on(mesh)
    tx, schedule = make_optimizer(**config.optimizer, decay_1d=config.parity.decay_1d)
    state = abstract_state(networks, tx, config.ema_decay, mesh)
    frozen = abstract_frozen(networks, mesh)
    stream = active_streams(config)[name]
    # Any ids serve: they change no shape.
    step = make_train_step(config, networks, tx, schedule, stream.kind, config.model.vocab_size - 1, 1)
    lowered = lower_train_step(step, mesh, state, frozen, batch_shapes(config, stream))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise misfit(name, str(error)) from None
    text = compiled.as_text()
    if dump:
        dump.write_text(text)
    memory = compiled.memory_analysis()
    parameters, optimizer, frozen_bytes = (held_bytes(tree) for tree in (state.params, state[2:], frozen))
    # What the compiler's layouts pad is the state's, of which it is the largest part.
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch_shapes(config, stream).values()) // math.prod(
        mesh.shape[axis] for axis in sharding.BATCH[0]
    )
    padding = memory.argument_size_in_bytes - parameters - optimizer - frozen_bytes - batch
    chip = chip or hardware.find_chip(devices[0].device_kind)
    work = step_work(config, networks, stream, len(devices))
    collectives = read_collectives(text)
    slice_of = np.array([getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat])
    inside = {kind: 0.0 for kind in KINDS}
    across = {kind: 0.0 for kind in KINDS}
    for collective in collectives:
        between = collective.received_across(slice_of)
        across[collective.kind] += between
        inside[collective.kind] += collective.received - between
    roofline = dict.fromkeys(("compute", "hbm", "ici_overlapped", "ici_exposed", "dcn", "peak_flops"))
    if chip and chip.memory_bandwidth:
        head_width = config.model.head_width
        backward = compute_seconds(work["backward"], chip, head_width)
        overlapped, exposed = ici_seconds(collectives, chip, list(mesh.devices.flat), slice_of, backward)
        roofline = {
            "compute": compute_seconds(work, chip, head_width),
            "hbm": hbm_bytes(config, state, frozen, mesh, memory.temp_size_in_bytes) / chip.memory_bandwidth,
            "ici_overlapped": overlapped,
            "ici_exposed": exposed,
            "dcn": sum(across.values()) / chip.network if chip.network else 0.0,
            "peak_flops": chip.peak,
        }
    return StepPlan(
        stream=name,
        chips=len(devices),
        mesh=choice.sizes,
        mesh_reason=choice.reason,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        remat=config.model.remat,
        parameters=parameters,
        optimizer=optimizer + padding,
        frozen=frozen_bytes,
        batch=batch,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        usable=usable,
        flops=work["model"],
        bytes_inside=inside,
        bytes_across=across,
        **roofline,
    )


def misfit(name, message) -> DoesNotFit:
    """The compiler's refusal in one line, with its numbers."""
    flat = " ".join(message.split())
    whole = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+\w) hbm", flat)
    part = re.search(r"HLO temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+\w)\)", flat)
    match = whole or part
    if not match:
        return DoesNotFit(f"the step of {name} does not fit: {flat[:200]}")
    needed = round(float(match[1][:-1]) * 2 ** (10 * (1 + "KMGT".index(match[1][-1]))))
    alone = "" if whole else ", for temporaries alone"
    return DoesNotFit(f"the step of {name} does not fit: it needs {match[1]} of {match[2]}{alone}", needed)


def held_bytes(tree) -> int:
    """What one device holds of a tree of ShapeDtypeStructs with shardings, unpadded."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_work(config, networks, stream, chips) -> dict:
    """FLOPs of a step on one chip: the "model"'s, and as done, with recomputation, in "matmul" and in "attention".

    "backward" has those two of the blocks' backward pass alone.
    """
    model, text_encoder = networks.transformer.config, networks.text_encoder.config
    image_pass = has_image_pass(stream.kind)
    sample = flops.training_sample_flops(
        model,
        text_encoder,
        networks.autoencoder.config,
        networks.heads.config if config.loss_weights.intrinsic_modal else None,
        image_size=config.image_size,
        text_length=config.text_length,
        num_conditions=stream.num_conditions,
        image_pass=image_pass,
    )
    side = config.image_size // networks.autoencoder.config.downsample_factor
    lengths = [(0, image_pass), (1, True)]
    tokens = [
        (1 + (stream.num_conditions if i == 0 else 0)) * (side / model.patch_size) ** 2 + config.text_length
        for i, runs in lengths
        if runs
    ]
    forward_attention = sum(model.depth * flops.attention(n, model.width) for n in tokens)
    whole = [
        flops.mmdit_forward(
            model,
            latent_size=(side, side),
            text_length=config.text_length,
            num_conditions=stream.num_conditions if i == 0 else 0,
            velocity_head=False,
        )
        for i, runs in lengths
        if runs
    ]
    blocks, attention = RECOMPUTED[config.model.remat]
    samples = config.batch_size / chips
    forward_matmul = sum(whole) - forward_attention
    return {
        "model": samples * sample,
        "matmul": samples * (sample - 3 * forward_attention + blocks * forward_matmul),
        "attention": samples * forward_attention * (1 + ATTENTION_BACKWARD + attention),
        "backward": {
            "matmul": samples * (2 + blocks) * forward_matmul,
            "attention": samples * forward_attention * (ATTENTION_BACKWARD + attention),
        },
    }


def compute_seconds(work, chip, head_width) -> float:
    filled = min(1.0, head_width / chip.matrix_unit) if chip.matrix_unit else 1.0
    return (work["matmul"] + work["attention"] / filled) / (chip.peak * MATMUL_SHARE)


def hbm_bytes(config, state, frozen, mesh, temporaries) -> float:
    """What a chip reads and writes of its memory in a step; see the module's formula."""
    weights = 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) / mesh.shape["tensor"]
    passes = 2 + RECOMPUTED[config.model.remat][0]
    repeated = config.accumulation * (passes * weights + held_bytes(frozen))
    return repeated + 2 * weights + 2 * held_bytes(state) + 2 * temporaries


def ici_seconds(collectives: list[Collective], chip, devices, slice_of, backward) -> tuple[float, float]:
    """Seconds on the interconnect of a slice: (of what overlaps with other work, of what does not).

    Args: `backward`: seconds of compute in the backward pass of the blocks, beside which their gradients are summed.
    """
    coordinates = np.array([getattr(device, "coords", (0, 0, 0)) for device in devices])
    shape = coordinates.max(axis=0) + 1
    seconds = [0.0, 0.0]
    in_blocks, after_blocks, other = {}, {}, {}  # overlapped permutes, {way: seconds}
    for collective in collectives:
        if collective.between_slices:
            continue
        if collective.kind == "collective-permute":
            inside = slice_of[collective.groups[:, 0]] == slice_of[collective.groups[:, 1]]
            flows = link_flows(chip, coordinates[collective.groups[inside]], shape)
            busy = {way: collective.times * collective.sent * count / chip.link for way, count in flows.items()}
            if not collective.overlaps:
                seconds[1] += max(busy.values(), default=0.0)
                continue
            ours = collective.name.endswith("/ppermute")
            together = other if not ours else in_blocks if IN_BLOCKS.search(collective.name) else after_blocks
            for way, time in busy.items():
                together[way] = together.get(way, 0.0) + time
            continue
        inside = collective.received - collective.received_across(slice_of)
        if inside > 0:
            # Groups of several slices exchange inside each: the part of the first group in its first slice.
            group = collective.groups[0]
            group = group[slice_of[group] == slice_of[group[0]]]
            bandwidth = group_bandwidth(chip, coordinates[group], shape)
            seconds[0 if collective.overlaps else 1] += inside / bandwidth
    summing = both_ways(in_blocks)
    hidden = min(summing, backward)
    return seconds[0] + both_ways(other) + hidden, seconds[1] + both_ways(after_blocks) + summing - hidden


def both_ways(busy: dict[tuple[int, int], float]) -> float:
    """Seconds of permutes {(axis, +1 or -1): seconds}: one axis after the other, both ways along it at once."""
    axes = {axis for axis, _ in busy}
    return sum(max(busy.get((axis, way), 0.0) for way in (1, -1)) for axis in axes)


def group_bandwidth(chip, coordinates, shape) -> float:
    """Bytes/s that each chip of a group receives over the axes of the torus that the group spans.

    Args:
      coordinates: int [members, axes], where the group's chips are.
      shape: chips of the slice along each axis.

    An axis gives a link in one direction, or in both where the group is the whole of an axis that closes to a ring;
    a group that takes every n-th chip shares its links with n - 1 others.
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


def link_flows(chip, pairs, shape) -> dict[tuple[int, int], int]:
    """Messages on the busiest link of each way, {(axis, +1 or -1): count}, when each goes the shortest way.

    Args: `pairs`: int [pairs, 2, axes], from where to where; routed along one axis after the other.
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


def report(config, plans: list[StepPlan]) -> dict:
    """Tables (`sampling_plan.format_table`) of the streams' plans, and of the stage by the streams' shares of steps."""
    streams = active_streams(config)
    total = sum(streams[plan.stream].weight for plan in plans) or 1.0
    memory, network, speed = [], [], []
    for plan in plans:
        memory.append(
            {
                "GiB a chip": plan.stream,
                "parameters": plan.parameters / GIB,
                "optimizer": plan.optimizer / GIB,
                "frozen": plan.frozen / GIB,
                "batch": plan.batch / GIB,
                "activations": plan.temporaries / GIB,
                "code": plan.code / GIB,
                "peak": plan.peak / GIB,
                "usable": (plan.usable or 0) / GIB,
            }
        )
        for place, received in (("in the slice", plan.bytes_inside), ("across slices", plan.bytes_across)):
            if place == "in the slice" or any(received.values()):
                row = {"GB received a chip": f"{plan.stream}, {place}"}
                row |= {kind: number / 1e9 for kind, number in received.items()}
                network.append(row | {"total": sum(received.values()) / 1e9})
        speed.append(
            {
                "ms a step": plan.stream,
                "TFLOP a chip": plan.flops / 1e12,
                "compute": 1e3 * plan.compute,
                "hbm": 1e3 * plan.hbm,
                "ici overlapped": 1e3 * plan.ici_overlapped,
                "ici exposed": 1e3 * plan.ici_exposed,
                "dcn": 1e3 * plan.dcn,
                "step": 1e3 * plan.seconds,
                "MFU %": 100 * plan.mfu,
                "all overlapped %": 100 * plan.mfu_overlapped,
                "images/s": plan.images_per_second,
            }
        )
    tables = {"memory": memory, "interconnect": network, "roofline (arithmetic, not measured)": speed}
    if {plan.stream for plan in plans} == streams.keys():
        seconds = sum(streams[plan.stream].weight / total * plan.seconds for plan in plans)
        work = sum(streams[plan.stream].weight / total * plan.flops for plan in plans)
        hours = config.num_steps * seconds / 3600
        tables["the stage"] = [
            {
                config.name or "stage": f"{config.num_steps} steps",
                "images/s": config.batch_size / seconds,
                "MFU %": 100 * work / seconds / plans[0].peak_flops,
                "hours": hours,
                "chip-hours": hours * plans[0].chips,
            }
        ]
    return {"tables": tables, "steps": [dataclasses.asdict(plan) | {"peak": plan.peak} for plan in plans]}
