"""What a builder's run is asked to do. OUTPUT/settings.json keeps it, so that a later call need not repeat it."""

import dataclasses
import math
from pathlib import Path

from unialign_jax.files import read_json, shown, write_json

FILE = "settings.json"
FORMAT = "unialign_jax semgen builder"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command, by their names there.

    Attributes:
      coco: a folder with annotations/instances_SPLIT.json, annotations/captions_SPLIT.json and SPLIT/.
      images: folders of images, or JSON lists (JSONL) of them.
      licenses: ids or names; an image under another is left out. All are kept where none is named.
      image_license: of the images in `images` that do not say.
      min_sharpness: least variance of the Laplacian of the grey image (0 to 255).
      min_brightness, max_brightness: of the mean grey.
      max_clipped: largest share of pixels that are black (at most 5), or white (at least 250).
      min_classes: least number of kinds of objects, where the source lists objects.
      exclude: keys of images that are not to be chosen; others of their clusters take their places.
      embedder: "histogram", the URL of an OpenAI-compatible API, or the folder of a CLIP or SigLIP.
      duplicate_cosine: of two images that are more alike than this only the first can be chosen.
      judge, judge_model: the model that writes the drafts.
      templates: a folder of templates of your own; "" for those of the package.
      tokenizer: "words" (words and punctuation marks), or a tokenizer.json or its folder.
      max_overlap: largest share of a prompt's runs of four words that another prompt of its group has.
      max_verb_share: largest share of the instructions of a group that one verb may begin.
      redraft: how often a draft that a rule flags is asked for again.
    """

    coco: str = ""
    split: str = "val2017"
    images: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    image_license: str = ""
    min_side: int = 400
    min_aspect: float = 0.75
    max_aspect: float = 1.33
    min_sharpness: float = 100.0
    min_brightness: float = 40.0
    max_brightness: float = 215.0
    max_clipped: float = 0.5
    min_classes: int = 2
    embedder: str = ""
    embedder_model: str = ""
    duplicate_cosine: float = 0.95
    clusters: int = 15
    per_cluster: int = 10
    seed: int = 0
    exclude: tuple[str, ...] = ()
    judge: str = ""
    judge_model: str = ""
    temperature: float = 0.7
    templates: str = ""
    long_tokens: int = 200
    tokenizer: str = "words"
    max_overlap: float = 0.3
    max_verb_share: float = 0.4
    redraft: int = 0

    def part(self, *names: str) -> dict:
        """Some of the settings, as JSON holds them."""
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# The least and the largest value of a number.
RANGES = {
    "min_side": (1, 10**6),
    "min_aspect": (0.0, 100.0),
    "max_aspect": (0.01, 100.0),
    "min_sharpness": (0.0, 1e9),
    "min_brightness": (0.0, 255.0),
    "max_brightness": (0.0, 255.0),
    "max_clipped": (0.0, 1.0),
    "min_classes": (0, 1000),
    "duplicate_cosine": (-1.0, 1.0),
    "clusters": (1, 15),
    "per_cluster": (1, 1000),
    "seed": (0, 2**63 - 1),
    "temperature": (0.0, 2.0),
    "long_tokens": (0, 10**6),
    "max_overlap": (0.0, 1.0),
    "max_verb_share": (0.0, 1.0),
    "redraft": (0, 20),
}


def check(settings: Settings) -> None:
    """Raises ValueError for a number out of range, and for ranges that hold nothing."""
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"--{name.replace('_', '-')} is {shown(value)}, expected a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}")
    for low, high in (("min_aspect", "max_aspect"), ("min_brightness", "max_brightness")):
        if getattr(settings, low) > getattr(settings, high):
            raise ValueError(
                f"--{low.replace('_', '-')} is {getattr(settings, low)}, more than --{high.replace('_', '-')}, "
                f"{getattr(settings, high)}"
            )


def load(folder: Path) -> Settings | None:
    """The settings of a builder's folder; None where there is no folder, or an empty one.

    Raises ValueError or OSError, in one line, for a folder of something else.
    """
    path = folder / FILE
    if not path.exists():
        if folder.is_dir() and any(name.name != ".lock" for name in folder.iterdir()):
            raise FileExistsError(f"{folder} holds what was not written by this command; choose another --output")
        return None
    content = read_json(path)
    if content.get("format") != FORMAT or not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path} is not of this command: choose another --output")
    known = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in content["settings"].items() if name in known}
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def save(folder: Path, settings: Settings) -> None:
    """Writes settings.json."""
    content = {"format": FORMAT, "settings": settings.part(*(field.name for field in dataclasses.fields(Settings)))}
    write_json(folder / FILE, content)
