"""The kinds of records: one table for data, training, inference and help. A new kind is a new row.

Readers and writers of formats have tables of their own (`jsonl.READERS`, `shapes.STREAMS`), and refuse other kinds.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The content of the records of one kind, and its use in training.

    Attributes:
      summary: for help, in a few words.
      fields: the fields of `records.Record` that must be filled; "conditions" means at least one image.
      prompt: the field with the prompt. "caption" or "instruction": the image pass reads it, and the text pass learns
        the caption. "question": the text pass reads it and learns the answer.
      image_pass: whether the image pass is trained.
      num_conditions: condition images of an example, by default; 0 for none.
      tasks: the inference tasks (of TASKS) that it trains.
    """

    summary: str
    fields: tuple[str, ...]
    prompt: str
    image_pass: bool
    num_conditions: int
    tasks: tuple[str, ...]


# The tasks of inference. Those of images have the names of the kinds that train them.
TASKS = ("text_to_image", "edit", "perception", "personalization", "caption", "vqa")
# Other names of tasks: of older bundles, job files and command lines, and the methods of `Pipeline`.
TASK_ALIASES = {
    "t2i": "text_to_image",
    "generate": "text_to_image",
    "perceive": "perception",
    "personalize": "personalization",
    "answer": "vqa",
}

# The instruction of each kind of map. The one for depth is the released model's own; the others are written after it.
PERCEPTION = {
    "canny": "Provide a detailed canny edge map of the entire scene.",
    "depth": "Provide a detailed depth map of the entire scene.",
    "pose": "Provide a detailed pose map of the people in the scene.",
}

_CHANGED = ("image", "conditions", "instruction", "caption")

KINDS = {
    "text_to_image": Kind(
        "an image and its caption", ("image", "caption"), "caption", True, 0, ("text_to_image", "caption")
    ),
    "edit": Kind("an image changed as an instruction says", _CHANGED, "instruction", True, 1, ("edit", "caption")),
    "perception": Kind("edges, depth or pose of an image", _CHANGED, "instruction", True, 1, ("perception", "caption")),
    "personalization": Kind(
        "references placed in a new image", _CHANGED, "instruction", True, 3, ("personalization", "caption")
    ),
    # Trains the text pass alone, as in DualDiffusion, since its records have no prompt for an image.
    "vqa": Kind("a question about an image", ("image", "question", "answer"), "question", False, 0, ("vqa",)),
}


def task_name(name: Any):
    """The name in TASKS of a task; what is no name of one is returned as it is."""
    return TASK_ALIASES.get(name, name) if isinstance(name, str) else name


def find_kind(name: str) -> Kind:
    """The kind of that name. Raises ValueError for an unknown one."""
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"unknown kind {name!r}, expected one of {', '.join(KINDS)}")
    return KINDS[name]


def has_image_pass(name: str) -> bool:
    """Whether records of the kind train the image pass. Raises ValueError for an unknown kind."""
    return find_kind(name).image_pass
