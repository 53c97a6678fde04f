"""The options of a preparation from files, and the plan that they make, for `launch/prepare_data.py`."""

import argparse
import dataclasses
import os

from unialign_jax.data.buckets import STEP, bucket_sizes
from unialign_jax.data.preparation.maps import check_maps
from unialign_jax.data.preparation.pieces import Job
from unialign_jax.data.preparation.runner import Plan
from unialign_jax.data.sources import ALIASES, guess_format, json_lists, locations
from unialign_jax.data.sources.parts import SourceOptions
from unialign_jax.data.sources.pictures import FORMAT_RULES
from unialign_jax.data.sources.rows import FIELDS, check_kind

PLAN_OPTIONS = ("holdout", "near_duplicates", "buckets", "max_bad_fraction", "overwrite")
COLUMN_FIELDS = ("image", "source", "caption", "instruction", "question", "answer")
LIMITS = {  # of the options that are numbers: the least and the most
    "max_side": (1, 2**16),
    "side": (1, 2**16),
    "min_side": (1, 2**16),
    "max_aspect": (1, 100),
    "min_words": (0, 10**6),
    "max_words": (1, 10**6),
    "near_duplicates": (0, 16),
    "buckets": (STEP, 2**13),
    "holdout": (0, 0.5),
    "threads": (1, 256),
    "processes": (1, 1024),
    "max_bad_fraction": (0, 1),
    "text_length": (2, 4096),
}
KEYS = "\n".join(
    f"  {kind}\n" + "\n".join(f"    {field}: {', '.join(names)}" for field, names in fields.items())
    for kind, fields in FIELDS.items()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the groups "rows", "filters" and "work"."""
    add = parser.add_argument_group("rows").add_argument
    for field in COLUMN_FIELDS:
        add(f"--{field}-key", metavar="NAME", help=f"the column of the {field}")
    add(
        "--key",
        metavar="NAME",
        help="the column that names a row (default: its place); of equal keys the first is kept",
    )
    add("--image-root", metavar="DIR", help="the folder that image paths are relative to, and may not leave")
    add("--split", help="hf: the split (default train)")
    add("--class-names", metavar="FILE", help="a name per line, which stands for the class of that number")
    add("--missing-captions", action="store_true", help="keep records of images without a caption, to be captioned")

    add = parser.add_argument_group("perception from plain images").add_argument
    add("--maps", metavar="A,B", help="canny, depth, pose: a record for each map of each image")
    for name in ("depth", "pose"):
        add(f"--{name}-model", metavar="MODULE:FUNCTION", help=f"makes the {name} map of an image: docs/data.md")

    add = parser.add_argument_group("filters (defaults by format: docs/data.md)").add_argument
    add("--min-side", type=int, metavar="N", help="leave out images whose shorter side has fewer pixels")
    add(
        "--max-aspect",
        type=float,
        metavar="F",
        help="leave out images whose longer side is more than F times the other",
    )
    add("--animated", choices=["first", "refuse"], help="of an animated image: the first frame, or none")
    add("--max-side", type=int, metavar="N", help="shrink images to at most N pixels a side")
    add("--side", type=int, metavar="N", help="shrink images to N pixels at the shorter side, as training reads them")
    add("--min-words", type=int, default=0, metavar="N", help="leave out captions and answers of fewer words")
    add("--max-words", type=int, metavar="N", help="leave out captions and answers of more words")
    add(
        "--buckets",
        type=int,
        metavar="N",
        help="a folder for each aspect ratio, with about N x N pixels (a multiple of 64): data.buckets of a run",
    )
    add("--near-duplicates", type=int, metavar="N", help="keep one of pictures whose 64-bit hashes differ in N bits")
    add("--tokenizer", metavar="DIR", help='count tokens with this one (a folder, or "shapes")')
    add("--text-length", type=int, metavar="N", help="count the texts that N tokens would cut")

    add = parser.add_argument_group("work").add_argument
    add("--holdout", type=float, default=0.0, metavar="F", help="put this share of the records into DIR-holdout")
    add("--processes", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one per core)")
    add("--threads", type=int, default=1, help="rows read at the same time by each process (more for URLs; default 1)")
    add(
        "--runner",
        metavar="NAME",
        help="run as a pipeline of Apache Beam: DirectRunner, DataflowRunner, FlinkRunner ...",
    )
    add("--runner-options", metavar="OPTIONS", help="Beam's own options, in one quoted text")
    bad = "fail, and write nothing, when more than this share of the rows is bad (default 0.1)"
    add("--max-bad-fraction", type=float, default=0.1, metavar="F", help=bad)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """The preparation that the command line asks for. Raises OSError or ValueError for a source that cannot be one."""
    check_kind(arguments.stream)
    if arguments.buckets:
        bucket_sizes(arguments.buckets)  # raises for what is no multiple
    format = ALIASES.get(arguments.format, arguments.format)
    is_name = format == "hf" and not os.path.lexists(arguments.source)
    paths = [arguments.source] if is_name else locations.expand(arguments.source)
    format = format or guess_format(paths[0])
    if format == "json":
        for path in paths:
            json_lists.is_array(path)  # each must be a list in JSON
    columns = {field: getattr(arguments, f"{field}_key") for field in COLUMN_FIELDS}
    names = ()
    if arguments.class_names:
        names = tuple(locations.read_bytes(arguments.class_names, 2**26).decode("utf-8").splitlines())
    maps = tuple(name.strip() for name in (arguments.maps or "").split(",") if name.strip())
    models = {name: model for name in ("depth", "pose") if (model := getattr(arguments, f"{name}_model"))}
    if maps and arguments.stream != "perception":
        raise ValueError(f"--maps makes perception records, but --stream is {arguments.stream}")
    check_maps(maps, models)
    source = SourceOptions(
        kind="text_to_image" if maps else arguments.stream,
        columns={field: name for field, name in columns.items() if name},
        key=arguments.key,
        image_root=arguments.image_root and locations.local(arguments.image_root),
        free_paths=format == "json",
        split=arguments.split,
        class_names=names,
        caption_optional=arguments.missing_captions or bool(maps),
    )
    rules = {name: getattr(arguments, name) for name in ("min_side", "max_aspect", "max_side", "side")}
    rules["animated"] = arguments.animated and arguments.animated == "first"
    given = {name: value for name, value in rules.items() if value is not None}
    job = Job(
        kind=arguments.stream,
        format=format,
        work="",
        source=source,
        images=dataclasses.replace(FORMAT_RULES[format], hashed=arguments.near_duplicates is not None, **given),
        **{
            name: getattr(arguments, name) for name in ("min_words", "max_words", "tokenizer", "text_length", "threads")
        },
        maps=maps,
        map_models=models,
    )
    return Plan(
        job,
        paths,
        locations.local(arguments.output),
        **{
            name: getattr(arguments, name)
            for name in ("holdout", "near_duplicates", "buckets", "max_bad_fraction", "overwrite")
        },
    )
