"""The config.json of a bundle: written with a hash of itself, every field checked when it is read."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from unialign_jax import files
from unialign_jax.data.kinds import TASKS, task_name
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.files import shown
from unialign_jax.files.places import Place, is_url, place
from unialign_jax.integrity import inventory
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import REMAT_POLICIES, AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.teacher import TeacherConfig
from unialign_jax.models.text_encoder import TextEncoderConfig
from unialign_jax.sampling.text import DECODINGS

FORMAT, VERSION = "unialign_jax bundle", 1
PACKAGED = {"demo": Path(__file__).with_name("assets") / "demo"}  # bundles inside the package
COMPONENTS = {
    "transformer": MMDiTConfig,
    "heads": AlignmentHeadsConfig,
    "text_encoder": TextEncoderConfig,
    "autoencoder": AutoencoderConfig,
    "teacher": TeacherConfig,  # in a bundle of its own
}
SIZES = ("image_size", "text_length")
# How the released model is sampled, with the range or the choices of each value. These are the defaults of all bundles.
# Captions are sampled as the reference does. Answers are decoded without randomness: they are right or wrong.
SAMPLING = {
    "steps": (28, 1, 1000),
    "edit_steps": (50, 1, 1000),  # of images with conditions
    "caption_steps": (32, 1, 1000),  # of captions and answers
    "caption_decoding": ("ancestral", DECODINGS),
    "caption_temperature": (1.0, 0, 100),
    "answer_decoding": ("top_k", DECODINGS),
    "answer_temperature": (0.0, 0, 100),
    "guidance_scale": (7.0, 0, 100),
    "shift": (3.0, 0.01, 100),
}
# Overrides for a transformer with text positions. It can place words itself, so sampling need not be random.
POSITIONED_SAMPLING = {"caption_decoding": "top_k", "caption_temperature": 0.0}
_KEYS = {"format", "version", *COMPONENTS, *SIZES, "tasks", "sampling", "dtypes", "provenance", "files"}
_CHOICES = {
    "attention": ("auto", "xla", "cudnn", "splash"),
    "remat": ("none", *REMAT_POLICIES),
    "dtype": ("bfloat16", "float32"),
    "kind": ("kl", "space_to_depth"),
}
# Upper limits of whole numbers. Building a network with larger ones would take for ever.
_MOST = {"depth": 1000, "blocks_per_level": 64, "num_buckets": 10_000, "min_pixels": 2**30, "max_pixels": 2**30}
_MOST_OF_ALL = 2**24
_NONE = ("text_positions", "blocks_per_level", "full_attention_layers")  # these may be 0, or contain it
_LENGTHS = {"full_attention_layers": (0, 1000)}  # of a list; 1 to 16 elsewhere


@dataclasses.dataclass(frozen=True)
class BundleConfig:
    """The architecture of a bundle's components, None for those that it lacks, and how the model is used.

    Attributes:
      image_size: the side in pixels that the model was trained with, and the default of sampling.
      text_length: the same of texts, in tokens.
      tasks: those of TASKS that it was trained for; None when that is not known.
      sampling: other defaults of sampling, with the keys of SAMPLING.
      dtypes: the stored dtypes by component, such as {"transformer": ["float16", "float32"]}.
      provenance: what the writer recorded: sources with sizes and hashes, layout, versions.
    """

    transformer: MMDiTConfig | None = None
    heads: AlignmentHeadsConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    teacher: TeacherConfig | None = None
    image_size: int = 512
    text_length: int = 256
    tasks: tuple[str, ...] | None = None
    sampling: dict = dataclasses.field(default_factory=dict)
    dtypes: dict = dataclasses.field(default_factory=dict)
    provenance: dict = dataclasses.field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for name in COMPONENTS if getattr(self, name) is not None)

    @property
    def sampling_defaults(self) -> dict:
        """A value for every key of SAMPLING: the bundle's own, or else the default for its architecture."""
        usual = {key: value for key, (value, *_) in SAMPLING.items()}
        if self.transformer is not None and self.transformer.text_positions:
            usual |= POSITIONED_SAMPLING
        return usual | self.sampling


def is_packaged(name: str | os.PathLike) -> bool:
    """Whether `name` is one of PACKAGED, and no folder here has that name."""
    return str(name) in PACKAGED and not os.path.lexists(name)


def locate(name: str | os.PathLike) -> Place:
    """The folder of the bundle `name`: a path, or the name of a packaged bundle, such as "demo".

    A URL is that of a run in a bucket. Raises as `places.place` does.
    """
    if is_packaged(name):
        return PACKAGED[str(name)]
    return place(name) if is_url(name) else Path(name)


def is_bundle(directory: str | os.PathLike) -> bool:
    """Whether the folder holds a whole bundle (of any version). Those in buckets are not read, so there is none."""
    if is_url(directory):
        return False
    try:
        return files.read_json(Path(directory) / "config.json").get("format") == FORMAT
    except (OSError, ValueError):
        return False


def read_content(directory: str | os.PathLike, verify: bool = True) -> dict:
    """The JSON object in a bundle's config.json, whose format and version are checked.

    Raises FileNotFoundError when there is no such folder, and ValueError when it is not a bundle, is of another version
    or (with `verify`) has been changed since it was written.
    """
    if is_url(directory):
        raise ValueError(f"{directory} is no run's folder; a bundle must lie on a file system: copy it here first")
    directory = Path(directory)
    if not directory.is_dir():
        if directory.exists():
            raise ValueError(f"{directory} is a file, expected the folder of a bundle")
        raise FileNotFoundError(f"{directory}: there is no such bundle; make one with launch/convert.py")
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a bundle: expected a folder written by launch/convert.py")
    files.check_regular(path, files.MAX_JSON)
    raw = path.read_bytes()
    content = files.parse_json(raw, str(path))
    if content.get("format") != FORMAT:
        raise ValueError(f"{directory} is not a bundle: expected a folder written by launch/convert.py")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{directory} is a bundle of version {str(content.get('version'))[:20]}, this code reads version "
            f"{VERSION}: convert the model anew, or use the code that wrote it"
        )
    unknown = sorted(content.keys() - _KEYS - {inventory.SEAL})
    if unknown:
        raise ValueError(f"{path} has the unknown key {unknown[0][:60]!r}: it is damaged, or of newer code")
    if verify and inventory.seal_is_broken(raw, content):
        inventory.refuse(directory, ["config.json has been changed (its hash differs)"])
    content["files"] = inventory.check_form(content.get("files", {}), str(path))
    return content


def write_content(directory: str | os.PathLike, content: dict) -> None:
    """Writes config.json: format and version, `content`, and the hash of the file itself."""
    text = inventory.sealed({"format": FORMAT, "version": VERSION} | content)
    (Path(directory) / "config.json").write_text(text)


def parse_config(directory: str | os.PathLike, content: dict) -> BundleConfig:
    """The content of a config.json as a BundleConfig. Raises ValueError with one line that names the key."""
    where = f"{directory}/config.json"
    components = {
        name: parse_component(kind, content[name], f"{where}: {name}")
        for name, kind in COMPONENTS.items()
        if content.get(name) is not None
    }
    found = {key: content[key] for key in (*SIZES, "sampling", "dtypes", "provenance") if key in content}
    for key, (low, high) in {"image_size": (1, 2**16), "text_length": (2, 2**16)}.items():
        if key in found and not inventory.is_whole(found[key], low, high):
            raise ValueError(f"{where}: {key} is {shown(found[key])}, expected a whole number from {low} to {high}")
    for key in ("sampling", "dtypes", "provenance"):
        if not isinstance(found.get(key, {}), dict):
            raise ValueError(f"{where}: {key} is {shown(found[key])}, expected an object")
    _check_sampling(found.get("sampling", {}), where)
    tasks = content.get("tasks")
    if tasks is not None:
        if not isinstance(tasks, list) or not all(task_name(task) in TASKS for task in tasks):
            raise ValueError(f"{where}: tasks is {shown(tasks)}, expected a list of {', '.join(TASKS)}")
        tasks = tuple(map(task_name, tasks))
    return BundleConfig(**components, **found, tasks=tasks)


def parse_component(kind: type, values: Any, where: str):
    """The configuration dataclass `kind` from a JSON value. Raises ValueError with a line that begins with `where`."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {shown(values)}, expected an object")
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0][:60]!r}, expected some of {', '.join(fields)}")
    for name, value in values.items():
        expected = _expected(name, value, fields[name])
        if expected:
            raise ValueError(f"{where}.{name} is {shown(value)}, expected {expected}")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except ValueError as error:
        reason = str(error).removeprefix("teacher: ")  # `where` ends with it
        raise ValueError(f"{where}: {reason}") from None


def _expected(name: str, value, default) -> str | None:
    """A description of the values that a field may have, or None when `value` is one of them."""
    least, most = 0 if name in _NONE else 1, _MOST.get(name, _MOST_OF_ALL)
    if name in _CHOICES:
        fits, expected = isinstance(value, str) and value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}"
    elif isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, expected = inventory.is_whole(value, least, most), f"a whole number from {least} to {most}"
    elif isinstance(default, float):
        fits, expected = is_number(value) and (name != "scale" or value > 0), "a number"
    else:
        shortest, longest = _LENGTHS.get(name, (1, 16))
        fits = isinstance(value, list | tuple) and shortest <= len(value) <= longest
        fits = fits and all(inventory.is_whole(number, least, most) for number in value)
        expected = f"{shortest} to {longest} whole numbers from {least} to {most}"
    return None if fits else expected


def _check_sampling(sampling: dict, where: str) -> None:
    for key, value in sampling.items():
        if key not in SAMPLING:
            known = ", ".join(SAMPLING)
            raise ValueError(f"{where}: sampling has the unknown key {key[:60]!r}, expected some of {known}")
        default, *limits = SAMPLING[key]
        if isinstance(default, str):
            fits, expected = value in limits[0], f"one of {', '.join(limits[0])}"
        else:
            low, high = limits
            fits = inventory.is_whole(value, low, high) if isinstance(default, int) else is_number(value)
            fits, expected = fits and low <= value <= high, f"{low} to {high}"
        if not fits:
            raise ValueError(f"{where}: sampling.{key} is {shown(value)}, expected {expected}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def fit_problems(config: BundleConfig, tokenizer: Tokenizer | None = None) -> list[str]:
    """The ways in which components and tokenizer do not fit each other, one line each.

    Vocabularies may grow from tokenizer to text head to text encoder: each one's ids are the first ids of the next.
    """
    t, e, a = config.transformer, config.text_encoder, config.autoencoder
    lines = []
    if t and 0 < t.text_positions < config.text_length:
        lines.append(f"texts have {config.text_length} tokens, the transformer has positions for {t.text_positions}")
    if t and e and t.text_width != e.width:
        lines.append(f"the transformer reads text of width {t.text_width}, the text encoder gives {e.width}")
    if t and e and t.vocab_size > e.vocab_size:
        lines.append(f"the transformer predicts {t.vocab_size} tokens, the text encoder's table has {e.vocab_size}")
    if t and a and t.latent_channels != a.latent_channels:
        lines.append(f"the transformer has {t.latent_channels} latent channels, the VAE {a.latent_channels}")
    if tokenizer and t and tokenizer.vocab_size > t.vocab_size:
        lines.append(f"the tokenizer has {tokenizer.vocab_size} tokens, the transformer predicts {t.vocab_size}")
    elif tokenizer and e and tokenizer.vocab_size > e.vocab_size:
        lines.append(f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder's table has {e.vocab_size}")
    return lines
