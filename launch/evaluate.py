"""Scores of a model: python launch/evaluate.py --help"""

import argparse
import importlib
import logging
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command, sigterm_interrupts

explain_missing_packages()

from tqdm.contrib.logging import logging_redirect_tqdm

DESCRIPTION = """\
Runs a model on a benchmark and scores what it makes. A run has three parts: generate, score and report. All are done
one after another, or alone the one that is named after the suite. After an interruption the same command resumes.
"""

EXAMPLES = """\
examples
  python launch/evaluate.py shapes --bundle=runs/quickstart --output=scores/quickstart
  python launch/evaluate.py mmmu --bundle=BUNDLE --data=data/mmmu --output=scores/mmmu
  python launch/evaluate.py semgen generate --bundle=BUNDLE --data=data/semgen --output=scores/semgen --limit=10
  python launch/evaluate.py semgen score --output=scores/semgen --judge=http://localhost:8000/v1 --judge-model=NAME
  python launch/evaluate.py list --run=scores/mmmu
  python launch/evaluate.py fetch geneval --data=data/geneval
  python launch/evaluate.py compare scores/before scores/after --output=comparison.md
A judge's key is read from the environment variable OPENAI_API_KEY. Suites, data and figures: docs/evaluation.md.
"""
# Commands that are no suite of `suites.SUITES`, and their modules.
COMMANDS = {
    "shapes": "shapes_command",
    "fid": "image_sets",
    "clipscore": "image_sets",
    "list": "listing",
    "compare": "comparing",
    "fetch": "fetching",
    "build-semgen": "building.command",
}
# Options of the sampler that no suite leaves to the user.
FIXED = ("images_per_prompt", "kind", "slots", "prefix")
# Options of the machine and of the model, as launch/generate.py has them.
MACHINE = (
    "bundle",
    "batch",
    "devices",
    "weights",
    "dtype",
    "quantize",
    "low_memory",
    "attention",
    "verify",
    "compilation_cache",
)
RESERVED = ("official", "corrected")  # folders of a run beside that of the model
KEY = "OPENAI_API_KEY"  # the environment variable of a judge's key


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from unialign_jax.evaluation import comparing, fetching, image_sets, listing, shapes_command
    from unialign_jax.evaluation.building import command as building
    from unialign_jax.evaluation.suites import SUITES, find_suite

    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUITE|COMMAND")
    shapes_command.add_arguments(commands.add_parser("shapes", help="the procedural world, by an exact detector"))
    for name in SUITES:
        suite = find_suite(name)
        about = f"{suite.title}: {suite.summary}.\nData: {suite.source}"
        add_suite_arguments(commands.add_parser(name, help=suite.summary, description=about), suite)
    image_sets.add_fid_arguments(commands.add_parser("fid", help="the Frechet distance of two folders of images"))
    image_sets.add_clipscore_arguments(commands.add_parser("clipscore", help="how well images fit their prompts"))
    listing.add_arguments(commands.add_parser("list", help="the suites, what each needs and what it costs"))
    comparing.add_arguments(commands.add_parser("compare", help="runs of one suite side by side"))
    fetching.add_arguments(commands.add_parser("fetch", help="download what is free of a suite's data"), list(SUITES))
    about = "a new set in the form of SemGen-Bench"
    building.add_arguments(commands.add_parser("build-semgen", help=about, description=building.DESCRIPTION))
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    if arguments.command in SUITES:
        check_suite_arguments(parser, arguments)
    elif arguments.command == "shapes":
        shapes_command.check_arguments(parser, arguments)
    elif arguments.command == "build-semgen":
        building.check_arguments(parser, arguments)
    return arguments


def add_suite_arguments(parser: argparse.ArgumentParser, suite) -> None:
    """The options of a suite's command."""
    from unialign_jax.evaluation import judging
    from unialign_jax.evaluation.running import PARTS
    from unialign_jax.evaluation.suite import MODES
    from unialign_jax.inference.options import OPTIONS, flag

    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, help="do this part alone")
    add("--output", required=True, metavar="DIR", type=Path, help="folder of the run")
    add("--bundle", metavar="DIR", help="the model: a bundle, a run's folder, or demo; generate needs it")
    add("--data", metavar="PATH", type=Path, help="your copy of the suite's data; only generate needs it")
    add("--mode", choices=MODES, help="official: as the official code does, defects included; corrected: without them")
    add("--limit", type=int, metavar="N", help="the first N items of each group alone")
    add("--overwrite", action="store_true", help="replace what was made in another way")
    own, defaults = parser.add_argument_group(f"options of {suite.name}"), {}

    def add_own(name, **options):
        key = name[2:].replace("-", "_")
        defaults[key] = options.get("default", False if options.get("action") == "store_true" else None)
        own.add_argument(name, dest=f"extra_{key}", **options)

    suite.add_arguments(add_own)
    parser.set_defaults(defaults=defaults)
    add = parser.add_argument_group("the model").add_argument
    add("--name", default="model", help="under which the official layout files the images (%(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="most samples at a time (%(default)s)")
    add("--devices", type=int, metavar="N", help="default all GPUs or TPU chips, on a CPU 1")
    add("--weights", choices=["raw", "ema"], help="of a run: default its average, if it keeps one")
    add("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    add("--quantize", choices=["int8", "w8a8", "fp8"], help="weights of 8 bits; w8a8, fp8: inputs too")
    add("--low-memory", action="store_true", help="on the device only what is in use; slower")
    add("--attention", default="auto", metavar="NAME", help="auto, xla, cudnn (GPU) or splash (TPU)")
    add("--no-verify", dest="verify", action="store_false", help="read the bundle without checking its files' hashes")
    add(
        "--compilation-cache",
        metavar="DIR",
        default="",
        help="keeps compiled programs; none: nothing (~/.cache/unialign_jax/compiled)",
    )
    add = parser.add_argument_group("the sampler (default: the suite's own settings, then the model's)").add_argument
    for name, option in OPTIONS.items():
        if name not in FIXED and set(option.tasks) & set(suite.tasks):
            metavar = "|".join(option.choices) or "X"
            add(flag(name), dest=f"option_{name}", type=option.parse, metavar=metavar, help=option.help)
    if suite.judge_calls:
        judging.add_arguments(parser.add_argument_group("the judge"))


def check_suite_arguments(parser: Parser, arguments: argparse.Namespace) -> None:
    """An error where options are missing, or out of range."""
    parser.check_least(arguments, batch=1)
    if arguments.limit is not None:
        parser.check_least(arguments, limit=1)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", arguments.name) or arguments.name in RESERVED:
        parser.error(
            f"--name is {arguments.name!r}, expected the name of a folder, of letters, digits, . _ -, and none of "
            f"{', '.join(RESERVED)}"
        )
    if "generate" in parts_of(arguments):
        for name in ("bundle", "data"):
            if getattr(arguments, name) is None:
                parser.error(f"--{name} is not given; {arguments.command} needs it to generate")


def parts_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The parts of a run to do; the answers are not generated where they are in a file of the user's."""
    from unialign_jax.evaluation.running import PARTS

    if arguments.part:
        return (arguments.part,)
    return PARTS[1:] if getattr(arguments, "extra_results", None) else PARTS


def run_suite(arguments: argparse.Namespace) -> int:
    """The parts of a run that are asked for. Returns 1 where jobs or scores failed."""
    from unialign_jax.evaluation import judging, running
    from unialign_jax.evaluation.reporting import words
    from unialign_jax.evaluation.suite import Request
    from unialign_jax.evaluation.suites import find_suite

    suite, failed, parts = find_suite(arguments.command), 0, parts_of(arguments)
    named = vars(arguments)
    extra = {key[6:]: as_setting(value) for key, value in named.items() if key.startswith("extra_")}
    given = {key: value for key, value in extra.items() if value != arguments.defaults[key]}
    if "score" in parts and suite.judge_calls:
        judging.endpoint_of(arguments, os.environ.get(KEY, ""))  # wrong options are told before anything is made
    request = Request(
        data=arguments.data or Path(extra.get("results") or ""),
        output=arguments.output,
        model=arguments.name,
        mode=arguments.mode or "official",
        limit=arguments.limit,
        options={key[7:]: value for key, value in named.items() if key.startswith("option_") and value is not None},
        extra=extra,
    )
    if "generate" in parts:
        if "score" in parts:
            suite.check_scoring(request, bool(getattr(arguments, "judge", None)))
        machine = running.Machine(**{name: named[name] for name in MACHINE})
        failed += running.generate(suite, request, machine, overwrite=arguments.overwrite)
    if parts == ("generate",):
        return 1 if failed else 0
    if extra.get("results") and not (arguments.output / running.SETTINGS).exists():
        running.adopt(suite, request)
    request = running.opened(suite, arguments.output, arguments.mode, arguments.limit, data=arguments.data, extra=given)
    if "score" in parts:
        failed += score(suite, request, arguments)
    if "report" in parts:
        found = running.report(suite, request)
        print("\n".join(words.summary(found, request.output / request.mode)))
    return 1 if failed else 0


def as_setting(value):
    """The value of an option as settings.json has it."""
    return str(value.resolve()) if isinstance(value, Path) else value


def score(suite, request, arguments: argparse.Namespace) -> int:
    """Scores a run. Returns how many of its items could not be scored."""
    from unialign_jax.evaluation import judging, running
    from unialign_jax.evaluation.suite import Scorer

    judge = None
    if suite.judge_calls:
        journal = request.output / running.JUDGEMENTS
        judge = judging.from_arguments(arguments, os.environ.get(KEY, ""), journal)
    guess = getattr(arguments, "official_guess", False)
    try:
        scores = running.score(suite, request, lambda update: Scorer(judge, guess, update))
    except KeyboardInterrupt as stop:
        raise type(stop)("what was judged is kept; the same command resumes there") from None
    finally:
        if judge:
            judge.close()
    return sum(bool(score.failed) for score in scores)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = parse_arguments(argv)
    for name in ("absl", "asyncio"):  # the storage library logs its own tracebacks; the error raised says it all
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hint = ": a smaller --batch takes less"
    if arguments.command in COMMANDS:
        work = importlib.import_module(f"unialign_jax.evaluation.{COMMANDS[arguments.command]}").run
    else:
        logging.getLogger("unialign_jax").setLevel(logging.INFO)  # what is sampled, what a judge is asked
        work = run_suite
    resumes = "what is done is kept; the same command resumes"

    def interruptible():
        with sigterm_interrupts(), logging_redirect_tqdm():
            return work(arguments)

    return run_command(interruptible, traceback=arguments.traceback, hint=hint, interrupted=resumes)


if __name__ == "__main__":
    sys.exit(main())
