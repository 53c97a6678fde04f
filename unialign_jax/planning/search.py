"""The fastest way to run a step that fits: how many micro-batches, and what the backward pass recomputes.

A compilation takes minutes, so arithmetic says where to begin: all choices in the order of their time on paper, each
with the bytes that it should need. What the compiler answers corrects the arithmetic, and so says where to go on.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from unialign_jax.parallel import hardware
from unialign_jax.planning.sampling_plan import GIB
from unialign_jax.planning.step_plan import DoesNotFit, StepPlan, compute_seconds, group_bandwidth, step_work
from unialign_jax.training import meshes
from unialign_jax.training.config import active_streams, batch_shards
from unialign_jax.training.program import make_networks
from unialign_jax.training.step import has_image_pass

POLICIES = ("none", "dots", "block")
LAST = ("offload",)  # tried where none of those fits: what it costs to go to the host's memory and back is not known
DOUBT = 1.1  # needs by corrected arithmetic that are worth a compilation, of what there is


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a step, on paper: `need` in bytes, `seconds` of a step."""

    accumulation: int
    remat: str
    need: float
    seconds: float

    def applied_to(self, config):
        trial = config.copy_and_resolve_references()
        trial.accumulation, trial.model.remat = self.accumulation, self.remat
        return trial


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search: the plan that was chosen, or None, and all that was compiled.

    `tried` has for each compilation {"accumulation", "remat", "bytes", "fits"}, in order; bytes are None where the
    compiler gave no number. `misfit` is the compiler's last refusal.
    """

    plan: StepPlan | None
    tried: list[dict]
    misfit: str | None


def heaviest_stream(config, names) -> str:
    """Of some streams the one that takes the most memory: with the most condition images, or else an image pass."""
    streams = config.streams
    return max(names, key=lambda name: (streams[name].num_conditions, has_image_pass(streams[name].kind), name))


def candidates(config, devices, name: str) -> list[Candidate]:
    """All ways to run the stream `name`, the fastest on paper first, those of LAST at the end.

    A step's time is its compute, recomputation included, and for each micro-batch what moves the weights and does not
    run beside compute: gathering them once, or under fsdp twice and reducing their gradients.

    Raises ValueError for a configuration that cannot run there in any number of micro-batches.
    """
    whole = config.copy_and_resolve_references()
    whole.accumulation = 1
    networks = make_networks(whole, devices)
    stream = active_streams(config)[name]
    needs = meshes.read_needs(config, networks)
    chip = hardware.find_chip(devices[0].device_kind)
    places = np.array([getattr(device, "coords", (0, 0, 0)) for device in devices])
    bandwidth = group_bandwidth(chip, places, places.max(axis=0) + 1)
    rows = config.batch_size // batch_shards(config.mesh, len(devices))  # of one chip
    result = []
    for count in (count for count in range(1, rows + 1) if rows % count == 0):
        for remat in (*POLICIES, *LAST):
            candidate = Candidate(count, remat, 0.0, 0.0)
            trial = candidate.applied_to(config)
            sizes = meshes.mesh_for(trial, devices, networks, needs).sizes
            moved = needs.weights * (3 if sizes["fsdp"] > 1 else 1) * (len(devices) > 1)
            work = step_work(trial, networks, stream, len(devices))
            seconds = compute_seconds(work, chip, config.model.head_width) + count * moved / bandwidth
            need = meshes.estimate(needs, sizes, rows / count, remat)
            result.append(dataclasses.replace(candidate, need=need, seconds=seconds))
    return sorted(result, key=lambda candidate: (candidate.remat in LAST, candidate.seconds))


def search(ordered: list[Candidate], usable: int, compile_step: Callable[[Candidate], StepPlan]) -> Found:
    """The first of `ordered` that fits, with few compilations.

    It begins with the first that fits by arithmetic. Once a plan fits, those before it are compiled too, unless they
    need more than one that did not fit, or by the corrected arithmetic DOUBT times more than there is. Where arithmetic
    leaves nothing, the one that needs least is compiled, so that a misfit has the compiler's numbers.

    Args:
      usable: bytes that the compiler may use.
      compile_step: gives the plan of a candidate, or raises DoesNotFit.
    """
    best, plan, misfit = len(ordered), None, None
    tried, done = [], set()
    correction, refused = 1.0, math.inf  # measured over estimated, and the least estimate of those that did not fit
    while True:
        room = usable * (DOUBT if plan else 1)
        left = [c for c in ordered[:best] if c not in done and c.need < refused]
        chosen = next((c for c in left if c.need * correction <= room), None)
        if chosen is None and plan is None and left:
            chosen = min(left, key=lambda c: c.need)
        if chosen is None:
            return Found(plan, tried, None if plan else misfit)
        done.add(chosen)
        try:
            answer = compile_step(chosen)
            measured, fits = answer.peak, answer.fits
        except DoesNotFit as error:
            misfit, measured, fits = str(error), error.needed, False
        else:
            if not fits:
                numbers = f"{answer.peak / GIB:.2f} of {usable / GIB:.2f} GiB"
                misfit = f"the step of {answer.stream} does not fit: it needs {numbers}"
        tried.append({"accumulation": chosen.accumulation, "remat": chosen.remat, "bytes": measured, "fits": fits})
        if fits:
            best, plan = ordered.index(chosen), answer
        else:
            refused = min(refused, chosen.need)
        if measured:
            correction = measured / chosen.need
