"""One queue of requests before one or several pipelines, which do them in batches of one shape.

A request is a `Job` with its images. Its samples wait in the queue; whenever a pipeline is free it takes the samples of
one shape that are due, at most `max_batch` of them, whoever asked for them.

Which shape is next: each sample is due at its arrival plus what its task is expected to take, and the shape of the
earliest goes first. So short work passes long work that came a little before it, and whatever has waited longer than
the dearest task takes is passed by nothing.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from unialign_jax.files import first_line
from unialign_jax.inference import job_runner
from unialign_jax.inference.job_runner import Sample
from unialign_jax.inference.jobs import Job
from unialign_jax.inference.streaming import TextStep
from unialign_jax.sampling.programs import seconds_by_part

log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full. `retry_after` is in how many seconds there will probably be room."""

    def __init__(self, waiting: int, retry_after: float, what: str = "samples"):
        super().__init__(f"{waiting:,} {what} are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class TooMuch(ValueError):
    """A request has more than the queue ever has room for. `parameter` is what there is too much of: n or image."""

    def __init__(self, message: str, parameter: str):
        super().__init__(message)
        self.parameter = parameter


class Closing(Exception):
    """The engine takes no more requests, since it ends."""


class TooLate(Exception):
    """A request waited longer than it may."""


@dataclasses.dataclass
class Ticket:
    """A request that was taken.

    Attributes:
      job: what is asked.
      images: its images, upright and RGB.
      future: gets the list of its results: images of PIL, or a text; or the error of its first sample that failed.
      deadline: by `time.monotonic`, when the first of its samples must have begun.
      queued, working: seconds that it waited, and from its first batch's begin to its last one's end.
      batch_sizes: samples of each batch that it was in.
      callback: of `Pipeline.generate`; its samples then share no batch with others.
      hear: of a text, called in the thread of a pipeline with how it begins (`TextStep.texts`) while it is written.
      loras: {name: scale} of the adapters that it is made with.
    """

    job: Job
    images: Sequence[Image.Image]
    deadline: float
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    queued: float | None = None
    working: float = 0.0
    batch_sizes: list[int] = dataclasses.field(default_factory=list)
    callback: Callable | None = None
    hear: Callable[[str], None] | None = None
    loras: Mapping[str, float] = dataclasses.field(default_factory=dict)
    _outcomes: dict = dataclasses.field(default_factory=dict)
    _waiting: int = 0  # its samples in the queue

    def cancel(self) -> None:
        """Nobody waits for it any more: what has not begun leaves the queue and is not done."""
        self.future.cancel()

    @property
    def has_begun(self) -> bool:
        """Whether one of its samples has left the queue."""
        return self._waiting < self.job.images_per_prompt

    @property
    def pixels(self) -> int:
        """Of all its images."""
        return sum(image.width * image.height for image in self.images)


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A sample in the queue."""

    sample: Sample
    ticket: Ticket
    due: float


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What may be expected of a request: samples `before` it, and `seconds` from now until it is done.

    `seconds` is None while no request of its task has been done.
    """

    before: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Counts:
    """What an engine has done so far: numbers of samples, by task where a dict.

    `waiting_pixels` are those of the images of requests that wait.
    """

    waiting: int
    waiting_pixels: int
    working: int
    done: dict[str, int]
    failed: dict[str, int]
    rejected: int
    cancelled: int
    expired: int


class Engine:
    """Does requests through pipelines of one model, one thread each; another thread ends those that wait too long.

    Attributes:
      loras: {name: usual scale} of the adapters that requests may name; all pipelines have loaded them.
    """

    def __init__(
        self,
        pipelines: Sequence,
        *,
        max_waiting: int = 256,
        max_waiting_pixels: int = 256 * 1024**2,
        time_limit: float = 300.0,
        loras: Mapping[str, float] | None = None,
        kept_loras: int = 2,
        observe: Callable[[str, list[float], float, dict[str, float]], None] = lambda task, waits, seconds, parts: None,
    ):
        """Starts the threads.

        Args:
          pipelines: replicas: `Pipeline`s of the same model on different devices.
          max_waiting: samples in the queue at most.
          max_waiting_pixels: of the images of requests in the queue, at most: they lie in memory, 3 bytes each.
          time_limit: seconds after which a request is given up of which no sample has begun.
          kept_loras: of `Pipeline.choose_loras`.
          observe: is told of each batch: its task, the seconds that each sample waited, those that it took, and
            those of its parts (`sampling.programs.seconds_by_part`).
        """
        self.loras, self._kept_loras = dict(loras or {}), kept_loras
        self._pipelines, self._observe = pipelines, observe
        self._max_waiting, self._max_waiting_pixels, self._time_limit = max_waiting, max_waiting_pixels, time_limit
        lock = threading.RLock()
        self._lock = threading.Condition(lock)  # tells pipelines of work
        self._deadlines = threading.Condition(lock)  # tells `_watch` of a deadline before `_alarm`
        self._alarm = math.inf
        self._queues: dict[tuple, collections.deque[_Waiting]] = {}  # by shape; none is empty
        self._waiting = self._waiting_pixels = self._working = 0
        self._rejected = self._cancelled = self._expired = 0
        self._done, self._failed = collections.Counter(), collections.Counter()
        # task -> of a sample, a moving average of batches that neither failed nor compiled
        self._seconds: dict[str, float] = {}
        self._is_closing = self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(pipeline,), name=f"pipeline {number}", daemon=True)
            for number, pipeline in enumerate(pipelines)
        ]
        for thread in self._threads:
            thread.start()
        threading.Thread(target=self._watch, name="deadlines", daemon=True).start()

    @property
    def pipeline(self):
        """The first replica, for what all have alike."""
        return self._pipelines[0]

    def submit(
        self,
        job: Job,
        images: Sequence[Image.Image] = (),
        *,
        time_limit: float | None = None,
        callback: Callable | None = None,
        hear: Callable[[str], None] | None = None,
        loras: Mapping[str, float] | None = None,
    ) -> Ticket:
        """Queues a request.

        Args:
          job: of `jobs.make_job`; its seed is set.
          time_limit: seconds, shorter than the engine's.
          callback: of `Pipeline.generate`, called in the thread of a pipeline.
          hear, loras: see `Ticket`. Samples of one batch have the same adapters, and it makes them faster if several
            requests do.

        Raises Busy when the queue has no room for all of its samples and images, Closing when the engine ends,
        TooMuch when there are more samples or pixels than it ever has room for.
        """
        count, shape = job.images_per_prompt, job_runner.shape_of(job, self.pipeline)
        if count > self._max_waiting:
            raise TooMuch(f"{count} images are asked for at once, expected at most {self._max_waiting}", "n")
        now = time.monotonic()
        deadline = now + min(time_limit or self._time_limit, self._time_limit)
        ticket = Ticket(job, images, deadline, now, callback=callback, hear=hear, loras=dict(loras or {}))
        if ticket.pixels > self._max_waiting_pixels:
            most = f"{self._max_waiting_pixels:,}"
            raise TooMuch(
                f"the images have {ticket.pixels:,} pixels, expected at most {most}: send smaller ones", "image"
            )
        shape += (tuple(sorted(ticket.loras.items())),)
        if callback is not None:
            shape += (id(ticket),)
        with self._lock:
            if self._is_closing:
                raise Closing("the server is shutting down")
            if self._waiting + count > self._max_waiting:
                self._rejected += count
                raise Busy(self._waiting, self._expected_wait())
            if self._waiting_pixels + ticket.pixels > self._max_waiting_pixels:
                self._rejected += count
                raise Busy(self._waiting_pixels, self._expected_wait(), "pixels of images")
            due = now + self._seconds.get(job.task, 1.0)
            queue = self._queues.setdefault(shape, collections.deque())
            queue.extend(_Waiting(Sample(job, index), ticket, due) for index in range(count))
            self._waiting += count
            self._waiting_pixels += ticket.pixels
            ticket._waiting = count
            ticket.future.add_done_callback(lambda _: self._take_out(ticket))
            self._lock.notify()
            if deadline < self._alarm:
                self._deadlines.notify()
        return ticket

    def outlook(self, ticket: Ticket) -> Outlook:
        """What may be expected of a request that is in the queue or in the making."""
        with self._lock:
            each, count = self._seconds.get(ticket.job.task), ticket.job.images_per_prompt
            if ticket.queued is not None:
                spent = time.monotonic() - ticket.arrived - ticket.queued
                return Outlook(0, None if each is None else max(0.0, each * count - spent))
            waiting = [w for queue in self._queues.values() for w in queue if w.ticket is not ticket]
            due = ticket.arrived + self._seconds.get(ticket.job.task, 1.0)
            tasks = collections.Counter(w.sample.job.task for w in waiting if w.due <= due)
            work = sum(count * self._seconds.get(task, 1.0) for task, count in tasks.items()) / len(self._pipelines)
            return Outlook(tasks.total() + self._working, None if each is None else work + each * count)

    def counts(self) -> Counts:
        """What was done until now."""
        with self._lock:
            return Counts(
                self._waiting,
                self._waiting_pixels,
                self._working,
                dict(self._done),
                dict(self._failed),
                self._rejected,
                self._cancelled,
                self._expired,
            )

    def close(self, *, timeout: float | None = None) -> bool:
        """Takes no more requests, does those in the queue, and ends the threads.

        Returns whether all was done within `timeout` seconds; what is left then fails with Closing.
        """
        with self._lock:
            self._is_closing = True
            self._lock.notify_all()
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = {id(w.ticket): w.ticket for queue in self._queues.values() for w in queue}
            for ticket in left.values():
                _fail(ticket, Closing("the server shut down before this was done"))
            self._is_closed = True
            self._deadlines.notify()
        return not left and not any(thread.is_alive() for thread in self._threads)

    def _expected_wait(self) -> float:
        """Seconds in which the queue as it is will probably be done; at least one."""
        tasks = collections.Counter(w.sample.job.task for queue in self._queues.values() for w in queue)
        work = sum(count * self._seconds.get(task, 1.0) for task, count in tasks.items())
        return max(1.0, work / len(self._pipelines))

    def _work(self, pipeline) -> None:
        while batch := self._take(pipeline.max_batch):
            try:
                self._do(pipeline, batch)
            except BaseException as error:  # a thread that ends would leave its clients waiting for ever
                log.exception("a batch of %d was given up", len(batch))
                for waiting in batch:
                    _fail(waiting.ticket, error)
            finally:
                with self._lock:
                    self._working -= len(batch)

    def _take(self, most: int) -> list[_Waiting]:
        """The next batch; waits for one. Empty when the engine ends."""
        with self._lock:
            while True:
                if self._queues:
                    shape = min(self._queues, key=lambda shape: self._queues[shape][0].due)
                    queue = self._queues[shape]
                    batch = [queue.popleft() for _ in range(min(most, len(queue)))]
                    if not queue:
                        del self._queues[shape]
                    for waiting in batch:
                        self._no_longer_waits(waiting.ticket, 1)
                    self._working += len(batch)
                    return batch
                if self._is_closing:
                    return []
                self._lock.wait()

    def _no_longer_waits(self, ticket: Ticket, samples: int) -> None:
        """Counts samples that have left the queue."""
        self._waiting -= samples
        ticket._waiting -= samples
        if not ticket._waiting:
            self._waiting_pixels -= ticket.pixels

    def _take_out(self, ticket: Ticket) -> None:
        """Takes the samples of a request that has ended out of the queue: it was cancelled or has failed."""
        with self._lock:
            count = ticket._waiting
            if not count:
                return
            for shape, queue in list(self._queues.items()):
                kept = collections.deque(waiting for waiting in queue if waiting.ticket is not ticket)
                if kept:
                    self._queues[shape] = kept
                else:
                    del self._queues[shape]
            self._no_longer_waits(ticket, count)
            error = None if ticket.future.cancelled() else ticket.future.exception()
            if isinstance(error, TooLate):
                self._expired += count
            elif error is None:
                self._cancelled += count
            elif not isinstance(error, Closing):
                self._failed[ticket.job.task] += count

    def _watch(self) -> None:
        """Fails requests at their deadlines, whatever the pipelines do, until the engine is closed."""
        with self._lock:
            while not self._is_closed:
                now = time.monotonic()
                waiting = (w.ticket for queue in self._queues.values() for w in queue)
                tickets = {id(ticket): ticket for ticket in waiting if not ticket.has_begun}
                for ticket in tickets.values():
                    if ticket.deadline <= now:
                        limit = ticket.deadline - ticket.arrived
                        _fail(ticket, TooLate(f"it waited for {limit:.0f} s, longer than it may"))
                self._alarm = min((t.deadline for t in tickets.values() if t.deadline > now), default=math.inf)
                self._deadlines.wait(None if self._alarm == math.inf else self._alarm - now)

    def _do(self, pipeline, batch: list[_Waiting]) -> None:
        """Makes a batch and hands out what came of it."""
        began, task = time.monotonic(), batch[0].sample.job.task
        for waiting in batch:
            if waiting.ticket.queued is None:
                waiting.ticket.queued = began - waiting.ticket.arrived
        samples = [waiting.sample for waiting in batch]
        callback = batch[0].ticket.callback
        if any(waiting.ticket.hear for waiting in batch):
            callback = functools.partial(_tell, batch)
        if self.loras:
            pipeline.choose_loras(batch[0].ticket.loras, kept=self._kept_loras)
        images = [list(waiting.ticket.images) for waiting in batch]
        with seconds_by_part() as watch:
            outcomes = job_runner.attempt(pipeline, samples, images, callback)
        seconds = time.monotonic() - began
        failed = sum(isinstance(outcome, Exception) for outcome in outcomes)
        self._observe(task, [began - waiting.ticket.arrived for waiting in batch], seconds, watch.seconds)
        with self._lock:
            if not failed and not watch.has_compiled:
                before = self._seconds.get(task, seconds / len(batch))
                self._seconds[task] = 0.8 * before + 0.2 * seconds / len(batch)
            self._done[task] += len(batch) - failed
            self._failed[task] += failed
        for waiting, outcome in zip(batch, outcomes, strict=True):
            ticket = waiting.ticket
            if isinstance(outcome, Exception):
                log.warning("a request failed: %s", first_line(outcome))
                _fail(ticket, outcome)
                continue
            with self._lock:
                ticket.working = time.monotonic() - ticket.arrived - ticket.queued
                ticket.batch_sizes.append(len(batch))
                ticket._outcomes[waiting.sample.index] = outcome
                is_whole = len(ticket._outcomes) == ticket.job.images_per_prompt
            if is_whole:
                _finish(ticket, [ticket._outcomes[index] for index in range(ticket.job.images_per_prompt)])


def _tell(batch: Sequence[_Waiting], step: TextStep) -> None:
    """Tells those of a batch that want to hear it how their texts begin."""
    for position, text in zip(step.members, step.texts, strict=True):
        ticket = batch[position].ticket
        if ticket.hear and not ticket.future.done():
            ticket.hear(text)


def _finish(ticket: Ticket, results: list) -> None:
    try:
        ticket.future.set_result(results)
    except concurrent.futures.InvalidStateError:
        pass  # cancelled meanwhile


def _fail(ticket: Ticket, error: BaseException) -> None:
    try:
        ticket.future.set_exception(error)
    except concurrent.futures.InvalidStateError:
        pass  # cancelled, or another sample of it failed before
