"""Captions of images from an OpenAI-compatible endpoint (`/v1/chat/completions` with an image part).

Every answer goes at once into a journal, one JSON object a line, under the SHA-256 of its image. A run that was killed
resumes from it, and no image is asked about twice, however many records hold it.
"""

import base64
import collections
import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import requests

from unialign_jax.data.endpoint import Endpoint, Failed, Usage, ask, read_text
from unialign_jax.data.images import decode_rgb
from unialign_jax.files import parse_json, shown

PROMPT = "Describe this image in one detailed paragraph, as a caption for training. Give the caption alone."


@dataclasses.dataclass(frozen=True)
class Captioner(Endpoint):
    """The endpoint that captions come from, and what it is asked.

    Attributes:
      prompt: what is asked of each image.
      max_side: images are shrunk to at most so many pixels a side before they are sent.
    """

    prompt: str = PROMPT
    max_side: int = 1024


@dataclasses.dataclass
class Progress(Usage):
    """What has been done, and what it took.

    Attributes:
      asked, answered, failed: images.
      reasons: of failures -> how many.
    """

    asked: int = 0
    answered: int = 0
    failed: int = 0
    reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Journal:
    """The captions that are there, by the SHA-256 of their image: `journal[digest]`, `journal.add(digest, caption)`.

    A last line that was cut off by a kill is dropped. Raises ValueError for a file that is no journal, or one of
    another model or prompt.
    """

    def __init__(self, path: str | os.PathLike, endpoint: Captioner):
        self.path, self._lock = Path(path), threading.Lock()
        self.captions: dict[str, str] = {}
        head = {"format": "unialign_jax captions", "model": endpoint.model, "prompt": endpoint.prompt}
        whole = 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                for number, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        break
                    entry = parse_json(line, f"{self.path}, line {number + 1}")
                    if number == 0:
                        self._check(entry, head)
                    else:
                        self.captions[entry["image"]] = entry["caption"]
                    whole += len(line)
            os.truncate(self.path, whole)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if not whole:
            self._write(head)

    def _check(self, found, head):
        if found.get("format") != head["format"]:
            raise ValueError(f"{self.path} is no journal of captions: name another by --journal")
        for key in ("model", "prompt"):
            if found.get(key) != head[key]:
                raise ValueError(
                    f"{self.path} has captions of the {key} {shown(found.get(key))}, this run has {shown(head[key])}: "
                    "name another by --journal"
                )

    def __contains__(self, digest: str) -> bool:
        return digest in self.captions

    def __getitem__(self, digest: str) -> str:
        return self.captions[digest]

    def add(self, digest: str, caption: str) -> None:
        with self._lock:
            self.captions[digest] = caption
            self._write({"image": digest, "caption": caption})

    def _write(self, entry):
        self._file.write(json.dumps(entry, ensure_ascii=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def image_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def caption_images(
    images: Iterable[bytes],
    endpoint: Captioner,
    journal: Journal,
    *,
    concurrency: int = 16,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Fills the journal with a caption of every image that it does not have.

    Args:
      images: encoded images; few are held at a time.
      endpoint: asked with up to `concurrency` requests at once.
      journal: told of every answer at once.
      progress: called after every image.

    Raises Refused when the endpoint refuses what every request has in common; answers until then are kept.
    """
    done, seen = Progress(), set()
    local, stop = threading.local(), threading.Event()

    def caption(digest, data):
        if not hasattr(local, "session"):
            local.session = requests.Session()
        body = request_body(endpoint, data)
        return digest, ask(local.session, endpoint, lambda attempt: body, lambda c: read_caption(c, done), done, stop)

    with ThreadPoolExecutor(concurrency) as pool:
        pending = set()

        def settle(finished):
            for future in finished:
                try:
                    digest, caption = future.result()
                except Failed as error:
                    done.failed += 1
                    done.reasons[str(error)] += 1
                else:
                    journal.add(digest, caption)
                    done.answered += 1
                progress(done)

        try:
            for data in images:
                digest = image_digest(data)
                if digest in journal or digest in seen:
                    continue
                seen.add(digest)
                done.asked += 1
                pending.add(pool.submit(caption, digest, data))
                if len(pending) >= 2 * concurrency:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    settle(finished)
            settle(wait(pending).done)
        except BaseException:
            stop.set()  # wakes the threads that pause
            for future in pending:
                future.cancel()
            raise
    return done


def request_body(endpoint: Captioner, data: bytes) -> dict:
    """The request for one image. Raises Failed for data that cannot be decoded."""
    try:
        image = decode_rgb(data, "image")
    except ValueError as error:
        raise Failed(str(error)) from None
    image.thumbnail((endpoint.max_side, endpoint.max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": endpoint.prompt}]
    return {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": endpoint.max_tokens,
        "temperature": 0,
    }


def read_caption(content: bytes, done: Progress) -> str:
    """The caption in an answer. Raises Retry for an answer without one, Failed for one that was cut."""
    text, is_cut = read_text(content, done, "a caption")
    if is_cut:
        raise Failed("the caption is longer than --max-tokens")
    return " ".join(text.split())
