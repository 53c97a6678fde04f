"""report.md: the figures of a run in Markdown."""

import re
from collections.abc import Sequence

from unialign_jax.evaluation.reporting import words
from unialign_jax.files import one_line


def escaped(text: str) -> str:
    """An untrusted text as one line that Markdown shows as it is, also in a cell of a table."""
    return re.sub(r"[\\`*\[\]<>|~&$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(str(text), 1000))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def render(found: dict) -> str:
    """report.md."""
    scale, items = found["scale"], found["items"]
    lines = [f"# {escaped(found['title'])}: {escaped(words.model_name(found))}", ""]
    lines += [f"{words.sentence_of_counts(found)} {words.sentence_of_mode(found)}", ""]
    if judge := words.sentence_of_judge(found):
        lines += [escaped(judge), ""]
    rows = [
        (
            escaped(name) + (" (leading)" if name == found["leading"] else ""),
            words.number(figure["value"], scale),
            f"{words.number(figure['low'], scale)} to {words.number(figure['high'], scale)}",
        )
        for name, figure in found["figures"].items()
    ]
    lines += table(("figure", "value", f"{found['bootstrap']['level']:.0%} interval"), rows)
    lines += ["", words.sentence_of_intervals(found), ""]
    if items["reasons"]:
        lines += ["## Items that failed", ""]
        lines += table(("items", "reason"), [(str(row["items"]), escaped(row["reason"])) for row in items["reasons"]])
        lines.append("")
    if found["published"]:
        lines += ["## Published values", "", f"Comparable: {escaped(found['comparable'] or '')}", ""]
        lines += [*published_table(found["published"]), ""]
        if found["errors_in_print"]:
            lines += [*(f"- {escaped(error)}" for error in found["errors_in_print"]), ""]
    lines += ["## How it was made", ""]
    lines += [f"- {escaped(note)}" for note in found["notes"]]
    lines += [
        f"- {escaped(name)}: SHA-256 `{entry['sha256']}`, {words.OFFICIAL[entry['official']]}."
        for name, entry in found["data"].items()
    ]
    lines += [f"- {escaped(key)}: {escaped(value)}" for key, value in words.flat(found)]
    if found["official_command"]:
        lines += ["", "The official scorer over this folder ($RUN):", "", *fenced(found["official_command"])]
    return "\n".join(lines) + "\n"


def published_table(rows: Sequence[dict]) -> list[str]:
    """Published values as a table."""
    cells = [
        (
            escaped(row["model"]),
            escaped(row["figure"]),
            f"{row['value']:g}",
            escaped(row["source"]),
            escaped(words.remark(row)),
        )
        for row in rows
    ]
    return table(("model", "figure", "value", "read in", "how"), cells)


def fenced(text: str) -> list[str]:
    """A block of code that its own text cannot end."""
    return [f"    {line}" for line in text.splitlines()]
