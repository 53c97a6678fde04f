"""Scores of the shapes world: pictures, maps, captions and answers against the truth, one record at a time.

Every function returns {name: bool or float}; `summary` makes means and standard errors of many. Nothing here knows a
model: what is scored is an array or a string.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from unialign_jax.data.shapes.detector import Detection, detect
from unialign_jax.data.shapes.render import DEPTH_LEVELS, draw_scene
from unialign_jax.data.shapes.scene import Scene, Thing
from unialign_jax.data.shapes.tasks import relations
from unialign_jax.data.shapes.words import Claim, Named, is_true, parse_caption

TOLERANCE = 1  # pixels that an edge or a corner point may be off
UNCHANGED = 8.0  # mean absolute difference in grey levels below which a region counts as unchanged


def score_text_to_image(image: np.ndarray, claim: Claim) -> dict[str, bool]:
    """Whether a picture shows what its caption claims.

    `count`, `background`: as said. `color`, `shape`, `size`: the picture has the wanted ones, each as often as wanted.
    `place`: for every named thing there is one of its colour where it should be, or in the wanted relation.
    `exact`: all at once, thing by thing, and nothing else in the picture.
    """
    found = detect(image)
    things = found.scene.things
    return {
        "background": found.scene.background == claim.background,
        "count": len(things) == len(claim.things),
        "color": _same((t.color for t in things), (n.color for n in claim.things)),
        "shape": _same((t.shape for t in things), (n.shape for n in claim.things)),
        "size": _same((t.size for t in things), (n.size for n in claim.things)),
        "place": _places(things, claim),
        "exact": found.is_clean and is_true(claim, found.scene),
    }


def _same(found: Iterable[str], wanted: Iterable[str]) -> bool:
    return sorted(found) == sorted(wanted)


def _places(things: Sequence[Thing], claim: Claim) -> bool:
    if claim.relation is not None:
        first, second = claim.things
        pairs = [(a, b) for a in things for b in things if a is not b]
        return any(
            (a.color, b.color) == (first.color, second.color) and claim.relation in relations(a, b) for a, b in pairs
        )
    if any(named.cell is None for named in claim.things):  # things alike, told by their number alone
        return True
    return all(any((t.cell, t.color) == (named.cell, named.color) for t in things) for named in claim.things)


def claim_of(scene: Scene) -> Claim:
    """The claim that names every thing of a scene with its place."""
    return Claim("photo", scene.background, tuple(Named(t.size, t.color, t.shape, t.cell) for t in scene.things))


def score_scene(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether a picture shows a scene: personalization, and the target of an edit."""
    return score_text_to_image(image, claim_of(scene))


def score_edit(image: np.ndarray, source: np.ndarray, target_image: np.ndarray, target: Scene) -> dict[str, bool]:
    """An edit: `exact`, it shows the target; `unchanged`, where the target equals the source the picture does too."""
    kept = (source == target_image).all(-1)
    difference = np.abs(image.astype(np.float32) - source).mean(-1)
    unchanged = bool(difference[kept].mean() <= UNCHANGED) if kept.any() else True
    return {"exact": score_scene(image, target)["exact"], "unchanged": unchanged}


def score_edges(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Edges, white on black: the share of all edge pixels, of either, that have one of the other within TOLERANCE."""
    ours, theirs = (picture.mean(-1) >= 128 for picture in (image, target))
    return {"iou": _tolerant_iou(ours, theirs)}


def score_depth(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Depth levels: the intersection over union of each level that the target has, on average."""
    levels = np.array([0, *DEPTH_LEVELS])
    ours, theirs = (np.abs(p.mean(-1)[..., None] - levels).argmin(-1) for p in (image, target))
    present = [level for level in range(1, len(levels)) if (theirs == level).any()]
    ious = [((ours == k) & (theirs == k)).sum() / ((ours == k) | (theirs == k)).sum() for k in present]
    return {"iou": float(np.mean(ious)) if ious else float(not (ours > 0).any())}


def score_keypoints(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Corner points, white: `precision` of the drawn ones that are wanted, `recall` of the wanted that are drawn."""
    ours, theirs = (picture.min(-1) >= 160 for picture in (image, target))
    precision = float((ours & _grow(theirs)).sum() / ours.sum()) if ours.any() else 0.0
    recall = float((theirs & _grow(ours)).sum() / theirs.sum()) if theirs.any() else 1.0
    return {"precision": precision, "recall": recall}


def _tolerant_iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    matched = (ours & _grow(theirs)).sum() + (theirs & _grow(ours)).sum()
    total = ours.sum() + theirs.sum()
    return float(matched / total) if total else 1.0


def _grow(mask: np.ndarray) -> np.ndarray:
    """Every pixel within TOLERANCE of the mask."""
    padded = np.pad(mask, TOLERANCE)
    height, width = mask.shape
    steps = range(2 * TOLERANCE + 1)
    return np.any([padded[y : y + height, x : x + width] for y in steps for x in steps], axis=0)


def score_caption(text: str, scene: Scene, view: str, written: str) -> dict[str, bool]:
    """A caption: it `parses`, all that it says is `true`, it is `exact`, the record's own words."""
    claim = parse_caption(text)
    return {
        "parses": claim is not None,
        "true": claim is not None and is_true(claim, scene, view),
        "exact": text.strip() == written,
    }


def score_answer(text: str, answer: str) -> dict[str, bool]:
    return {"correct": text.strip() == answer}


def summary(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{name: {"mean", "standard_error", "count"}} over records; a record without a name does not count in it.

    The standard error of a single record is None.
    """
    result = {}
    for name in sorted({name for score in scores for name in score}):
        values = np.array([float(score[name]) for score in scores if name in score])
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        result[name] = {"mean": float(values.mean()), "standard_error": error, "count": len(values)}
    return result


def is_same_scene(found: Detection, scene: Scene) -> bool:
    """Whether a picture was read as this scene, shifts within the cells aside."""
    return is_true(claim_of(scene), found.scene)


def residual(image: np.ndarray, scene: Scene) -> float:
    """The mean absolute difference, in grey levels, between a picture and a scene's drawing."""
    return float(np.abs(image.astype(np.float32) - draw_scene(scene, image.shape[0])).mean())
