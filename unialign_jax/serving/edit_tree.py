"""A conversation of edits that branches: every image stays, and an edit may begin from any of them."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Step:
    """An image of the tree.

    Attributes:
      image: its PNG.
      instruction: what made it, or None of the original.
      seed: of the edit.
      parent: the number of the step that it was made from; None of the original.
    """

    image: Path
    instruction: str | None = None
    seed: int = 0
    parent: int | None = None


class EditTree:
    """Steps by number, the original first, and the one that the user looks at.

    Attributes:
      steps: all of them, in the order in which they were made.
      at: the number of the one that is shown.
    """

    def __init__(self, original: Path):
        self.steps = [Step(original)]
        self.at = 0
        self._last_child: dict[int, int] = {}

    @property
    def now(self) -> Step:
        """The step that is shown."""
        return self.steps[self.at]

    @property
    def before(self) -> Step:
        """The step that it was made from; the original is its own."""
        return self.steps[self.now.parent or 0]

    def add(self, parent: int, image: Path, instruction: str, seed: int) -> None:
        """A new image made from that of number `parent`; it is shown from now on."""
        self.steps.append(Step(image, instruction, seed, parent))
        self.go_to(len(self.steps) - 1)

    def go_to(self, number: int) -> None:
        """Shows a step. Undo leads from it to its parents, and redo back on the same way."""
        self.at = number
        while (parent := self.steps[number].parent) is not None:
            self._last_child[parent] = number
            number = parent

    def undo(self) -> None:
        """Shows the image before. Raises ValueError at the original."""
        if self.now.parent is None:
            raise ValueError("there is no edit to undo")
        self.at = self.now.parent

    def redo(self) -> None:
        """Shows the edit that was undone last. Raises ValueError when there is none."""
        if self.at not in self._last_child:
            raise ValueError("there is no edit to redo")
        self.at = self._last_child[self.at]

    def labels(self) -> list[str]:
        """Of each step: its number, the one before it, its instruction and seed."""
        return [
            f"{number}: the original" if step.parent is None
            else f"{number}, from {step.parent}: {step.instruction} (seed {step.seed})"
            for number, step in enumerate(self.steps)
        ]  # fmt: skip
