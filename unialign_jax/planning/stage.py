"""All steps of a configuration on one machine: searched, compiled, and added up to the stage."""

import dataclasses
import math
import sys
from pathlib import Path

from ml_collections import ConfigDict

from unialign_jax.planning import search, step, topology
from unialign_jax.planning.step import StepPlan
from unialign_jax.training.config import active_streams, config_problems


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The steps of a configuration's streams, each compiled by itself."""

    config: ConfigDict  # with the accumulation and remat of the search
    device_kind: str
    chips: int
    usable: int | None  # bytes that the compiler may use on a chip
    steps: list[StepPlan]
    out_of_memory: list[str]  # the compiler's errors, of streams that have no step
    tried: list[search.Trial]

    @property
    def fits(self) -> bool:
        return not self.out_of_memory and all(plan.memory.fits for plan in self.steps)


def plan_stage(
    config: ConfigDict,
    topology_name: str,
    num_slices: int = 1,
    *,
    stream: str | None = None,
    searching: bool = False,
    dump: Path | None = None,
) -> StagePlan:
    """Compiles the steps of a configuration for slices of a topology.

    Args:
      topology_name: such as "v5e-256", "v4:4x4x4" or "h100:8".
      stream: this stream alone; all active ones when None.
      searching: whether accumulation and remat are searched, for the heaviest stream; otherwise the configuration's.
        Where nothing fits, the result has no steps.
      dump: a folder for the optimised HLO.

    Raises ValueError for a configuration, stream or topology that cannot be.
    """
    topology.count_chips(topology_name)
    if problems := config_problems(config):  # those of the mesh are found with the devices
        raise ValueError("the configuration cannot run: " + "; ".join(problems))
    names = list(active_streams(config))
    if stream and stream not in names:
        raise ValueError(f"unknown stream {stream!r}, expected one of {', '.join(names)}")
    names = [stream] if stream else names
    devices = topology.topology_devices(topology_name, num_slices)
    kind, usable = devices[0].device_kind, topology.usable_bytes(devices[0])

    def compile_step(config: ConfigDict, name: str) -> StepPlan:
        how = f"accumulation {config.accumulation}, remat {config.model.remat}"
        print(f"compiling: {name} on {len(devices)} x {kind}, {how}", file=sys.stderr)
        file = dump and dump / f"{config.name}-{name}-{how.replace(', ', '-').replace(' ', '-')}.hlo"
        return step.plan_step(config, devices, name, usable=usable, dump=file)

    searched, tried = {}, []
    if searching:
        heaviest = search.heaviest_stream(config, names)
        found = search.search(
            search.candidates(config, devices, heaviest),
            usable or math.inf,
            lambda candidate: compile_step(candidate.applied_to(config), heaviest),
        )
        if found.plan is None:
            return StagePlan(config, kind, len(devices), usable, [], [found.out_of_memory], found.tried)
        searched, tried = {heaviest: found.plan}, found.tried
        config = config.copy_and_resolve_references()
        config.accumulation, config.model.remat = found.plan.accumulation, found.plan.remat
    steps, out_of_memory = [], []
    for name in names:
        try:
            steps.append(searched.get(name) or compile_step(config, name))
        except topology.DoesNotFit as error:
            out_of_memory.append(str(error))
    return StagePlan(config, kind, len(devices), usable, steps, out_of_memory, tried)


def stage_total(weighted: list[tuple[float, StepPlan]], num_samples: int) -> dict[str, float]:
    """Speed and time of a stage from (weight of the stream, its step), and the samples that the stage reads."""
    total, first = sum(weight for weight, _ in weighted), weighted[0][1]
    seconds = sum(weight / total * plan.roofline.seconds for weight, plan in weighted)
    flops = sum(weight / total * plan.roofline.flops for weight, plan in weighted)
    hours = num_samples / first.batch_size * seconds / 3600
    return {
        "images/s": first.batch_size / seconds,
        "MFU %": 100 * flops / seconds / first.roofline.peak_flops,
        "hours": hours,
        "chip-hours": hours * first.chips,
    }
