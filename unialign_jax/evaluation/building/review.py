"""Seventh stage, export: a sheet for people, who accept, edit or reject every prompt; and what they decided.

A sheet is a CSV file with an HTML page of the pictures beside it, review/sheet-ID.csv and .html. Its ID stands for its
content, and a sheet that is there is never written again: it may be half filled in. A sheet has the prompts that are
still open. Several people may share its rows, and import each their own.
"""

import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path

from unialign_jax.evaluation.building import pictures, rules
from unialign_jax.evaluation.building.drafting import clean, join_edits
from unialign_jax.evaluation.building.stages import Build, Stage, now, read_rows, write_rows
from unialign_jax.files import check_regular, one_line, replacing_file, sha256, shown

COLUMNS = ("item", "draft_id", "image", "prompt", "flags", "decision", "text", "editor", "reason")
DECISIONS = ("accept", "edit", "reject")
DECIDED = "review/decisions.jsonl"
MAX_SHEET = 2**26  # bytes
MAX_WORDS = 1000  # characters of an editor's name and of a reason
PICTURE = 360  # pixels of a picture's longer side in the HTML page


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a person decided about a draft: a line of decisions.jsonl.

    Attributes:
      decision: "accept", "edit" or "reject".
      text: of an edit, the new prompt.
      edits: of an edit of edit_multi, its three edits.
      sheet: SHA-256 of the CSV file.
    """

    item: str
    draft_id: str
    decision: str
    editor: str
    text: str = ""
    edits: tuple[str, ...] = ()
    reason: str = ""
    sheet: str = ""
    imported: str = ""


def decisions(build: Build) -> dict[str, Decision]:
    """{draft id: what was decided about it}, of all imports."""
    path = build.path(DECIDED)
    if not path.exists():
        return {}
    found = {}
    for number, row in enumerate(read_rows(path), start=1):
        try:
            decision = Decision(**row | {"edits": tuple(row["edits"])})
        except (TypeError, KeyError):
            raise ValueError(f"{path}, line {number} is no decision: move the file away and import again") from None
        found[decision.draft_id] = decision
    return found


def rejected(build: Build) -> dict[str, str]:
    """{draft id: reason} of the drafts that were rejected."""
    return {key: found.reason for key, found in decisions(build).items() if found.decision == "reject"}


# Export


def parameters(build: Build) -> dict:
    decided = sorted(key for key, found in decisions(build).items() if found.decision != "reject")
    return {"decided": hashlib.sha256(" ".join(decided).encode()).hexdigest()[:16] if decided else ""}


def work(build: Build, folder: Path) -> dict:
    decided = decisions(build)
    rows = build.rows("validate/items.jsonl")
    open_rows = [row for row in rows if row["draft_id"] not in decided]
    write_rows(folder / "items.jsonl", open_rows)
    if not open_rows:
        return {"said": f"all {len(rows)} prompts are reviewed", "open": 0, "sheet": ""}
    name = f"sheet-{hashlib.sha256(sheet_text(open_rows).encode()).hexdigest()[:8]}"
    return {"said": f"{len(open_rows)} of {len(rows)} prompts to review", "open": len(open_rows), "sheet": name}


STAGE = Stage("export", ("validate/items.jsonl",), parameters, work)


def write_sheet(build: Build) -> Path | None:
    """Writes the sheet of the open prompts unless it is there. Returns the CSV file; None where none is open."""
    rows = build.rows("export/items.jsonl")
    if not rows:
        return None
    text = sheet_text(rows)
    folder = build.folder / "review"
    folder.mkdir(exist_ok=True)
    path = folder / f"sheet-{hashlib.sha256(text.encode()).hexdigest()[:8]}.csv"
    if not path.with_suffix(".html").exists():
        with replacing_file(path.with_suffix(".html")) as scratch:
            scratch.write_text(page(rows, build.rows("select/images.jsonl"), path.name), encoding="utf-8")
    if not path.exists():
        with replacing_file(path) as scratch:
            scratch.write_bytes(text.encode())
    return path


def sheet_text(rows: Iterable[dict]) -> str:
    """The CSV file: one row a prompt, the three edits of edit_multi on lines of their own."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(sheet_row(row) for row in rows)
    return "\ufeff" + buffer.getvalue()  # the mark tells spreadsheets that it is UTF-8


def sheet_row(row: dict) -> dict[str, str]:
    """The columns of a sheet that are filled in when it is written."""
    own = {"item": row["item"], "draft_id": row["draft_id"], "image": row["key"], "prompt": prompt_of(row)}
    return own | {"flags": "; ".join(row["flags"])}


def prompt_of(row: dict) -> str:
    return "\n".join(row["parts"].get("edits", [])) or row["text"]


STYLE = """body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 80em; color: #222 }
header { position: sticky; top: 0; background: white; padding: .5em 0; border-bottom: 1px solid #bbb }
section { display: flex; gap: 1.5em; margin: 2em 0; border-top: 1px solid #bbb; padding-top: 1em }
td { vertical-align: top; padding: .3em .6em; border-bottom: 1px solid #ddd }
p { margin: 0; white-space: pre-line }
textarea { width: 22em; height: 5em } input { width: 14em }
.flag { color: #a30; font-size: 90% }"""
FIELDS = f"""<td><select name=decision><option><option>{"<option>".join(DECISIONS)}</select>
<input name=reason placeholder=reason><br><textarea name=text placeholder="new prompt of an edit"></textarea></td>"""


def page(rows: list[dict], images: Iterable[dict], sheet: str) -> str:
    """The HTML page of a sheet: every picture with its prompts, flags and fields to fill in. It needs no other file."""
    by_image: dict[str, list[dict]] = {}
    for row in rows:
        by_image.setdefault(row["item"].split("/")[0], []).append(row)
    content = {"columns": COLUMNS, "rows": [sheet_row(row) for row in rows], "sheet": sheet}
    data = json.dumps(content).replace("<", "\\u003c")  # no prompt can end the script
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{sheet}</title><style>{STYLE}</style><header><b>{sheet}</b> "
        "your name <input id=editor> <button id=save>save as CSV</button> <span id=count></span> decided</header>"
        "<p>Accept, edit or reject every prompt. An edit has the new prompt (edit_multi: three lines); a rejection has "
        "a reason, which the model that drafts the next one is told. What you fill in stays in this browser until you "
        "save it; the saved file is what import-review takes. You can fill in the CSV file beside this page instead."
    ]
    for image in images:
        found = by_image.get(str(image["image_id"]), [])
        if not found:
            continue
        buffer = io.BytesIO()
        pictures.thumbnail(image["file"], PICTURE).save(buffer, "JPEG", quality=80)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        lines = []
        for row in found:
            flags = "".join(f"<div class=flag>{html.escape(flag)}</div>" for flag in row["flags"])
            prompt = html.escape(prompt_of(row)) or "<i>no draft</i>"
            lines.append(f'<tr data-item="{row["item"]}"><td>{row["item"]}<td><p>{prompt}</p>{flags}</td>{FIELDS}</tr>')
        caption = html.escape(f"{image['key']} · cluster {image['cluster']['id']} {image['cluster']['label']}")
        parts.append(
            f'<section><div><img src="{source}" alt=""><br>{caption}</div><table>{"".join(lines)}</table></section>'
        )
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    parts.append(f'<script type="application/json" id=sheet>{data}</script><script>\n{script}</script>')
    return "\n".join(parts) + "\n"


# Import


def import_sheets(build: Build, paths: Iterable[Path], *, partial: bool = False) -> list[str]:
    """Takes the decisions of filled-in sheets. Returns what is wrong with them, a line each: then nothing is taken.

    A row that is not there is not reviewed yet. An earlier decision about the same draft is replaced.

    Args:
      partial: rows without a decision are not reviewed yet, instead of wrong.
    """
    items = {row["item"]: row for row in build.rows("validate/items.jsonl")}
    found: dict[str, tuple[str, Decision]] = {}
    problems = []
    for path in paths:
        for place, decision, problem in read_sheet(path, items, partial):
            if problem:
                problems.append(f"{place}: {problem}")
            elif decision is not None:
                if decision.item in found:
                    problems.append(f"{place}: {decision.item} is decided twice, also in {found[decision.item][0]}")
                found[decision.item] = (place, decision)
    if problems:
        return problems
    kept = decisions(build) | {decision.draft_id: decision for _, decision in found.values()}
    build.path(DECIDED).parent.mkdir(exist_ok=True)
    with replacing_file(build.path(DECIDED)) as scratch:
        write_rows(scratch, (dataclasses.asdict(decision) for decision in kept.values()))
    return []


def read_sheet(path: Path, items: dict[str, dict], partial: bool):
    """(where, decision or None, what is wrong or "") of every row of a filled-in sheet."""
    check_regular(path, MAX_SHEET)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        lines = [(reader.line_num, fields) for fields in reader]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save the sheet as CSV UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path}: its first line has the columns {shown(header, 200)}, expected {','.join(COLUMNS)}")
    stamp = {"sheet": sha256(path), "imported": now()}
    for line, fields in lines:
        if not any(fields):
            continue
        place = f"{path}, line {line}"
        if len(fields) != len(COLUMNS):
            yield place, None, f"{len(fields)} columns, expected {len(COLUMNS)}"
            continue
        try:
            decision = read_row(dict(zip(COLUMNS, fields, strict=True)), items, partial)
        except ValueError as error:
            yield place, None, one_line(str(error))
        else:
            yield place, decision and dataclasses.replace(decision, **stamp), ""


def read_row(row: dict[str, str], items: dict[str, dict], partial: bool) -> Decision | None:
    """The decision of a row; None where there is none yet. Raises ValueError that says what is wrong."""
    item = row["item"].strip()
    if item not in items:
        raise ValueError(f"{shown(item)} is no item of this set")
    draft, where = items[item], f"{item}: "
    if row["draft_id"].strip() != draft["draft_id"]:
        raise ValueError(
            f"{where}draft_id is {shown(row['draft_id'])}, expected {draft['draft_id']}: the sheet is of another draft"
        )
    if row["prompt"].split() != prompt_of(draft).split():
        raise ValueError(f"{where}the column prompt was changed: write the new prompt into text, and decide edit")
    decision, text, editor, reason = (row[name].strip() for name in ("decision", "text", "editor", "reason"))
    if not decision and partial:
        return None
    if decision not in DECISIONS:
        found = f"decision is {shown(decision)}" if decision else "no decision"
        raise ValueError(f"{where}{found}, expected {', '.join(DECISIONS)}")
    if not editor:
        raise ValueError(f"{where}no editor: write the name of who decided")
    for name, value in (("editor", editor), ("reason", reason)):
        if len(value) > MAX_WORDS:
            raise ValueError(f"{where}{name} has {len(value):,} characters, expected at most {MAX_WORDS:,}")
    made = Decision(item, draft["draft_id"], decision, " ".join(editor.split()), reason=" ".join(reason.split()))
    if decision == "reject" and not reason:
        raise ValueError(f"{where}rejected without a reason")
    if decision == "accept" and not draft["text"]:
        raise ValueError(f"{where}accepted, but there is no draft: decide edit and write one, or reject")
    if decision != "edit":
        if text:
            raise ValueError(f"{where}text is filled in, but the decision is {decision}, not edit")
        return made
    if not text:
        raise ValueError(f"{where}edited, but text is empty")
    if text.split() == draft["text"].split():
        raise ValueError(f"{where}edited, but text is the draft: decide accept")
    try:
        if draft["group"] != "edit_multi":
            return dataclasses.replace(made, text=clean(text))
        lines = [line for line in text.splitlines() if line.strip()]
        edits = [clean(edit) for edit in (lines if len(lines) > 1 else rules.split_sentences(text))]
        if len(edits) != 3:
            raise ValueError(f"has {len(edits)} edits, expected exactly three, each on a line of its own")
        return dataclasses.replace(made, text=join_edits(edits), edits=tuple(join_edits([edit]) for edit in edits))
    except ValueError as error:
        raise ValueError(f"{where}text {error}") from None


def summary(build: Build) -> str:
    """How far the review is, one line."""
    decided, counts = decisions(build), dict.fromkeys((*DECISIONS, "open"), 0)
    for row in build.rows("validate/items.jsonl"):
        found = decided.get(row["draft_id"])
        counts[found.decision if found else "open"] += 1
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"review: {said}"
