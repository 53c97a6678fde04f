"""Jobs: what one asks of a model, checked before the model is opened; this module does not import JAX.

A jobs file holds one JSON object a line. `TASKS` and `OPTIONS` say which keys a job may have, and which options
launch/generate.py has. Image paths are relative to the file.

    {"id": "cat", "task": "t2i", "prompt": "a cat on a mat", "seed": 7, "steps": 28}
    {"task": "vqa", "image": "photos/1.jpg", "question": "What is on the mat?"}
"""

import collections
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from unialign_jax.data import images
from unialign_jax.files import check_regular, first_line

RESULTS = "results.jsonl"  # in the folder of results: no job may be called so
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99}){0,7}")
MAX_ID = 200  # characters
MAX_FILE = 2**30  # bytes of a jobs file
MAX_CHARACTERS = 2**20  # of a text
SEEDS = 2**32
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task reads: `texts` are the keys its text may have, the proper one first; `images`, the least and most."""

    texts: tuple[str, ...]
    images: tuple[int, int]
    needs_text: bool = True


TASKS = {
    "t2i": Task(("prompt",), (0, 0)),
    "edit": Task(("instruction", "prompt"), (1, 1)),
    "perceive": Task(("instruction", "prompt"), (1, 1), needs_text=False),
    "personalize": Task(("prompt", "instruction"), (1, 4)),
    "caption": Task((), (1, 1)),
    "vqa": Task(("question", "prompt"), (1, 1)),
}
IMAGE_TASKS = ("t2i", "edit", "perceive", "personalize")
CONDITION_TASKS = ("edit", "perceive", "personalize")
TEXT_TASKS = ("caption", "vqa")


@dataclasses.dataclass(frozen=True)
class Option:
    """A key that jobs of some tasks may have.

    Attributes:
      kind: "whole", "number", "text", "choice" or "interval" (two numbers from 0 to 1).
      tasks: the tasks it belongs to.
      help: for people.
      low, high: the range of a number.
      choices: of a "choice".
    """

    kind: str
    tasks: tuple[str, ...]
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, name, value):
        """The value, numbers as floats, if it is one; or else ValueError says what `name` was expected to be."""
        if self.kind == "whole":
            fits = isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high
            expected = f"a whole number from {self.low} to {self.high}"
            if self.high == math.inf:
                expected = f"a whole number of at least {self.low}"
        elif self.kind == "number":
            fits = _is_number(value) and self.low <= value <= self.high
            expected = f"a number from {self.low} to {self.high}" if self.high < math.inf else f"at least {self.low}"
        elif self.kind == "interval":
            fits = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
            fits = fits and 0 <= value[0] <= value[1] <= 1
            expected = "two numbers, 0 <= low <= high <= 1"
        elif self.kind == "choice":
            fits, expected = value in self.choices, f"one of {', '.join(self.choices)}"
        else:
            fits, expected = _is_text(value), f"a text of at most {MAX_CHARACTERS} characters"
        if not fits:
            raise ValueError(f"{name} is {shown(value)}, expected {expected}")
        if self.kind == "number":
            return float(value)
        return [float(number) for number in value] if self.kind == "interval" else value

    def parse(self, text: str):
        """A command line's text as the value that a jobs file would have; what cannot be one is left to `check`."""
        try:
            if self.kind == "whole":
                return int(text)
            if self.kind == "number":
                return float(text)
            if self.kind == "interval":
                return [float(part) for part in text.split(",")]
        except ValueError:
            pass
        return text


# The ranges and choices are the pipeline's own (a test compares them), known here before it is opened. Sizes depend on
# the model: see `check_size`.
OPTIONS = {
    "seed": Option("whole", tuple(TASKS), "of the random numbers; image i of a count has seed + i (0)", 0, SEEDS - 1),
    "count": Option("whole", IMAGE_TASKS, "images of this job (1)", 1, 256),
    "negative_prompt": Option("text", IMAGE_TASKS, "what guidance leads away from"),
    "height": Option("whole", IMAGE_TASKS, "in pixels, a multiple of 16 (the model's; of an edit, its image's)", 1),
    "width": Option("whole", IMAGE_TASKS, "likewise", 1),
    "steps": Option("whole", tuple(TASKS), "of the sampler (the bundle's, or 28; with images 50; texts 32)", 1, 1000),
    "guidance_scale": Option(
        "number", IMAGE_TASKS, "of the text; 1 is without, at half the work (the bundle's, or 7)", 0, 100
    ),
    "guidance_interval": Option("interval", IMAGE_TASKS, "noise levels at which guidance acts (0,1)"),
    "guidance_rescale": Option("number", IMAGE_TASKS, "takes back contrast that guidance adds (0)", 0, 1),
    "image_guidance_scale": Option(
        "number", CONDITION_TASKS, "of the images, apart from the text's (text guidance alone)", 0, 100
    ),
    "solver": Option("choice", IMAGE_TASKS, "of the flow (euler)", choices=("euler", "heun", "dpmpp_2m", "unipc")),
    "shift": Option("number", IMAGE_TASKS, "of the noise levels (the bundle's, or 3)", 0.01, 100),
    "kind": Option("choice", ("perceive",), "the map to make", choices=("canny", "depth", "pose")),
    "slots": Option("whole", ("personalize",), "fewer references than this are repeated in turn (3)", 1, 4),
    "prefix": Option("text", ("caption",), "what the caption begins with (nothing)"),
    "max_tokens": Option("whole", TEXT_TASKS, "most tokens of the text (the model's text length)", 1, 4096),
    "decoding": Option(
        "choice",
        TEXT_TASKS,
        "in which order tokens are decided (the bundle's, or captions ancestral, answers top_k)",
        choices=("ancestral", "confidence", "entropy", "top_k"),
    ),
    "temperature": Option(
        "number",
        TEXT_TASKS,
        "of the token distributions; 0 takes the most likely (the bundle's, or captions 1, answers 0)",
        0,
        100,
    ),
    "threshold": Option("number", TEXT_TASKS, "of the decoding confidence (0.9)", 0, 1),
    "entropy_bound": Option("number", TEXT_TASKS, "of the decoding entropy (0.1)", 0),
    "text_length": Option("whole", TEXT_TASKS, "tokens of the text stream (the model's)", 8, 4096),
}
BY_SAMPLE = ("seed", "count", "negative_prompt")  # may differ within a batch; the others are the batch's


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request that passed its checks.

    Attributes:
      id: names its files; `line`: of the jobs file, counted from 1.
      task, text: of TASKS; the prompt, instruction or question, None without.
      images, sizes: paths, and the (width, height) of each as it is seen.
      seed, count, negative_prompt: as in OPTIONS.
      options: the others that were given; the pipeline knows their defaults.
      hash: of all that the result depends on, the images' content included.
    """

    id: str
    line: int
    task: str
    text: str | None
    images: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    seed: int
    count: int
    negative_prompt: str
    options: dict
    hash: str

    @property
    def files(self) -> list[str]:
        """The names of its images; none for a text."""
        if self.task in TEXT_TASKS:
            return []
        return [f"{self.id}.png"] if self.count == 1 else [f"{self.id}_{i}.png" for i in range(self.count)]


@dataclasses.dataclass(frozen=True)
class BadJob:
    """A line of a jobs file that is no job, and why."""

    id: str
    line: int
    error: str


def read_jobs(path, model: str = "") -> list[Job | BadJob]:
    """The jobs of a file, in its order; a line that is no job becomes a `BadJob`, blank lines are left out.

    A job that would write what one before it writes is bad too. Its id is then its line ("line 7"), as no job's can be.

    Args: `model` identifies the model, for the jobs' hashes.
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
    """Which ids, files and folders the jobs so far have."""

    def __init__(self):
        self._lines = {}  # id or file -> the line that has it first
        self._folders = set()

    def problem(self, job: Job | BadJob) -> str | None:
        """Why a job cannot be beside those so far; None when it can."""
        for name in (job.id, *_files(job)):
            if name in self._lines:
                what = f"the id {name!r}" if name == job.id else f"the file {name}"
                return f"line {self._lines[name]} has {what} already; give this one another id"
        both = [name for name in _files(job) if name in self._folders]
        both += [name for name in _folders(job) if name in self._lines and name.endswith(".png")]
        return f"{both[0]} would be a file and a folder; give this one another id" if both else None

    def add(self, job: Job | BadJob) -> None:
        self._lines |= dict.fromkeys((job.id, *_files(job)), job.line)
        self._folders |= set(_folders(job))


def _files(job):
    return job.files if isinstance(job, Job) else []


def _folders(job):
    parts = job.id.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def check_id(value) -> str:
    """A job's id. Raises ValueError for what cannot name files inside the folder of results."""
    if not isinstance(value, str) or len(value) > MAX_ID or not SAFE_ID.fullmatch(value):
        raise ValueError(
            f"id is {shown(value)}, expected a file name without an ending, of letters, digits, . _ - and beginning "
            f"with a letter or digit, or several with / between, as folders; at most {MAX_ID} characters"
        )
    if value.split("/")[0].lower() == RESULTS:
        raise ValueError(f"id is {shown(value)}, but {RESULTS} is the file of all results; give it another")
    return value


def _read_line(content, line, folder, model):
    name = f"{line:06d}"
    try:
        try:
            fields = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
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


def _object(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return fields


def _refuse_constant(name):
    raise ValueError(f"has {name}, which is no JSON number")


def make_job(
    fields: dict, folder, *, id: str = "", line: int = 0, model: str = "", named: Callable[[str], str] = str
) -> Job:
    """A job from its keys and values.

    Args:
      fields: as in a line of a jobs file; what is None counts as not given.
      folder: what image paths are relative to.
      id, line, model: see `Job` and `read_jobs`.
      named: how messages call a key.
    Raises ValueError for a key or a value that the task does not take, a missing text, and images that are too few,
    too many or unreadable.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    task = fields.pop("task", None)
    if not isinstance(task, str) or task not in TASKS:
        found = "not given" if task is None else f"is {shown(task)}"
        raise ValueError(f"{named('task')} {found}, expected one of {', '.join(TASKS)}")
    reads = TASKS[task]
    text = _take_text(fields, task, reads, named)
    paths = _take_images(fields, task, reads, named)
    for key in fields:
        if key not in OPTIONS or task not in OPTIONS[key].tasks:
            known = [*reads.texts, *(("image", "images") if reads.images[1] else ())]
            known += [name for name, option in OPTIONS.items() if task in option.tasks]
            takes = ", ".join(dict.fromkeys(map(named, known)))
            raise ValueError(f"{task} takes no {named(key)[:60]}; it takes {takes}")
    values = {key: OPTIONS[key].check(named(key), value) for key, value in fields.items()}
    if task == "perceive" and "kind" not in values:
        raise ValueError(f"{named('kind')} is not given, expected one of {', '.join(OPTIONS['kind'].choices)}")
    seed, count = values.get("seed", 0), values.get("count", 1)
    if seed + count > SEEDS:
        raise ValueError(f"{named('seed')} is {seed}, too large for {count} images: the last seed is {SEEDS - 1}")
    paths = tuple(Path(folder) / path for path in paths)
    contents = [_inspect_image(path) for path in paths]
    depends_on = {"task": task, "text": text, "images": [digest for digest, _ in contents], "model": model, **values}
    return Job(
        id=id,
        line=line,
        task=task,
        text=text,
        images=paths,
        sizes=tuple(size for _, size in contents),
        seed=seed,
        count=count,
        negative_prompt=values.get("negative_prompt", ""),
        options={key: value for key, value in values.items() if key not in BY_SAMPLE},
        hash=hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16],
    )


def _take_text(fields, task, reads, named):
    given = {key: fields.pop(key) for key in reads.texts if key in fields}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(map(named, given))} are both given; {task} takes one text")
    for key, text in given.items():
        if not _is_text(text) or not text.strip():
            raise ValueError(f"{named(key)} is {shown(text)}, expected a text that is not empty")
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
        raise ValueError(f"{named('image')} is {shown(paths)}, expected paths of image files")
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


def check_size(job: Job, pipeline):
    """Raises ValueError for a height or width that this pipeline's model does not make."""
    for name in ("height", "width"):
        if name in job.options:
            pipeline.sizes.check(name, job.options[name])


def shown(value, most: int = 100) -> str:
    """A value of JSON in a message, on one line."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a number of too many digits, or nested too deeply
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(value) -> bool:
    """Whether a tokenizer can read it: JSON and the command line may bring halves of characters (lone surrogates)."""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return False
    return value.encode(errors="ignore").decode() == value
