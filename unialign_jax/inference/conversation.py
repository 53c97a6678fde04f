"""Several edits of one image in turn, each step kept."""

import dataclasses
import json
import os
import re
from pathlib import Path

from PIL import Image

from unialign_jax.files import replacing_folder
from unialign_jax.inference.options import by_name


@dataclasses.dataclass(frozen=True)
class Edit:
    """One step of a conversation: the instruction, the options of `Pipeline.edit`, and the image that came of them."""

    instruction: str
    options: dict
    image: Image.Image


class Conversation:
    """Edits of one image, one after another; `Pipeline.conversation` starts one.

        talk = pipeline.conversation(photo, steps=28)
        talk.edit("make it winter")
        talk.edit("add a red sledge", seed=3)
        talk.undo()
        talk.edit("add a blue sledge").save("winter.png")
        talk.replay(another_photo)

    Every edit starts from the image before it. Its default seed is the step's number, so that a repetition is exact.
    """

    def __init__(self, pipeline, image: Image.Image, options: dict | None = None):
        self._pipeline, self.original = pipeline, image
        self._defaults = dict(options or {})
        self._edits: list[Edit] = []
        self._undone: list[Edit] = []
        self._saved_in: Path | None = None

    @property
    def image(self) -> Image.Image:
        """The image as it stands."""
        return self._edits[-1].image if self._edits else self.original

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The steps so far, the oldest first."""
        return tuple(self._edits)

    def edit(self, instruction: str, *, seed: int | None = None, **options) -> Image.Image:
        """One more edit of the image as it stands; `options` are those of `Pipeline.edit`, for this step alone."""
        options = by_name(self._defaults) | by_name(options)
        if "seed" in options or options.get("images_per_prompt", 1) != 1:
            raise ValueError(
                "a step of a conversation is one image: its seed is edit(seed=), without images_per_prompt"
            )
        options["seed"] = len(self._edits) if seed is None else seed
        (image,) = self._pipeline.edit(instruction, self.image, **options)
        self._edits.append(Edit(instruction, options, image))
        self._undone.clear()
        return image

    def undo(self) -> Image.Image:
        """Takes back the last edit and returns the image before it. Raises ValueError when there is none."""
        if not self._edits:
            raise ValueError("there is no edit to undo")
        self._undone.append(self._edits.pop())
        return self.image

    def redo(self) -> Image.Image:
        """Brings back the edit that was undone last. Raises ValueError when there is none."""
        if not self._undone:
            raise ValueError("there is no edit to redo")
        self._edits.append(self._undone.pop())
        return self.image

    def replay(self, image: Image.Image | None = None) -> "Conversation":
        """The same edits, with the same seeds, of the original or another image, as a conversation of their own."""
        talk = Conversation(self._pipeline, self.original if image is None else image, self._defaults)
        for step in self._edits:
            talk.edit(step.instruction, **step.options)
        return talk

    def save(self, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes 0.png (the original), 1.png, ... and conversation.json into a folder, which it makes.

        Raises FileExistsError when the folder holds anything, unless this conversation was saved there before, or
        `overwrite` is set and it holds a conversation alone; OSError when it cannot be written.
        """
        directory = Path(directory).absolute()
        with replacing_folder(
            directory, overwrite=overwrite or directory == self._saved_in, foreign=_strangers
        ) as folder:
            self.original.save(folder / "0.png")
            steps = []
            for number, step in enumerate(self._edits, start=1):
                step.image.save(folder / f"{number}.png")
                options = {key: value for key, value in step.options.items() if key != "callback"}
                steps.append({"instruction": step.instruction, "image": f"{number}.png", **options})
            (folder / "conversation.json").write_text(
                json.dumps({"original": "0.png", "edits": steps}, indent=2, default=lambda value: value.tolist()) + "\n"
            )
        self._saved_in = directory


def _strangers(folder: Path) -> list[str]:
    """The files of a folder that no conversation writes."""
    names = sorted(path.name for path in folder.iterdir())
    if "conversation.json" not in names:
        return names
    return [name for name in names if not re.fullmatch(r"\d+\.png|conversation\.json", name)]
