"""GEdit-Bench (arXiv 2504.17761): 606 real edits in eleven groups, in English and in Chinese; a judge scores."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unialign_jax.data import images as image_files
from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.sources import FORMATS, huggingface
from unialign_jax.data.sources.parts import Row, SourceOptions
from unialign_jax.data.sources.pictures import read_image
from unialign_jax.evaluation import viescore
from unialign_jax.evaluation.suite import Item, Request, Score
from unialign_jax.evaluation.viescore_suite import VIEScoreSuite, means, save_png
from unialign_jax.files import read_json, shown
from unialign_jax.inference.jobs import check_id

LIST = "metadata.jsonl"  # of a plain folder
COUNT = 606  # of each language
AREA = 512 * 512
STEPS, GUIDANCE = 50, 9.0
# The data set's columns, under the names that the readers of training data need for theirs.
_COLUMNS = {
    "image": "input_image",
    "source": "input_image",
    "instruction": "instruction",
    "caption": "task_type",
    "key": "key",
    "language": "instruction_language",
    "intersection": "Intersection_exist",
    "raw": "input_image_raw",
}
_TEXTS = ("task_type", "key", "instruction", "instruction_language")


class Source(NamedTuple):
    """The user's copy: its format (`data.sources.FORMATS`), what its reader is given, and its files."""

    format: str
    path: Path
    files: list[Path]


class GEdit(VIEScoreSuite):
    name = "gedit"
    title = "GEdit-Bench"
    summary = "606 edits that people asked for, in eleven groups"
    source = "huggingface.co/datasets/stepfun-ai/GEdit-Bench: its Parquet files, or what save_to_disk made of it"
    tasks = ("edit",)
    images = COUNT
    judge_calls = 2 * COUNT
    csv_folder = "gpt4o/eval_results_new"
    csv_ending = "gpt_score.csv"
    csv_columns = (
        "source_image",
        "edited_image",
        "instruction",
        "sementics_score",
        "quality_score",
        "intersection_exist",
        "instruction_language",
    )
    result_column = "edited_image"
    images_first = False  # as the official judge, GPT, is given them
    groups = (
        "background_change",
        "color_alter",
        "material_alter",
        "motion_change",
        "ps_human",
        "style_change",
        "subject-add",
        "subject-remove",
        "subject-replace",
        "text_change",
        "tone_transfer",
    )

    def add_arguments(self, add: Callable) -> None:
        super().add_arguments(add)
        add("--language", choices=("en", "cn"), default="en", help="of the instructions (%(default)s)")

    def files(self, request: Request) -> list[Path]:
        return find_source(request.data, self.source).files

    def items(self, request: Request) -> list[Item]:
        found: dict[str, list[Item]] = {group: [] for group in self.groups}
        names = set()
        for row in self._rows(request):
            item = self._item(request, row)
            if item is None:
                continue
            if item.id in names:
                raise ValueError(f"{row.place} has the key {item.id} for the second time")
            names.add(item.id)
            found[item.group].append(item)
        if not names:
            raise ValueError(f"{request.data} has no instruction in {request.extra['language']}")
        return [item for group in found.values() for item in group]

    def _rows(self, request) -> Iterator[Row]:
        source = find_source(request.data, self.source)
        options = SourceOptions("edit", columns=_COLUMNS)
        for part in FORMATS[source.format].list_parts(str(source.path), source.path.name, options):
            for row in FORMATS[source.format].read_part(part, options):
                if row.fault:
                    raise ValueError(f"{row.place}: {row.fault}; expected {self.source}")
                yield row

    def _item(self, request, row):
        """The item of a row; None in another language."""
        fields, language = row.fields, request.extra["language"]
        for name in _TEXTS:
            if not isinstance(fields.get(name), str) or not fields[name].strip():
                raise ValueError(f"{row.place} has no text in {name}, expected {self.source}")
        if fields["task_type"] not in self.groups:
            raise ValueError(
                f"{row.place} has the task_type {shown(fields['task_type'])}, expected one of {', '.join(self.groups)}"
            )
        if fields["instruction_language"] != language:
            return None
        name = f"{fields['task_type']}/{language}/{fields['key']}"
        job = {
            "id": check_id(f"fullset/{name}"),  # it names files
            "task": "edit",
            "instruction": fields["instruction"],
            "image": str(request.output.resolve() / "sources" / f"{name}.png"),
            "seed": 0,
            "steps": STEPS,
            "guidance_scale": GUIDANCE,
        }
        facts = {"language": language, "intersection": bool(fields.get("Intersection_exist"))}
        return Item(name, fields["task_type"], (job,), fields["instruction"], facts)

    def prepare(self, request: Request, items: Sequence[Item]) -> None:
        wanted = {item.id: item for item in items if not all(path.exists() for path in _sources(request, item))}
        for row in self._rows(request) if wanted else ():
            name = "{task_type}/{instruction_language}/{key}".format_map(row.fields)
            if item := wanted.pop(name, None):
                self._write_sources(request, item, row)

    def _write_sources(self, request, item, row):
        """The image that the judge sees as the source, and the one that the model edits."""
        try:
            shown_image, raw = (
                image_files.decode_rgb(*read_image(row.fields.get(column), row.base, None, False))
                for column in ("input_image", "input_image_raw" if row.fields.get("input_image_raw") else "input_image")
            )
        except (BadRow, ValueError) as error:
            raise ValueError(f"{row.place}: {error}") from None
        judged, edited = _sources(request, item)
        save_png(shown_image, judged)
        save_png(raw.resize(edit_size(request, raw.size), Image.Resampling.BICUBIC), edited)

    def shown(self, request: Request, item: Item) -> tuple[str, list[Path]]:
        source, made = _sources(request, item)[0], request.made / f"{item.jobs[0]['id']}.png"
        return "tie", [source, viescore.resized(made, source, request.output / "judged" / f"{item.id}.png")]

    def csv_row(self, request: Request, item: Item) -> dict[str, Any]:
        return {
            "source_image": _sources(request, item)[0],
            "edited_image": request.made / f"{item.jobs[0]['id']}.png",
            "instruction": item.text,
            "intersection_exist": item.facts["intersection"],
            "instruction_language": item.facts["language"],
        }

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        shared = [score for score in scores if score.facts["intersection"]]
        return means(scores) | means(shared, "_intersection")

    def notes(self, request: Request) -> list[str]:
        settings = read_json(request.output / "settings.json")
        notes = [
            "Of each item the least of the judge's scores counts. The means over groups are unweighted; those of the "
            "intersection are over the items that the official data mark with Intersection_exist.",
            f"The data name no sampler: {STEPS} steps and guidance {GUIDANCE:g} are those of SemGen-Bench's edits. The "
            "seed is 0 for each.",
        ]
        if settings["request"]["mode"] == "official":
            notes.append(
                "The model edited sources of about 512 x 512 pixels in multiples of 32, whose width is then a multiple "
                "more or less, as the official example makes them."
            )
        else:
            notes.append("The model edited sources of about 512 x 512 pixels in the nearest multiples of 16.")
        if settings["items"] != COUNT:
            notes.append(f"The data have {settings['items']} instructions in this language, the official ones {COUNT}.")
        notes.append(
            "The official scorer, test_gedit_score.py, runs once it takes the split: load_dataset(...)['train']. It "
            "gives no means of the Chinese instructions."
        )
        return notes + self.notes_on_prompts(request)

    def official_command(self, request: Request) -> str | None:
        if request.extra["language"] != "en":  # calculate_statistics.py knows zh, and its data say cn
            return None
        root, model = request.output.resolve(), request.model
        return (
            f"cd GEdit-Bench && python test_gedit_score.py --model_name={model} --save_path={root} --backbone=gpt4o && "
            f"python calculate_statistics.py --model_name={model} --save_path={root} --backbone=gpt4o --language=en"
        )


def find_source(data: Path, expected: str) -> Source:
    """What a path holds: Parquet files (also in its folder `data`), a saved data set, or a plain folder with LIST.

    Raises FileNotFoundError or ValueError, in one line.
    """
    if not data.exists():
        raise FileNotFoundError(f"--data={data} does not exist, expected {expected}")
    if data.is_file():
        if data.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"--data={data} is neither a Parquet file nor a list in JSONL, expected {expected}")
        return Source("parquet" if data.suffix == ".parquet" else "json", data, [data])
    for folder in (data, data / "data"):
        if huggingface.is_saved(str(folder)):
            return Source(
                "hf", folder, sorted(path for path in folder.rglob("*") if path.suffix in (".arrow", ".json"))
            )
        files = sorted(folder.glob("*.parquet"))
        if files:
            _check_parts(folder, files)
            return Source("parquet", folder, files)
        if (folder / LIST).exists():
            return Source("json", folder / LIST, [folder / LIST])
    raise FileNotFoundError(f"--data={data} has no Parquet files, saved data set or {LIST}, expected {expected}")


def _check_parts(folder, files):
    """Refuses a folder that lacks some of the parts that its files' names count."""
    parts = [re.fullmatch(r"(.*)-\d+-of-(\d+)\.parquet", path.name) for path in files]
    for name, count in {(match[1], match[2]) for match in parts if match}:
        there = sum(bool(match) and (match[1], match[2]) == (name, count) for match in parts)
        if there != int(count):
            raise ValueError(
                f"{folder} has {there} of {int(count)} files {name}-*-of-{count}.parquet: download the rest"
            )


def _sources(request, item) -> tuple[Path, Path]:
    """(the source that is judged, in the official layout; that which is edited)."""
    made = request.made / f"{item.jobs[0]['id']}.png"
    return made.with_name(f"{made.stem}_SRCIMG.png"), Path(item.jobs[0]["image"])


def edit_size(request: Request, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which the model edits a source of that (width, height), unless the user named them."""
    height, width = (request.options.get(name) for name in ("height", "width"))
    if height or width:
        return width or height, height or width
    return official_size(size) if request.mode == "official" else fitting_size(size)


def official_size(size: tuple[int, int]) -> tuple[int, int]:
    """As the official example: the nearest multiples of 32, and then 32 more or fewer of the width, for the area."""
    ratio = size[0] / size[1]
    width = math.sqrt(AREA * ratio)
    width, height = (max(32, round(side / 32) * 32) for side in (width, width / ratio))
    if width * height < AREA:
        width += 32
    elif width * height > AREA and width > 32:
        width -= 32
    return width, height


def fitting_size(size: tuple[int, int]) -> tuple[int, int]:
    """The nearest multiples of 16 of the size that has AREA pixels and the aspect of `size`."""
    scale = math.sqrt(AREA / (size[0] * size[1]))
    return tuple(max(16, round(side * scale / 16) * 16) for side in size)
