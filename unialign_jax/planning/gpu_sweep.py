"""The plans of docs/gpu.md: training steps and sampling tasks compiled for GPUs that are not here, in one JSON file.

The file is the state: a row in it is not compiled again.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from unialign_jax import files
from unialign_jax.planning import sampling, topology
from unialign_jax.planning.step import StepPlan, plan_step
from unialign_jax.planning.sweep import from_json, locked, write_plans
from unialign_jax.training.config import read_config

REMAT = ("none", "dots", "block")
# (topology, stage, stream, accumulation, remat). The other GPUs' programs need the same memory.
TRAINING = (
    *(("h100:1", "stage1", "text_to_image", *pair) for pair in itertools.product((8, 16, 32), REMAT)),
    *(("h100:8", "stage1", "text_to_image", *pair) for pair in itertools.product((1, 2, 4), REMAT)),
    ("h100:2x8", "stage1", "text_to_image", 1, "dots"),
    ("h100:8", "stage2", "edit", 4, "dots"),
    ("h100:8", "stage2", "personalization", 4, "block"),
    ("h100:8", "stage3", "vqa", 1, "dots"),
)
# (task, topology, size, batch, quantize)
SAMPLING = (
    *(("text_to_image", "h100:1", 512, 1, quantize) for quantize in (None, "int8", "w8a8", "fp8")),
    ("text_to_image", "h100:1", 512, 8, None),
    ("text_to_image", "h100:1", 1024, 1, None),
    ("text_to_image", "h100:1", 1024, 4, None),
    *(("edit", "h100:1", 512, 1, quantize) for quantize in (None, "int8")),
    ("edit", "h100:1", 512, 8, None),
    *(("caption", "h100:1", 512, 1, quantize) for quantize in (None, "int8")),
    ("caption", "h100:1", 512, 8, None),
    *(("text_to_image", "t4:1", 512, 1, quantize) for quantize in (None, "int8")),
)


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    topology: str
    stage: str
    stream: str
    accumulation: int
    remat: str
    step: StepPlan
    made: dict[str, str]  # date, and versions of jax and of the compiler

    @property
    def key(self) -> tuple:
        return self.topology, self.stage, self.stream, self.accumulation, self.remat


@dataclasses.dataclass(frozen=True)
class SamplingRow:
    task: str
    topology: str
    size: int
    batch: int
    quantize: str | None
    rows: list[dict]  # of `sampling.plan_sampling`
    made: dict[str, str]

    @property
    def key(self) -> tuple:
        return self.task, self.topology, self.size, self.batch, self.quantize


@dataclasses.dataclass
class GpuPlans:
    """The content of the file."""

    training: list[TrainingRow]
    sampling: list[SamplingRow]


def read_gpu_plans(path: Path) -> GpuPlans:
    """The content of the file. Raises ValueError for another file, or one of other code."""
    return from_json(GpuPlans, files.read_json(path), str(path))


def is_gpu_file(path: Path) -> bool:
    """Whether a file of plans is one of `sweep_gpus`."""
    return path.is_file() and "sampling" in files.read_json(path)


def sweep_gpus(path: Path) -> None:
    """Compiles what TRAINING and SAMPLING have and the file `path` has not, row by row.

    Raises ValueError where the compiler is not installed.
    """
    topology.topology_devices("h100:1")
    for key in SAMPLING:
        add(path, "sampling", key, lambda key=key: compile_sampling(*key))
    for key in TRAINING:
        add(path, "training", key, lambda key=key: compile_training(*key))


def add(path: Path, part: str, key: tuple, compile_row: Callable) -> None:
    """Adds a row to a part of the file, unless it is there."""

    def read() -> GpuPlans:
        return read_gpu_plans(path) if path.exists() else GpuPlans([], [])

    name = " ".join(map(str, key))
    if key in {row.key for row in getattr(read(), part)}:
        print(f"{path} has {name}", file=sys.stderr)
        return
    print(name, file=sys.stderr)
    row = compile_row()
    with locked(path):
        plans = read()
        getattr(plans, part).append(row)
        order = {key: place for place, key in enumerate(TRAINING + SAMPLING)}
        getattr(plans, part).sort(key=lambda row: order.get(row.key, len(order)))
        write_plans(path, plans)


def compile_training(name: str, stage: str, stream: str, accumulation: int, remat: str) -> TrainingRow:
    config = read_config(stage, [f"accumulation={accumulation}", f"model.remat={remat}"])
    devices = topology.topology_devices(name)
    step = plan_step(config, devices, stream, usable=topology.usable_bytes(devices[0]))
    return TrainingRow(name, stage, stream, accumulation, remat, step, made())


def compile_sampling(task: str, name: str, size: int, batch: int, quantize: str | None) -> SamplingRow:
    figures = sampling.plan_sampling(task, name, size=size, batch=batch, quantize=quantize, low_memory=False)
    return SamplingRow(task, name, size, batch, quantize, figures["rows"], made())


def made() -> dict[str, str]:
    plugin = next(name for name in ("jax-cuda12-plugin", "jax-cuda13-plugin") if is_distributed(name))
    versions = {"jax": jax.__version__, "compiler": f"{plugin} {importlib.metadata.version(plugin)}"}
    return {"date": datetime.date.today().isoformat(), **versions}


def is_distributed(name: str) -> bool:
    return next(iter(importlib.metadata.distributions(name=name)), None) is not None
