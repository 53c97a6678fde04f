"""GenEval's rules: whether the objects found in an image are those that its prompt asks for (arXiv 2310.11513).

They are those of the official evaluation/evaluate_images.py, on whatever a detector found.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
RELATIONS = ("left of", "right of", "above", "below")
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # an object must have more
MOST_OBJECTS = 16  # of a class
MARGIN = 0.1  # of the two objects' sizes, by which their distance is shortened
BACKGROUND = "#999"


@dataclasses.dataclass(frozen=True)
class Found:
    """An object that a detector found.

    Attributes:
      box: left, top, right, bottom, in pixels.
      confidence: from 0 to 1.
      mask: bool [height, width] of its pixels; None from a detector of boxes.
    """

    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray | None = dataclasses.field(default=None, compare=False)


Objects = dict[str, list[Found]]
# An image -> what is in it, by the names of GenEval's classes.
Detector = Callable[[Image.Image], Objects]
# (an image, objects of one class in it, the class's name) -> a color of COLORS for each.
ColorReader = Callable[[Image.Image, Sequence[Found], str], list[str]]


def confident(found: Objects, tag: str) -> Objects:
    """The objects that count for a prompt of a tag, the surest first; classes without one are left out."""
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    kept = {}
    for name, objects in found.items():
        sure = [thing for thing in objects if thing.confidence > least]
        if sure:
            kept[name] = sorted(sure, key=lambda thing: -thing.confidence)[:MOST_OBJECTS]
    return kept


def relations(one: Found, other: Found) -> set[str]:
    """Where `one` is, seen from `other`; none where their boxes are too close or too far aslant.

    The distance of their centres, in each direction shortened by MARGIN of the sum of their sizes, must be more than
    half of the whole distance.
    """
    boxes = np.array([one.box, other.box], np.float64).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    shortened = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shortened) < 1e-3):
        return set()
    right, down = shortened / math.hypot(*offset)
    seen = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in seen.items() if holds}


def check(image: Image.Image, objects: Objects, wanted: dict, read_colors: ColorReader) -> tuple[bool, str]:
    """(whether an image is as its prompt says, why not).

    Every clause of `include` must hold and none of `exclude`. A clause looks at the surest `count` objects of its class
    alone: their colors, and where they are from every one of the objects that an earlier clause found.

    Args:
      objects: what `confident` left.
      wanted: a line of GenEval's metadata.
    """
    reasons, groups = [], []
    for clause in wanted.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        reason = ""
        if len(found) < count:
            reason = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause:
            colors = read_colors(image, found, name)
            if colors.count(clause["color"]) < count:
                seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
                reason = f"expected {clause['color']} {name}>={count}, found {seen}"
        if not reason and "position" in clause:
            reason = _misplaced(found, name, clause["position"], groups)
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    for clause in wanted.get("exclude", ()):
        number = len(objects.get(clause["class"], ()))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return not reasons, "\n".join(reasons)


def _misplaced(found, name, position, groups) -> str:
    relation, target = position
    if groups[target] is None:
        return f"no target for {name} to be {relation}"
    for thing in found:
        for other in groups[target]:
            seen = relations(thing, other)
            if relation not in seen:
                return (
                    f"expected {name} {relation} target, found {' and '.join(sorted(seen)) or 'no relation to'} target"
                )
    return ""


def crop(image: Image.Image, thing: Found) -> Image.Image:
    """What a reader of colors sees of an object: its box, with all that is not of its mask in grey."""
    if thing.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(thing.mask.astype(np.uint8) * 255))
    return image.crop(tuple(round(side) for side in thing.box))
