"""Scores of a model: python launch/evaluate.py --help"""

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command

explain_missing_packages()

DESCRIPTION = """\
Runs a model on a benchmark and scores what it makes. A run has three parts: generate, score and report. All are done
one after another, or alone the one that is named after the suite. After an interruption the same command resumes.
"""

EXAMPLES = """\
examples
  python launch/evaluate.py shapes --bundle=runs/quickstart --output=scores/quickstart
  python launch/evaluate.py geneval --bundle=BUNDLE --data=data/geneval --output=scores/geneval
  python launch/evaluate.py semgen generate --bundle=BUNDLE --data=data/semgen --output=scores/semgen --limit=10
  python launch/evaluate.py semgen score --output=scores/semgen --judge=http://localhost:8000/v1 --judge-model=NAME
A judge's key is read from the environment variable OPENAI_API_KEY. Suites, data and figures: docs/evaluation.md.
"""
# Options of the sampler that no suite leaves to the user.
FIXED = ("images_per_prompt", "kind", "slots", "prefix")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from unialign_jax.evaluation import shapes_command
    from unialign_jax.evaluation.suites import SUITES, find_suite

    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUITE|COMMAND")
    shapes_command.add_arguments(commands.add_parser("shapes", help="the procedural world, by an exact detector"))
    for name in SUITES:
        suite = find_suite(name)
        about = f"{suite.title}: {suite.summary}.\nData: {suite.source}"
        add_suite_arguments(commands.add_parser(name, help=suite.summary, description=about), suite)
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    if arguments.command in SUITES:
        check_suite_arguments(parser, arguments)
    elif arguments.command == "shapes":
        shapes_command.check_arguments(parser, arguments)
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
    add("--data", metavar="PATH", type=Path, help="your copy of the suite's data; generate needs it")
    add("--mode", choices=MODES, help="official: as the official code does, defects included; corrected: without them")
    add("--limit", type=int, metavar="N", help="the first N items of each group alone")
    add("--overwrite", action="store_true", help="replace what was made in another way")
    own = parser.add_argument_group(f"options of {suite.name}")
    suite.add_arguments(
        lambda name, **options: own.add_argument(name, dest=f"extra_{name[2:].replace('-', '_')}", **options)
    )
    add = parser.add_argument_group("the model").add_argument
    add("--name", default="model", help="under which the official layout files the images (%(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="most samples at a time (%(default)s)")
    add("--weights", choices=["raw", "ema"], help="of a run: default its average, if it keeps one")
    add("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    add("--quantize", choices=["int8", "w8a8"], help="int8 weights; w8a8: int8 activations too")
    add("--low-memory", action="store_true", help="on the device only what is in use; slower")
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
    if arguments.part in (None, "generate"):
        for name in ("bundle", "data"):
            if getattr(arguments, name) is None:
                parser.error(f"--{name} is not given; {arguments.command} needs it to generate")


def run_suite(arguments: argparse.Namespace) -> int:
    """The parts of a run that are asked for. Returns 1 where jobs or scores failed."""
    from unialign_jax.evaluation import judging, running
    from unialign_jax.evaluation.suite import Request, Scorer
    from unialign_jax.evaluation.suites import find_suite

    suite, failed = find_suite(arguments.command), 0
    parts = (arguments.part,) if arguments.part else running.PARTS
    if "generate" in parts:
        named = vars(arguments)
        request = Request(
            data=arguments.data,
            output=arguments.output,
            model=arguments.name,
            mode=arguments.mode or "official",
            limit=arguments.limit,
            options={key[7:]: value for key, value in named.items() if key.startswith("option_") and value is not None},
            extra={key[6:]: value for key, value in named.items() if key.startswith("extra_")},
        )
        names = ("bundle", "batch", "weights", "dtype", "quantize", "low_memory")
        machine = running.Machine(**{name: named[name] for name in names})
        failed += running.generate(suite, request, machine, overwrite=arguments.overwrite)
    if parts == ("generate",):
        return 1 if failed else 0
    request = running.opened(suite, arguments.output, arguments.mode, arguments.limit)
    if "score" in parts:
        judge = None
        if suite.judge_calls:
            judge = judging.from_arguments(
                arguments, os.environ.get("OPENAI_API_KEY", ""), request.output / running.JUDGEMENTS
            )
        guess = getattr(arguments, "official_guess", False)
        scores = running.score(suite, request, lambda update: Scorer(judge, guess, update))
        failed += sum(bool(score.failed) for score in scores)
    if "report" in parts:
        print(running.report(suite, request))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hint = ": a smaller --batch takes less"
    if arguments.command == "shapes":
        from unialign_jax.evaluation import shapes_command

        work = shapes_command.run
    else:
        work = run_suite
    resumes = "what is done is kept; the same command resumes"
    return run_command(lambda: work(arguments), traceback=arguments.traceback, hint=hint, interrupted=resumes)


if __name__ == "__main__":
    sys.exit(main())
