"""Runs a model on held-out scenes of the shapes world, task by task, and scores its images and texts."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unialign_jax.bundle_config import BundleConfig
from unialign_jax.data.shapes.tasks import Example, shapes_example
from unialign_jax.data.shapes.words import parse_caption, question_topic
from unialign_jax.evaluation import shapes
from unialign_jax.training.samples import cell, draw_sheet

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
    pipeline,
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
      pipeline: a `Pipeline` of a model that was trained on the shapes world.
      task: one of TASKS.
      image_options: further arguments of `Pipeline.generate`, `edit` and `personalize`.
      text_options: further arguments of `Pipeline.caption` and `answer`.
      seed: of the held-out world.
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
        results += _RUN[task](pipeline, chunk, dict(options) | {"seed": list(range(first, first + len(chunk)))})
        progress(len(chunk))
    return results


def _text_to_image(pipeline, examples, options):
    made = pipeline.generate([e.caption for e in examples], **options)
    for example, picture in zip(examples, _arrays(made), strict=True):
        scores = shapes.score_text_to_image(picture, parse_caption(example.caption))
        yield Result(example.caption, example.image, (), picture, scores)


def _caption(pipeline, examples, options):
    texts = pipeline.caption(_pictures(e.image for e in examples), **options)
    for example, text in zip(examples, texts, strict=True):
        scores = shapes.score_caption(text, example.scene, example.view, example.caption)
        yield Result("caption", example.caption, (example.image,), text, scores)


def _vqa(pipeline, examples, options):
    texts = pipeline.answer(_pictures(e.image for e in examples), [e.question for e in examples], **options)
    for example, text in zip(examples, texts, strict=True):
        correct = shapes.score_answer(text, example.answer)["correct"]
        scores = {"correct": correct, f"correct/{question_topic(example.question)}": correct}
        yield Result(example.question, example.answer, (example.image,), text, scores)


def _edit(pipeline, examples, options):
    sources = _pictures(e.conditions[0] for e in examples)
    made = pipeline.edit([e.instruction for e in examples], sources, **options)
    for example, picture in zip(examples, _arrays(made), strict=True):
        scores = shapes.score_edit(picture, example.conditions[0], example.image, example.scene)
        yield Result(example.instruction, example.image, example.conditions, picture, scores)


def _perception(pipeline, examples, options):
    sources = _pictures(e.conditions[0] for e in examples)
    made = pipeline.edit([e.instruction for e in examples], sources, **options)
    score = {"canny": shapes.score_edges, "depth": shapes.score_depth, "pose": shapes.score_keypoints}
    for example, picture in zip(examples, _arrays(made), strict=True):
        values = score[example.view](picture, example.image)
        scores = {f"{example.view}/{name}": value for name, value in values.items()}
        scores["score"] = min(values.values())
        yield Result(example.instruction, example.image, example.conditions, picture, scores)


def _personalization(pipeline, examples, options):
    references = [list(_pictures(e.conditions)) for e in examples]
    made = pipeline.personalize([e.instruction for e in examples], references, **options)
    for example, picture in zip(examples, _arrays(made), strict=True):
        scores = shapes.score_scene(picture, example.scene)
        yield Result(example.instruction, example.image, example.conditions, picture, scores)


_RUN = {
    "text_to_image": _text_to_image,
    "caption": _caption,
    "vqa": _vqa,
    "edit": _edit,
    "perception": _perception,
    "personalization": _personalization,
}


def _pictures(arrays) -> list[Image.Image]:
    return [Image.fromarray(array) for array in arrays]


def _arrays(images) -> list[np.ndarray]:
    return [np.asarray(image.convert("RGB")) for image in images]


def worst(results: Sequence[Result], task: str, count: int = 12) -> list[Result]:
    """The `count` records of the lowest leading figure; among equals the first."""
    order = sorted(range(len(results)), key=lambda i: (float(results[i].scores[LEADING[task]]), i))
    return [results[i] for i in itertools.islice(order, count)]


def tasks_of(config: BundleConfig) -> list[str]:
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
