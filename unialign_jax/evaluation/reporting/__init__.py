"""Reports of a run of a suite: report.json, report.md and report.html."""

import collections
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from unialign_jax import __version__
from unialign_jax.evaluation import intervals, official_files, published
from unialign_jax.evaluation.reporting import markdown, page
from unialign_jax.evaluation.suite import Request, Score, Suite
from unialign_jax.files import read_json, replacing_file, write_json

FORMAT = "unialign_jax report"
JSON, MARKDOWN, PAGE = "report.json", "report.md", "report.html"


def write(suite: Suite, request: Request, settings: dict, scores: Sequence[Score], *, seed: int = 0) -> dict:
    """Writes OUTPUT/MODE/report.json, report.md and report.html, and returns what report.json holds.

    Args:
      settings: what settings.json holds.
      seed: of the resampling.
    """
    scores = [dataclasses.replace(score, failed=placeless(score.failed, request)) for score in scores]
    found = content(suite, request, settings, scores, seed=seed)
    write_files(request.output / request.mode, found, scores, worst_by=suite.worst_by, roots=roots(request))
    return found


def roots(request: Request) -> tuple[Path, ...]:
    """The folders out of which a report takes pictures: the run's, to which their names are relative, and the data."""
    data = request.data if request.data.is_dir() else request.data.parent
    return request.output, data


def content(suite: Suite, request: Request, settings: dict, scores: Sequence[Score], *, seed: int = 0) -> dict:
    """What report.json holds."""
    figures = with_intervals(lambda found: suite.figures(found, request.mode), scores, seed=seed, name=suite.name)
    return {
        **heading(suite.name, suite.title, request.mode, settings),
        "leading": suite.leading,
        "scale": suite.scale,
        **figures,
        "items": counts(scores, settings.get("items")),
        "data": data_hashes(suite.name, settings.get("data", {})),
        "notes": [placeless(note, request) for note in suite.notes(request)],
        "official_command": placeless(suite.official_command(request) or "", request) or None,
        "published": published_rows(suite.name, suite.leading, suite.scale),
        "comparable": published.COMPARABLE.get(suite.name),
        "errors_in_print": list(published.ERRORS.get(suite.name, ())),
    }


def heading(suite: str, title: str, mode: str, settings: dict) -> dict:
    """Whose report it is."""
    kept = {key: value for key, value in settings.items() if key not in ("model", "data", "suite", "scoring")}
    kept |= {"scoring": settings["scoring"][mode]} if mode in settings.get("scoring", {}) else {}
    return {
        "format": FORMAT,
        "suite": suite,
        "title": title,
        "mode": mode,
        "model": settings.get("model"),
        "settings": without_paths(kept),
        "unialign_jax": __version__,
    }


def without_paths(settings: dict) -> dict:
    """Settings with the names alone of files and folders: a published report need not tell where they lay."""

    def named(value):
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

    return named(settings)


def placeless(text: str, request: Request) -> str:
    """A text with $RUN, $DATA and such for the user's paths: a published report need not tell where they lay."""
    given = {key: value for key, value in request.extra.items() if isinstance(value, str) and os.path.isabs(value)}
    names = {request.output: "$RUN", request.data: "$DATA"} | {Path(v): f"${key.upper()}" for key, v in given.items()}
    if request.data.is_file():
        names[request.data.resolve().parent] = "$DATA_FOLDER"
    # The longest first, since one may lie in another.
    for folder, name in sorted(names.items(), key=lambda pair: -len(str(pair[0].resolve()))):
        for path in (folder.resolve(), folder):
            if len(path.parts) > 1:
                text = text.replace(str(path), name)
    return text


def with_intervals(
    figures: Callable[[Sequence[Score]], dict[str, float]], scores: Sequence[Score], *, seed: int, name: str
) -> dict:
    """The keys "figures" and "bootstrap" of a report."""
    with tqdm(total=intervals.RESAMPLES, desc=f"{name}, intervals", unit="resample", disable=None, leave=False) as bar:
        found = intervals.of_figures(figures, scores, seed=seed, progress=bar.update)
    ordered = sorted(found, key=lambda figure: "/" in figure)  # those of all items before those of groups
    return {
        "figures": {figure: dataclasses.asdict(found[figure]) for figure in ordered},
        "bootstrap": bootstrap(seed),
    }


def bootstrap(seed: int) -> dict:
    """The key "bootstrap" of a report: how its intervals were made."""
    return {
        "level": intervals.LEVEL,
        "method": "percentile",
        "resampled": "items within each group, with replacement",
        "resamples": intervals.RESAMPLES,
        "seed": seed,
    }


def counts(scores: Sequence[Score], every: int | None) -> dict:
    """The key "items": how many there are, were scored and failed, and why."""
    groups = {name: {"items": 0, "failed": 0} for name in dict.fromkeys(score.group for score in scores)}
    for score in scores:
        groups[score.group]["items"] += 1
        groups[score.group]["failed"] += bool(score.failed)
    reasons = collections.Counter(score.failed for score in scores if score.failed)
    return {
        "of_the_suite": every,
        "in_this_run": len(scores),
        "failed": sum(reasons.values()),
        "reasons": [{"reason": reason, "items": count} for reason, count in reasons.most_common()],
        "groups": groups,
    }


def data_hashes(suite: str, found: dict[str, str]) -> dict[str, dict]:
    """The key "data": the SHA-256 of each file, and whether it is the official one; None where that is not known."""
    known = official_files.sha256_of(suite)
    return {
        name: {"sha256": digest, "official": digest == known[file] if (file := Path(name).name) in known else None}
        for name, digest in found.items()
    }


def published_rows(suite: str, leading: str, scale: float) -> list[dict]:
    """The key "published": values on the scale of the suite's own figures."""
    return [
        {
            "model": row.model,
            "figure": row.figure or leading,
            "value": round(row.value * scale / published.SCALES[suite], 6),
            "source": row.where,
            "setting": row.setting,
            "note": row.note,
        }
        for row in published.of_suite(suite)
    ]


def write_files(folder: Path, found: dict, scores: Sequence[Score], *, worst_by: str, roots: Sequence[Path]) -> None:
    """Writes the three files of a report.

    Args:
      found: what report.json holds.
      worst_by: the value that orders the worst and the best items.
      roots: folders of the pictures; the names in the scores are relative to the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON, found)
    with replacing_file(folder / MARKDOWN) as scratch:
        scratch.write_text(markdown.render(found), encoding="utf-8")
    with replacing_file(folder / PAGE) as scratch:
        scratch.write_text(page.render(found, scores, worst_by=worst_by, roots=roots), encoding="utf-8")


def read(path: Path) -> dict:
    """Reads a report.json. Raises FileNotFoundError or ValueError, in one line."""
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is no report of launch/evaluate.py")
    return found
