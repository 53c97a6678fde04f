"""Search for the fastest micro-batches and remat policy that fit.

A compilation takes minutes, so arithmetic orders the candidates: each has an estimate of its time and of its memory
(`training.meshes.estimate`). The compiler says whether it fits; the ratio of the two corrects the other estimates.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from unialign_jax.data.kinds import has_image_pass
from unialign_jax.parallel import hardware
from unialign_jax.planning.roofline import compute_seconds, group_bandwidth, step_work
from unialign_jax.planning.step import StepPlan
from unialign_jax.planning.topology import GIB, DoesNotFit
from unialign_jax.training import meshes
from unialign_jax.training.config import active_streams, batch_shards
from unialign_jax.training.program import make_networks
from unialign_jax.training.state import Networks

POLICIES = ("none", "dots", "block")
FALLBACK_POLICIES = ("offload",)  # tried when none of those fits: the cost of transfers to the host is not known
COMPILE_MARGIN = 1.1  # compile a candidate if its corrected estimate is below COMPILE_MARGIN x usable memory


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a step, with estimates by arithmetic: memory of a chip in bytes, seconds of a step."""

    accumulation: int
    remat: str
    estimate: float
    seconds: float

    def applied_to(self, config: ConfigDict) -> ConfigDict:
        trial = config.copy_and_resolve_references()
        trial.accumulation, trial.model.remat = self.accumulation, self.remat
        return trial


@dataclasses.dataclass(frozen=True)
class Trial:
    """One compilation of a search; `bytes` is None where the compiler gave no number."""

    accumulation: int
    remat: str
    bytes: int | None
    fits: bool


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The fastest plan that fits, or None with the compiler's last error; and all compilations in order."""

    plan: StepPlan | None
    tried: list[Trial]
    out_of_memory: str | None


def heaviest_stream(config: ConfigDict, names: list[str]) -> str:
    """The stream that takes the most memory: most condition images first, then an image pass."""
    streams = active_streams(config)
    return max(names, key=lambda name: (streams[name].num_conditions, has_image_pass(streams[name].kind), name))


def candidates(config: ConfigDict, devices: list, name: str) -> list[Candidate]:
    """All ways to run the stream `name`, the fastest estimate first, those of FALLBACK_POLICIES last.

    The estimated time of a step is its compute, with recomputation, plus the sums of the text encoder's group,
    plus for each micro-batch the transfers of weights that do not overlap: one gather, or under fsdp two gathers,
    that of the text encoder and the reduction of the gradients.

    Raises ValueError for a configuration that cannot run on the devices in any number of micro-batches.
    """
    whole = config.copy_and_resolve_references()
    whole.accumulation = 1
    networks = make_networks(whole, devices)
    stream = active_streams(config)[name]
    needs = meshes.step_memory(config, networks, devices[0].platform)
    chip = hardware.find_chip(devices[0].device_kind)
    places = np.array([getattr(device, "coords", (0, 0, 0)) for device in devices])
    grid = places.max(axis=0) + 1
    bandwidth = group_bandwidth(chip, places, grid)
    rows = config.batch_size // batch_shards(config.mesh, len(devices))  # of one chip
    result = []
    for count in (count for count in range(1, rows + 1) if rows % count == 0):
        for remat in (*POLICIES, *FALLBACK_POLICIES):
            candidate = Candidate(count, remat, estimate=0.0, seconds=0.0)
            trial = candidate.applied_to(config)
            sizes = meshes.mesh_for(trial, devices, networks, needs).sizes
            moved = 3 * needs.weights + needs.text_encoder if sizes["fsdp"] > 1 else needs.weights
            moved *= len(devices) > 1
            work = step_work(trial, networks, stream, len(devices))
            seconds = compute_seconds(work, chip, config.model.head_width) + count * moved / bandwidth
            seconds += text_encoder_seconds(config, networks, stream, rows, sizes["encoder"], chip, grid)
            estimate = meshes.estimate(needs, sizes, rows / count, remat, count)
            result.append(dataclasses.replace(candidate, estimate=estimate, seconds=seconds))
    return sorted(result, key=lambda candidate: (candidate.remat in FALLBACK_POLICIES, candidate.seconds))


def text_encoder_seconds(
    config: ConfigDict,
    networks: Networks,
    stream: ConfigDict,
    rows: int,
    group: int,
    chip: hardware.Chip,
    grid: Sequence[int],
) -> float:
    """Seconds of a step in the all-reduces, two for each layer, of `group` neighbours that share a text encoder.

    Args:
      rows: samples of one chip.
      grid: chips along each axis of the torus.
    """
    if group == 1:
        return 0.0
    encoder = networks.text_encoder.config
    tokens = group * rows * (1 + has_image_pass(stream.kind)) * config.text_length
    received = 2 * encoder.depth * tokens * encoder.width * 2 * (group - 1) / group
    received *= np.dtype(encoder.dtype).itemsize
    closed = zip(grid, hardware.rings(chip.name, grid), strict=True)
    return received / (chip.link * (2 if (group, True) in closed else 1))


def search(ordered: list[Candidate], usable: float, compile_step: Callable[[Candidate], StepPlan]) -> SearchResult:
    """The first of `ordered` that fits and leaves ROOM (parallel/hardware.py), with few compilations.

    The first candidate whose estimate fits is compiled first. After a candidate fits, faster ones are compiled too,
    except those estimated above one that already failed, or above COMPILE_MARGIN x usable after correction. If no
    estimate fits, the smallest candidate is compiled, so that the error can quote the compiler.

    Args:
      usable: bytes that the compiler may use.
      compile_step: gives the plan of a candidate, or raises DoesNotFit.
    """
    best, plan, out_of_memory = len(ordered), None, None
    tried, done = [], set()
    correction, failed = 1.0, math.inf  # compiled over estimated bytes; the least estimate of those that did not fit
    while True:
        room = (1 - hardware.ROOM) * usable * (COMPILE_MARGIN if plan else 1)
        left = [c for c in ordered[:best] if c not in done and c.estimate < failed]
        chosen = next((c for c in left if c.estimate * correction <= room), None)
        if chosen is None and plan is None and left:
            chosen = min(left, key=lambda c: c.estimate)
        if chosen is None:
            return SearchResult(plan, tried, None if plan else out_of_memory)
        done.add(chosen)
        try:
            answer = compile_step(chosen)
            compiled = answer.memory.peak
            fits = compiled <= (1 - hardware.ROOM) * usable
        except DoesNotFit as error:
            out_of_memory, compiled, fits = str(error), error.needed, False
        else:
            if not fits:
                numbers = f"{compiled / GIB:.2f} of {usable / GIB:.2f} GiB"
                room = f"{100 * hardware.ROOM:.0f}% stay free"
                out_of_memory = f"the step of {answer.stream} does not fit: it needs {numbers}, of which {room}"
        tried.append(Trial(chosen.accumulation, chosen.remat, compiled, fits))
        if fits:
            best, plan = ordered.index(chosen), answer
        else:
            failed = min(failed, chosen.estimate)
        if compiled:
            correction = compiled / chosen.estimate
