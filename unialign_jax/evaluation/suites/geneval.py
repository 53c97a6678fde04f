"""GenEval (arXiv 2310.11513): 553 prompts about objects, their numbers, colors and places, four images each."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation import objects
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, parse_json, shown, write_json

PROMPTS = "evaluation_metadata.jsonl"
COUNT = 553
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SEED = 42  # of each prompt's first image
CHECKED = "geneval_results.jsonl"  # in the run's folder: what our scorer found, as the official results.jsonl
CLIP = "openai/clip-vit-large-patch14"


class GenEval(Suite):
    name = "geneval"
    title = "GenEval"
    summary = "objects, numbers, colors and places in images of 553 prompts"
    source = "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"
    tasks = ("text_to_image",)
    images = 2212
    leading = "overall"
    worst_by = "correct"
    needs = "a detector (with PyTorch) or the official scorer"
    scoring_options = ("detector", "color_model", "results")

    def add_arguments(self, add: Callable) -> None:
        add("--images-per-prompt", type=int, default=4, metavar="N", help="officially 4 (%(default)s)")
        add(
            "--prompts",
            type=Path,
            metavar="FILE",
            help="lines of the same clauses with prompts rewritten, as BAGEL's evaluation_metadata_long.jsonl",
        )
        add("--detector", metavar="NAME", help="of transformers, such as facebook/mask2former-swin-small-coco-instance")
        add("--color-model", metavar="NAME", help=f"a CLIP of transformers that reads colors ({CLIP})")
        add("--results", type=Path, metavar="FILE", help="results.jsonl of the official scorer, instead")

    def files(self, request: Request) -> list[Path]:
        path = request.data / PROMPTS if request.data.is_dir() else request.data
        rewritten = request.extra.get("prompts")
        return [path, *([Path(rewritten)] if rewritten else [])]

    def items(self, request: Request) -> list[Item]:
        if request.extra["images_per_prompt"] < 1:
            raise ValueError(f"--images-per-prompt is {request.extra['images_per_prompt']}, expected at least 1")
        path, *rewritten = self.files(request)
        entries = read_entries(path)
        if path.name == PROMPTS and len(entries) != COUNT:
            raise ValueError(f"{path} has {len(entries)} prompts, expected {COUNT}: get it again ({self.source})")
        if rewritten:
            entries = _rewritten(path, entries, rewritten[0])
        items = []
        for number, entry in enumerate(entries):
            jobs = tuple(
                {
                    "id": f"{number:05d}/samples/{index:05d}",
                    "task": "text_to_image",
                    "prompt": entry["prompt"],
                    "seed": SEED + index,
                    "steps": 50,
                    "guidance_scale": 9.0,
                }
                for index in range(request.extra["images_per_prompt"])
            )
            items.append(Item(f"{number:05d}", entry["tag"], jobs, entry["prompt"], entry))
        return items

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        if not request.extra.get("results") and not request.extra.get("detector"):
            raise ValueError(
                "geneval needs --detector=NAME to score by a model of transformers, or, after generate, --results=FILE "
                f"of the official scorer: {self.official_command(request)}"
            )

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        for item in items:
            folder = request.made / item.id
            if folder.is_dir():
                write_json(folder / "metadata.jsonl", item.facts, indent=None)

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        self.check_scoring(request, scorer.judge is not None)
        if request.extra.get("results"):
            checked = read_results(Path(request.extra["results"]), items)
        else:
            checked = self._detect(request, items, scorer)
        return [self._score(request, item, checked) for item in items]

    def _detect(self, request, items, scorer) -> dict[str, dict]:
        """{job id: what was found}, after all images were looked at."""
        from unialign_jax.evaluation import torch_models

        name, colors = request.extra["detector"], request.extra.get("color_model") or CLIP
        clauses = [clause for item in items for clause in (*item.facts["include"], *item.facts.get("exclude", ()))]
        detector = torch_models.open_detector(name, sorted({clause["class"] for clause in clauses}))
        reads = None
        if any("color" in clause for clause in clauses):
            reads = torch_models.color_reader(torch_models.Clip("--color-model", colors))
        return look(request, items, detector, reads, f"{name} {colors}", scorer.progress)

    def _score(self, request, item, checked) -> Score:
        found = {job["id"]: checked[job["id"]] for job in item.jobs if job["id"] in checked}
        correct = [bool(entry["correct"]) for entry in found.values()]
        missing = len(item.jobs) - len(correct)
        reasons = [f"{name}: {entry['reason']}" for name, entry in found.items() if entry["reason"]]
        if missing and request.mode == "corrected":
            correct += [False] * missing
            reasons.append(f"{missing} images without a result count as wrong")
        return Score(
            item.id,
            item.group,
            {"correct": sum(correct) / len(correct)} if correct else {},
            text=item.text,
            images=tuple(f"{request.model}/{job['id']}.png" for job in item.jobs),
            answer="; ".join(" ".join(reason.split()) for reason in reasons),
            failed="" if correct else "none of its images has a result",
            facts={"correct": correct},
        )

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """Means over images for each tag, and the mean of the tags' means, as summary_scores.py has them."""
        by_tag: dict[str, list[bool]] = {}
        for score in scores:
            by_tag.setdefault(score.group, []).extend(score.facts.get("correct", ()))
        means = {tag: mean(correct) for tag, correct in by_tag.items() if correct}
        every = [correct for score in scores if (correct := score.facts.get("correct"))]
        order = [*TAGS, *sorted(set(means) - set(TAGS))]
        return {
            "overall": mean(list(means.values())),
            **{f"{tag}/correct": means[tag] for tag in order if tag in means},
            "images": mean([value for correct in every for value in correct]),
            "prompts": mean([any(correct) for correct in every]),
        }

    def notes(self, request: Request) -> list[str]:
        notes = []
        if request.extra.get("prompts"):
            notes.append("The prompts are rewritten ones: papers mark such figures with a dagger.")
        if request.extra["images_per_prompt"] != 4:
            notes.append(f"{request.extra['images_per_prompt']} images of each prompt; the official number is 4.")
        notes.append(
            "overall is the mean of the tags' means; images and prompts are the shares of right images, and of prompts "
            "with at least one. Where images have no result, official mode leaves them out as the official code does, "
            "and corrected mode counts them as wrong; else the two are equal."
        )
        if request.extra.get("results"):
            notes.append(f"Scored by the official scorer: {Path(request.extra['results']).name}.")
        elif request.extra.get("detector"):
            colors = request.extra.get("color_model") or CLIP
            notes.append(
                f"Objects are found by {request.extra['detector']}, colors by {colors}. The rules are the official "
                "scorer's, but its Mask2Former is mmdetection's, so its figures may differ a little."
            )
        notes.append("Image i of a prompt has seed 42 + i; the official sampler draws all four after seed 42.")
        return notes

    def official_command(self, request: Request) -> str:
        results = request.output.absolute() / "official_results.jsonl"
        return (
            f"cd evaluation && python evaluate_images.py {request.made.absolute()} --outfile {results} --model-path "
            f"MASK2FORMER_FOLDER && python summary_scores.py {results}"
        )


def read_entries(path: Path) -> list[dict]:
    """The lines of a file of GenEval's metadata, checked. Raises FileNotFoundError or ValueError in one line."""
    check_regular(path)
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        name = f"{path}, line {number}"
        entry = parse_json(line, name)
        if problem := _problem(entry):
            raise ValueError(f"{name} is no prompt of GenEval: {problem} (expected {GenEval.source})")
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path} is empty, expected {GenEval.source}")
    return entries


def _problem(entry) -> str:
    """What is wrong with a line of metadata; "" if nothing."""
    if "vqa_list" in entry:
        return "it is of GenEval 2, which the suite geneval2 reads"
    for key in ("tag", "prompt"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            return f"{key} is {shown(entry.get(key))}, expected a text"
    if not isinstance(entry.get("include"), list) or not isinstance(entry.get("exclude", []), list):
        return "include and exclude must be lists"
    for number, clause in enumerate((*entry["include"], *entry.get("exclude", ()))):
        if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
            return f"{shown(clause)} is no clause"
        if type(clause.get("count")) is not int or clause["count"] < 1:
            return f"count is {shown(clause.get('count'))}, expected a number from 1 on"
        if "color" in clause and clause["color"] not in objects.COLORS:
            return f"color is {shown(clause['color'])}, expected one of {', '.join(objects.COLORS)}"
        if "position" in clause:
            where = clause["position"]
            is_pair = isinstance(where, list) and len(where) == 2 and where[0] in objects.RELATIONS
            if not is_pair or type(where[1]) is not int or not 0 <= where[1] < number:
                return f"position is {shown(where)}, expected a relation and the number of an earlier clause"
    return ""


def _rewritten(path, entries, rewritten) -> list[dict]:
    """The entries with other prompts."""
    others = read_entries(rewritten)
    if len(others) != len(entries):
        raise ValueError(
            f"{rewritten} has {len(others)} prompts, {path} {len(entries)}: expected the same prompts, rewritten"
        )
    for number, (one, other) in enumerate(zip(entries, others, strict=True), start=1):
        if {**one, "prompt": ""} != {**other, "prompt": ""}:
            raise ValueError(f"{rewritten}, line {number} asks for other objects than {path} ({shown(one['prompt'])})")
    return others


def look(
    request: Request,
    items: Sequence[Item],
    detector: objects.Detector,
    read_colors: objects.ColorReader | None,
    name: str,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, dict]:
    """{job id: {"correct", "reason", ...}} of all images.

    OUTPUT/geneval_results.jsonl gets a line as soon as an image is done. The lines are those of the official
    results.jsonl, with the scorer's name and the image's SHA-256, by which images that were looked at before are known.

    Args:
      name: stands for the detector and the reader of colors.
    """
    path, known = request.output / CHECKED, {}
    if path.exists():
        check_regular(path)
        lines = path.read_bytes().split(b"\n")
        whole = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]
        known = {(entry.get("scorer"), entry.get("sha256"), entry.get("metadata")): entry for entry in whole}
        if lines[-1]:  # torn by a kill
            path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    checked = {}
    with open(path, "a", encoding="utf-8") as file:
        for item in items:
            metadata = json.dumps(item.facts)
            for job in item.jobs:
                image = request.made / f"{job['id']}.png"
                digest = hashlib.sha256(image.read_bytes()).hexdigest()
                if (entry := known.get((name, digest, metadata))) is None:
                    pixels = load_rgb(image)
                    found = objects.confident(detector(pixels), item.group)
                    correct, reason = objects.check(pixels, found, item.facts, read_colors)
                    boxes = {key: [[*thing.box, thing.confidence] for thing in things] for key, things in found.items()}
                    entry = {
                        "filename": str(image),
                        "tag": item.group,
                        "prompt": item.text,
                        "correct": correct,
                        "reason": reason,
                        "metadata": metadata,
                        "details": json.dumps(boxes),
                        "scorer": name,
                        "sha256": digest,
                    }
                    file.write(json.dumps(entry) + "\n")
                    file.flush()
                checked[job["id"]] = entry
            progress(1)
    return checked


def read_results(path: Path, items: Sequence[Item]) -> dict[str, dict]:
    """{job id: line} of the official scorer's results.jsonl.

    Raises FileNotFoundError or ValueError, in one line, for another file, or results of other prompts.
    """
    check_regular(path)
    tags = {job["id"]: item for item in items for job in item.jobs}
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        name = f"{path}, line {number}"
        entry = parse_json(line, name)
        where = re.search(r"(\d+)/samples/(\d+)\.png$", str(entry.get("filename")).replace("\\", "/"))
        if not where or not isinstance(entry.get("correct"), bool) or not isinstance(entry.get("tag"), str):
            raise ValueError(f"{name} is no result of GenEval's evaluate_images.py: expected filename, tag and correct")
        job = f"{where[1]}/samples/{where[2]}"
        if job not in tags:
            continue  # beyond --limit
        if entry["tag"] != tags[job].group or entry.get("prompt") != tags[job].text:
            raise ValueError(
                f"{name} is about {shown(entry.get('prompt'))}, but {job} of this run is {shown(tags[job].text)}"
            )
        if job in found:
            raise ValueError(f"{name} is about {job}, which came before")
        found[job] = entry | {"reason": entry.get("reason") or ""}
    if not found:
        raise ValueError(f"{path} has no result of this run")
    return found
