"""The `build-semgen` part of launch/evaluate.py: makes a new set in the form of SemGen-Bench."""

import argparse
import dataclasses
import fcntl
import logging
import os
import sys
from pathlib import Path
from typing import Any

from unialign_jax.command_line import Parser
from unialign_jax.evaluation import judging
from unialign_jax.evaluation.building import (
    drafting,
    embedding,
    filters,
    freezing,
    ingest,
    review,
    selection,
    settings,
    stages,
    validation,
)
from unialign_jax.evaluation.building.settings import Settings
from unialign_jax.files import make_folder

STAGES = [module.STAGE for module in (ingest, filters, embedding, selection, drafting, validation, review)]
# Options that name files: kept as absolute paths, so that a later call may stand elsewhere.
PATHS = ("coco", "images", "templates", "tokenizer", "embedder")
PARTS = ("make", "import-review", "freeze")
LOCK = ".lock"
DESCRIPTION = """\
Makes a new, held-out set in the form of SemGen-Bench (150 photographs, four prompts each), in OUTPUT:
  make           ingest, filter, embed, select, draft, validate, export: ends with a sheet for reviewers
  import-review  takes filled-in sheets; `make` then drafts what was rejected again
  freeze         writes OUTPUT/benchmark once every prompt is accepted or edited
Options are kept in OUTPUT/settings.json and need not be repeated. What is done is not done again, and no endpoint is
asked twice; a changed option or file makes what follows from it be done again. docs/semgen_builder.md explains.
"""
HELP = {
    "coco": ("DIR", "a COCO folder with annotations/ and the images of --split"),
    "split": ("NAME", "of COCO"),
    "images": ("PATH", "a folder of images, or a JSON list (JSONL) of them; may be given again"),
    "licenses": ("A,B", "ids or names of licenses that are allowed; default all"),
    "image_license": ("NAME", "of the images in --images that do not say"),
    "min_side": ("N", "pixels of the shorter side at least"),
    "min_aspect": ("X", "width to height at least"),
    "max_aspect": ("X", "width to height at most"),
    "min_sharpness": ("X", "variance of the Laplacian at least"),
    "min_brightness": ("X", "mean grey at least, 0 to 255"),
    "max_brightness": ("X", "mean grey at most"),
    "max_clipped": ("X", "share of black or white pixels at most"),
    "min_classes": ("N", "kinds of objects at least, where the source lists objects"),
    "embedder": (
        "URL|DIR",
        "an OpenAI-compatible API (key: EMBEDDER_API_KEY), a CLIP's folder, or histogram, for trials",
    ),
    "embedder_model": ("NAME", "the API's name of the model"),
    "duplicate_cosine": ("X", "images more alike than this count as one"),
    "clusters": ("N", "of Ward's tree"),
    "per_cluster": ("N", "images chosen of each cluster"),
    "seed": ("N", "of the choice"),
    "exclude": ("KEY", "an image that is not to be chosen (its key in the sheet); may be given again"),
    "temperature": ("X", "of drafts"),
    "templates": ("DIR", "your own templates for drafts; default those of the package"),
    "long_tokens": ("N", "tokens of t2i_long at least"),
    "tokenizer": ("PATH", "that counts them: words, or a tokenizer.json or its folder"),
    "max_overlap": ("X", "share of a prompt's runs of four words in another at most"),
    "max_verb_share": ("X", "share of the edits that one verb may begin at most"),
    "redraft": ("N", "times that a draft that breaks a rule is asked for again at most"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, default="make", help="what to do (%(default)s)")
    add("--output", required=True, metavar="DIR", type=Path, help="the builder's folder")
    add("--until", choices=stages.NAMES, default=stages.NAMES[-1], help="make: the last stage to do (%(default)s)")
    add("--review", action="append", metavar="CSV", type=Path, help="import-review: a filled-in sheet; may be repeated")
    add("--partial", action="store_true", help="import-review: rows without a decision stay open")
    add("--draft", action="store_true", help="freeze: also what is not reviewed, with the status machine_draft")
    add("--overwrite", action="store_true", help="freeze: replace a finished set")
    add = parser.add_argument_group("the set").add_argument
    for field in dataclasses.fields(Settings):
        if field.name not in HELP:
            continue  # --judge and --judge-model, below
        metavar, text = HELP[field.name]
        options = {"metavar": metavar, "help": text, "default": None}
        if isinstance(field.default, tuple):
            options |= {"type": lambda text: text.split(",")} if field.name == "licenses" else {"action": "append"}
        else:
            options |= {"type": type(field.default)}
            options["help"] += f" ({field.default})" if field.default != "" else ""
        add(f"--{field.name.replace('_', '-')}", **options)
    judging.add_arguments(parser.add_argument_group("the model that drafts (its key: OPENAI_API_KEY)"))


def check_arguments(parser: Parser, arguments: argparse.Namespace) -> None:
    """An error where options do not go together."""
    if (arguments.part == "import-review") != bool(arguments.review):
        parser.error("import-review and --review=CSV go together")


def run(arguments: argparse.Namespace) -> int:
    """Does the part that is asked for."""
    folder = arguments.output
    found = settings.load(folder)
    if found is None and arguments.part != "make":
        raise FileNotFoundError(f"{folder} is no builder's folder: it has no {settings.FILE}")
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    given = {name: as_setting(name, value) for name, value in given.items() if value is not None}
    asked = dataclasses.replace(found or Settings(), **given)
    settings.check(asked)
    if arguments.part != "make" and asked != found:
        name = next(name for name, value in given.items() if value != getattr(found, name))
        raise ValueError(f"--{name.replace('_', '-')} cannot be changed by {arguments.part}, only by make")
    make_folder(folder, "--output")
    logging.getLogger("unialign_jax").setLevel(logging.INFO)  # what the model that drafts is asked, and took
    with open(folder / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written by another process: wait until it ends") from None
        if asked != found:
            settings.save(folder, asked)

        def make_judge():
            arguments.judge, arguments.judge_model = asked.judge, asked.judge_model
            judge = judging.from_arguments(arguments, os.environ.get("OPENAI_API_KEY", ""), folder / drafting.ANSWERS)
            if judge is None:
                raise ValueError("the model that drafts is not named: give --judge=URL and --judge-model=NAME")
            return judge

        # A key of its own: the two endpoints may be of different providers.
        build = stages.Build(folder, asked, make_judge, os.environ.get("EMBEDDER_API_KEY", ""))
        return {"make": make, "import-review": import_review, "freeze": freeze}[arguments.part](build, arguments)


def as_setting(name: str, value: Any):
    """The value of an option as settings.json keeps it."""
    if isinstance(value, list):
        return tuple(os.path.abspath(path) if name in PATHS else path for path in filter(None, value))
    if name in PATHS and value and not embedding.is_url(value) and value not in ("words", "histogram"):
        return os.path.abspath(value)
    return value


def make(build: stages.Build, arguments: argparse.Namespace) -> int:
    stages.run(build, STAGES, arguments.until)
    if arguments.until == stages.NAMES[-1]:
        path = review.write_sheet(build)
        if path is None:
            print("every prompt is reviewed: freeze is next")
        else:
            print(f"to review: {path}, and {path.with_suffix('.html').name} beside it with the pictures")
    return 0


def import_review(build: stages.Build, arguments: argparse.Namespace) -> int:
    stages.check_done(build, STAGES[:-1])
    problems = review.import_sheets(build, arguments.review, partial=arguments.partial)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        count = len(problems)
        raise ValueError(f"{count} row{'s' * (count > 1)} cannot be taken (above): nothing was imported")
    print(review.summary(build))
    return 0


def freeze(build: stages.Build, arguments: argparse.Namespace) -> int:
    folder = freezing.freeze(build, STAGES[:-1], draft=arguments.draft, overwrite=arguments.overwrite)
    print(f"wrote {folder}, status {freezing.status_of(folder)}")
    return 0
