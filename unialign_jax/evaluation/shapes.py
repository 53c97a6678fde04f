"""Scores of the shapes world: pictures, maps, captions and answers against the truth, one record at a time.

Every scoring function returns {name: bool or float}; `summary` turns many into means and standard errors.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from unialign_jax.data.shapes.detector import detect
from unialign_jax.data.shapes.render import DEPTH_LEVELS
from unialign_jax.data.shapes.scene import Scene, Thing
from unialign_jax.data.shapes.tasks import relations
from unialign_jax.data.shapes.words import Claim, Named, is_true, parse_caption

TOLERANCE = 1  # pixels by which an edge or a corner point may miss
UNCHANGED = 8.0  # mean absolute difference in grey levels below which a region counts as unchanged


def score_text_to_image(image: np.ndarray, claim: Claim) -> dict[str, bool]:
    """Whether a picture shows what its caption claims.

    - `count`, `background`: as claimed.
    - `color`, `shape`, `size`: the picture has the claimed ones, each as often as claimed.
    - `place`: every named thing has one of its colour in its place, or in the claimed relation.
    - `exact`: all of it, thing by thing, and nothing else in the picture.
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
    """An edit. `exact`: it shows the target. `unchanged`: it equals the source wherever the target does."""
    kept = (source == target_image).all(-1)
    difference = np.abs(image.astype(np.float32) - source).mean(-1)
    unchanged = bool(difference[kept].mean() <= UNCHANGED) if kept.any() else True
    return {"exact": score_scene(image, target)["exact"], "unchanged": unchanged}


def score_edges(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Edges, white on black: of the edge pixels of both images, the share with one of the other within TOLERANCE."""
    ours, theirs = (picture.mean(-1) >= 128 for picture in (image, target))
    return {"iou": _tolerant_iou(ours, theirs)}


def score_depth(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Depth levels: the mean intersection over union of the levels in the target."""
    levels = np.array([0, *DEPTH_LEVELS])
    ours, theirs = (np.abs(p.mean(-1)[..., None] - levels).argmin(-1) for p in (image, target))
    present = [level for level in range(1, len(levels)) if (theirs == level).any()]
    ious = [((ours == k) & (theirs == k)).sum() / ((ours == k) | (theirs == k)).sum() for k in present]
    return {"iou": float(np.mean(ious)) if ious else float(not (ours > 0).any())}


def score_keypoints(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Corner points, white. `precision`: share of drawn pixels that are wanted; `recall`: of wanted that are drawn."""
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
    from scipy import ndimage

    return ndimage.binary_dilation(mask, np.ones((2 * TOLERANCE + 1, 2 * TOLERANCE + 1)))


def score_caption(text: str, scene: Scene, view: str, written: str) -> dict[str, bool]:
    """A caption. `parses`: it is a sentence of the world; `true`: its claim is; `exact`: it has the record's words."""
    claim = parse_caption(text)
    return {
        "parses": claim is not None,
        "true": claim is not None and is_true(claim, scene, view),
        "exact": text.strip() == written,
    }


def score_answer(text: str, answer: str) -> dict[str, bool]:
    """An answer: `correct` when it has the record's words."""
    return {"correct": text.strip() == answer}


def summary(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{name: {"mean", "standard_error", "count"}} over the records that have the name.

    The standard error of a single record is None.
    """
    result = {}
    for name in sorted({name for score in scores for name in score}):
        values = np.array([float(score[name]) for score in scores if name in score])
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        result[name] = {"mean": float(values.mean()), "standard_error": error, "count": len(values)}
    return result
