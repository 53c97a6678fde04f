"""The procedural world `shapes`: five streams of records with true targets, each a pure function of (seed, index).

Scenes are in scene.py, their pictures in render.py; here are the words and the tasks.
The teacher features are an oracle (`scene.oracle_features`): the truth about the scene, randomly projected.
"""

import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unialign_jax.data import records as records_lib
from unialign_jax.data.records import Record
from unialign_jax.data.shapes import render
from unialign_jax.data.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    GRID,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    oracle_features,
    sample_scene,
)
from unialign_jax.files import refuse_existing

WORLD_VERSION = 1  # raise it when the same (seed, index) gives another record
DEFAULT_NUM_RECORDS = {
    "text_to_image": 60_000,
    "edit": 20_000,
    "perception": 15_000,
    "personalization": 15_000,
    "vqa": 20_000,
}
MAX_REFERENCES = 3
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 4096  # pixels a side of a world on disk

_NUMBERS = ("zero", "one", "two", "three")
_ORDINALS = ("first", "second", "third")
_TOPICS = ("count", "count of", "color", "shape", "size", "background", "exists", "relation", "position")


class Example(NamedTuple):
    """One task before its pictures are encoded, images uint8 [S, S, 3]; `scene` and `view` say what `image` shows."""

    scene: Scene
    image: np.ndarray
    view: str = "photo"
    conditions: tuple[np.ndarray, ...] = ()
    caption: str = ""
    instruction: str = ""
    question: str = ""
    answer: str = ""


# --- words -----------------------------------------------------------------------------------------------------------


def caption_scene(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption of at most about 30 words in which every stated thing is true.

    With `rng`, pairs are told by their relation half of the time; without, always by position.
    """
    background = f"on a {scene.background} background"
    things = sorted(scene.things, key=lambda thing: thing.cell)
    first = things[0]
    if len(things) > 1 and all(_look(thing) == _look(first) for thing in things):
        return f"{_NUMBERS[len(things)]} {first.size} {first.color} {first.shape}{_plural(first.shape)} {background}"
    if len(things) == 2 and rng is not None and rng.integers(2):
        subject, relation, other = _pick_relation(scene, rng)
        return f"a {_name(subject)} {relation} a {_name(other)} {background}"
    return f"{_listing(f'a {_name(thing)} at the {thing.position}' for thing in things)} {background}"


def relations(subject: Thing, other: Thing) -> list[str]:
    """The true ones of "left of", "right of", "above", "below" (by grid cell, so none is a close call)."""
    row, column = divmod(subject.cell, GRID)
    other_row, other_column = divmod(other.cell, GRID)
    found = []
    if column != other_column:
        found.append("left of" if column < other_column else "right of")
    if row != other_row:
        found.append("above" if row < other_row else "below")
    return found


def _pick_relation(scene: Scene, rng: np.random.Generator) -> tuple[Thing, str, Thing]:
    subject, other = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    return subject, _choose(rng, relations(subject, other)), other


def _look(thing: Thing) -> tuple[str, str, str]:
    return thing.size, thing.color, thing.shape


def _name(thing: Thing) -> str:
    return f"{thing.size} {thing.color} {thing.shape}"


def _plural(shape: str) -> str:
    return "es" if shape == "cross" else "s"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _listing(parts: Iterable[str]) -> str:
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def _choose(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


# --- tasks -----------------------------------------------------------------------------------------------------------


def text_to_image_example(rng: np.random.Generator, image_size: int) -> Example:
    """A scene and its caption; one in six scenes shows two or three alike things, told by their count."""
    if rng.integers(6) == 0:
        scene = sample_scene(rng, num_things=int(rng.integers(2, 4)), alike=True)
    else:
        scene = sample_scene(rng)
    return Example(scene, render.draw_scene(scene, image_size), caption=caption_scene(scene, rng))


def edit_example(rng: np.random.Generator, image_size: int) -> Example:
    """Recolour, move, add, remove or replace one thing; the rest of the scene stays to the pixel."""
    operation = _choose(rng, ("recolor", "move", "add", "remove", "replace"))
    num_things = {"add": (1, 3), "remove": (2, 4)}.get(operation, (1, 4))
    source = sample_scene(rng, num_things=int(rng.integers(*num_things)))
    index = int(rng.integers(len(source.things)))
    thing = source.things[index]
    the_thing = f"the {thing.color} {thing.shape}"
    free_cells = [cell for cell in range(len(POSITIONS)) if cell not in {t.cell for t in source.things}]
    new_colors = [color for color in COLORS if color not in {t.color for t in source.things}]
    new_shapes = [shape for shape in SHAPES if shape not in {t.shape for t in source.things}]

    things = list(source.things)
    if operation == "recolor":
        things[index] = dataclasses.replace(thing, color=_choose(rng, new_colors))
        instruction = f"make {the_thing} {things[index].color}"
    elif operation == "move":
        things[index] = dataclasses.replace(thing, cell=_choose(rng, free_cells))
        instruction = f"move {the_thing} to the {things[index].position}"
    elif operation == "add":
        added = Thing(_choose(rng, new_shapes), _choose(rng, new_colors), _choose(rng, SIZES), _choose(rng, free_cells))
        things.append(added)
        instruction = f"add a {_name(added)} at the {added.position}"
    elif operation == "remove":
        del things[index]
        instruction = f"remove {the_thing}"
    else:
        new = dataclasses.replace(thing, shape=_choose(rng, new_shapes), color=_choose(rng, new_colors))
        things[index] = new
        instruction = f"replace {the_thing} with {_article(new.color)} {new.color} {new.shape}"

    target = Scene(source.background, tuple(things))
    return Example(
        target,
        render.draw_scene(target, image_size),
        conditions=(render.draw_scene(source, image_size),),
        instruction=instruction,
        caption=caption_scene(target),
    )


def perception_example(rng: np.random.Generator, image_size: int) -> Example:
    """The edges, the depth or the keypoints of a scene, asked for in words; the caption tells what the map shows."""
    view = _choose(rng, ("canny", "depth", "pose"))
    scene = sample_scene(rng)
    source = render.draw_scene(scene, image_size)
    in_order = sorted(scene.things, key=lambda thing: thing.cell)
    placed = _listing(f"a {thing.size} {thing.shape} at the {thing.position}" for thing in in_order)
    if view == "canny":
        image = render.draw_edges(scene, image_size)
        instruction = _choose(rng, ("detect the edges", "draw the edge map"))
        caption = f"the edges of {placed}"
    elif view == "depth":
        image = render.draw_depth(scene, image_size)
        instruction = _choose(rng, ("estimate the depth", "draw the depth map"))
        near_to_far = [f"{thing.size} {thing.shape}" for thing in scene.far_to_near()[::-1]]
        caption = f"a depth map from near to far: {', '.join(near_to_far)}"
    else:
        image = render.draw_keypoints(scene, image_size)
        instruction = _choose(rng, ("find the keypoints", "draw the pose"))
        caption = f"the keypoints of {placed}"
    return Example(scene, image, view, conditions=(source,), instruction=instruction, caption=caption)


def personalization_example(rng: np.random.Generator, image_size: int) -> Example:
    """One to three subjects, each alone in its own reference, placed in a new scene. The prompt does not describe
    the subjects, so the references have to be read; the caption does."""
    scene = sample_scene(rng)
    references = tuple(render.draw_reference(thing, _choose(rng, BACKGROUNDS), image_size) for thing in scene.things)
    places = [f"the {_ORDINALS[i]} at the {thing.position}" for i, thing in enumerate(scene.things)]
    return Example(
        scene,
        render.draw_scene(scene, image_size),
        conditions=references,
        instruction=f"put {_listing(places)} on a {scene.background} background",
        caption=caption_scene(scene),
    )


def vqa_example(rng: np.random.Generator, image_size: int) -> Example:
    """A scene, a question and its answer, drawn first where the scene leaves it open, so that all are balanced."""
    topic = _choose(rng, _TOPICS)
    if topic == "count of":
        return _count_example(rng, image_size)
    scene = sample_scene(rng, num_things=int(rng.integers(2, 4)) if topic == "relation" else None)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if topic == "count":
        question, answer = "how many shapes are there?", _NUMBERS[len(scene.things)]
    elif topic == "color":
        question, answer = f"what color is the {thing.shape}?", thing.color
    elif topic == "shape":
        question, answer = f"what shape is {thing.color}?", thing.shape
    elif topic == "size":
        question, answer = f"is the {thing.color} {thing.shape} small or large?", thing.size
    elif topic == "background":
        question, answer = "what color is the background?", scene.background
    elif topic == "position":
        question, answer = f"where is the {thing.color} {thing.shape}?", thing.position
    elif topic == "exists":
        answer = _choose(rng, ("yes", "no"))
        named = thing
        if answer == "no":
            # Only one of the two attributes is wrong, so neither alone gives the answer away.
            if rng.integers(2):
                absent = [shape for shape in SHAPES if shape not in {t.shape for t in scene.things}]
                named = dataclasses.replace(thing, shape=_choose(rng, absent))
            else:
                absent = [color for color in COLORS if color not in {t.color for t in scene.things}]
                named = dataclasses.replace(thing, color=_choose(rng, absent))
        question = f"is there {_article(named.color)} {named.color} {named.shape}?"
    else:
        subject, relation, other = _pick_relation(scene, rng)
        answer = _choose(rng, ("yes", "no"))
        if answer == "no":
            relation = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
        question = f"is the {subject.color} {subject.shape} {relation} the {other.color} {other.shape}?"
    return Example(scene, render.draw_scene(scene, image_size), question=question, answer=answer)


def _count_example(rng: np.random.Generator, image_size: int) -> Example:
    """How many things of a colour or shape, zero to three with equal chance."""
    count = int(rng.integers(4))
    scene = sample_scene(rng, num_things=max(count, 1), alike=count > 1)
    thing = scene.things[0]
    if rng.integers(2):
        absent = [color for color in COLORS if color != thing.color]
        question = f"how many {thing.color if count else _choose(rng, absent)} shapes are there?"
    else:
        absent = [shape for shape in SHAPES if shape != thing.shape]
        shape = thing.shape if count else _choose(rng, absent)
        question = f"how many {shape}{_plural(shape)} are there?"
    return Example(scene, render.draw_scene(scene, image_size), question=question, answer=_NUMBERS[count])


# The kinds that the world has, each with a number of its own, which seeds its records: never give one to another kind.
_TASKS = {
    "text_to_image": (0, text_to_image_example),
    "edit": (1, edit_example),
    "perception": (2, perception_example),
    "personalization": (3, personalization_example),
    "vqa": (4, vqa_example),
}
STREAMS = tuple(_TASKS)


# --- records ---------------------------------------------------------------------------------------------------------


def shapes_example(stream: str, seed: int, index: int, *, image_size: int = 64) -> Example:
    """Example number `index` of a stream: a pure function of its arguments."""
    if stream not in _TASKS:
        raise ValueError(f"unknown stream {stream!r}: shapes has {', '.join(STREAMS)}")
    number, make_example = _TASKS[stream]
    return make_example(np.random.default_rng([WORLD_VERSION, number, seed, index]), image_size)


def shapes_record(stream: str, seed: int, index: int, *, image_size: int = 64, teacher_width: int = 64) -> Record:
    """Record number `index` of a stream, PNG-encoded; without teacher features when `teacher_width` is 0."""
    example = shapes_example(stream, seed, index, image_size=image_size)
    teacher_image, teacher_text = (
        oracle_features(example.scene, teacher_width, example.view) if teacher_width else (None, None)
    )
    return Record(
        key=f"shapes/{stream}/{seed}/{index}",
        image=_encode_png(example.image),
        conditions=tuple(map(_encode_png, example.conditions)),
        caption=example.caption,
        instruction=example.instruction,
        question=example.question,
        answer=example.answer,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
    )


def shapes_texts(num_per_stream: int, seed: int = 0) -> Iterator[str]:
    """Every text of the first records of all streams, in the form the model reads: the tokenizer's corpus."""
    for stream, index in itertools.product(STREAMS, range(num_per_stream)):
        example = shapes_example(stream, seed, index, image_size=8)  # the words do not depend on the size
        if example.question:
            yield f"Q: {example.question} A: {example.answer}"
        yield from (text for text in (example.caption, example.instruction) if text)


def write_shapes(
    output_dir: str | os.PathLike,
    num_records: int | dict[str, int] | None = None,
    *,
    seed: int = 0,
    image_size: int = 64,
    teacher_width: int = 64,
    streams: tuple[str, ...] = STREAMS,
    overwrite: bool = False,
    progress: Callable | None = lambda stream, total, records: records,
) -> dict[str, bool]:
    """Writes `output_dir/<stream>/` for every stream, unless it is there with the same parameters: {stream: is new}.

    Args:
      num_records: per stream, one number for all or a dict; None means DEFAULT_NUM_RECORDS.
      teacher_width: width of the oracle's features; 0 leaves them out.
      progress: called with (stream, total, iterator), returns the iterator to consume (a progress bar).

    Raises FileExistsError, and writes nothing, when a folder holds something else and `overwrite` is off; ValueError
    for a stream that the world does not have and a number out of range.
    """
    if not isinstance(num_records, dict):
        num_records = {name: num_records or DEFAULT_NUM_RECORDS[name] for name in DEFAULT_NUM_RECORDS}
    jobs = {}
    for stream in streams:
        if stream not in _TASKS:
            raise ValueError(f"unknown stream {stream!r}: shapes has {', '.join(STREAMS)}")
        if num_records[stream] < 1:
            raise ValueError(f"num_records of {stream} is {num_records[stream]}: expected at least 1")
        if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size is {image_size}, expected {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}")
        jobs[stream] = {
            "source": "shapes",
            "world_version": WORLD_VERSION,
            "num_records": num_records[stream],
            "seed": seed,
            "image_size": image_size,
            "teacher_width": teacher_width,
            "teacher": "oracle: a fixed random projection of the scene's true attributes",
        }
    output_dir = Path(output_dir)
    to_write = {
        stream: parameters for stream, parameters in jobs.items() if not _is_there(output_dir / stream, parameters)
    }
    for stream in to_write:
        refuse_existing(output_dir / stream, overwrite=overwrite, foreign=records_lib.foreign_names)
    for stream, parameters in to_write.items():
        total = parameters["num_records"]
        rendered = (
            shapes_record(stream, seed, index, image_size=image_size, teacher_width=teacher_width)
            for index in range(total)
        )
        records_lib.write_records(
            output_dir / stream,
            progress(stream, total, rendered),
            kind=stream,
            parameters=parameters,
            overwrite=overwrite,
        )
    return {stream: stream in to_write for stream in jobs}


def _is_there(directory: Path, parameters: dict) -> bool:
    try:
        return records_lib.read_metadata(directory).parameters == parameters
    except (FileNotFoundError, ValueError):
        return False


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
