"""Last: the reviewed set as OUTPUT/benchmark/, in the form of the official one.

semgen_bench.jsonl   a line for each image, with more keys than the official file (schema.json)
images/N.jpg         the images, byte for byte
ATTRIBUTION.csv      where every image comes from, and its license
README.md            how the set was made
manifest.json        SHA-256 of all of it, and of what it was made from
"""

import collections
import csv
import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unialign_jax import __version__
from unialign_jax.evaluation.building import review, stages, validation
from unialign_jax.evaluation.building.drafting import GROUPS, Draft
from unialign_jax.evaluation.building.review import Decision
from unialign_jax.evaluation.building.settings import Settings
from unialign_jax.evaluation.building.stages import Build, Stage, write_rows
from unialign_jax.files import read_json, replacing_folder, sha256, write_json

FOLDER = "benchmark"
PROMPTS, ATTRIBUTION = "semgen_bench.jsonl", "ATTRIBUTION.csv"
OWN = {PROMPTS, "images", ATTRIBUTION, "README.md", "manifest.json", "schema.json"}
FINISHED, UNFINISHED = "human_refined", "machine_draft"
STATUS = {"accept": "accepted", "edit": "edited", "reject": "rejected"}


def freeze(build: Build, before: list[Stage], *, draft: bool = False, overwrite: bool = False) -> Path:
    """Writes the folder of the set, and returns it.

    Args:
      before: the stages that must be done.
      draft: also a set that is not reviewed, which is stamped "machine_draft".
      overwrite: replace a set that is finished; one that is not is replaced anyway.

    Raises ValueError or OSError, in one line, where prompts are not reviewed, or images have changed.
    """
    given = stages.check_done(build, before)
    images, rows = build.rows("select/images.jsonl"), build.rows("validate/items.jsonl")
    decided = review.decisions(build)
    found = [decided.get(row["draft_id"]) for row in rows]
    check_reviewed(rows, found, draft)
    finals = [final_draft(row, decision) for row, decision in zip(rows, found, strict=True)]
    is_finished = all(decision is not None and decision.decision != "reject" for decision in found)
    status = FINISHED if is_finished else UNFINISHED
    reasoning = {
        row["item"]: row["checks"]["reasoning"]
        for row, final in zip(rows, finals, strict=True)
        if "reasoning" in row["checks"] and final.text == row["text"]
    }
    checked = validation.check_all(finals, given, reasoning)
    by_image = collections.defaultdict(dict)
    for row, decision, final in zip(rows, found, finals, strict=True):
        by_image[row["item"].split("/")[0]][final.group] = (row, decision, final, checked[row["item"]])
    version = hashlib.sha256(" ".join(final.draft_id + final.text for final in finals).encode()).hexdigest()[:12]
    created = {name: read_json(build.folder / name / stages.MANIFEST)["created"] for name in stages.NAMES}
    target = build.folder / FOLDER
    is_replaced = overwrite or status_of(target) == UNFINISHED
    with replacing_folder(target, overwrite=is_replaced, foreign=foreign_names) as folder:
        (folder / "images").mkdir()
        lines = []
        for image in tqdm(images, desc="freeze", unit="image", disable=None):
            path = f"images/{image['image_id']}{Path(image['file']).suffix.lower()}"
            copy_image(image, folder / path)
            generation = {
                "model": given.judge_model,
                "template_sha256": {},
                "temperature": given.temperature,
                "created": created["draft"],
            }
            line = record(image, path, by_image[str(image["image_id"])], generation)
            lines.append(line | {"status": status, "version": version})
        write_rows(folder / PROMPTS, lines)
        write_attribution(folder / ATTRIBUTION, images, lines)
        shutil.copyfile(Path(__file__).parent / "schema.json", folder / "schema.json")
        (folder / "README.md").write_text(readme(build, given, images, found, status, version), encoding="utf-8")
        write_json(
            folder / "manifest.json",
            {
                "status": status,
                "version": version,
                "created": stages.now(),
                "unialign_jax": __version__,
                "files": {
                    path.relative_to(folder).as_posix(): sha256(path)
                    for path in sorted(folder.rglob("*"))
                    if path.is_file() and not path.name.startswith(".")
                },
                "stages": {name: sha256(build.folder / name / stages.MANIFEST) for name in stages.NAMES},
                "decisions": sha256(build.path(review.DECIDED)) if decided else None,
            },
        )
    return target


def check_reviewed(rows: list[dict], found: list[Decision | None], draft: bool) -> None:
    """Raises ValueError, in one line, for prompts that are empty and, unless `draft`, not accepted or edited."""
    empty = [
        row["item"]
        for row, decision in zip(rows, found, strict=True)
        if not row["text"] and not (decision and decision.text)
    ]
    if empty:
        raise ValueError(
            f"{len(empty)} prompts have no text ({listed(empty)}): write them in the review, by decision edit"
        )
    if draft:
        return
    pending = [row["item"] for row, decision in zip(rows, found, strict=True) if decision is None]
    bad = [row["item"] for row, decision in zip(rows, found, strict=True) if decision and decision.decision == "reject"]
    parts = [f"{len(pending)} are not reviewed ({listed(pending)})"] * bool(pending)
    parts += [f"{len(bad)} are rejected and not replaced ({listed(bad)})"] * bool(bad)
    if parts:
        raise ValueError(
            f"all {len(rows)} prompts must be accepted or edited: {', '.join(parts)}; go on with the review, or give "
            f"--draft for a set with the status {UNFINISHED}"
        )


def listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def final_draft(row: dict, decision: Decision | None) -> Draft:
    """The draft of an item, with the text that an editor gave it."""
    found = Draft(**{field.name: row[field.name] for field in dataclasses.fields(Draft)})
    if decision is None or decision.decision != "edit":
        return found
    parts = {"edits": list(decision.edits)} if found.group == "edit_multi" else found.parts
    return dataclasses.replace(found, text=decision.text, parts=parts)


def record(image: dict, path: str, prompts: dict[str, tuple], generation: dict) -> dict:
    """A line of semgen_bench.jsonl, without its status.

    Args:
      prompts: {group: (row of items.jsonl, decision or None, final draft, what the rules say of it)}.
      generation: of the line, without the templates.
    """
    texts = {group: prompts[group][2].text for group in GROUPS}
    flags = [f"{group}: {flag}" for group in GROUPS for flag in prompts[group][3]["flags"]]
    checks = {group: prompts[group][3]["checks"] for group in GROUPS}
    reviewed = {group: prompts[group][1] for group in GROUPS if prompts[group][1]}
    reached = {STATUS[decision.decision] for decision in reviewed.values()}
    if len(reviewed) < len(GROUPS):
        reached.add("pending")
    refinement = {
        "status": next(status for status in ("rejected", "pending", "edited", "accepted") if status in reached),
        "editor": ", ".join(sorted({decision.editor for decision in reviewed.values()})),
        "reason": "; ".join(f"{group}: {found.reason}" for group, found in reviewed.items() if found.reason),
        "before": {group: prompts[group][0]["text"] for group, found in reviewed.items() if found.decision == "edit"},
        "decisions": {group: STATUS[found.decision] for group, found in reviewed.items()},
    }
    source = {name: image[name] for name in ("dataset", "coco_image_id", "license_id", "license", "sha256")}
    source |= {name: image[name] for name in ("width", "height", "key")}
    return {
        "image_id": image["image_id"],
        "image_path": path,
        **texts,
        "edit_multi_list": prompts["edit_multi"][2].parts["edits"],
        "source": source | {"flickr_url": image["url"] or None},
        "cluster": image["cluster"],
        "checks": {
            "t2i_long_tokens": checks["t2i_long"]["tokens"],
            "tokenizer": checks["t2i_long"]["tokenizer"],
            "slots": checks["t2i_complex"]["slots"],
            "flags": flags,
        },
        "generation": generation
        | {
            "template_sha256": {group: prompts[group][2].template_sha256 for group in GROUPS},
            "attempts": {group: prompts[group][2].attempt + 1 for group in GROUPS},
        },
        "refinement": refinement,
    }


def copy_image(image: dict, target: Path) -> None:
    """Copies an image. Raises ValueError where it is not the one that was ingested."""
    shutil.copyfile(image["file"], target)
    if sha256(target) != image["sha256"]:
        raise ValueError(f"{image['file']} has changed since it was ingested: bring the old file back, or build again")


def write_attribution(path: Path, images: list[dict], lines: list[dict]) -> None:
    """Writes the table of sources and licenses."""
    names = ("dataset", "key", "coco_image_id", "author", "url", "license_id", "license", "license_url", "sha256")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", *names))
        for image, line in zip(images, lines, strict=True):
            writer.writerow((line["image_path"], *("" if image[name] is None else image[name] for name in names)))


def readme(build: Build, given: Settings, images: Any, found: Any, status: str, version: str) -> str:
    """What a reader must know of the set, in Markdown."""
    licenses = collections.Counter((image["license"] or "not stated", image["license_url"]) for image in images)
    reviewed = collections.Counter(STATUS[decision.decision] if decision else "not reviewed" for decision in found)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(reviewed.items()))
    editors = sorted({decision.editor for decision in found if decision})
    embedder = read_json(build.folder / "embed" / stages.MANIFEST)["said"]
    license_lines = "\n".join(f"- {count} {name} {url}".rstrip() for (name, url), count in sorted(licenses.items()))
    warning = ""
    if status == UNFINISHED:
        warning = "\n**Not reviewed by people in full: scores on it are not to be published.**\n"
    return f"""# A set in the form of SemGen-Bench

Status `{status}`, version `{version}`.
{warning}
{len(images)} photographs with {len(GROUPS)} prompts each ({", ".join(GROUPS)}), made by the construction of arXiv
2509.23760 with unialign_jax {__version__}; it is not the authors' set, and scores on it are not comparable with theirs.

- Images: {given.clusters} clusters with {given.per_cluster} images, seed {given.seed}; {embedder}.
- Prompts: drafts by {given.judge_model} at temperature {given.temperature:g}; SHA-256 of the templates in each line.
- Review: {counts}, by {", ".join(editors) or "nobody"}.
- `edit_multi` has a space between its sentences, which the official file lacks; `edit_multi_list` has them one by one.

The photographs stay under their own licenses ({ATTRIBUTION} has each):

{license_lines}
"""


def status_of(folder: Path) -> str:
    """The status of a set that is there; "" where none is."""
    path = folder / "manifest.json"
    return read_json(path).get("status", "") if path.is_file() else ""


def foreign_names(folder: Path) -> list[str]:
    """Names in the folder of a set that `freeze` does not write."""
    return sorted(path.name for path in folder.iterdir() if path.name not in OWN)
