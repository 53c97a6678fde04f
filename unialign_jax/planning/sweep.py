"""Plans of a configuration for many TPU slices, one JSON file for each shape of step and slice.

The folder is the state of the sweep: what is in it is not compiled again, so a sweep that was broken off goes on, and
several processes share one by taking different slices. Streams whose steps have the same shapes share their plans,
also those of another stage's configuration. Batches grow with the slice: at least a sample a chip.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import jax

from unialign_jax import files
from unialign_jax.parallel import hardware
from unialign_jax.planning import sampling_plan, search, step_plan
from unialign_jax.training.config import active_streams, flat_items
from unialign_jax.training.step import has_image_pass

TOPOLOGIES = (
    *(f"v4-{2**n}" for n in range(3, 10)),
    *(f"v5e-{2**n}" for n in (0, *range(2, 9))),
    "4xv5e-256",
    *(f"v5p-{2**n}" for n in range(3, 14)),
    *(f"v6e-{2**n}" for n in range(3, 9)),
)
# What of a configuration changes what is compiled; accumulation and remat are the plan's to choose.
SECTIONS = ("model", "heads", "text_encoder", "autoencoder", "mesh")
KEYS = ("batch_size", "image_size", "text_length")


def split_name(topology: str) -> tuple[int, str]:
    """ "4xv5e-256" -> (4, "v5e-256"), a number of slices and one of them; ValueError for what is no slice's name."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(v.+)", topology)
    hardware.topology_name(match[2] if match else topology)
    return int(match[1] or 1), match[2]


def usual_name(topology: str) -> str:
    """The name that the tables have for a slice, if they have one: "v5e:16x16" -> "v5e-256"."""
    slices, one = split_name(topology)
    grid = hardware.topology_name(one)
    same = (name for name in TOPOLOGIES if hardware.topology_name(split_name(name)[1]) == grid)
    one = next((name for name in same if split_name(name)[0] == 1), one)
    return one if slices == 1 else f"{slices}x{one}"


def shape_of(config, stream) -> str:
    """The name of what is compiled for a stream: passes, condition images, and the losses that add something."""
    image_pass = has_image_pass(stream.kind)
    losses = ["masked_text", "intrinsic_modal", *(["flow_matching", "cross_modal"] if image_pass else [])]
    absent = [f"no-{loss}" for loss in sorted(losses) if not config.loss_weights[loss]]
    return "-".join([f"image{stream.num_conditions}-text" if image_pass else "text", *absent])


def program_of(config) -> dict:
    """What two sweeps must have in common to share a folder."""
    found = {f"{section}.{key}": value for section in SECTIONS for key, value in flat_items(config[section])}
    found |= {key: config[key] for key in KEYS} | {"one_forward": True}  # a key once, in the plans of then
    found |= {"average": config.ema_decay > 0, "optimizer.freeze": config.optimizer.freeze}
    del found["model.remat"]
    return json.loads(json.dumps(found))  # as it comes back from a file


def sweep(config, reference: str, topologies, folder: Path, *, plan_row: Callable | None = None) -> list[str]:
    """Fills `folder` with the plans of a configuration's streams; returns what went wrong, a line for each.

    A slice on which nothing fits is a result, not an error.

    Args:
      reference: the configuration's name as the user gave it.
      topologies: names of slices, such as "v4-128" and "4xv5e-256".
      plan_row: (config, stream's name, topology) -> the JSON of a row; tests give their own.

    Raises ValueError for an unknown topology, and for a folder that has plans of another configuration.
    """
    topologies = list(dict.fromkeys(map(usual_name, topologies)))
    folder.mkdir(parents=True, exist_ok=True)
    program, shapes = program_of(config), {}
    for name, stream in active_streams(config).items():
        shapes.setdefault(shape_of(config, stream), name)
    stage = {"name": config.name, "config": reference, "num_steps": config.num_steps, "batch_size": config.batch_size}
    stage["streams"] = {
        name: {"shape": shape_of(config, stream), "weight": stream.weight}
        for name, stream in active_streams(config).items()
    }
    for row in read_rows(folder):
        check_program(folder, row, program)
    write_json(folder / f"stage-{config.name}.json", stage)

    errors = []
    for topology in topologies:
        for shape, name in shapes.items():
            path = folder / f"plan-{shape}-{topology}.json"
            if path.exists():
                print(f"{path} is there", file=sys.stderr)
                continue
            try:
                row = (plan_row or compile_row)(config, name, topology)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                errors.append(f"{name} on {topology}: {' '.join(str(error).split())[:300]}")
                print(f"error: {errors[-1]}", file=sys.stderr)
                continue
            write_json(path, row | {"shape": shape, "topology": topology, "program": program})
            print(f"{path}: {describe(row)}", file=sys.stderr)
    return errors


def read_rows(folder: Path) -> list[dict]:
    """All plans of a folder. Raises ValueError naming a file that cannot be read, or is of other code."""
    kinds = typing.get_type_hints(step_plan.StepPlan).items()
    figures = {name: kind if kind in (str, dict) else kind | int for name, kind in kinds}  # 0 is a float too
    rows = []
    for path in sorted(folder.glob("plan-*.json")):
        row = read_json(path, ROW)
        if row["step"] and (differing := figures.keys() ^ row["step"].keys()):
            raise ValueError(f"{path} is of other code ({min(differing)}): name another folder, or remove it")
        if row["step"]:
            check_kinds(path, row["step"], figures)
        rows.append(row)
    return rows


# What the files hold that others than their writer read.
ROW = {"step": dict | None, "program": dict, "topology": str, "shape": str, "made": dict}
STAGE = {"name": str, "num_steps": int, "batch_size": int, "streams": dict}


def check_kinds(path: Path, content: dict, kinds: dict):
    """Raises ValueError for a file that lacks a key, or has a value of another kind."""
    for key, kind in kinds.items():
        if key not in content or not isinstance(content[key], kind):
            raise ValueError(f"{path} is not of a sweep (its {key}): remove it, and the sweep makes it again")


def read_json(path: Path, kinds: dict) -> dict:
    """A file of the folder, whose keys `kinds` are there and of their kinds."""
    try:
        content = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: remove it, and the sweep makes it again") from None
    check_kinds(path, content, kinds)
    return content


def check_program(folder, row, program):
    """Raises ValueError when a folder's plan is one of another model or batch."""
    for key in sorted(row["program"].keys() | program.keys()):
        found, expected = row["program"].get(key), program.get(key)
        if found != expected:
            raise ValueError(
                f"{folder} has plans of another configuration ({key} is {found!r} there, {expected!r} here): "
                "name another folder"
            )


def write_json(path: Path, content: dict):
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)


def describe(row: dict) -> str:
    if row["step"] is None:
        return f"DOES NOT FIT: {row['misfit']}"
    step = step_plan.StepPlan(**row["step"])
    return (
        f"accumulation {step.accumulation}, remat {step.remat}, {step.peak / sampling_plan.GIB:.2f} GiB, "
        f"{1e3 * step.seconds:.0f} ms, MFU {100 * step.mfu:.0f}%"
    )


def compile_row(config, name: str, topology: str) -> dict:
    """Searches the best plan of one stream on one slice, compiling; the search's result as JSON."""
    slices, one = split_name(topology)
    devices = sampling_plan.topology_devices(one, slices)
    made = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    usable = sampling_plan.usable_bytes(devices[0])
    alone = config.copy_and_resolve_references()
    alone.batch_size = max(config.batch_size, len(devices))
    for other, stream in alone.streams.items():
        stream.weight = float(other == name)

    def compile_step(candidate):
        print(
            f"compiling: {name} on {topology}, accumulation {candidate.accumulation}, remat {candidate.remat}",
            file=sys.stderr,
        )
        return step_plan.plan_step(candidate.applied_to(alone), devices, name, usable=usable)

    found = search.search(search.candidates(alone, devices, name), usable or math.inf, compile_step)
    return {
        "chip": hardware.find_chip(devices[0].device_kind).name,
        "chips": len(devices),
        "slices": slices,
        "batch_size": alone.batch_size,
        "usable": usable,
        "step": found.plan and dataclasses.asdict(found.plan),
        "misfit": found.misfit,
        "tried": found.tried,
        "made": made,
    }
