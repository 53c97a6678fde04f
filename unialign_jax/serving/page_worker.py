"""Requests of the web page: done through an `Engine`, told of while they last, and their images kept as files."""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.files import first_line
from unialign_jax.inference.options import IMAGE_TASKS
from unialign_jax.serving import snippets
from unialign_jax.serving.engine import Busy, Closing, Engine, Ticket, TooLate, TooMuch
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.page_folder import Folder
from unialign_jax.serving.requests import BadRequest, Limits, Work, check_fit, make_work, stamped_png

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.5  # between two lines about a request
PREVIEW_SECONDS = 0.7


@dataclasses.dataclass(frozen=True)
class Moment:
    """How it stands with requests.

    Attributes:
      status: a line for the user.
      tickets: what can be cancelled.
      preview: the image as the network sees it now.
      said: of a caption or an answer, how it begins.
      made: at the end, each request's job with its results; None before, and where they failed.
    """

    status: str
    tickets: list[Ticket] = dataclasses.field(default_factory=list)
    preview: Image.Image | None = None
    said: str = ""
    made: list[tuple[Work, list]] | None = None


class Worker:
    """Does requests of the page through an engine, and keeps their images in a folder of its own.

    Attributes:
      engine, limits: those that it was given.
      folder: where the images are.
    """

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
        how = {"limits": limits, "model": model, "loras": engine.loras}
        self._work_of = functools.partial(make_work, **how, image_size=engine.pipeline.config.image_size)
        self.folder, self._model, self._stamp = Folder(folder), model, stamp
        self._needs_key, self._log_prompts = needs_key, log_prompts

    async def do(self, requests: Sequence[tuple[str, dict, list[Path]]], live: bool = False) -> AsyncIterator[Moment]:
        """Queues requests and tells of them until all are done.

        Args:
          requests: (task, fields as `make_work` takes them, files of the images).
          live: with previews; the image then differs by up to a grey level from that of the API, unless the pipeline is
            reproducible.
        """
        tickets: list[Ticket] = []
        # A callback changes the program that makes an image, unless the pipeline is reproducible.
        has_steps = live or getattr(self.engine.pipeline, "reproducible", False)
        said = [""]

        def hear(text: str) -> None:
            said[0] = text

        try:
            works = [await asyncio.to_thread(self._read, *request) for request in requests]
            warnings: list[str] = []
            for work in works:
                warnings += check_fit(work.job, self.engine.pipeline)
                if self._log_prompts:
                    log.info(json.dumps({"task": work.job.task, "text": work.job.text}))
                is_image = work.job.task in IMAGE_TASKS
                watch = Steps(work.job.images_per_prompt, live) if is_image and has_steps else None
                tickets.append(
                    self.engine.submit(
                        work.job, work.images, callback=watch, hear=None if is_image else hear, loras=work.loras
                    )
                )
            futures = [asyncio.wrap_future(ticket.future) for ticket in tickets]
            left = set(futures)
            while left:
                seen = next((ticket.callback.image for ticket in tickets if ticket.callback), None)
                yield Moment(self._status(tickets), tickets, seen, said[0])
                _, left = await asyncio.wait(left, timeout=STATUS_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                if any(ticket.future.cancelled() for ticket in tickets):
                    yield Moment("Cancelled.")
                    return
                for future in futures:
                    if future.done():
                        future.result()  # raises its error
            made = [(work, future.result()) for work, future in zip(works, futures, strict=True)]
            seconds = max((ticket.queued or 0) + ticket.working for ticket in tickets)
            yield Moment(" ".join([f"Done in {seconds:.1f} s.", *dict.fromkeys(warnings)]), made=made)
        except (BadRequest, TooMuch, Busy, Closing, TooLate) as error:
            reasons = {Busy: "busy", Closing: "closing", TooLate: "too_late"}
            self._metrics.refused(reasons.get(type(error), "bad_request"))
            yield Moment(f"Not done: {first_line(error)}")
        except Exception as error:
            log.exception("a request of the page failed")
            self._metrics.failed()
            yield Moment(f"It failed: {first_line(error)}")
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _status(self, tickets: Sequence[Ticket]) -> str:
        """Of the request that will be done last: its place in the queue, or its time."""
        waiting = [ticket for ticket in tickets if not ticket.future.done()] or tickets
        looks = [(ticket, self.engine.outlook(ticket)) for ticket in waiting]
        ticket, look = max(looks, key=lambda pair: (pair[1].before, pair[1].seconds or 0))
        if ticket.queued is None:
            expected = "" if look.seconds is None else f", done in about {max(1, round(look.seconds))} s"
            return f"Waiting: {look.before} before it{expected}."
        spent = time.monotonic() - ticket.arrived
        step = f"{ticket.callback.words}, " if ticket.callback and ticket.callback.words else ""
        if look.seconds is None:
            return f"Working: {step}{spent:.1f} s; the first of a kind takes longer."
        return f"Working: {step}{spent:.1f} s of about {max(spent, spent + look.seconds):.0f} s."

    def _read(self, task: str, fields: dict, files: Sequence[Path]) -> Work:
        """A request with its images. Raises BadRequest."""
        data = []
        for file in files:
            try:
                data.append(file.read_bytes())
                os.utime(file)  # it is in use, and so not old
            except OSError:
                raise BadRequest("the picture is no longer kept here: give it again") from None
        return self._work_of(task, fields, data)

    def keep(self, image: Image.Image, seed: int) -> Path:
        """Writes an image as the API sends it, and returns its file. Raises OSError where there is no room for it."""
        content = stamped_png(image, self._stamp)
        path = self.folder.path / hashlib.sha256(content).hexdigest()[:32] / f"unialign_{seed}.png"
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # it is shown again, and so not old
            return path
        if not self.folder.make_room(len(content)):
            raise OSError(f"the folder of the page's pictures is full ({self.folder.most:,} bytes)")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def copies(self, works: Sequence[Work], url: str) -> tuple[str, str, str]:
        """(Python, curl, lines of a jobs file) that do the same as the requests."""
        how = {"reproducible": getattr(self.engine.pipeline, "reproducible", False)}
        return (
            "\n".join(snippets.as_python(work.job, self._model, work.loras, **how) for work in works),
            "\n".join(snippets.as_curl(work.job, url, work.loras, needs_key=self._needs_key) for work in works),
            "".join(snippets.as_job(work.job) for work in works),
        )


class Steps:
    """A callback of `Pipeline.generate` that keeps how far it is.

    Attributes:
      words: the step, for the user; empty before the first.
      image: the newest prediction of the first image in the making, where it is wanted.
    """

    def __init__(self, images: int, has_previews: bool):
        """`images` are those that the request makes, in one call of the pipeline or in several."""
        self.words, self.image = "", None
        self._images, self._has_previews = images, has_previews
        self._made, self._shown = 0, 0.0

    def __call__(self, step) -> None:
        step.latents.block_until_ready()  # JAX calls this before the step is done
        count = len(step.members)
        self.words = f"step {step.index} of {step.count}"
        if count < self._images:
            numbers = f"image {self._made + 1}" if count == 1 else f"images {self._made + 1} to {self._made + count}"
            self.words += f" for {numbers} of {self._images}"
        if step.index == step.count:
            self._made += count
        elif self._has_previews and 0 in step.members and time.monotonic() > self._shown + PREVIEW_SECONDS:
            self.image = step.images()[step.members.index(0)]
            self._shown = time.monotonic()
