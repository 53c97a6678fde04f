"""Runs a model on held-out scenes of the shapes world, task by task, and scores its images and texts."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from unialign_jax.data.shapes.tasks import Example, shapes_example
from unialign_jax.data.shapes.words import parse_caption, question_topic
from unialign_jax.evaluation import shapes

if TYPE_CHECKING:  # without JAX, the command's help and its errors come at once
    from unialign_jax.bundle_config import BundleConfig
    from unialign_jax.inference.pipeline import Pipeline

HELD_OUT_SEED = 1_000_003  # of a world that no data set is made of by default
# The tasks, each with its leading figure, which orders the sheet of its worst records.
LEADING = {
    "text_to_image": "exact",
    "caption": "true",
    "vqa": "correct",
    "edit": "exact",
    "perception": "score",
    "personalization": "exact",
}
TASKS = tuple(LEADING)


class Result(NamedTuple):
    """One record of one task: the request, the truth, the answer of the model, and its scores."""

    asked: str
    wanted: Any  # an image uint8 [S, S, 3] or a text
    given: tuple[np.ndarray, ...]  # the images that the model was shown
    made: Any
    scores: dict[str, float]


def stream_of(task: str) -> str:
    """The stream of the world whose records test a task: the one of its name; captions are tested on text_to_image."""
    return {"caption": "text_to_image"}.get(task, task)


def held_out(stream: str, count: int, image_size: int, seed: int = HELD_OUT_SEED) -> list[Example]:
    """The first `count` records of a stream of the held-out world."""
    return [shapes_example(stream, seed, index, image_size=image_size) for index in range(count)]


def run_task(
    pipeline: "Pipeline",
    task: str,
    count: int,
    *,
    image_options: dict | None = None,
    text_options: dict | None = None,
    seed: int = HELD_OUT_SEED,
    batch: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """Runs one task on `count` held-out records.

    Args:
      image_options: further arguments of `Pipeline.generate`, `edit` and `personalize`.
      text_options: further arguments of `Pipeline.caption` and `answer`.
      batch: records handed to the pipeline in one call.
      progress: called with the number of records that a call has finished.

    Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    examples = held_out(stream_of(task), count, pipeline.config.image_size, seed)
    results = []
    for first in range(0, count, batch):
        chunk = examples[first : first + batch]
        options = (text_options if task in ("caption", "vqa") else image_options) or {}
        results += _run(pipeline, task, chunk, dict(options) | {"seed": list(range(first, first + len(chunk)))})
        progress(len(chunk))
    return results


def _run(pipeline, task: str, examples: list[Example], options: dict) -> Iterator[Result]:
    """The results of one call of the pipeline."""
    asked = [e.caption if task == "text_to_image" else e.question or e.instruction or task for e in examples]
    given = [(e.image,) if task in ("caption", "vqa") else e.conditions for e in examples]
    pictures = [[Image.fromarray(array) for array in arrays] for arrays in given]
    firsts = [images[0] for images in pictures if images]
    if task == "text_to_image":
        made = pipeline.generate(asked, **options)
    elif task == "caption":
        made = pipeline.caption(firsts, **options)
    elif task == "vqa":
        made = pipeline.answer(firsts, asked, **options)
    elif task == "personalization":
        made = pipeline.personalize(asked, pictures, **options)
    else:
        made = pipeline.edit(asked, firsts, **options)
    wanted = {"caption": "caption", "vqa": "answer"}.get(task, "image")
    for example, text, arrays, result in zip(examples, asked, given, made, strict=True):
        result = result if isinstance(result, str) else np.asarray(result.convert("RGB"))
        yield Result(text, getattr(example, wanted), arrays, result, _scores(task, example, result))


def _scores(task: str, example: Example, made) -> dict[str, float]:
    if task == "text_to_image":
        return shapes.score_text_to_image(made, parse_caption(example.caption))
    if task == "caption":
        return shapes.score_caption(made, example.scene, example.view, example.caption)
    if task == "vqa":
        correct = shapes.score_answer(made, example.answer)["correct"]
        return {"correct": correct, f"correct/{question_topic(example.question)}": correct}
    if task == "edit":
        return shapes.score_edit(made, example.conditions[0], example.image, example.scene)
    if task == "personalization":
        return shapes.score_scene(made, example.scene)
    score = {"canny": shapes.score_edges, "depth": shapes.score_depth, "pose": shapes.score_keypoints}
    values = score[example.view](made, example.image)
    return {f"{example.view}/{name}": value for name, value in values.items()} | {"score": min(values.values())}


def worst(results: Sequence[Result], task: str, count: int = 12) -> list[Result]:
    """The `count` records of the lowest leading figure; among equals the first."""
    order = sorted(range(len(results)), key=lambda i: (float(results[i].scores[LEADING[task]]), i))
    return [results[i] for i in itertools.islice(order, count)]


def tasks_of(config: "BundleConfig") -> list[str]:
    """The tasks that a model was trained for, by its `BundleConfig`; all when it does not say."""
    if config.tasks is None:
        return list(TASKS)
    return [task for task in TASKS if task in config.tasks]


def table(task: str, scores: dict, seconds: float) -> str:
    """The scores of a task as lines of text: mean and standard error of each figure, in per cent."""
    lines = [f"{task} ({max(score['count'] for score in scores.values())} records, {seconds:.0f} s)"]
    for name, score in scores.items():
        error = "" if score["standard_error"] is None else f" +- {100 * score['standard_error']:.1f}"
        lines.append(f"  {name:<22} {100 * score['mean']:5.1f}{error}")
    return "\n".join(lines)


def write_worst(folder: Path, task: str, results: Sequence[Result]) -> Path:
    """Writes the records of the lowest scores: pictures as a sheet (.png), texts as a table (.md)."""
    from unialign_jax.training.samples import cell, draw_sheet

    chosen = worst(results, task)
    if isinstance(chosen[0].made, str):
        path = folder / f"worst_{task}.md"
        rows = ["| asked | wanted | made |", "|---|---|---|"]
        rows += [f"| {cell(r.asked)} | {cell(r.wanted)} | {cell(r.made)} |" for r in chosen]
        path.write_text("\n".join(rows) + "\n")
        return path
    most = max(len(result.given) for result in chosen)
    cards = []
    for result in chosen:
        blank = [np.full_like(result.wanted, 255)] * (most - len(result.given))
        given = [("given", image) for image in (*result.given, *blank)]
        cards.append((result.asked, [*given, ("wanted", result.wanted), ("made", result.made)]))
    path = folder / f"worst_{task}.png"
    draw_sheet(cards).save(path)
    return path
