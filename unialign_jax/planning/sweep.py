"""Plans of a configuration for many TPU slices, in one JSON file.

The file is the state of the sweep. A plan in it that today's code has made is not compiled again, so an interrupted
sweep resumes, and several processes may share the file by taking different slices. A plan of older code is replaced.
Streams whose steps have the same shapes share their plans, also across stages. Batches grow with the slice, to at least
one sample per chip.
"""

import ast
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from unialign_jax import __version__, files
from unialign_jax.data.kinds import has_image_pass
from unialign_jax.parallel import hardware
from unialign_jax.planning import gpus, stage
from unialign_jax.planning.search import Trial
from unialign_jax.planning.step import StepPlan
from unialign_jax.planning.topology import GIB, split_name, topology_devices
from unialign_jax.training.config import active_streams, flat_items

TOPOLOGIES = (
    *(f"v4-{2**n}" for n in range(3, 10)),
    *(f"v5e-{2**n}" for n in (0, *range(2, 9))),
    "4xv5e-256",
    *(f"v5p-{2**n}" for n in range(3, 14)),
    *(f"v6e-{2**n}" for n in range(3, 9)),
)
# The keys of a configuration that change the compiled program, except accumulation and remat, which are searched.
SECTIONS = ("model", "heads", "text_encoder", "autoencoder", "mesh")
KEYS = ("batch_size", "image_size", "text_length", "quantize_text_encoder")
# The code that a plan comes from, in the package: folders and files.
SOURCES = (
    *("models", "losses", "diffusion"),
    *(f"parallel/{name}.py" for name in ("activations", "few_rows", "gradients", "hardware", "mesh", "sharding")),
    *(f"training/{name}.py" for name in ("meshes", "optimizer", "program", "state", "step")),
    *(f"planning/{name}.py" for name in ("collectives", "roofline", "search", "stage", "step", "topology")),
)


@dataclasses.dataclass(frozen=True)
class SlicePlan:
    """The fastest step of one shape on one slice; `step` is None where nothing fits."""

    shape: str
    topology: str
    chip: str
    chips: int
    batch_size: int
    usable: int | None
    step: StepPlan | None
    out_of_memory: str | None
    tried: list[Trial]
    made: dict[str, str]  # date; versions of jax and libtpu; this code's commit, and the digest of its SOURCES

    @property
    def is_current(self) -> bool:
        """Whether today's code has made it."""
        return self.made.get("sources") == sources_digest()


@dataclasses.dataclass(frozen=True)
class Share:
    """A stream of a stage: the shape of its step, and its weight."""

    shape: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Stage:
    config: str  # as the user gave it
    num_steps: int
    batch_size: int
    streams: dict[str, Share]


@dataclasses.dataclass
class Plans:
    """The content of a sweep's file; all of its plans are of one `program`."""

    program: dict
    stages: dict[str, Stage]
    plans: list[SlicePlan]

    def find(self, shape: str, topology: str) -> SlicePlan | None:
        return next((plan for plan in self.plans if (plan.shape, plan.topology) == (shape, topology)), None)


def usual_name(topology: str) -> str:
    """The name of a slice in TOPOLOGIES, if it is there: "v5e:16x16" -> "v5e-256"."""
    if gpus.is_gpu(topology):
        raise ValueError(f"{topology} is no TPU slice: --gpus plans GPUs")
    slices, one = split_name(topology)
    grid = hardware.topology_name(one)
    same = (name for name in TOPOLOGIES if hardware.topology_name(split_name(name)[1]) == grid)
    one = next((name for name in same if split_name(name)[0] == 1), one)
    return one if slices == 1 else f"{slices}x{one}"


def shape_of(config: ConfigDict, stream: ConfigDict) -> str:
    """The name of a stream's step: its passes, its condition images, and the losses that are off."""
    image_pass = has_image_pass(stream.kind)
    losses = ["masked_text", "intrinsic_modal", *(["flow_matching", "cross_modal"] if image_pass else [])]
    absent = [f"no-{loss}" for loss in sorted(losses) if not config.loss_weights[loss]]
    return "-".join([f"image{stream.num_conditions}-text" if image_pass else "text", *absent])


def program_of(config: ConfigDict) -> dict:
    """The keys that two configurations must have in common to share a file."""
    found = {f"{section}.{key}": value for section in SECTIONS for key, value in flat_items(config[section])}
    found |= {key: config[key] for key in KEYS}
    found |= {"average": config.ema_decay > 0, "optimizer.freeze": config.optimizer.freeze}
    del found["model.remat"]
    return json.loads(json.dumps(found))  # as it comes back from a file


def sweep(
    config: ConfigDict, reference: str, topologies: list[str], path: Path, *, plan_slice: Callable | None = None
) -> list[str]:
    """Adds the plans of a configuration's streams to the file `path`, in place of those of older code.

    Returns one line for each error. A slice on which nothing fits is a result, not an error.

    Args:
      reference: the configuration's name as the user gave it.
      topologies: names of slices, such as "v4-128" and "4xv5e-256".
      plan_slice: replaces `compile_slice` in tests.

    Raises ValueError for an unknown topology, a missing compiler, and a file of another configuration.
    """
    topologies = list(dict.fromkeys(map(usual_name, topologies)))
    code_version(), sources_digest()  # of the code that is loaded now, whatever changes on disk meanwhile
    if plan_slice is None:
        topology_devices("v5e-1")  # without the TPU compiler one error, not one for each slice
    program, shapes, errors = program_of(config), {}, []
    shares = {name: Share(shape_of(config, x), x.weight) for name, x in active_streams(config).items()}
    for name, share in shares.items():
        shapes.setdefault(share.shape, name)
    with updating(path, program) as plans:
        plans.stages[config.name] = Stage(reference, config.num_steps, config.batch_size, shares)
    for topology in topologies:
        for shape, name in shapes.items():
            found = read_plans(path).find(shape, topology)
            if found and found.is_current:
                print(f"{path} has {shape} on {topology}", file=sys.stderr)
                continue
            start, start_cpu = time.perf_counter(), time.process_time()
            try:
                plan = (plan_slice or compile_slice)(config, name, topology)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                errors.append(f"{name} on {topology}: {' '.join(str(error).split())[:300]}")
                print(f"error: {errors[-1]}", file=sys.stderr)
                continue
            with updating(path, program) as plans:
                plans.plans = [old for old in plans.plans if (old.shape, old.topology) != (shape, topology)] + [plan]
            took = f"{time.perf_counter() - start:.0f} s, {time.process_time() - start_cpu:.0f} s of CPU"
            print(f"{shape} on {topology}: {describe(plan)} ({took})", file=sys.stderr)
    return errors


def compile_slice(config: ConfigDict, name: str, topology: str) -> SlicePlan:
    """Searches the fastest plan of one stream on one slice, compiling."""
    slices, one = split_name(topology)
    chips = slices * hardware.chips_of(hardware.topology_name(one))
    alone = config.copy_and_resolve_references()
    alone.batch_size = max(config.batch_size, chips)
    for other, stream in alone.streams.items():  # the mesh is chosen for the streams that have a weight
        stream.weight = float(other == name)
    found = stage.plan_stage(alone, one, slices, searching=True)
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    versions |= {"code": code_version(), "sources": sources_digest()}
    return SlicePlan(
        shape=shape_of(config, config.streams[name]),
        topology=topology,
        chip=hardware.find_chip(found.device_kind).name,
        chips=chips,
        batch_size=alone.batch_size,
        usable=found.usable,
        step=found.steps[0] if found.steps else None,
        out_of_memory=found.out_of_memory[0] if found.out_of_memory else None,
        tried=found.tried,
        made={"date": datetime.date.today().isoformat(), **versions},
    )


@functools.cache
def code_version() -> str:
    """The commit of this code, with a + where the package differs from it; without a repository its version."""
    package = Path(__file__).parents[1]

    def git(*words):
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short=7", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__


@functools.cache
def sources_digest(sources: tuple[str, ...] = SOURCES) -> str:
    """A digest of the code of `sources`, without comments and docstrings: plans that differ in it may differ."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in sources:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                    and ast.get_docstring(node) is not None
                ):
                    node.body = node.body[1:]
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def describe(plan: SlicePlan) -> str:
    step = plan.step
    if step is None:
        return f"DOES NOT FIT: {plan.out_of_memory}"
    return (
        f"accumulation {step.accumulation}, remat {step.remat}, {step.memory.peak / GIB:.2f} GiB, "
        f"{1e3 * step.roofline.seconds:.0f} ms, MFU {100 * step.roofline.mfu:.0f}%"
    )


@contextlib.contextmanager
def updating(path: Path, program: dict) -> Iterator[Plans]:
    """The plans in the file `path`, to be changed in the block and then written whole; one process at a time.

    Raises ValueError when the file has plans of another program.
    """
    with locked(path):
        plans = read_plans(path) if os.path.lexists(path) else Plans(program, {}, [])
        newer = program.keys() - plans.program.keys()  # keys that the code did not have yet
        plans.program.update({key: program[key] for key in newer})
        for key in sorted(plans.program.keys() | program.keys()):
            found, expected = plans.program.get(key), program.get(key)
            if found != expected:
                raise ValueError(
                    f"{path} has plans of another configuration ({key} is {found!r} there, {expected!r} here): "
                    "name another file"
                )
        yield plans
        plans.plans.sort(key=lambda plan: (plan.shape, plan.topology))
        write_plans(path, plans)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from changing the file in the block."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_plans(path: Path, plans: Any) -> None:
    """Writes a dataclass as JSON, in which objects and lists without others in them take one line each."""
    text = json.dumps(dataclasses.asdict(plans), indent=1)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    with files.replacing_file(path) as scratch:
        scratch.write_text(text + "\n")


def read_plans(path: Path) -> Plans:
    """The content of a sweep's file. Raises ValueError for another file, or one of other code."""
    return from_json(Plans, files.read_json(path), str(path))


_hints = functools.cache(typing.get_type_hints)


def from_json(kind: Any, value: Any, where: str):
    """`value` as `kind`: a dataclass, a list or dict of them, or a type of JSON."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None
    kind, inner = options[0], typing.get_args(options[0])
    plain = dict if dataclasses.is_dataclass(kind) else typing.get_origin(kind) or kind
    if not isinstance(value, (int, float) if plain is float else plain):
        raise ValueError(f"{where} is not of a sweep: it is a {type(value).__name__}, expected a {plain.__name__}")
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        if differing := hints.keys() ^ value.keys():
            raise ValueError(f"{where} is of other code ({min(differing)}): name another file, or remove it")
        return kind(**{key: from_json(hint, value[key], f"{where}: {key}") for key, hint in hints.items()})
    if inner and plain is list:
        return [from_json(inner[0], item, f"{where} {i}") for i, item in enumerate(value)]
    if inner and plain is dict:
        return {key: from_json(inner[1], item, f"{where} {key}") for key, item in value.items()}
    return value
