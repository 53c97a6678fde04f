"""The plans of docs/gpu.md: training steps and sampling tasks compiled for GPUs that are not here, in one JSON file.

The file is the state: a row in it that today's code has made is not compiled again.
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
from unialign_jax.planning.sweep import SOURCES, from_json, locked, sources_digest, write_plans
from unialign_jax.training.config import read_config

REMAT = ("none", "dots", "block")
# The code that a row comes from, in the package: folders and files.
TRAINING_SOURCES = (*SOURCES, "planning/gpus.py")
SAMPLING_SOURCES = (
    *("models", "diffusion", "sampling", "parallel/hardware.py"),
    *(f"inference/{name}.py" for name in ("model", "pipeline", "weights")),
    *(f"planning/{name}.py" for name in ("gpus", "roofline", "sampling", "topology")),
)
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
    *(("personalization", "h100:1", 512, 1, quantize) for quantize in (None, "int8")),
    ("personalization", "h100:1", 512, 8, None),
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
    made: dict[str, str]  # date, versions of jax and of the compiler, and the digest of TRAINING_SOURCES

    @property
    def key(self) -> tuple:
        return self.topology, self.stage, self.stream, self.accumulation, self.remat

    @property
    def is_current(self) -> bool:
        """Whether today's code has made it."""
        return self.made.get("sources") == sources_digest(TRAINING_SOURCES)


@dataclasses.dataclass(frozen=True)
class SamplingRow:
    task: str
    topology: str
    size: int
    batch: int
    quantize: str | None
    rows: list[dict]  # of `sampling.plan_sampling`
    made: dict[str, str]  # as TrainingRow's, with SAMPLING_SOURCES

    @property
    def key(self) -> tuple:
        return self.task, self.topology, self.size, self.batch, self.quantize

    @property
    def is_current(self) -> bool:
        """Whether today's code has made it."""
        return self.made.get("sources") == sources_digest(SAMPLING_SOURCES)


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
    """Compiles what TRAINING and SAMPLING have and the file `path` has not, or has from older code, row by row.

    Raises ValueError where the compiler is not installed.
    """
    topology.topology_devices("h100:1")
    for sources in (TRAINING_SOURCES, SAMPLING_SOURCES):
        sources_digest(sources)  # of the code that is loaded now, whatever changes on disk meanwhile
    for key in SAMPLING:
        add(path, "sampling", key, lambda key=key: compile_sampling(*key))
    for key in TRAINING:
        add(path, "training", key, lambda key=key: compile_training(*key))


def add(path: Path, part: str, key: tuple, compile_row: Callable) -> None:
    """Puts a row into a part of the file, unless today's code has made the one that is there."""

    def read() -> GpuPlans:
        return read_gpu_plans(path) if path.exists() else GpuPlans([], [])

    name = " ".join(map(str, key))
    if any(row.key == key and row.is_current for row in getattr(read(), part)):
        print(f"{path} has {name}", file=sys.stderr)
        return
    print(name, file=sys.stderr)
    row = compile_row()
    with locked(path):
        plans = read()
        order = {key: place for place, key in enumerate(TRAINING + SAMPLING)}
        rows = [row, *(other for other in getattr(plans, part) if other.key != key)]
        setattr(plans, part, sorted(rows, key=lambda row: order.get(row.key, len(order))))
        write_plans(path, plans)


def compile_training(name: str, stage: str, stream: str, accumulation: int, remat: str) -> TrainingRow:
    config = read_config(stage, [f"accumulation={accumulation}", f"model.remat={remat}"])
    devices = topology.topology_devices(name)
    step = plan_step(config, devices, stream, usable=topology.usable_bytes(devices[0]))
    return TrainingRow(name, stage, stream, accumulation, remat, step, made(TRAINING_SOURCES))


def compile_sampling(task: str, name: str, size: int, batch: int, quantize: str | None) -> SamplingRow:
    figures = sampling.plan_sampling(task, name, size=size, batch=batch, quantize=quantize, low_memory=False)
    return SamplingRow(task, name, size, batch, quantize, figures["rows"], made(SAMPLING_SOURCES))


def made(sources: tuple[str, ...]) -> dict[str, str]:
    plugin = next(name for name in ("jax-cuda12-plugin", "jax-cuda13-plugin") if is_distributed(name))
    versions = {"jax": jax.__version__, "compiler": f"{plugin} {importlib.metadata.version(plugin)}"}
    return {"date": datetime.date.today().isoformat(), **versions, "sources": sources_digest(sources)}


def is_distributed(name: str) -> bool:
    return next(iter(importlib.metadata.distributions(name=name)), None) is not None
