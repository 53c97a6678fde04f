"""`launch/evaluate.py compare`: runs of one suite side by side, and beside published values.

Figures are those of the items that all runs have, and differences are resampled over items that the runs share.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from unialign_jax.evaluation import intervals, published, reporting
from unialign_jax.evaluation.reporting import markdown, words
from unialign_jax.evaluation.suite import MODES, Score, Suite, read_scores
from unialign_jax.files import replacing_file, shown, write_json

ENDINGS = (".md", ".json")
# Of the settings: what runs may differ in without a warning.
_MAY_DIFFER = ("seconds_per_job", "unialign_jax", "items", "suite", "data", "request", "model", "scoring")
_MAY_DIFFER_IN_REQUEST = ("output", "data", "limit", "model", "mode")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, with its settings and scores of one mode."""

    label: str
    suite: Suite
    mode: str
    settings: dict
    scores: dict[str, Score]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="DIR", type=Path, help="folders of runs; differences are to the first")
    add("--mode", choices=MODES, help="which scores, where a run has both")
    add("--output", metavar="FILE", type=Path, help="write the comparison too, as Markdown (.md) or JSON (.json)")
    add("--overwrite", action="store_true", help="replace the file that is there")
    add("--seed", type=int, default=0, help="of the resampling (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the comparison, and writes it if that is asked for."""
    output = arguments.output
    if len(arguments.runs) < 2:
        raise ValueError(f"{arguments.runs[0]} alone is no comparison: name two runs or more")
    if output is not None:
        if output.suffix not in ENDINGS:
            raise ValueError(f"--output={output} ends in {output.suffix or 'nothing'}, expected .md or .json")
        if output.exists() and not arguments.overwrite:
            raise FileExistsError(f"{output} is there already: choose another --output, or give --overwrite")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output={output}: there is no folder {output.parent}")
    found = compare([open_run(folder, arguments.mode) for folder in arguments.runs], seed=arguments.seed)
    text = render(found)
    print(text)
    if output is not None and output.suffix == ".json":
        write_json(output, found)
    elif output is not None:
        with replacing_file(output) as scratch:
            scratch.write_text(text + "\n", encoding="utf-8")


def open_run(folder: Path, mode: str | None = None) -> Run:
    """A run's folder.

    Args:
      mode: of the scores; None is the run's own, or the one that it has.

    Raises ValueError or OSError, in one line, for a folder without scores.
    """
    from unialign_jax.evaluation import running

    settings = running.read_settings(folder)
    there = [name for name in ("", *MODES) if (folder / name / running.SCORES).is_file()]
    own = settings.get("request", {}).get("mode")
    wanted = mode or (own if own in there or len(there) != 1 else there[0])
    if wanted not in there:
        raise FileNotFoundError(
            f"{folder} has no scores of mode {wanted}"
            + (f", it has {' and '.join(there)}" if there else "")
            + ": score it first (python launch/evaluate.py SUITE score)"
        )
    scores = read_scores(folder / wanted / running.SCORES)
    return Run(str(folder), _suite(settings.get("suite"), folder), wanted, settings, {s.item: s for s in scores})


def _suite(name, folder) -> Suite:
    from unialign_jax.evaluation.shapes_suite import Shapes
    from unialign_jax.evaluation.suites import SUITES, find_suite

    if name == Shapes.name:
        return Shapes()
    if name not in SUITES:
        raise ValueError(f"{folder} holds a run of {shown(name)}, which is no suite here ({', '.join(SUITES)}, shapes)")
    return find_suite(name)


def compare(runs: Sequence[Run], *, seed: int = 0) -> dict:
    """What the comparison says, for JSON.

    Raises ValueError, in one line, for runs of different suites, modes or items.
    """
    first = runs[0]
    for other in runs[1:]:
        if other.suite.name != first.suite.name:
            raise ValueError(
                f"{first.label} is a run of {first.suite.name}, {other.label} of {other.suite.name}: they have no "
                "figures in common"
            )
        if other.mode != first.mode:
            raise ValueError(
                f"{first.label} is scored in mode {first.mode}, {other.label} in mode {other.mode}: give --mode"
            )
    items = [item for item in first.scores if all(item in run.scores for run in runs)]
    if not items:
        raise ValueError(f"{first.label} and {runs[-1].label} have no items in common")
    for run in runs[1:]:
        for item in items:
            one, other = first.scores[item], run.scores[item]
            if (one.group, one.text) != (other.group, other.text):
                raise ValueError(
                    f"item {item} is {shown(one.text)} in {first.label} and {shown(other.text)} in {run.label}: the "
                    "runs were made of different data"
                )
    scores = [[run.scores[item] for item in items] for run in runs]
    figures = lambda found: first.suite.figures(found, first.mode)  # noqa: E731
    total = intervals.RESAMPLES * (2 * len(runs) - 1)
    with tqdm(total=total, desc="intervals", unit="resample", disable=None, leave=False) as bar:
        values = [intervals.of_figures(figures, found, seed=seed, progress=bar.update) for found in scores]
        gaps = [
            intervals.of_differences(figures, scores[0], found, seed=seed, progress=bar.update) for found in scores[1:]
        ]
    return {
        "format": "unialign_jax comparison",
        "suite": first.suite.name,
        "title": first.suite.title,
        "mode": first.mode,
        "leading": first.suite.leading,
        "scale": first.suite.scale,
        "items": len(items),
        "runs": [
            {
                "name": run.label,
                "items": len(run.scores),
                "failed": sum(bool(score.failed) for score in found),
                "figures": {name: dataclasses.asdict(value) for name, value in mine.items()},
                "difference": None if gap is None else {name: dataclasses.asdict(value) for name, value in gap.items()},
            }
            for run, found, mine, gap in zip(runs, scores, values, [None, *gaps], strict=True)
        ],
        "bootstrap": reporting.bootstrap(seed),
        "warnings": warnings(runs, len(items)),
        "published": reporting.published_rows(first.suite.name, first.suite.leading, first.suite.scale),
        "comparable": published.COMPARABLE.get(first.suite.name),
    }


def warnings(runs: Sequence[Run], common: int) -> list[str]:
    """What the runs differ in besides their models, and whether items are left out."""
    first, said = runs[0], []
    for run in runs:
        if len(run.scores) > common:
            said.append(f"{run.label} has {len(run.scores)} items, of which {common} are compared")
        every = run.settings.get("items")
        if every is not None and len(run.scores) < every:
            said.append(f"{run.label} has {len(run.scores)} of the suite's {every} items: published values are of all")
    for run in runs[1:]:
        one, other = first.settings.get("data", {}), run.settings.get("data", {})
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                said.append(f"{name} is not the same file in {first.label} and {run.label}")
        one, other = settings_of(first), settings_of(run)
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                said.append(
                    f"{name} is {shown(one.get(name))} in {first.label} and {shown(other.get(name))} in {run.label}"
                )
    return said


def settings_of(run: Run) -> dict[str, str]:
    """The settings that should be the same in runs that are compared, by flat names.

    Files of answers or of the official scorer's results differ from model to model: only whether there is one counts.
    """
    settings = run.settings
    kept = {key: value for key, value in settings.items() if key not in _MAY_DIFFER}
    scoring = dict(settings.get("scoring", {}).get(run.mode, {}))
    if "judge" in scoring:
        scoring["judge"] = {key: scoring["judge"].get(key) for key in ("model", "max_tokens")}
    kept |= {"scoring": {key: value for key, value in scoring.items() if key not in ("items", "failed")}}
    asked = {key: value for key, value in settings.get("request", {}).items() if key not in _MAY_DIFFER_IN_REQUEST}
    model = {key: value for key, value in (settings.get("model") or {}).items() if key in ("dtype", "quantize")}
    flat = dict(words.flat({"model": model, "settings": {**asked, **kept}}))
    return {
        key: "a file" if key.endswith("results") else value
        for key, value in flat.items()
        if not key.endswith("results_sha256")
    }


def render(found: dict) -> str:
    """The comparison as Markdown."""
    scale, runs = found["scale"], found["runs"]
    labels = [chr(ord("A") + number) if number < 26 else f"run {number + 1}" for number in range(len(runs))]
    lines = [
        f"# {markdown.escaped(found['title'])}, {found['items']} items"
        + (f", mode {found['mode']}" if found["mode"] else ""),
        "",
    ]
    lines += [f"- {label}: {markdown.escaped(run['name'])}" for label, run in zip(labels, runs, strict=True)]
    lines += [f"- Warning: {markdown.escaped(warning)}." for warning in found["warnings"]]
    heads = ["figure", *labels, *(f"{label} - {labels[0]}" for label in labels[1:])]
    rows = []
    for name in runs[0]["figures"]:
        cells = [_cell(run["figures"].get(name), scale) for run in runs]
        cells += [_cell((run["difference"] or {}).get(name), scale, signed=True) for run in runs[1:]]
        rows.append([markdown.escaped(name) + (" (leading)" if name == found["leading"] else ""), *cells])
    lines += ["", *markdown.table(heads, rows), "", words.sentence_of_intervals(found)]
    lines.append("A difference whose interval has 0 in it may come from the choice of items; others are marked *.")
    if found["published"]:
        lines += ["", "Published values:", "", *markdown.published_table(found["published"])]
        lines += ["", markdown.escaped(found["comparable"] or "")]
    return "\n".join(lines)


def _cell(figure: dict | None, scale: float, signed: bool = False) -> str:
    """A figure with its interval in brackets; a difference that does not reach 0 has a star."""
    if figure is None or figure["value"] is None:
        return "none"
    value, low, high = (words.number(figure[key], scale) for key in ("value", "low", "high"))
    star = "*" if signed and None not in figure.values() and (figure["low"] > 0 or figure["high"] < 0) else ""
    return f"{'+' if signed and figure['value'] > 0 else ''}{value} [{low}, {high}]{star}"
