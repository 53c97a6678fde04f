"""Bootstrap intervals of a suite's figures: over items, within groups, by the percentile method."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unialign_jax.evaluation.suite import Score

RESAMPLES, LEVEL = 1000, 0.95
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with the bounds between which LEVEL of its resampled values lie; None where it is not a number."""

    value: float | None
    low: float | None
    high: float | None


def resamples(groups: Sequence[str], count: int, seed: int) -> Iterator[np.ndarray]:
    """Yields `count` times the indices of a resample: as many items of each group as there are, drawn with replacement.

    Indices are sorted, so that the items keep their order.

    Args:
      groups: the group of each item.
    """
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero([group == name for group in groups]) for name in dict.fromkeys(groups)]
    for _ in range(count):
        drawn = [indices[generator.integers(len(indices), size=len(indices))] for indices in members]
        yield np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, int)


def of_figures(
    figures: Callable[[Sequence[Score]], Figures],
    scores: Sequence[Score],
    *,
    count: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Interval]:
    """The figures of the scores, each with its interval.

    Args:
      figures: of `Suite`, with its mode; it is called once for every resample, where an item may come several times.
      progress: called after every resample.
    """
    return _intervals(figures, [scores], count, seed, progress, lambda values: values[0])


def of_differences(
    figures: Callable[[Sequence[Score]], Figures],
    first: Sequence[Score],
    second: Sequence[Score],
    *,
    count: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Interval]:
    """By how much the figures of `second` lie above those of `first`: scores of the same items in the same order.

    Every resample draws the same items of both, so what an item's difficulty does to both cancels out.
    """
    if [score.item for score in first] != [score.item for score in second]:
        raise ValueError("the scores are not of the same items in the same order")
    return _intervals(figures, [first, second], count, seed, progress, lambda values: values[1] - values[0])


def _intervals(figures, runs, count, seed, progress, combine) -> dict[str, Interval]:
    """Intervals of what `combine` makes of [run, figure], the figures of runs that are resampled together."""
    whole = [figures(scores) for scores in runs]
    names = [name for name in whole[0] if all(name in found for found in whole)]

    def row(found):  # a resample may lack a figure, as that of a kind of question that was not drawn
        return combine(np.array([[run.get(name, math.nan) for name in names] for run in found]))

    drawn = np.empty((count, len(names)))
    for number, indices in enumerate(resamples([score.group for score in runs[0]], count, seed)):
        drawn[number] = row([figures([scores[i] for i in indices]) for scores in runs])
        progress()
    return {
        name: Interval(_number(value), *_bounds(drawn[:, place]))
        for place, (name, value) in enumerate(zip(names, row(whole), strict=True))
    }


def _bounds(drawn: np.ndarray) -> tuple[float | None, float | None]:
    """The percentiles; resamples in which the figure is not a number are left out."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return None, None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
