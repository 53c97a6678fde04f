"""A judge: a model behind an OpenAI-compatible endpoint that answers questions about texts and images.

Every answer goes at once into a journal, one JSON object a line, under a key made of all that was asked. A run that
was killed resumes from it, and no question that has an answer is asked again. What could not be answered, or not be
read, is kept as such: a score is never made up.
"""

import argparse
import base64
import collections
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import mimetypes
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import requests

from unialign_jax.data import images
from unialign_jax.data.endpoint import Endpoint, Failed, Refused, Retry, Usage, ask, read_text
from unialign_jax.files import check_regular, parse_json, shown

log = logging.getLogger(__name__)

FORMAT = "unialign_jax judgements"
PARSED, UNPARSED, FAILED = "parsed", "unparsed", "failed"
STATUSES = (PARSED, UNPARSED, FAILED)
GIVE_UP = 64  # questions in a row without any answer: the endpoint is down
# For the estimate of the cost: characters of English a token, and pixels a side of an image token of Qwen2.5-VL.
_CHARACTERS, _PATCH = 4, 28


class Unparsed(ValueError):
    """An answer that does not say what was asked for. Its text says why."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      item: the id of the item that it is about; for readers of the journal, and for progress.
      name: which of the item's questions it is, such as "SC".
      text: what is asked.
      images: files, sent as they are, in this order.
      images_first: whether the images stand before the text.
      read: makes a value of an answer, which JSON must hold; raises Unparsed, and the judge is asked again. It must
        not depend on the mode, since both modes share the journal.
      system: a system message; "" for none.
      max_tokens: of the answer; None for the endpoint's.
      tries: answers that cannot be read, after which it is not asked again; None for the endpoint's attempts.
      more: further fields of the request, such as {"response_format": {"type": "json_object"}}.
    """

    item: str
    name: str
    text: str
    images: tuple[Path, ...] = ()
    images_first: bool = False
    read: Callable[[str], Any] = str
    system: str = ""
    max_tokens: int | None = None
    tries: int | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, model: str) -> str:
        """32 hexadecimal digits that stand for all that the answer depends on."""
        asked = [model, self.name, self.text, self.images_first, self.system, self.max_tokens, self.more]
        images = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.images]
        return hashlib.sha256(json.dumps([*asked, *images], sort_keys=True).encode()).hexdigest()[:32]

    def body(self, endpoint: Endpoint, unread: int) -> dict:
        """The request: temperature 0, and 0.2 more for each of the `unread` answers before it, up to 1."""
        text = {"type": "text", "text": self.text}
        images = [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in self.images]
        content = [*images, text] if self.images_first else [text, *images]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": endpoint.model,
            "messages": [*system, {"role": "user", "content": content if images else self.text}],
            "max_tokens": self.max_tokens or endpoint.max_tokens,
            "temperature": min(1.0, round(0.2 * unread, 1)),
            **self.more,
        }

    def tokens(self) -> int:
        """About how many tokens the judge reads: four characters each, and a square of 28 pixels of an image."""
        count = len(self.text) + len(self.system)
        sizes = [image_size(path) for path in self.images]
        patches = (math.ceil(width / _PATCH) * math.ceil(height / _PATCH) for width, height in sizes)
        return math.ceil(count / _CHARACTERS) + sum(patches)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header. Raises OSError or ValueError in one line."""
    with images.open_image(images.read_bytes(path), str(path)) as image:
        return image.size


def data_uri(path: Path) -> str:
    """A file as a data URI."""
    kind = mimetypes.guess_type(Path(path).name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What came of a question: a line of the journal.

    Attributes:
      status: "parsed"; "unparsed", when no answer could be read; "failed", when there was none.
      value: what `Question.read` made of the answer; None unless parsed.
      answer: the judge's last words; "" when there are none.
      earlier: its answers before that, none of which could be read.
      reason: why it is not parsed.
      prompt_tokens, answer_tokens: of all attempts, as the endpoint counts them.
    """

    key: str
    item: str
    name: str
    status: str
    value: Any = None
    answer: str = ""
    earlier: tuple[str, ...] = ()
    reason: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def is_parsed(self) -> bool:
        return self.status == PARSED

    @property
    def answers(self) -> tuple[str, ...]:
        """All that the judge said, the first first."""
        return (*self.earlier, self.answer) if self.answer else self.earlier


class Journal:
    """The judgements that are there, by key. Failed ones are asked again by the next run.

    A last line that was cut off by a kill is dropped. One process at a time has a journal. Raises ValueError for a file
    that is no journal, and for one that another process has.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self._lock = Path(path), threading.Lock()
        self.judgements: dict[str, Judgement] = {}
        if os.path.lexists(self.path):
            check_regular(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        try:
            self._claim()
            if not self._read():
                self._write({"format": FORMAT})
        except BaseException:
            self._file.close()
            raise

    def _claim(self):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another process: wait until it has ended") from None
        except OSError:  # a file system without locks
            log.warning("%s cannot be locked: do not score this folder twice at once", self.path)

    def _read(self) -> int:
        """Takes the judgements of the file; returns how many of its bytes are whole lines, and drops the others."""
        whole = 0
        if self.path.stat().st_size:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        break
                    entry = parse_json(line, f"{self.path}, line {number + 1}")
                    if number == 0:
                        if entry.get("format") != FORMAT:
                            raise ValueError(f"{self.path} holds no judgements: choose another --output")
                    else:
                        self._take(entry, number + 1)
                    whole += len(line)
            os.truncate(self.path, whole)
        return whole

    def _take(self, entry, line):
        try:
            judgement = Judgement(**entry | {"earlier": tuple(entry.get("earlier", ()))})
            if judgement.status not in STATUSES:
                raise TypeError
        except TypeError:
            raise ValueError(f"{self.path}, line {line} is no judgement: move the file away") from None
        self.judgements[judgement.key] = judgement

    def add(self, judgement: Judgement) -> None:
        """Keeps a judgement."""
        with self._lock:
            self.judgements[judgement.key] = judgement
            self._write(dataclasses.asdict(judgement))

    def _write(self, entry):
        self._file.write(json.dumps(entry, ensure_ascii=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Judge:
    """Asks questions, many at a time, and keeps the answers.

    Attributes:
      endpoint, journal: where it asks and what it remembers.
      usage: what this process has asked so far.
      prices: for a million tokens read and written; 0 where they are not known.
      used: the judgements that were asked for, by key, wherever they came from.
    """

    def __init__(
        self, endpoint: Endpoint, journal: Journal, *, concurrency: int = 16, prices: tuple[float, float] = (0.0, 0.0)
    ):
        self.endpoint, self.journal, self.usage, self.prices = endpoint, journal, Usage(), prices
        self.used: dict[str, Judgement] = {}
        self._concurrency, self._local, self._in_a_row = concurrency, threading.local(), 0

    def close(self) -> None:
        self.journal.close()

    def describe(self) -> dict[str, Any]:
        """What settings.json says of the judge, and of what it was asked and said; the key is not in it."""
        endpoint, used = self.endpoint, self.used.values()
        spent = Usage(
            prompt_tokens=sum(judgement.prompt_tokens for judgement in used),
            answer_tokens=sum(judgement.answer_tokens for judgement in used),
        )
        counts = collections.Counter(judgement.status for judgement in used)
        return {
            # A password before the host, or a key among the parameters, is the user's alone.
            "url": re.sub(r"(?<=//)[^/@]*@", "", endpoint.url).partition("?")[0],
            "model": endpoint.model,
            "max_tokens": endpoint.max_tokens,
            "attempts": endpoint.attempts,
            "temperature": "0, and 0.2 more for each answer that could not be read",
            "questions": len(used),
            **{status: counts[status] for status in STATUSES},
            "prompt_tokens": spent.prompt_tokens,
            "answer_tokens": spent.answer_tokens,
            **({"cost": round(spent.cost(*self.prices), 4)} if any(self.prices) else {}),
        }

    def ask(
        self, questions: Sequence[Question], progress: Callable[[Judgement], None] = lambda judgement: None
    ) -> list[Judgement]:
        """A judgement for every question, in their order; those that the journal has are not asked.

        Args:
          progress: called with the judgement of each question, as it is found or made.

        Raises ValueError when the endpoint refuses what every request has in common, and OSError when it answers
        nothing at all, or an image cannot be read; the answers until then are kept.
        """
        keys = [question.key(self.endpoint.model) for question in questions]
        times, todo, stop = collections.Counter(keys), {}, threading.Event()

        def settled(key, judgement):
            self.used[key] = judgement
            for _ in range(times[key]):
                progress(judgement)

        for key, question in dict(zip(keys, questions, strict=True)).items():
            found = self.journal.judgements.get(key)
            if found is not None and found.status != FAILED:
                settled(key, found)
            else:
                todo[key] = question
        if not todo:
            return [self.journal.judgements[key] for key in keys]
        log.info("%s", self.estimate(list(todo.values()), len(times)))
        with ThreadPoolExecutor(self._concurrency) as pool:
            pending = set()

            def settle(finished):
                for judgement in (future.result() for future in finished):
                    settled(judgement.key, judgement)
                    self._in_a_row = self._in_a_row + 1 if judgement.status == FAILED else 0
                    if self._in_a_row >= GIVE_UP:
                        raise OSError(
                            f"{self.endpoint.url} answered none of {GIVE_UP} questions, the last: {judgement.reason}"
                        )

            try:
                for key, question in todo.items():
                    pending.add(pool.submit(self._settle, key, question, stop))
                    if len(pending) >= 2 * self._concurrency:
                        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                        settle(finished)
                while pending:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    settle(finished)
            except BaseException as error:
                stop.set()  # wakes the threads that pause
                for future in pending:
                    future.cancel()
                if isinstance(error, Refused):
                    raise ValueError(str(error)) from None
                raise
        judgements = [self.journal.judgements[key] for key in keys]
        counts = collections.Counter(self.journal.judgements[key].status for key in todo)
        log.info(
            "%d questions: %d answers parsed, %d not, %d without an answer; %s tokens read, %s written%s",
            len(todo), *(counts[status] for status in STATUSES), f"{self.usage.prompt_tokens:,}",
            f"{self.usage.answer_tokens:,}", self._cost(self.usage),
        )  # fmt: skip
        return judgements

    def estimate(self, todo: Sequence[Question], count: int) -> str:
        """What the questions that are left may cost, as a sentence; `count` is that of all questions."""
        read = sum(question.tokens() for question in todo)
        most = sum(question.max_tokens or self.endpoint.max_tokens for question in todo)
        cost = self._cost(Usage(prompt_tokens=read, answer_tokens=most))
        return (
            f"the judge is asked {len(todo)} of {count} questions, the others have answers: it reads about {read:,} "
            f"tokens and writes {most:,} at most, if it is asked once each{cost}"
        )

    def _cost(self, usage: Usage) -> str:
        return f", {usage.cost(*self.prices):.2f} by the prices given" if any(self.prices) else ""

    def _settle(self, key, question, stop) -> Judgement:
        """Asks, and keeps what came of it."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        usage, answers, is_answered = Usage(), [], False

        def body(attempt):
            nonlocal is_answered
            is_answered = False
            return question.body(self.endpoint, len(answers))

        def read(content):
            nonlocal is_answered
            text, is_cut = read_text(content, usage)
            answers.append(text)
            is_answered = True
            try:
                return question.read(text)
            except Unparsed as error:
                reason = f"{error}{' (it is cut at max_tokens)' if is_cut else ''}"
                if len(answers) == question.tries:
                    raise Failed(reason) from None
                raise Retry(reason, pauses=False) from None

        facts = {"key": key, "item": question.item, "name": question.name}
        try:
            value = ask(self._local.session, self.endpoint, body, read, usage, stop)
            facts |= {"status": PARSED, "value": value}
        except Failed as error:
            facts |= {"status": UNPARSED if is_answered else FAILED, "reason": str(error)}
        tokens = {"prompt_tokens": usage.prompt_tokens, "answer_tokens": usage.answer_tokens}
        self.usage.add(**tokens, retries=usage.retries)
        judgement = Judgement(**facts, answer=(answers or [""])[-1], earlier=tuple(answers[:-1]), **tokens)
        if judgement.is_parsed or not stop.is_set():  # when stopped, it had not all its attempts
            self.journal.add(judgement)
        return judgement


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options of a judge."""
    add = group.add_argument
    add("--judge", metavar="URL", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", help="the endpoint's name of the model")
    add("--judge-concurrency", type=int, default=16, metavar="N", help="questions at once (%(default)s)")
    add("--judge-attempts", type=int, default=6, metavar="N", help="requests for one answer at most (%(default)s)")
    add("--judge-timeout", type=float, default=120.0, metavar="S", help="seconds that a request may take (%(default)g)")
    add("--judge-max-tokens", type=int, default=512, metavar="N", help="of an answer (%(default)s)")
    add("--input-price", type=float, default=0.0, metavar="X", help="for a million tokens read, to show the cost")
    add("--output-price", type=float, default=0.0, metavar="X", help="for a million tokens written, to show the cost")
    add("--official-guess", action="store_true", help="as some official code: a random score where the judge gave none")


def endpoint_of(arguments: argparse.Namespace, key: str) -> Endpoint | None:
    """The endpoint of a command line; None where --judge is not given.

    Args:
      key: of the API; "" without one.

    Raises ValueError for options that do not fit.
    """
    if not arguments.judge:
        return None
    if not arguments.judge_model:
        raise ValueError(f"--judge={shown(arguments.judge)} needs --judge-model=NAME, the endpoint's name of the model")
    for name in ("judge_concurrency", "judge_attempts", "judge_timeout", "judge_max_tokens"):
        if not 0 < getattr(arguments, name) < 2**31:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected a number above 0")
    for name in ("input_price", "output_price"):
        if not 0 <= getattr(arguments, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected a price")
    return Endpoint(
        arguments.judge,
        arguments.judge_model,
        key,
        max_tokens=arguments.judge_max_tokens,
        timeout=arguments.judge_timeout,
        attempts=arguments.judge_attempts,
        flag="--judge",
    )


def from_arguments(arguments: argparse.Namespace, key: str, journal: Path) -> Judge | None:
    """The judge of a command line, which the caller closes; None where --judge is not given.

    Args:
      key: of the API; "" without one.
      journal: the file of judgements.

    Raises ValueError for options that do not fit, or a journal that is none.
    """
    endpoint = endpoint_of(arguments, key)
    if endpoint is None:
        return None
    prices = (arguments.input_price, arguments.output_price)
    return Judge(endpoint, Journal(journal), concurrency=arguments.judge_concurrency, prices=prices)
