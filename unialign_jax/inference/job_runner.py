"""Jobs through a pipeline, in full batches, into a folder.

The folder gets ID.png (ID_0.png, ID_1.png, ... for several images; an id may name folders) and results.jsonl: a line
for each job, written as soon as the job is done. A job whose line is there with the same hash is not done again.
Results of other jobs are not replaced unless that is asked for.
"""

import collections
import contextlib
import dataclasses
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unialign_jax.data import images as image_files
from unialign_jax.files import check_regular, check_writable, first_line, replacing_file
from unialign_jax.inference import inputs
from unialign_jax.inference.jobs import RESULTS, BadJob, Job
from unialign_jax.inference.options import OPTIONS, TEXT_TASKS

log = logging.getLogger(__name__)

# Errors of a sample that cannot be made: bad input, or not enough memory (a RuntimeError of JAX).
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


class Sample(NamedTuple):
    """Image or text number `index` of a job."""

    job: Job
    index: int

    @property
    def seed(self) -> int:
        return self.job.seed + self.index


def batches(jobs: Sequence[Job], batch: int, pipeline: Any) -> list[list[Sample]]:
    """All samples of the jobs, those of one shape together, in batches of at most `batch`, in order of appearance."""
    samples = [Sample(job, index) for job in jobs for index in range(job.images_per_prompt)]
    keys = [shape_of(sample.job, pipeline) for sample in samples]
    return [[samples[i] for i in members] for members in inputs.batches(keys, batch)]


def shape_of(job: Job, pipeline: Any) -> tuple:
    """What jobs must share to be done in one call of the pipeline, and in one forward."""
    shape = [job.task, json.dumps(job.options, sort_keys=True)]
    if job.task == "perception":
        shape.append(job.text)  # one call has one instruction
    if job.task == "personalization":
        shape.append(max(len(job.images), job.options.get("slots", OPTIONS["slots"].default)))
    if job.task in ("edit", "perception") and not ("height" in job.options or "width" in job.options):
        width, height = job.sizes[0]
        shape.append(pipeline.sizes.of_edit(height, width, pipeline.edit_limit)[0])
    return tuple(shape)


def call(pipeline: Any, samples: Sequence[Sample], images: Sequence, callback: Callable | None = None) -> list:
    """The samples, which share a shape, and a list of PIL images for each -> their images or texts, in one call.

    `callback` is that of `Pipeline.generate`, or of `Pipeline.caption` for texts.
    """
    first = samples[0].job
    options = dict(first.options, seed=[sample.seed for sample in samples])
    if callback is not None:
        options["callback"] = callback
    texts = [sample.job.text for sample in samples]
    if first.task == "caption":
        return pipeline.caption([image for (image,) in images], **options)
    if first.task == "vqa":
        return pipeline.answer([image for (image,) in images], texts, **options)
    options["negative_prompt"] = [sample.job.negative_prompt for sample in samples]
    if first.task == "text_to_image":
        return pipeline.generate(texts, **options)
    if first.task == "personalization":
        return pipeline.personalize(texts, images, **options)
    if first.task == "edit":
        return pipeline.edit(texts, [image for (image,) in images], **options)
    return pipeline.perceive(options.pop("kind"), [image for (image,) in images], instruction=first.text, **options)


def load_images(samples: Sequence[Sample]) -> list:
    """A list of upright RGB images for each sample, or the error that its files gave."""

    def load(path):
        try:
            return inputs.open_image(path, "image")
        except ValueError as error:
            return error

    opened = {path: load(path) for path in dict.fromkeys(path for sample in samples for path in sample.job.images)}
    lists = [[opened[path] for path in sample.job.images] for sample in samples]
    return [next((image for image in images if isinstance(image, Exception)), images) for images in lists]


def attempt(pipeline: Any, samples: Sequence[Sample], images: Sequence, callback: Callable | None = None) -> list:
    """An image, a text or an error for each sample: where a batch fails, its samples are done one by one.

    `callback` hears of the batch, not of samples that are done one by one.
    """
    outcomes = dict(zip(samples, images, strict=True))  # errors of loading stay
    whole = [sample for sample in samples if not isinstance(outcomes[sample], Exception)]
    try:
        made = call(pipeline, whole, [outcomes[sample] for sample in whole], callback) if whole else []
    except FAILURES as error:
        if len(whole) > 1:
            log.warning("a batch of %d failed and is done one by one (%s)", len(whole), first_line(error))
            made = [attempt(pipeline, [sample], [outcomes[sample]])[0] for sample in whole]
        else:
            made = [error]
    outcomes.update(zip(whole, made, strict=True))
    return [outcomes[sample] for sample in samples]


def make(job: Job, pipeline: Any, batch: int) -> list:
    """The images or the text of a single job. Raises the pipeline's errors, and ValueError for unreadable images."""
    made = []
    for samples in batches([job], batch, pipeline):
        images = load_images(samples)
        if isinstance(images[0], Exception):
            raise images[0]
        made += call(pipeline, samples, images)
    return made


def run(
    jobs: Sequence[Job], pipelines: Sequence, results: "Results", batch: int, done: Callable[[], None] = lambda: None
) -> None:
    """Does the jobs in full batches, and records each as soon as it is done or has failed.

    The images of the next batch are read, and those of the last are written, while a pipeline works.

    Args:
      jobs: what `Results.begin` returned.
      pipelines: of one model, each on a device of its own: they take the batches in turn. What a job gives depends on
        its batch and its seed, not on the device.

    Raises OSError when a result cannot be written. Whatever stops it, the jobs done by then are recorded.
    """
    with ThreadPoolExecutor(1) as writer:
        work = _Work(batches(jobs, batch, pipelines[0]), results, done, writer)
        if len(pipelines) == 1:
            work.through(pipelines[0])
            return
        with ThreadPoolExecutor(len(pipelines)) as workers:
            running = [workers.submit(work.through, pipeline) for pipeline in pipelines]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                work.stop()  # the others end with the batch that they are at
                raise


class _Work:
    """The batches of a run, which one or several pipelines take, and the jobs that are not whole yet."""

    def __init__(self, todo: list[list[Sample]], results: "Results", done: Callable[[], None], writer):
        self._todo, self._results, self._done, self._writer = collections.deque(todo), results, done, writer
        self._outcomes: dict[str, dict[int, object]] = collections.defaultdict(dict)
        self._seconds = collections.Counter()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """No batch is taken from now on."""
        self._todo.clear()

    def through(self, pipeline) -> None:
        """Does batches until there are none."""
        with ThreadPoolExecutor(1) as reader:
            samples, loading = self._next(reader)
            writing = []
            while samples:
                images = loading.result()
                following, loading = self._next(reader)
                began = time.monotonic()
                made = attempt(pipeline, samples, images)
                share = (time.monotonic() - began) / len(samples)
                for future in writing:  # at most one batch waits to be written; a full disk ends the run here
                    future.result()
                writing = self._collect(samples, made, share)
                samples = following
            for future in writing:
                future.result()

    def _next(self, reader):
        """(the next batch, its images as a future); (None, None) after the last."""
        try:
            samples = self._todo.popleft()
        except IndexError:
            return None, None
        return samples, reader.submit(load_images, samples)

    def _collect(self, samples, made, share) -> list:
        """Keeps what was made, and has the jobs written that are whole now."""
        writing = []
        with self._lock:
            for sample, outcome in zip(samples, made, strict=True):
                job, outcomes = sample.job, self._outcomes[sample.job.id]
                outcomes[sample.index] = outcome
                self._seconds[job.id] += share
                if len(outcomes) == job.images_per_prompt:
                    ordered = [outcomes[index] for index in range(job.images_per_prompt)]
                    del self._outcomes[job.id]
                    writing.append(self._writer.submit(self._record, job, ordered, self._seconds.pop(job.id)))
        return writing

    def _record(self, *finished):
        self._results.record(*finished)
        self._done()


# Results on disk


class Results:
    """A folder of results and its results.jsonl.

    A line has id, task, status ("done" or "failed"), files or text or error, seed, seconds (the job's share of its
    batches' time), line (of the jobs file) and hash.

    Attributes:
      done, failed: numbers of jobs of this run.
      earlier: number of jobs that were done before it.
    """

    def __init__(self, directory: str | Path, stamp: dict | None = None):
        """Makes the folder.

        Args:
          stamp: goes into every image's parameters, such as the model's name.

        Raises OSError when it cannot be written, ValueError when its results.jsonl is something else.
        """
        self.directory = Path(directory)
        self.path = self.directory / RESULTS
        self._stamp = stamp or {}
        self.done = self.failed = self.earlier = 0
        check_writable(self.directory)
        self._lines = {}
        lines = self._read()
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if entry["status"] in ("done", "failed"):
                    self._lines[entry["id"]] = entry
            except (ValueError, TypeError, KeyError, RecursionError):
                if line.strip() and number < len(lines):  # the last one, without its end, was torn by a kill
                    raise ValueError(
                        f"{self.path}:{number} is no line of results; choose another --output, or move the file away"
                    ) from None

    def _read(self) -> list[bytes]:
        if not self.path.exists():
            return []
        check_regular(self.path)
        try:
            return self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise OSError(f"{self.path} cannot be read: {error.strerror}") from None

    def begin(self, jobs: Sequence[Job | BadJob], *, overwrite: bool = False) -> list[Job]:
        """Opens results.jsonl for this run: keeps lines of jobs that are done, records bad jobs, returns the rest.

        Lines of ids that are not among `jobs` stay. Raises FileExistsError, and changes nothing, where results of other
        jobs, or of these before they were changed, would be replaced without `overwrite`.
        """
        jobs = [self._placed(job) for job in jobs]
        todo = [job for job in jobs if isinstance(job, BadJob) or not self._is_done(job)]
        able = [job for job in todo if isinstance(job, Job)]
        lost = [name for job in able for name in self._would_replace(job)]
        if lost and not overwrite:
            raise FileExistsError(
                f"{self.directory} holds {len(lost)} results that other jobs made, or these before they (or the model) "
                f"were changed, the first {lost[0]}; choose another --output, or replace them by --overwrite"
            )
        self.earlier = len(jobs) - len(todo)
        # A line that has become bad does not replace the results that its id has.
        bad = [
            dataclasses.replace(job, id=f"line {job.line}") if self._was_done(job) else job
            for job in todo
            if isinstance(job, BadJob)
        ]
        for job in (*able, *bad):
            self._lines.pop(job.id, None)
        with _writing(self.path), replacing_file(self.path) as partial:
            partial.write_bytes(b"".join(map(_encode, self._lines.values())))
        for job in bad:
            self._fail(job, job.error, {"id": job.id})
        return able

    def _placed(self, job):
        """The job, or a `BadJob` when its folder would lie outside the folder of results."""
        folder = (self.directory / job.id).parent if isinstance(job, Job) else self.directory
        if not folder.resolve().is_relative_to(self.directory.resolve()):
            return BadJob(job.id, job.line, f"id is {job.id!r}, but {folder} is a link that leads out of the output")
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            return BadJob(job.id, job.line, f"id is {job.id!r}, but {existing} is a file")
        return job

    def _was_done(self, job):
        return self._lines.get(job.id, {}).get("status") == "done"

    def _is_done(self, job):
        is_same = self._was_done(job) and self._lines[job.id].get("hash") == job.hash
        return is_same and all((self.directory / name).is_file() for name in job.files)

    def _would_replace(self, job) -> list[str]:
        """Existing files of this job's names, or its text, that are no results of it."""
        entry = self._lines.get(job.id, {})
        is_same = entry.get("hash") == job.hash
        if job.task in TEXT_TASKS:
            return [f"the text of {job.id}"] if self._was_done(job) and not is_same else []
        own = entry.get("files") if is_same else ()
        own = own if isinstance(own, list) else ()
        paths = {name: self.directory / name for name in job.files if name not in own}
        # A kill may have come between writing an image and its line.
        return [name for name, path in paths.items() if path.exists() and made_by(path) != job.hash]

    def record(self, job: Job, outcomes: Sequence, seconds: float) -> None:
        """Writes the outcome of a job: an image, a text or an error for each of its samples."""
        entry = {"id": job.id, "task": job.task, "seed": job.seed, "seconds": round(seconds, 3), "hash": job.hash}
        error = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
        if error is not None:
            self._fail(job, first_line(error), entry)
            return
        if job.files:
            for number, (name, image) in enumerate(zip(job.files, outcomes, strict=True)):
                parameters = describe(image, Sample(job, number), self._stamp) | {"job_hash": job.hash}
                save_png(image, self.directory / name, parameters)
            made = {"files": job.files}
        else:
            made = {"text": outcomes[0]}
        self._append(job, {"id": job.id, "status": "done", **made, **entry})
        self.done += 1

    def _fail(self, job, error, entry):
        error = error.encode(errors="backslashreplace").decode()  # a bad line may hold halves of characters
        log.warning("line %d, job %s: %s", job.line, job.id, error)
        self._append(job, {"id": job.id, "status": "failed", "error": error, **entry})
        self.failed += 1

    def _append(self, job, entry):
        with _writing(self.path), open(self.path, "ab") as file:
            file.write(_encode(entry | {"line": job.line}))


def made_by(path: Path) -> str | None:
    """The hash of the job that made a picture; None for every other file."""
    try:
        with image_files.open_image(image_files.read_bytes(path), str(path)) as image:
            return json.loads(image.info["parameters"])["job_hash"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _encode(entry) -> bytes:
    # A lone surrogate, which a bad line may hold, becomes its JSON escape.
    return json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def describe(image: Image.Image, sample: Sample, stamp: dict) -> dict:
    """The parameters that made an image: those that the pipeline gives, the job's id if it has one, and the stamp."""
    made = json.loads(image.info.get("parameters", "{}"))
    return made | ({"id": sample.job.id} if sample.job.id else {}) | stamp


def png_bytes(image: Image.Image, parameters: dict) -> bytes:
    """An image as PNG, with its parameters as a text chunk."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("parameters", json.dumps(parameters))
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, parameters: dict) -> None:
    """Writes a PNG with its parameters as a text chunk, and makes its folder; the file appears when it is whole.

    Raises OSError in one line.
    """
    content = png_bytes(image, parameters)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as partial:
            partial.write_bytes(content)


def save_text(text: str, path: Path) -> None:
    """Writes a text file, which appears when it is whole. Raises OSError in one line."""
    with _writing(path), replacing_file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError into one line that names the path as it was given, not a scratch file beside it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error).removeprefix(f"cannot write {path.absolute()}: ")
        raise OSError(f"cannot write {path}: {reason}") from None
