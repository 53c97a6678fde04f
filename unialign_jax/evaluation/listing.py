"""`launch/evaluate.py list`: the suites, what each needs, and what it costs by a measured rate."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from unialign_jax.evaluation.suite import Suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--rate", type=float, metavar="X", help="images that your machine makes in a second")
    add("--text-rate", type=float, metavar="X", help="texts that it makes in a second")
    add(
        "--run",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="take the rate of this run; may be repeated",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    from unialign_jax.evaluation.running import read_settings
    from unialign_jax.evaluation.shapes_suite import Shapes
    from unialign_jax.evaluation.suites import SUITES, find_suite

    for name in ("rate", "text_rate"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name):g}, expected a number above 0")
    suites = [*map(find_suite, SUITES), Shapes()]
    measured = {}
    for folder in arguments.run:
        settings = read_settings(folder)
        if "seconds_per_job" not in settings:
            raise ValueError(f"{folder} has made nothing yet, so it has no rate")
        measured[settings.get("suite")] = settings["seconds_per_job"]
    print("\n".join(lines(suites, measured, arguments.rate, arguments.text_rate)))


def lines(
    suites: Sequence[Suite], measured: dict[str, float], rate: float | None = None, text_rate: float | None = None
) -> list[str]:
    """The table and where its hours come from.

    Args:
      measured: seconds for a job of a run, by the name of its suite.
      rate, text_rate: images and texts in a second; None is the rate of a run of such a suite, where there is one.
    """
    known = {suite.name: suite for suite in suites}
    seconds = {"images": rate and 1 / rate, "texts": text_rate and 1 / text_rate}
    whose = {"images": "--rate", "texts": "--text-rate"}
    for kind in seconds:
        for name, value in measured.items():
            if seconds[kind] is None and name in known and getattr(known[name], kind):
                seconds[kind], whose[kind] = value, f"the run of {name}"
    rows = [("suite", "images", "texts", "judge calls", "scoring needs", "hours", "what it is")]
    for suite in suites:
        own = measured.get(suite.name)
        spent = [(count, own or seconds[kind]) for kind in seconds if (count := getattr(suite, kind))]
        hours = f"{sum(n * each for n, each in spent) / 3600:.1f}" if all(each for _, each in spent) else "?"
        numbers = (f"{count:,}" if count else "" for count in (suite.images, suite.texts, suite.judge_calls))
        rows.append((suite.name, *numbers, suite.needs, hours if spent else "", suite.summary))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    table = ["  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    table += ["", *(f"{suite.name}: {suite.source}" for suite in suites), ""]
    given = [f"{kind} by {whose[kind]}, {1 / value:.3g} a second" for kind, value in seconds.items() if value]
    given += [f"{name} by its own run, {value:.3g} s a job" for name, value in measured.items() if name in known]
    if given:
        return [*table, f"Hours of generating: {'; '.join(given)}."]
    return [*table, "Hours of generating: give --rate=X (images a second), or --run=DIR of a run that has made some."]
