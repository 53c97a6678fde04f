"""Reports of a run of a suite: report.json, report.md and report.html."""

from collections.abc import Sequence

from unialign_jax.evaluation.suite import Request, Score, Suite


def write(suite: Suite, request: Request, settings: dict, scores: Sequence[Score], *, seed: int = 0) -> dict:
    """Writes OUTPUT/MODE/report.json, report.md and report.html, and returns what report.json holds.

    Args:
      settings: what settings.json holds.
      seed: of the resampling.
    """
    raise NotImplementedError
