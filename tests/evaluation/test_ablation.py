"""Intervals over seeds."""

import numpy as np

from unialign_jax.evaluation.ablation import interval


def test_intervals_are_students():
    """By the printed tables of t: 12.706 for two values, 4.303 for three, 2.262 for ten."""
    for count, quantile in ((2, 12.706), (3, 4.303), (10, 2.262)):
        values = list(np.random.default_rng(count).normal(size=count))
        wanted = np.mean(values), quantile * np.std(values, ddof=1) / np.sqrt(count)
        np.testing.assert_allclose(interval(values), wanted, rtol=1e-3)
    assert interval([3.0]) == (3.0, float("inf"))
