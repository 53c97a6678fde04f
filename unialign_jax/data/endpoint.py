"""One request to an OpenAI-compatible endpoint (`/v1/chat/completions`), repeated until it is answered or given up."""

import dataclasses
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import requests
import urllib3

from unialign_jax.files import first_line, one_line, parse_json, shown

MAX_ANSWER = 2**22  # bytes of a response
MAX_TEXT = 2**16  # characters
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_PAUSE = 60.0  # seconds

Answer = TypeVar("Answer")


class Refused(Exception):
    """The endpoint will answer every request so: a wrong key, model or address. Its text is for the user."""


class Failed(Exception):
    """One request has no answer after all attempts. Its text says why."""


class Retry(Exception):
    """One attempt gave no answer. Another may.

    Attributes:
      after: seconds before the next attempt at least, as the endpoint asks.
      pauses: whether to wait at all, which is of use where the endpoint is busy or down.
    """

    def __init__(self, reason: str, after: float = 0.0, *, pauses: bool = True):
        super().__init__(reason)
        self.after, self.pauses = after, pauses


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how patiently.

    Attributes:
      url: of the API, such as "http://localhost:8000/v1".
      model: its name for the endpoint.
      key: the API key, or "".
      max_tokens: of an answer.
      timeout: seconds that one request may take in all.
      attempts: of one request at most.
      first_pause: seconds before the second attempt; each pause is twice the one before, up to a minute.
      flag: the option that gave the URL, for messages.
    """

    url: str
    model: str
    key: str = ""
    max_tokens: int = 256
    timeout: float = 120.0
    attempts: int = 6
    first_pause: float = 1.0
    flag: str = "--endpoint"

    def __post_init__(self):
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ValueError(f"{self.flag} is {shown(self.url)}, expected a URL such as http://localhost:8000/v1")


@dataclasses.dataclass
class Usage:
    """What requests took, counted from any thread.

    Attributes:
      retries: requests that had to be repeated.
      prompt_tokens, answer_tokens: as the endpoint counts them.
    """

    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Adds to counts, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def cost(self, input_price: float, output_price: float) -> float:
        """What the tokens cost at prices for a million of them."""
        return (self.prompt_tokens * input_price + self.answer_tokens * output_price) / 1e6


def ask(
    session: requests.Session,
    endpoint: Endpoint,
    body: Callable[[int], dict],
    read: Callable[[bytes], Answer],
    usage: Usage,
    stop: threading.Event,
    path: str = "chat/completions",
) -> Answer:
    """One answer, after as many attempts as it takes.

    Args:
      body: the request of attempt 0, 1, ...
      read: makes the answer of a response's bytes; raises Retry where another attempt may give a better one.
      usage: counts the retries.
      stop: when set, no further attempt is made.

    Raises Failed after the last attempt, Refused when no attempt can succeed.
    """
    for attempt in range(endpoint.attempts):
        try:
            return read(_post(session, endpoint, path, body(attempt)))
        except Retry as error:
            last = error
        if attempt + 1 < endpoint.attempts:
            pause = min(_LONGEST_PAUSE, endpoint.first_pause * 2**attempt * random.uniform(0.5, 1))
            if stop.wait(max(pause, min(last.after, _LONGEST_PAUSE)) if last.pauses else 0):
                break
            usage.add(retries=1)
    raise Failed(str(last))


def _post(session, endpoint, path, body) -> bytes:
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    url, deadline = f"{endpoint.url.rstrip('/')}/{path}", time.monotonic() + endpoint.timeout
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
                    raise Retry(f"an answer of more than {MAX_ANSWER:,} bytes")
                if time.monotonic() > deadline:
                    raise Retry(f"no whole answer in {endpoint.timeout:g} s")
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError):
        raise Retry(f"no answer in {endpoint.timeout:g} s") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise Retry(f"the connection failed: {type(error).__name__}") from None
    if status in RETRIED:
        raise Retry(f"status {status}", float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 0.0)
    if status == 400 or status == 413 or status == 422:
        raise Failed(f"status {status}: {one_line(content.decode(errors='replace'), 200)}")
    if status != 200:
        keyless = ", to a request without an API key" if status in (401, 403) and not endpoint.key else ""
        raise Refused(f"{url} answers with status {status}{keyless}: {one_line(content.decode(errors='replace'), 200)}")
    return content


def read_text(content: bytes, usage: Usage, what: str = "a text") -> tuple[str, bool]:
    """(the text of a chat answer, whether it is cut at max_tokens); counts its tokens.

    Args:
      what: how messages call the text.

    Raises Retry for an answer without one.
    """
    try:
        answer = parse_json(content, "the answer")
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Retry(f"an answer without {what} ({type(error).__name__}: {first_line(error, 80)})") from None
    if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > MAX_TEXT:
        raise Retry(f"an answer without {what} (empty, too long or no text)")
    if text.encode(errors="ignore").decode() != text:
        raise Retry(f"an answer without {what} (halves of characters)")
    counts = answer.get("usage")
    for key, name in (("prompt_tokens", "prompt_tokens"), ("completion_tokens", "answer_tokens")):
        count = counts.get(key) if isinstance(counts, dict) else None
        if type(count) is int and 0 <= count < 2**31:
            usage.add(**{name: count})
    return text, choice.get("finish_reason") == "length"
