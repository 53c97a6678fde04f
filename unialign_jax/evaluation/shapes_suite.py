"""The scores of the shapes world as a suite's: what a report and a comparison of them need."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unialign_jax.evaluation.shapes_run import LEADING, TASKS, Result
from unialign_jax.evaluation.suite import Request, Score, Suite

PICTURES = "pictures"


class Shapes(Suite):
    """Held-out scenes of the procedural world; launch/evaluate.py shapes makes and scores them in one go."""

    name = "shapes"
    title = "Shapes world"
    summary = "the procedural world, by an exact detector"
    source = "drawn by the code"
    tasks = TASKS
    leading = f"text_to_image/{LEADING['text_to_image']}"
    worst_by = "leading"

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """The mean of every figure over the records of a task that have it."""
        values: dict[str, list[float]] = {}
        for score in scores:
            for name, value in score.values.items():
                if name != self.worst_by:
                    values.setdefault(f"{score.group}/{name}", []).append(value)
        return {name: sum(found) / len(found) for name, found in values.items()}

    def notes(self, request: Request) -> list[str]:
        return [
            "Pictures of a record lie side by side: what the model was shown, what was wanted, what it made.",
            "Each task's worst and best records are ordered by its leading figure: "
            + ", ".join(f"{name} of {task}" for task, name in LEADING.items())
            + ".",
        ]


def write_rows(folder: Path, task: str, results: Sequence[Result]) -> list[Score]:
    """A row for each record of a task, with its picture in the folder."""
    (folder / PICTURES / task).mkdir(parents=True)
    rows = []
    for number, result in enumerate(results):
        name = f"{PICTURES}/{task}/{number:05d}.png"
        is_text = isinstance(result.made, str)
        shown = [*result.given] if is_text else [*result.given, result.wanted, result.made]
        Image.fromarray(np.concatenate(shown, axis=1)).save(folder / name)
        values = {key: float(value) for key, value in result.scores.items()}
        rows.append(
            Score(
                item=f"{task}/{number}",
                group=task,
                values={"leading": values[LEADING[task]], **values},
                text=result.asked,
                images=(name,),
                answer=f"{result.made}\nwanted: {result.wanted}" if is_text else "",
            )
        )
    return rows
