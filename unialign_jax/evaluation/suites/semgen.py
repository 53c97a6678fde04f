"""SemGen-Bench (arXiv 2509.23760): 150 photographs, each with two prompts and two instructions; a judge scores."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation import official_files, viescore
from unialign_jax.evaluation.judging import image_size
from unialign_jax.evaluation.suite import Item, Request, Score
from unialign_jax.evaluation.viescore_suite import VIEScoreSuite, means, save_png
from unialign_jax.files import check_regular, parse_json, read_json, sha256

FILE, IMAGES = "semgen_bench.jsonl", "images"
LINES = 150
NEGATIVE = (
    "low quality, blurry, low resolution, backlit, cartoon, animated, deformed, oversaturated, undersaturated, "
    "out of frame"
)
SIDE, STEPS = 512, 50
GUIDANCE = {"text_to_image": 7.0, "edit": 9.0}


class SemGen(VIEScoreSuite):
    name = "semgen"
    title = "SemGen-Bench"
    summary = "long and complex prompts, multiple and complex edits of 150 photographs"
    source = f"SemGen-Bench/benchmark of github.com/glimmer16/UniAlignment: {FILE} and {IMAGES}/"
    tasks = ("text_to_image", "edit")
    images = 600
    judge_calls = 1200
    scoring_options = (*VIEScoreSuite.scoring_options, "images")
    csv_folder = "qwen25vl/eval_results_AWQ"
    csv_ending = "score.csv"
    csv_columns = (
        "data_type",
        "source_image",
        "generated_image",
        "instruction",
        "sementics_score",
        "quality_score",
    )
    result_column = "generated_image"
    images_first = True  # as the official judge, Qwen2.5-VL, is given them
    groups = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")

    def add_arguments(self, add: Callable) -> None:
        super().add_arguments(add)
        add("--images", type=Path, metavar="DIR", help=f"the photographs; default the folder {IMAGES} beside {FILE}")

    def files(self, request: Request) -> list[Path]:
        return [request.data / FILE if request.data.is_dir() else request.data]

    def items(self, request: Request) -> list[Item]:
        entries = self._entries(request)
        return [self._item(request, group, key, entry) for group in self.groups for key, entry in enumerate(entries)]

    def _entries(self, request):
        """The lines of the data, with the path of its photograph in each."""
        [path] = self.files(request)
        if not path.exists():
            raise FileNotFoundError(f"--data={request.data} has no {FILE}, expected {self.source}")
        check_regular(path, 2**28)
        folder = Path(request.extra["images"] or path.parent / IMAGES)
        entries, missing = [], []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            name = f"{path}, line {number}"
            entry = parse_json(line, name)
            for field in ("image_path", *self.groups):
                if not isinstance(entry.get(field), str) or not entry[field].strip():
                    raise ValueError(f"{name} has no {field}, expected a line of {self.source}")
            # The official paths are absolute ones of another machine.
            entry["image_path"] = folder / entry["image_path"].replace("\\", "/").rpartition("/")[2]
            if not entry["image_path"].is_file():
                missing.append(entry["image_path"].name)
            entries.append(entry)
        if not entries:
            raise ValueError(f"{path} is empty, expected {self.source}")
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(entries)} images ({listed}): download them again, or name "
                "their folder by --images"
            )
        return entries

    def _item(self, request, group, key, entry):
        # The official keys are the numbers of the lines from 0, and not the image_id.
        job: dict[str, Any] = {"id": f"fullset/{group}/{key}", "seed": key, "steps": STEPS, "negative_prompt": NEGATIVE}
        if group.startswith("t2i"):
            job |= {"task": "text_to_image", "prompt": entry[group], "height": SIDE, "width": SIDE}
        else:
            source = request.made.resolve() / "fullset" / group / f"{key}_SRCIMG.png"
            job |= {"task": "edit", "instruction": entry[group], "image": str(source)}
        job["guidance_scale"] = GUIDANCE[job["task"]]
        facts = {"key": key, "image": entry["image_path"].name}
        return Item(f"{group}/{key}", group, (job,), entry[group], facts)

    def prepare(self, request: Request, items: Sequence[Item]) -> None:
        photographs = [entry["image_path"] for entry in self._entries(request)]
        squashed = _squashed_size(request) if request.mode == "official" else None
        for item in items:
            job = item.jobs[0]
            if job["task"] != "edit":
                continue
            target, image = Path(job["image"]), load_rgb(photographs[item.facts["key"]])
            size = squashed or image.size
            if not target.exists() or image_size(target) != size:
                save_png(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC), target)

    def shown(self, request: Request, item: Item) -> tuple[str, list[Path]]:
        made = request.made / f"{item.jobs[0]['id']}.png"
        if item.jobs[0]["task"] == "text_to_image":
            return "tie" if request.mode == "official" else "t2i", [made]
        source = made.with_name(f"{made.stem}_SRCIMG.png")
        return "tie", [source, viescore.resized(made, source, request.output / "judged" / f"{item.jobs[0]['id']}.png")]

    def csv_row(self, request: Request, item: Item) -> dict[str, Any]:
        made = request.made / f"{item.jobs[0]['id']}.png"
        is_edit = item.jobs[0]["task"] == "edit"
        source = made.with_name(f"{made.stem}_SRCIMG.png") if is_edit else None
        return {"data_type": item.group, "source_image": source, "generated_image": made, "instruction": item.text}

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        return means(scores)

    def notes(self, request: Request) -> list[str]:
        made = read_json(request.output / "settings.json")["request"]["mode"]
        notes = [
            "SC is what the paper calls IC. Of each item the least of the judge's scores counts.",
            "Seeds are the numbers of the lines; the official code sets none.",
        ]
        if made == "official":
            notes.append("The sources were squashed to one size and lost their aspect, as the official code does it.")
        else:
            notes.append("The sources kept their size and aspect; the official code squashes them to 512 x 512.")
        if request.mode == "official":
            notes.append(
                "Images of prompts were scored by the prompt for edits, with one image, as the official code does it "
                "by mistake: their SC is also the degree of over-editing, where that is lower."
            )
        else:
            notes.append("Images of prompts were scored by the prompt for them; the official code uses that for edits.")
        return notes + self._notes_on_photographs(request) + self.notes_on_prompts(request)

    def _notes_on_photographs(self, request):
        known = official_files.sha256_of(self.name)
        paths = [entry["image_path"] for entry in self._entries(request)]
        others = [path.name for path in paths if sha256(path) != known.get(path.name)]
        return [f"{len(others)} of the {len(paths)} photographs are not the official files."] if others else []

    def official_command(self, request: Request) -> str | None:
        root, model = request.output.resolve(), request.model
        return (
            f"cd SemGen-Bench && python test_bench_score.py --image_path={root / model} --backbone=qwen25vl && "
            f"python calculate_statistics.py --model_name={model} --save_path={root} --backbone=qwen25vl"
        )


def _squashed_size(request):
    """(width, height) to which official mode squashes a source: that of the image to be made."""
    height, width = (request.options.get(name) for name in ("height", "width"))
    return width or height or SIDE, height or width or SIDE
