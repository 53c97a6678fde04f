"""What the pages of a report say in words and digits, for Markdown and HTML alike."""

import math
from pathlib import Path

OFFICIAL = {
    True: "the official file",
    False: "not the official file",
    None: "the SHA-256 of the official file is not known here",
}


def number(value: float | None, scale: float) -> str:
    """A figure with digits that suit its scale."""
    if value is None or not math.isfinite(value):
        return "none"
    return f"{value:.{2 if scale > 10 else 3}f}"


def remark(row: dict) -> str:
    """What is said of a published value besides its source."""
    return "; ".join(filter(None, (row["setting"], row["note"])))


def model_name(found: dict) -> str:
    """What a report calls the model: its bundle's name and step."""
    model = found["model"] or {}
    name = model.get("bundle") or model.get("run") or "a model"
    return f"{name}, step {model['step']}" if model.get("step") is not None else str(name)


def sentence_of_counts(found: dict) -> str:
    """How many of the items are in the figures."""
    items = found["items"]
    of = f" of {items['of_the_suite']}" if items["of_the_suite"] is not None else ""
    partial = items["of_the_suite"] is not None and items["in_this_run"] < items["of_the_suite"]
    part = " A part of the suite: not comparable with published values." if partial else ""
    return f"{items['in_this_run']}{of} items, {items['failed']} of them failed.{part}"


def sentence_of_mode(found: dict) -> str:
    """In which mode the items were scored; "" for a suite without modes."""
    return f"Mode: {found['mode']}." if found["mode"] else ""


def sentence_of_judge(found: dict) -> str:
    """Who judged, and how many answers are missing; "" without a judge."""
    scoring = found["settings"].get("scoring", {})
    if not (judge := scoring.get("judge")):
        return ""
    guess = " Those got a random score (--official-guess)." if scoring.get("official_guess") else ""
    return (
        f"Judge: {judge['model']} at {judge['url']}. Of {judge['questions']} questions {judge['unparsed']} have an "
        f"answer that cannot be read, and {judge['failed']} none.{guess}"
    )


def sentence_of_intervals(found: dict) -> str:
    """How the intervals were made."""
    bootstrap = found["bootstrap"]
    return (
        f"Intervals: {bootstrap['level']:.0%}, bootstrap over {bootstrap['resampled']} ({bootstrap['resamples']} "
        f"resamples, {bootstrap['method']} method, seed {bootstrap['seed']}). They say how much the choice of items "
        "matters, not how much another seed of the model or another answer of a judge would."
    )


def summary(found: dict, folder: Path) -> list[str]:
    """Lines for the terminal: the figures of all items, and where the report is."""
    whole = {name: figure for name, figure in found["figures"].items() if "/" not in name or name == found["leading"]}
    width = max(map(len, whole), default=0)
    lines = [f"{found['title']}: {sentence_of_counts(found)} {sentence_of_mode(found)}".rstrip()]
    for name, figure in whole.items():
        value, low, high = (number(figure[key], found["scale"]) for key in ("value", "low", "high"))
        lines.append(f"  {name:<{width}}  {value}  ({low} to {high})")
    return [*lines, f"wrote {folder}/report.html, report.md and report.json"]


def flat(found: dict) -> list[tuple[str, str]]:
    """The model and the settings as pairs of key and value."""
    pairs = []

    def walk(prefix, value):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix} {key}".strip(), inner)
        elif value not in (None, {}, [], ""):
            pairs.append((prefix, str(value)))

    walk("model", found["model"] or {})
    walk("", found["settings"])
    return pairs
