"""What the texts of the shapes world say: captions and questions read back into what they claim.

`data/shapes/tasks.py` writes these texts from scenes; here they are parsed, and compared with scenes.
"""

import itertools
import re
from typing import NamedTuple

from unialign_jax.data.shapes.scene import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, Scene, Thing
from unialign_jax.data.shapes.tasks import relations

NUMBERS = {"one": 1, "two": 2, "three": 3}
RELATIONS = ("left of", "right of", "above", "below")


class Named(NamedTuple):
    """A thing as a text names it; what the text leaves open is None."""

    size: str
    color: str | None
    shape: str
    cell: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether a thing has all that is said."""
        pairs = ((self.color, thing.color), (self.cell, thing.cell))
        return (self.size, self.shape) == (thing.size, thing.shape) and all(a in (None, b) for a, b in pairs)


class Claim(NamedTuple):
    """What a caption says of a picture.

    `view` is "photo" or the kind of map; `background` is None for maps. `relation` holds between the first named thing
    and the second. A depth map's things are told from near to far.
    """

    view: str
    background: str | None
    things: tuple[Named, ...]
    relation: str | None = None


def _any(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PLURALS = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}
_NAME = rf"({_any(SIZES)}) ({_any(COLORS)}) ({_any(SHAPES)})"
_GROUND = rf" on a ({_any(BACKGROUNDS)}) background"
_ALIKE = re.compile(rf"(two|three) ({_any(SIZES)}) ({_any(COLORS)}) ({_any(_PLURALS)}){_GROUND}")
_RELATED = re.compile(rf"a {_NAME} ({_any(RELATIONS)}) a {_NAME}{_GROUND}")
_LISTED = re.compile(rf"(.+){_GROUND}")
_PLACED = re.compile(rf"a {_NAME} at the ({_any(POSITIONS)})")
_MAP = re.compile(r"the (edges|keypoints) of (.+)")
_MAP_PLACED = re.compile(rf"a ({_any(SIZES)}) ({_any(SHAPES)}) at the ({_any(POSITIONS)})")
_DEPTH = re.compile(r"a depth map from near to far: (.+)")
_DEPTH_THING = re.compile(rf"({_any(SIZES)}) ({_any(SHAPES)})")


def parse_caption(text: str) -> Claim | None:
    """A caption -> what it claims, or None when it is not one of the world's sentences."""
    text = text.strip()
    if found := _ALIKE.fullmatch(text):
        number, size, color, plural, background = found.groups()
        return Claim("photo", background, (Named(size, color, _PLURALS[plural]),) * NUMBERS[number])
    if found := _RELATED.fullmatch(text):
        *names, background = found.groups()
        return Claim("photo", background, (Named(*names[:3]), Named(*names[4:])), names[3])
    if found := _MAP.fullmatch(text):
        things = _parts(_MAP_PLACED, found[2])
        view = {"edges": "canny", "keypoints": "pose"}[found[1]]
        return things and Claim(view, None, tuple(Named(s, None, x, POSITIONS.index(p)) for s, x, p in things))
    if found := _DEPTH.fullmatch(text):
        matches = [_DEPTH_THING.fullmatch(part) for part in found[1].split(", ")]
        if not all(matches) or len(matches) > 3:
            return None
        return Claim("depth", None, tuple(Named(match[1], None, match[2]) for match in matches))
    if found := _LISTED.fullmatch(text):
        things = _parts(_PLACED, found[1])
        return things and Claim("photo", found[2], tuple(Named(s, c, x, POSITIONS.index(p)) for s, c, x, p in things))
    return None


def _parts(pattern, listing):
    """The groups of "P, P and P", one to three of them, each matching the pattern; None when one does not."""
    head, _, last = listing.rpartition(" and ")
    matches = [pattern.fullmatch(part) for part in [*(head.split(", ") if head else []), last]]
    return [match.groups() for match in matches] if all(matches) and len(matches) <= 3 else None


def is_true(claim: Claim, scene: Scene, view: str = "photo") -> bool:
    """Whether all that a caption says is so, and it names every thing of the scene."""
    if claim.view != view or len(claim.things) != len(scene.things):
        return False
    if claim.background not in (None, scene.background):
        return False
    if view == "depth":
        near_to_far = scene.far_to_near()[::-1]
        return all(named.fits(thing) for named, thing in zip(claim.things, near_to_far, strict=True))
    return any(
        all(named.fits(thing) for named, thing in zip(claim.things, order, strict=True))
        and (claim.relation is None or claim.relation in relations(order[0], order[1]))
        for order in itertools.permutations(scene.things)
    )


def question_topic(question: str) -> str:
    """The topic of one of the world's questions, as `data/shapes/tasks.py` names them; "other" for any other text."""
    patterns = {
        "count": r"how many shapes are there\?",
        "count of": r"how many .+ are there\?",
        "background": r"what color is the background\?",
        "color": r"what color is the .+\?",
        "shape": r"what shape is .+\?",
        "size": r"is the .+ small or large\?",
        "position": r"where is the .+\?",
        "relation": rf"is the .+ ({_any(RELATIONS)}) the .+\?",
        "exists": r"is there an? .+\?",
    }
    return next((topic for topic, pattern in patterns.items() if re.fullmatch(pattern, question)), "other")
