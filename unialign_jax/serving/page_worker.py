"""Requests of the web page: done through an `Engine`, told of while they last, and their images kept as files."""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.files import first_line
from unialign_jax.serving import snippets
from unialign_jax.serving.engine import Busy, Closing, Engine, Ticket, TooLate
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import Limits, Work, check_size, make_work, stamped_png

log = logging.getLogger(__name__)

KEPT_SECONDS = 24 * 3600  # of files in the page's folder
STATUS_SECONDS = 0.5  # between two lines about a request
PREVIEW_SECONDS = 0.7


@dataclasses.dataclass(frozen=True)
class Moment:
    """How it stands with requests.

    Attributes:
      status: a line for the user.
      tickets: what can be cancelled.
      preview: the image as the network sees it now.
      made: at the end, each request's job with its results; None before, and where they failed.
    """

    status: str
    tickets: list[Ticket] = dataclasses.field(default_factory=list)
    preview: Image.Image | None = None
    made: list[tuple[Work, list]] | None = None


class Worker:
    """Does requests of the page through an engine, and keeps their images in a folder of its own."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        model: str,
        limits: Limits,
        stamp: dict[str, Any],
        metrics: Metrics | None = None,
        needs_key: bool = False,
        log_prompts: bool = False,
    ):
        self.engine, self.limits = engine, limits
        self._metrics = metrics or Metrics(engine)
        self._work_of = functools.partial(make_work, limits=limits, model=model, loras=engine.loras)
        self._folder, self._model, self._stamp = folder, model, stamp
        self._needs_key, self._log_prompts = needs_key, log_prompts
        self._swept = time.monotonic()

    async def do(self, requests: Sequence[tuple[str, dict, list[bytes]]], live: bool = False) -> AsyncIterator[Moment]:
        """Queues requests, (task, fields, images) as `make_work` takes them, and tells of them until all are done.

        Args:
          live: with previews; the image then differs by up to a grey level from that of the API, unless the pipeline is
            reproducible.
        """
        tickets: list[Ticket] = []
        seen = Preview() if live else None
        try:
            works = [await asyncio.to_thread(self._work_of, *request) for request in requests]
            for work in works:
                check_size(work.job, self.engine.pipeline.sizes)
                if self._log_prompts:
                    log.info(json.dumps({"task": work.job.task, "text": work.job.text}))
                tickets.append(self.engine.submit(work.job, work.images, callback=seen, loras=work.loras))
            futures = [asyncio.wrap_future(ticket.future) for ticket in tickets]
            left = set(futures)
            while left:
                yield Moment(self._status(tickets), tickets, seen and seen.image)
                _, left = await asyncio.wait(left, timeout=STATUS_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                if any(ticket.future.cancelled() for ticket in tickets):
                    yield Moment("Cancelled.")
                    return
                for future in futures:
                    if future.done():
                        future.result()  # raises its error
            made = [(work, future.result()) for work, future in zip(works, futures, strict=True)]
            seconds = max((ticket.queued or 0) + ticket.working for ticket in tickets)
            yield Moment(f"Done in {seconds:.1f} s.", made=made)
        except (ValueError, Busy, Closing, TooLate) as error:
            reasons = {Busy: "busy", Closing: "closing", TooLate: "too_late"}
            self._metrics.refused(reasons.get(type(error), "bad_request"))
            yield Moment(f"Not done: {first_line(error)}")
        except Exception as error:
            log.exception("a request of the page failed")
            yield Moment(f"It failed: {first_line(error)}")
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _status(self, tickets: Sequence[Ticket]) -> str:
        """Of the request that will be done last: its place in the queue, or its time."""
        waiting = [ticket for ticket in tickets if not ticket.future.done()] or tickets
        looks = [(ticket, self.engine.outlook(ticket)) for ticket in waiting]
        ticket, look = max(looks, key=lambda pair: (pair[1].before, pair[1].seconds or 0))
        spent = time.monotonic() - ticket.arrived
        if ticket.queued is None:
            expected = "" if look.seconds is None else f", done in about {max(1, round(look.seconds))} s"
            return f"Waiting: {look.before} before it{expected}."
        total = "" if look.seconds is None else f" of about {max(spent, spent + look.seconds):.0f} s"
        return (
            f"Working: {spent:.1f} s{total}." if total else f"Working: {spent:.1f} s; the first of a kind takes longer."
        )

    def keep(self, image: Image.Image, seed: int) -> Path:
        """Writes an image as the API sends it, and returns its file."""
        content = stamped_png(image, self._stamp)
        path = self._folder / hashlib.sha256(content).hexdigest()[:32] / f"unialign_{seed}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        self._sweep()
        return path

    def _sweep(self) -> None:
        """Once an hour, removes files that nobody has touched for a day."""
        now = time.monotonic()
        if now < self._swept + 3600:
            return
        self._swept = now
        for path in self._folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_mtime < time.time() - KEPT_SECONDS:
                    path.unlink()

    def copies(self, works: Sequence[Work], url: str) -> tuple[str, str, str]:
        """(Python, curl, lines of a jobs file) that do the same as the requests."""
        how = {"reproducible": getattr(self.engine.pipeline, "reproducible", False)}
        return (
            "\n".join(snippets.as_python(work.job, self._model, work.loras, **how) for work in works),
            "\n".join(snippets.as_curl(work.job, url, work.loras, needs_key=self._needs_key) for work in works),
            "".join(snippets.as_job(work.job) for work in works),
        )


class Preview:
    """A callback of `Pipeline.generate` that keeps the newest prediction of the first image."""

    def __init__(self):
        self.image: Image.Image | None = None
        self._shown = 0.0

    def __call__(self, step) -> None:
        if 0 in step.members and time.monotonic() > self._shown + PREVIEW_SECONDS and step.index < step.count:
            self.image = step.images()[step.members.index(0)]
            self._shown = time.monotonic()
