"""report.html: a run on one page, with pictures in it, that needs no other file and no JavaScript.

All texts come from users, models and judges, and are escaped; the page's own policy lets it load nothing.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation.reporting import words
from unialign_jax.evaluation.suite import Score
from unialign_jax.files import one_line

EXTREMES = 12  # worst items, and best
CARD, THUMBNAIL = 384, 160  # pixels of the longer side
# Bytes of all pictures of the cards, and of the contact sheet: a page stays below 20 MB.
CARDS_BUDGET, SHEET_BUDGET = 8_000_000, 8_000_000
SHEET_PICTURES, SHEET_ITEMS = 600, 40  # on the contact sheet in all, and items of a group on it
MAX_WORDS = 3000  # characters of a text
FAILED_SHOWN = 100

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --line: #dfe3e8; --paper: #fff; --card: #f6f7f9;
  --accent: #2f6fbd; --warn: #a15c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4b2; --line: #343a43; --paper: #16191d;
  --card: #1e2227; --accent: #77aef0; --warn: #f0b35b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
.soft { color: var(--soft); } .warn { color: var(--warn); }
.leading { font-size: 2.4rem; font-weight: 650; margin: .2rem 0; } .leading small { font-size: 1rem; font-weight: 400; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
td.number { text-align: right; white-space: nowrap; } tr.own { font-weight: 650; } tr.own td { color: var(--accent); }
.bar { position: relative; width: 12rem; height: .9rem; margin-top: .3rem; background: var(--card); }
.bar i { position: absolute; top: .2rem; height: .5rem; min-width: 1px; background: var(--accent); opacity: .4; }
.bar b { position: absolute; top: 0; width: 2px; height: .9rem; background: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .8rem; }
.card { background: var(--card); border-radius: .5rem; padding: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .3rem; margin: .4rem 0; }
.pictures img { flex: 1 1 45%; min-width: 0; max-width: 100%; height: auto; object-fit: contain;
  border-radius: .25rem; }
.words { white-space: pre-wrap; margin: .3rem 0; font-size: .92rem; } .words.model { color: var(--soft); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .5rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; border-radius: .25rem; }
figcaption { font-size: .75rem; line-height: 1.25; color: var(--soft); max-height: 5em; overflow: hidden; }
code, pre { font: .85rem/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; background: var(--card); padding: .8rem; }
summary { cursor: pointer; margin: .4rem 0; }
@media (max-width: 40rem) { .bar { width: 5rem; } th, td { padding-right: .5rem; } }
"""


def render(found: dict, scores: Sequence[Score], *, worst_by: str, roots: Sequence[Path]) -> str:
    """report.html.

    Args:
      found: what report.json holds.
      worst_by: the value that orders the worst and the best items.
      roots: folders of the pictures; the names in the scores are relative to the first.
    """
    title = f"{found['title']}: {words.model_name(found)}"
    worst, best = extremes(scores, worst_by)
    cards, sheet = Pictures(roots, CARD, CARDS_BUDGET), Pictures(roots, THUMBNAIL, SHEET_BUDGET)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escaped(title)}</h1>",
        leading(found),
        f"<p>{escaped(words.sentence_of_counts(found))} {escaped(words.sentence_of_mode(found))}</p>",
        f"<p>{escaped(words.sentence_of_judge(found))}</p>",
        "<h2>Figures</h2>",
        figures(found),
        f'<p class="soft">{escaped(words.sentence_of_intervals(found))}</p>',
        published(found),
        failures(found, scores),
        section(f"Worst items, by {worst_by}", "cards", [card(score, cards) for score in worst]),
        section(f"Best items, by {worst_by}", "cards", [card(score, cards) for score in best]),
        contact_sheet(scores, sheet),
        how(found),
        f'<p class="soft">Written by unialign_jax {escaped(found["unialign_jax"])}.</p></body></html>',
    ]
    return "\n".join(filter(None, parts)) + "\n"


def escaped(text: Any) -> str:
    """An untrusted text for HTML: its own line ends, and no other control characters."""
    lines = str(text)[: MAX_WORDS + 1].splitlines() or [""]
    text = "\n".join(one_line(line, MAX_WORDS) for line in lines)
    return html.escape(text if len(text) <= MAX_WORDS else text[: MAX_WORDS - 1] + "…")


def section(title: str, kind: str, inside: Sequence[str]) -> str:
    """A part of the page; "" where it is empty."""
    return f'<h2>{escaped(title)}</h2><div class="{kind}">{"".join(inside)}</div>' if inside else ""


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls on a narrow screen; the rows are HTML."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def row(*cells: str, numbers: Sequence[int] = (), own: bool = False) -> str:
    """A row of a table.

    Args:
      cells: HTML.
      numbers: the places of cells that are numbers.
      own: whether it is the row to look at.
    """
    tds = (f'<td class="number">{cell}</td>' if i in numbers else f"<td>{cell}</td>" for i, cell in enumerate(cells))
    start = '<tr class="own">' if own else "<tr>"
    return f"{start}{''.join(tds)}</tr>"


# Figures


def leading(found: dict) -> str:
    """The leading figure, large."""
    figure = found["figures"].get(found["leading"])
    if figure is None:
        return ""
    return f'<p class="leading">{shown(figure, found)} <small class="soft">{escaped(found["leading"])}</small></p>'


def shown(figure: dict, found: dict) -> str:
    """A figure with its interval."""
    value, low, high = (words.number(figure[key], found["scale"]) for key in ("value", "low", "high"))
    return f'{value} <small class="soft">{low} to {high}</small>'


def figures(found: dict) -> str:
    """All figures, each with its interval as numbers and as a bar from 0 to the scale's end."""
    rows = []
    for name, figure in found["figures"].items():
        value, low, high = (words.number(figure[key], found["scale"]) for key in ("value", "low", "high"))
        cells = escaped(name), value, f"{low} to {high}", bar(figure, found["scale"])
        rows.append(row(*cells, numbers=(1, 2), own=name == found["leading"]))
    return table(("figure", "value", f"{found['bootstrap']['level']:.0%} interval", ""), rows)


def bar(figure: dict, scale: float) -> str:
    """The interval and the value on a line."""
    if None in figure.values() or not 0 <= figure["low"] <= figure["high"] <= scale:
        return ""
    low, high, value = (100 * figure[key] / scale for key in ("low", "high", "value"))
    inside = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{value:.1f}%"></b>'
    return f'<div class="bar">{inside}</div>'


def published(found: dict) -> str:
    """Published values beside the run's own, the highest first."""
    if not found["published"]:
        return ""
    parts = ["<h2>Beside published values</h2>", f"<p>Comparable: {escaped(found['comparable'] or '')}</p>"]
    for name in dict.fromkeys(entry["figure"] for entry in found["published"]):
        rows = []
        for entry in found["published"]:
            if entry["figure"] == name:
                how = escaped(words.remark(entry))
                cells = escaped(entry["model"]), f"{entry['value']:g}", escaped(entry["source"]), how
                rows.append((entry["value"], row(*cells, numbers=(1,))))
        own = found["figures"].get(name, {"value": None})
        if own["value"] is not None:
            cells = escaped(words.model_name(found)), shown(own, found), "this run", escaped(found["mode"])
            rows.append((own["value"], row(*cells, numbers=(1,), own=True)))
        rows = [html_row for _, html_row in sorted(rows, key=lambda pair: -pair[0])]
        is_open = " open" if name == found["leading"] else ""
        inside = table(("model", "value", "read in", "how"), rows)
        parts.append(f"<details{is_open}><summary>{escaped(name)}</summary>{inside}</details>")
    if found["errors_in_print"]:
        parts += ["<ul>", *(f"<li>{escaped(error)}</li>" for error in found["errors_in_print"]), "</ul>"]
    return "".join(parts)


# Items


def extremes(scores: Sequence[Score], by: str, count: int = EXTREMES) -> tuple[list[Score], list[Score]]:
    """The worst and the best items, at most half of all each; of equal ones some of every group, in turn."""
    able = [score for score in scores if by in score.values]
    count = min(count, len(able) // 2) if len(able) > 1 else len(able)

    def first(sign):
        met: dict[tuple, int] = {}
        keyed = []
        for number, score in enumerate(able):
            value = sign * score.values[by]
            turn = met[value, score.group] = met.get((value, score.group), -1) + 1
            keyed.append((value, turn, number))
        return [able[number] for *_, number in sorted(keyed)[:count]]

    worst = first(1)
    taken = {id(score) for score in worst}
    return worst, [score for score in first(-1) if id(score) not in taken]


class Pictures:
    """Makes small JPEG pictures for a page, until their bytes are spent.

    Args:
      roots: the folders that files may lie in; names are relative to the first.
      side: pixels of the longer side.
      budget: bytes of all together.
    """

    def __init__(self, roots: Sequence[Path], side: int, budget: int):
        self._roots = [Path(root).resolve() for root in roots]
        self._side, self._left = side, budget
        self._done: dict[str, str] = {}

    def tag(self, name: str) -> str:
        """An <img>, or a word on why there is none."""
        if name not in self._done:
            self._done[name] = self._make(name)
        return self._done[name]

    def _make(self, name: str) -> str:
        path = (self._roots[0] / name).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            return '<span class="warn">a picture outside the run</span>'
        if self._left <= 0:
            return '<span class="soft">left out to keep the page small</span>'
        try:
            image = load_rgb(path)
        except (ValueError, OSError):
            return '<span class="warn">no readable picture</span>'
        image.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=78, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self._left -= len(data)
        width, height = image.size
        return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="" loading="lazy">'


def card(score: Score, pictures: Pictures) -> str:
    """An item in full: its scores, its text, its pictures, and the model's or the judge's words."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in score.values.items())
    images = "".join(pictures.tag(name) for name in score.images)
    head = f"{score.group}, {score.item}" if score.group else score.item
    return (
        f'<div class="card"><div class="soft">{escaped(head)}</div><strong>{escaped(values)}</strong>'
        f'<div class="words">{escaped(score.text)}</div>'
        + (f'<div class="pictures">{images}</div>' if images else "")
        + (f'<div class="words model">{escaped(score.answer)}</div>' if score.answer else "")
        + "</div>"
    )


def failures(found: dict, scores: Sequence[Score]) -> str:
    """The items without a score, and why."""
    failed = [score for score in scores if score.failed]
    if not failed:
        return ""
    rows = [row(str(entry["items"]), escaped(entry["reason"]), numbers=(0,)) for entry in found["items"]["reasons"]]
    each = [row(escaped(score.item), escaped(score.group), escaped(score.failed)) for score in failed[:FAILED_SHOWN]]
    more = f"<p>and {len(failed) - FAILED_SHOWN} more</p>" if len(failed) > FAILED_SHOWN else ""
    return (
        f"<h2>Items that failed</h2>{table(('items', 'reason'), rows)}<details><summary>which</summary>"
        f"{table(('item', 'group', 'reason'), each)}{more}</details>"
    )


def contact_sheet(scores: Sequence[Score], pictures: Pictures) -> str:
    """Small pictures of items of every group, spread evenly over it, not chosen."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        if score.images:
            groups.setdefault(score.group, []).append(score)
    if not groups:
        return ""
    each = max(len(score.images) for members in groups.values() for score in members)
    most = max(1, min(SHEET_ITEMS, SHEET_PICTURES // (each * len(groups))))
    parts = ["<h2>Contact sheet</h2>"]
    for name, members in groups.items():
        step = max(1.0, len(members) / most)
        chosen = [members[int(place * step)] for place in range(min(most, len(members)))]
        about = f"{name or 'all items'}: {len(chosen)} of {len(members)}"
        shown = (f"<figure>{pictures.tag(image)}{caption(s, image)}</figure>" for s in chosen for image in s.images)
        parts.append(f"<details open><summary>{escaped(about)}</summary>")
        parts.append(f'<div class="sheet">{"".join(shown)}</div></details>')
    return "".join(parts)


def caption(score: Score, image: str) -> str:
    """The text below an item's last picture; sources have none."""
    return f"<figcaption>{escaped(score.text[:160])}</figcaption>" if image == score.images[-1] else ""


# Settings


def how(found: dict) -> str:
    """Notes, data, settings and the official scorer's command."""
    notes = "".join(f"<li>{escaped(note)}</li>" for note in found["notes"])
    data = [
        row(escaped(name), f"<code>{escaped(entry['sha256'])}</code>", escaped(words.OFFICIAL[entry["official"]]))
        for name, entry in found["data"].items()
    ]
    settings = [row(escaped(key), escaped(value)) for key, value in words.flat(found)]
    command = found["official_command"]
    return (
        "<h2>How it was made</h2>"
        + (f"<ul>{notes}</ul>" if notes else "")
        + (f"<h3>Data</h3>{table(('file', 'SHA-256', ''), data)}" if data else "")
        + f"<h3>Model and settings</h3>{table(('setting', 'value'), settings)}"
        + (f"<h3>The official scorer over this folder ($RUN)</h3><pre>{escaped(command)}</pre>" if command else "")
    )
