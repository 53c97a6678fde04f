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
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import requests
import urllib3

from unialign_jax.data.images import decode_rgb
from unialign_jax.files import first_line, one_line, parse_json, shown

PROMPT = "Describe this image in one detailed paragraph, as a caption for training. Give the caption alone."
MAX_ANSWER = 2**22  # bytes of a response
MAX_CAPTION = 2**16  # characters
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_PAUSE = 60.0  # seconds


class Refused(Exception):
    """The endpoint will answer every request so: a wrong key, model or address. Its text is for the user."""


class Failed(Exception):
    """One image has no caption after all attempts. Its text says why."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where captions come from, and how they are asked for.

    Attributes:
      url: of the API, such as "http://localhost:8000/v1".
      model: its name for the endpoint.
      key: the API key, or "".
      prompt: what is asked of each image.
      max_tokens: of an answer.
      max_side: images are shrunk to at most so many pixels a side before they are sent.
      timeout: seconds that one request may take in all.
      attempts: requests for one image at most.
      first_pause: seconds before the second attempt; each pause is twice the one before, up to a minute.
    """

    url: str
    model: str
    key: str = ""
    prompt: str = PROMPT
    max_tokens: int = 256
    max_side: int = 1024
    timeout: float = 120.0
    attempts: int = 6
    first_pause: float = 1.0

    def __post_init__(self):
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ValueError(f"--endpoint is {shown(self.url)}, expected a URL such as http://localhost:8000/v1")


@dataclasses.dataclass
class Progress:
    """What has been done, and what it took.

    Attributes:
      asked, answered, failed: images.
      retries: requests that had to be repeated.
      prompt_tokens, answer_tokens: as the endpoint counts them.
      reasons: of failures -> how many.
    """

    asked: int = 0
    answered: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Adds to counts, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def cost(self, input_price: float, output_price: float) -> float:
        """What the tokens cost at prices for a million of them."""
        return (self.prompt_tokens * input_price + self.answer_tokens * output_price) / 1e6


class Journal:
    """The captions that are there, by the SHA-256 of their image: `journal[digest]`, `journal.add(digest, caption)`.

    A last line that was cut off by a kill is dropped. Raises ValueError for a file that is no journal, or one of
    another model or prompt.
    """

    def __init__(self, path: str | os.PathLike, endpoint: Endpoint):
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
    endpoint: Endpoint,
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

    def ask(digest, data):
        if not hasattr(local, "session"):
            local.session = requests.Session()
        return digest, ask_once_and_again(local.session, endpoint, data, done, stop)

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
                pending.add(pool.submit(ask, digest, data))
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


def ask_once_and_again(session, endpoint: Endpoint, data: bytes, done: Progress, stop: threading.Event) -> str:
    """The caption of one image. Raises Failed after the last attempt, Refused when no attempt can succeed."""
    body = request_body(endpoint, data)
    for attempt in range(endpoint.attempts):
        try:
            return _ask(session, endpoint, body, done)
        except _Retry as error:
            last = error
        if attempt + 1 < endpoint.attempts:
            done.add(retries=1)
            pause = min(_LONGEST_PAUSE, endpoint.first_pause * 2**attempt * random.uniform(0.5, 1))
            if stop.wait(max(pause, min(last.after, _LONGEST_PAUSE))):
                break
    raise Failed(str(last))


class _Retry(Exception):
    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


def request_body(endpoint: Endpoint, data: bytes) -> dict:
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


def _ask(session, endpoint, body, done) -> str:
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    url, deadline = endpoint.url.rstrip("/") + "/chat/completions", time.monotonic() + endpoint.timeout
    try:
        # No redirects: they would carry the key to another host.
        with session.post(
            url, json=body, headers=headers, timeout=endpoint.timeout, stream=True, allow_redirects=False
        ) as response:
            status, after = response.status_code, response.headers.get("Retry-After", "")
            content = b""
            # read1, since a timeout alone would wait for every drop of a slow answer.
            while piece := response.raw.read1(2**16, decode_content=True):
                content += piece
                if len(content) > MAX_ANSWER:
                    raise _Retry(f"an answer of more than {MAX_ANSWER:,} bytes")
                if time.monotonic() > deadline:
                    raise _Retry(f"no whole answer in {endpoint.timeout:g} s")
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError):
        raise _Retry(f"no answer in {endpoint.timeout:g} s") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _Retry(f"the connection failed: {type(error).__name__}") from None
    if status in RETRIED:
        raise _Retry(f"status {status}", float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 0.0)
    if status == 400 or status == 413 or status == 422:
        raise Failed(f"status {status}: {one_line(content.decode(errors='replace'), 200)}")
    if status != 200:
        raise Refused(f"{url} answers with status {status}: {one_line(content.decode(errors='replace'), 200)}")
    return _caption(content, done)


def _caption(content: bytes, done: Progress) -> str:
    """The caption in an answer. Raises _Retry for an answer without one."""
    try:
        answer = parse_json(content, "the answer")
        choice = answer["choices"][0]
        caption = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Retry(f"an answer without a caption ({type(error).__name__}: {first_line(error, 80)})") from None
    if not isinstance(caption, str) or not caption.strip() or "\0" in caption or len(caption) > MAX_CAPTION:
        raise _Retry("an answer without a caption (empty, too long or no text)")
    if choice.get("finish_reason") == "length":
        raise Failed("the caption is longer than --max-tokens")
    if caption.encode(errors="ignore").decode() != caption:
        raise _Retry("an answer without a caption (halves of characters)")
    usage = answer.get("usage")
    for key, name in (("prompt_tokens", "prompt_tokens"), ("completion_tokens", "answer_tokens")):
        count = usage.get(key) if isinstance(usage, dict) else None
        if type(count) is int and 0 <= count < 2**31:
            done.add(**{name: count})
    return " ".join(caption.split())
