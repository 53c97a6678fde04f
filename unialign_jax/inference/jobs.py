"""Jobs: requests to a model, checked before the model is opened; this module does not import JAX.

A jobs file holds one JSON object a line. Its keys are the inputs of its task (INPUTS) and options
(`inference.options`). Image paths are relative to the file.

    {"id": "cat", "task": "text_to_image", "prompt": "a cat on a mat", "seed": 7, "steps": 28}
    {"task": "vqa", "image": "photos/1.jpg", "question": "What is on the mat?"}
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unialign_jax.data import images
from unialign_jax.data.kinds import TASKS, task_name
from unialign_jax.files import check_regular, first_line, shown, unique_keys
from unialign_jax.inference.options import MAX_REFERENCES, SEEDS, TEXT_TASKS, by_name, is_text, options_of

RESULTS = "results.jsonl"  # in the folder of results: no job may be called so
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99}){0,7}")
MAX_ID = 200  # characters
MAX_FILE = 2**30  # bytes of a jobs file
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclasses.dataclass(frozen=True)
class TaskInputs:
    """The inputs of a task: the keys that its text may have, the proper one first, and its least and most images."""

    texts: tuple[str, ...]
    images: tuple[int, int]
    needs_text: bool = True


INPUTS = {
    "text_to_image": TaskInputs(("prompt",), (0, 0)),
    "edit": TaskInputs(("instruction", "prompt"), (1, 1)),
    "perception": TaskInputs(("instruction", "prompt"), (1, 1), needs_text=False),
    "personalization": TaskInputs(("prompt", "instruction"), (1, MAX_REFERENCES)),
    "caption": TaskInputs((), (1, 1)),
    "vqa": TaskInputs(("question", "prompt"), (1, 1)),
}
as_json = functools.partial(shown, most=100, show=json.dumps)  # a value in a message
BY_SAMPLE = ("seed", "images_per_prompt", "negative_prompt")  # may differ within a batch; the others are the batch's
# Hashes were made of these names first. They stay, so that results of earlier versions count as done.
HASHED_NAMES = {
    "text_to_image": "t2i",
    "perception": "perceive",
    "personalization": "personalize",
    "images_per_prompt": "count",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request that passed its checks.

    Attributes:
      id: names its files.
      line: of the jobs file, counted from 1.
      task: one of TASKS; `text`: its prompt, instruction or question, None without.
      images, sizes: paths, and the upright (width, height) of each.
      seed, images_per_prompt, negative_prompt: options, or their defaults.
      options: the others that were given; the pipeline knows their defaults.
      hash: of everything that the result depends on, the images' content included.
    """

    id: str
    line: int
    task: str
    text: str | None
    images: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    seed: int
    images_per_prompt: int
    negative_prompt: str
    options: dict
    hash: str

    @property
    def files(self) -> list[str]:
        """The names of its images; none for a text."""
        if self.task in TEXT_TASKS:
            return []
        count = self.images_per_prompt
        return [f"{self.id}.png"] if count == 1 else [f"{self.id}_{i}.png" for i in range(count)]


@dataclasses.dataclass(frozen=True)
class BadJob:
    """A line of a jobs file that is no job, with the reason."""

    id: str
    line: int
    error: str
    files = ()


def read_jobs(path: str | Path, model: str = "") -> list[Job | BadJob]:
    """The jobs of a file, in its order; a line that is no job becomes a `BadJob`, blank lines are left out.

    A job that would write what one before it writes is bad too. Its id is then its line ("line 7"), as no job's can be.

    Args:
      model: identifies the model, for the jobs' hashes.

    Raises OSError or ValueError for a file that cannot be read or has no jobs.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such jobs file")
    check_regular(path, MAX_FILE)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from None
    jobs, written = [], Written()
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        job = _read_line(line, number, path.parent, model)
        if problem := written.problem(job):
            job = BadJob(f"line {number}", number, problem)
        else:
            written.add(job)
        jobs.append(job)
    if not jobs:
        raise ValueError(f"{path} has no jobs: expected one JSON object a line")
    return jobs


class Written:
    """The ids, files and folders of the jobs so far."""

    def __init__(self):
        self._lines = {}  # id or file -> the line that has it first
        self._folders = set()

    def problem(self, job: Job | BadJob) -> str | None:
        """Why a job cannot be beside those so far; None when it can."""
        for name in (job.id, *job.files):
            if name in self._lines:
                what = f"the id {name!r}" if name == job.id else f"the file {name}"
                return f"line {self._lines[name]} has {what} already; give this one another id"
        both = [name for name in job.files if name in self._folders]
        both += [name for name in _folders(job) if name in self._lines and name.endswith(".png")]
        return f"{both[0]} would be a file and a folder; give this one another id" if both else None

    def add(self, job: Job | BadJob) -> None:
        self._lines |= dict.fromkeys((job.id, *job.files), job.line)
        self._folders |= set(_folders(job))


def _folders(job):
    parts = job.id.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def check_id(value: Any) -> str:
    """A job's id. Raises ValueError for a value that cannot name files inside the folder of results."""
    if not isinstance(value, str) or len(value) > MAX_ID or not SAFE_ID.fullmatch(value):
        raise ValueError(
            f"id is {as_json(value)}, expected a file name without an ending, of letters, digits, . _ - and beginning "
            f"with a letter or digit, or several with / between, as folders; at most {MAX_ID} characters"
        )
    if value.split("/")[0].lower() == RESULTS:
        raise ValueError(f"id is {as_json(value)}, but {RESULTS} is the file of all results; give it another")
    return value


def _read_line(content, line, folder, model):
    name = f"{line:06d}"
    try:
        try:
            fields = json.loads(content.decode(), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from None
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8") from None
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
        given = fields.pop("id", None)
        if given is not None:
            name = check_id(given)
        return make_job(fields, folder, id=name, line=line, model=model)
    except ValueError as error:
        return BadJob(name, line, first_line(error))


def _refuse_constant(name):
    raise ValueError(f"has {name}, which is no JSON number")


def make_job(
    fields: dict,
    folder: Path,
    *,
    id: str = "",
    line: int = 0,
    model: str = "",
    named: Callable[[str], str] = str,
    inspect: Callable[[Path], tuple[str, tuple[int, int]]] | None = None,
) -> Job:
    """A job from its keys and values.

    Args:
      fields: as in a line of a jobs file; what is None counts as not given.
      folder: what image paths are relative to.
      id, line, model: see `Job` and `read_jobs`.
      named: how messages call a key.
      inspect: gives (hash, (width, height)) of an image; None reads the file's header.

    Raises ValueError for keys and values that the task does not take, a missing text, and images that do not fit.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    task = task_name(fields.pop("task", None))
    if task not in TASKS:
        found = "not given" if task is None else f"is {as_json(task)}"
        raise ValueError(f"{named('task')} {found}, expected one of {', '.join(TASKS)}")
    reads, options = INPUTS[task], options_of(task)
    text = _take_text(fields, task, reads, named)
    paths = _take_images(fields, task, reads, named)
    fields = by_name(fields)
    for key in fields:
        if key not in options:
            known = [*reads.texts, *(("image", "images") if reads.images[1] else ()), *options]
            takes = ", ".join(dict.fromkeys(map(named, known)))
            raise ValueError(f"{task} takes no {named(key)[:60]}; it takes {takes}")
    values = {key: options[key].check(named(key), value, as_json) for key, value in fields.items()}
    if task == "perception" and "kind" not in values:
        raise ValueError(f"{named('kind')} is not given, expected {options['kind'].expected}")
    seed, count = values.get("seed", 0), values.get("images_per_prompt", 1)
    if seed + count > SEEDS:
        raise ValueError(f"{named('seed')} is {seed}, too large for {count} images: the last seed is {SEEDS - 1}")
    paths = tuple(Path(folder) / path for path in paths)
    contents = [(inspect or _inspect_image)(path) for path in paths]
    hashed = {HASHED_NAMES.get(key, key): value for key, value in values.items()}
    depends_on = {"task": HASHED_NAMES.get(task, task), "text": text, "model": model, **hashed}
    depends_on["images"] = [digest for digest, _ in contents]
    return Job(
        id=id,
        line=line,
        task=task,
        text=text,
        images=paths,
        sizes=tuple(size for _, size in contents),
        seed=seed,
        images_per_prompt=count,
        negative_prompt=values.get("negative_prompt", ""),
        options={key: value for key, value in values.items() if key not in BY_SAMPLE},
        hash=hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16],
    )


def _take_text(fields, task, reads, named):
    given = {key: fields.pop(key) for key in reads.texts if key in fields}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(map(named, given))} are both given; {task} takes one text")
    for key, text in given.items():
        if not is_text(text) or not text.strip():
            raise ValueError(f"{named(key)} is {as_json(text)}, expected a text that is not empty")
        return text
    if reads.texts and reads.needs_text:
        raise ValueError(f"{named(reads.texts[0])} is not given; {task} needs one")
    return None


def _take_images(fields, task, reads, named):
    low, high = reads.images
    if not high:
        return []
    if "image" in fields and "images" in fields:
        raise ValueError("image and images are both given, expected one of them")
    paths = [fields.pop("image")] if "image" in fields else fields.pop("images", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{named('image')} is {as_json(paths)}, expected paths of image files")
    if not low <= len(paths) <= high:
        wanted = f"{low} to {high} images" if low < high else "1 image"
        raise ValueError(f"{task} needs {wanted} ({named('image')}), {len(paths)} given")
    return paths


def _inspect_image(path) -> tuple[str, tuple[int, int]]:
    """(hash of the file, (width, height) of the image as it is seen), from its header alone."""
    try:
        content = images.read_bytes(path)
    except OSError as error:
        raise ValueError(f"image {error}") from None
    with images.open_image(content, f"image {path}") as image:
        width, height = image.size
        try:
            turned = "exif" in image.info and image.getexif().get(0x0112) in TURNED
        except Exception as error:  # PIL's readers raise many kinds on damaged bytes
            raise ValueError(f"image {path} cannot be decoded: {first_line(error)}") from None
    return hashlib.sha256(content).hexdigest(), (height, width) if turned else (width, height)
