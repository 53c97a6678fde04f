"""A preparation from its sources to its folder, by processes of this machine or by a pipeline of Apache Beam."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unialign_jax.data import records as records_lib
from unialign_jax.data.buckets import bucket_name, bucket_sizes
from unialign_jax.data.preparation import packing, report
from unialign_jax.data.preparation.pieces import Counts, Job, make_piece, read_counts, text_lengths
from unialign_jax.data.sources import list_parts, locations
from unialign_jax.data.sources.parts import Part
from unialign_jax.data.text_lengths import TextLengths
from unialign_jax.files import first_line, refuse_existing

_FOLDERS = ("pieces", "names", "shards")  # of the unfinished work
LOOKED_AT = 10_000  # rows after which a run of too many bad ones stops


@dataclass(frozen=True)
class Plan:
    """A preparation.

    Attributes:
      job: what workers need to know; its `work` is set by `prepare`.
      paths: the files or folders to read.
      output: the folder, or URL, to write.
      holdout: the share of records that goes into a folder of its own, `OUTPUT-holdout`.
      near_duplicates: bits that the hashes of two pictures may differ in to count as one; None keeps all.
      buckets: side of the square whose pixels each aspect bucket has about; the output then holds a data folder for
        each bucket. None for no buckets.
      max_bad_fraction: the largest share of bad rows that is still a success.
      shard_bytes: about how many bytes of records go into one file.
      overwrite: replace an existing data folder, and drop the unfinished work of another command.
    """

    job: Job
    paths: list[str]
    output: str
    holdout: float = 0.0
    near_duplicates: int | None = None
    buckets: int | None = None
    max_bad_fraction: float = 0.1
    shard_bytes: int = 256 << 20
    overwrite: bool = False


@dataclass
class Result:
    """What was written: the folders with their number of records, the counts, and the texts' lengths."""

    folders: dict[str, int]
    counts: Counts
    lengths: TextLengths
    resumed: int  # pieces that were there


def holdout_folder(output: str) -> str:
    return output.rstrip("/") + "-holdout"


def work_folder(output: str) -> str:
    path = output.rstrip("/") if locations.is_url(output) else os.path.abspath(output)
    return locations.join(locations.parent(path), f".{locations.name_of(path)}.preparing")


def prepare(
    plan: Plan,
    *,
    processes: int = 1,
    beam_options: list[str] | None = None,
    progress: Callable[[Counts], None] = lambda counts: None,
) -> Result:
    """Writes the data folder of a plan, or resumes the unfinished work of an earlier run of the same plan.

    Args:
      processes: of this machine; 1 does all in this one.
      beam_options: Apache Beam's own command line, `--runner=...` first; None for processes of this machine.
      progress: called with the counts so far, after each piece.

    Raises:
      FileExistsError: the output may not be replaced, or unfinished work of another command is beside it.
      ValueError: too many bad rows, or none; nothing is left behind then.
      OSError: something cannot be reached or written. The same command then resumes.
    """
    sizes = bucket_sizes(plan.buckets) if plan.buckets else []
    outputs = {}  # (split, bucket) -> folder
    for split, output in zip(packing.SPLITS, [plan.output, holdout_folder(plan.output)], strict=True):
        if split == "train" or plan.holdout:
            names = [bucket_name(size) for size in sizes]
            outputs |= {(split, name): locations.join(output, name) for name in names} or {(split, ""): output}
    work = work_folder(plan.output)
    job = dataclasses.replace(plan.job, work=work)
    own = {split: _is_ours(plan, split, output) for split, output in outputs.items()}
    for split, output in outputs.items():
        _refuse_output(output, plan.overwrite or own[split])
    if sizes and not locations.is_url(plan.output) and records_lib.is_data_folder(plan.output):
        raise FileExistsError(f"{plan.output} is a data folder without buckets; choose another --output")
    with _claimed(work, plan.output):
        try:
            _begin(plan, work)
            run = (
                _run_local(job, plan, processes, progress)
                if beam_options is None
                else _run_beam(job, plan, beam_options)
            )
            names, resumed, pack = run
            counts, lengths = Counts(), text_lengths(job)
            for name in names:
                found = read_counts(work, name)
                counts.add(found)
                lengths.merge(found.texts)
            _check_counts(counts, plan)
            choice = packing.choose(job, names, holdout=plan.holdout, near=plan.near_duplicates)
            shards = list(packing.plan_shards(job, names, choice, plan.shard_bytes, sizes))
            pack(shards)
        except BaseException as error:
            started = any(name.endswith(".json") for name in locations.listing(locations.join(work, "pieces")))
            if isinstance(error, TooManyBadRows) or not started:
                locations.remove_folder(work)
            raise
        for number, what in (
            (choice.duplicates, "record(s) with the key of an earlier one dropped"),
            (choice.near_duplicates, "record(s) with almost the picture of an earlier one dropped"),
        ):
            counts.notes.update({what: number} if number else {})
        splits = {split: [shard for shard in shards if (shard.split, shard.bucket) == split] for split in outputs}
        folders = {outputs[split]: sum(shard.num_records for shard in mine) for split, mine in splits.items() if mine}
        content = report.make(job, names, counts, choice, lengths, _describe(plan), folders)
        pages = {"report.json": json.dumps(content, indent=1) + "\n", "report.html": report.as_html(content)}
        for split in reversed(outputs):  # what is held out first, so that the main folder says that all is there
            if splits[split]:
                parameters = _describe(plan, split)
                if job.source.caption_optional:
                    parameters["without_caption"] = packing.count_without_caption(job, splits[split])
                packing.publish(
                    job,
                    outputs[split],
                    splits[split],
                    parameters=parameters,
                    overwrite=plan.overwrite or own[split],
                    extra=pages if split == ("train", "") else {},
                )
            elif plan.overwrite and split[1]:  # a bucket without records now
                locations.remove_folder(outputs[split])
        for name, text in pages.items() if sizes else ():
            with locations.writing(locations.join(plan.output, name)) as scratch:
                Path(scratch).write_text(text, encoding="utf-8")
        locations.remove_folder(work)
    return Result(folders, counts, lengths, resumed)


def _is_ours(plan: Plan, split: tuple[str, str], output: str) -> bool:
    """Whether an earlier run of this plan wrote the folder and was then killed."""
    if locations.is_url(output) or not os.path.isdir(work_folder(plan.output)):
        return False
    try:
        found = records_lib.read_metadata(output).parameters
        return {key: value for key, value in found.items() if key != "without_caption"} == _describe(plan, split)
    except (OSError, ValueError):
        return False


def _refuse_output(output: str, overwrite: bool) -> None:
    if not locations.is_url(output):
        refuse_existing(output, overwrite=overwrite, foreign=records_lib.foreign_names)
        return
    names = locations.listing(output)
    if names and not overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or give --overwrite")


@contextlib.contextmanager
def _claimed(work: str, output: str) -> Iterator[None]:
    """Makes the folder of the unfinished work, which one process of this machine may use at a time."""
    try:
        _make_folders(work)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or first_line(error)}") from None
    if locations.is_url(work):
        yield
        return
    with open(os.path.join(work, ".claim"), "w") as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process prepares the same output (it holds {work})") from None
        yield


def _make_folders(work: str) -> None:
    for inner in _FOLDERS:
        locations.make_folder(locations.join(work, inner))


def _describe(plan: Plan, part: tuple[str, str] | None = None) -> dict:
    """What decides which records are written, as JSON; of one folder, with its split and bucket."""
    job = dataclasses.asdict(plan.job)
    del job["work"], job["threads"]
    values = job | {"rows": job["source"]}
    values["source"] = [locations.shown(path) for path in plan.paths]
    values |= {"holdout": plan.holdout, "near_duplicates": plan.near_duplicates, "buckets": plan.buckets}
    if part:
        values |= {"split": part[0]} | ({"bucket": part[1]} if part[1] else {})
    return json.loads(json.dumps(values))


def _begin(plan: Plan, work: str) -> None:
    """Writes down whose work it is; drops the work of another command, if that is allowed."""
    sizes = [os.path.getsize(path) for path in plan.paths if os.path.isfile(path)]
    described = _describe(plan) | {"shard_bytes": plan.shard_bytes, "source_bytes": sizes}
    found = packing.read_manifest(work)
    if found and found != described:
        if not plan.overwrite:
            differs = [key for key in described if found.get(key) != described[key]]
            raise FileExistsError(
                f"{work} holds the unfinished work of another command (another {', '.join(differs)}): the same command "
                "resumes it; --overwrite, or removing that folder, drops it"
            )
        for inner in _FOLDERS:
            locations.remove_folder(locations.join(work, inner))
        _make_folders(work)
    with locations.writing(locations.join(work, "job.json")) as scratch, open(scratch, "w") as file:
        json.dump(described, file)


def named_parts(plan: Plan) -> Iterator[tuple[str, Part]]:
    """The parts of all sources in order, each with the name of its piece. The names sort in the order of the parts."""
    parts = list_parts(plan.job.format, plan.paths, plan.job.source)
    for number, part in enumerate(parts):
        yield f"{number:08d}-{part.fingerprint()}", part


def _check_counts(counts: Counts, plan: Plan, at_end: bool = True) -> None:
    """Raises ValueError for no rows, and for too many bad ones."""
    if counts.num_rows == 0:
        if at_end:
            raise ValueError(f"no rows in {', '.join(map(locations.shown, plan.paths[:3]))}")
        return
    if counts.num_bad > plan.max_bad_fraction * counts.num_rows or (at_end and not counts.num_records):
        bad = f"{counts.num_bad} of {counts.num_rows} rows are bad, more than the share of {plan.max_bad_fraction:g} "
        first = f"; first: {counts.first_bad[0]}" if counts.first_bad else ""
        raise TooManyBadRows(f"{bad}that is allowed{first}", counts)


class TooManyBadRows(ValueError):
    """`counts` says what was bad."""

    def __init__(self, message: str, counts: Counts):
        super().__init__(message)
        self.counts = counts


# --- this machine ----------------------------------------------------------------------------------------------------


def _run_local(job: Job, plan: Plan, processes: int, progress):
    names, total = [], Counts()
    listed = locations.listing(locations.join(job.work, "pieces"))
    there = {name.removesuffix(".json") for name in listed if name.endswith(".json")}

    def make_calls():
        for name, part in named_parts(plan):
            names.append(name)
            yield job, name, part

    calls = make_calls()
    first = list(itertools.islice(calls, 2))  # a source of one part is not worth a process
    with _pool(processes if len(first) > 1 else 1) as pool:
        for counts in _map(pool, processes, make_piece, itertools.chain(first, calls)):
            total.add(counts)
            progress(total)
            if total.num_rows >= LOOKED_AT:
                _check_counts(total, plan, at_end=False)

    def pack(shards: list[packing.Shard]) -> None:
        with _pool(processes if len(shards) > 1 else 1) as pool:
            for _ in _map(pool, processes, packing.pack_shard, ((job, shard) for shard in shards)):
                pass

    return names, len(there & set(names)), pack


def _map(pool, processes: int, function: Callable, calls: Iterable[tuple]) -> Iterator:
    """The results of calls as they come, of which a few more are under way than there are processes."""
    if pool is None:
        yield from itertools.starmap(function, calls)
        return
    waiting = set()
    try:
        for call in calls:
            waiting.add(pool.submit(function, *call))
            if len(waiting) >= 3 * processes:
                done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError(
            "a process of the preparation was killed, perhaps for its memory: the same command resumes, "
            "with fewer --processes if need be"
        ) from None


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[concurrent.futures.ProcessPoolExecutor | None]:
    """Processes that end when the block does, whatever waits for them then; None for a single one."""
    if processes == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_watch_parent)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _watch_parent() -> None:
    """A worker ends with its parent, even when that is killed; an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- Apache Beam -----------------------------------------------------------------------------------------------------


def _run_beam(job: Job, plan: Plan, options: list[str]):
    from unialign_jax.data.preparation import beam

    locations.remove_folder(locations.join(job.work, "names"))
    locations.make_folder(locations.join(job.work, "names"))
    names = beam.make_pieces(job, plan.paths, options)
    return names, 0, lambda shards: beam.pack_shards(job, shards, options)
