"""A judge: a model behind an OpenAI-compatible endpoint that answers questions about texts and images.

Every final answer goes at once into a journal, one JSON object a line, under a key made of all that was asked. A run
that was killed resumes from it, and no question is asked twice. What could not be answered, or not be read, is kept as
such: a score is never made up.
"""

import argparse
import base64
import dataclasses
import hashlib
import json
import mimetypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import requests

from unialign_jax.data.endpoint import Endpoint, Failed, Retry, Usage, ask, read_text
from unialign_jax.files import check_regular, parse_json, shown

FORMAT = "unialign_jax judgements"
PARSED, UNPARSED, FAILED = "parsed", "unparsed", "failed"


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
      read: makes a value of an answer, which JSON must hold; raises Unparsed, and the judge is asked again.
      system: a system message; "" for none.
      max_tokens: of the answer; None for the endpoint's.
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
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, model: str) -> str:
        """32 hexadecimal digits that stand for all that the answer depends on."""
        asked = [model, self.name, self.text, self.images_first, self.system, self.max_tokens, self.more]
        images = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.images]
        return hashlib.sha256(json.dumps([*asked, *images], sort_keys=True).encode()).hexdigest()[:32]

    def body(self, endpoint: Endpoint, attempt: int) -> dict:
        """The request of attempt 0, 1, ...: temperature 0 at first, and 0.2 more each time after that, up to 1."""
        text = {"type": "text", "text": self.text}
        images = [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in self.images]
        content = [*images, text] if self.images_first else [text, *images]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": endpoint.model,
            "messages": [*system, {"role": "user", "content": content if images else self.text}],
            "max_tokens": self.max_tokens or endpoint.max_tokens,
            "temperature": min(1.0, round(0.2 * attempt, 1)),
            **self.more,
        }


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
      answer: the judge's last words; "" when it failed.
      reason: why it is not parsed.
    """

    key: str
    item: str
    name: str
    status: str
    value: Any = None
    answer: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def is_parsed(self) -> bool:
        return self.status == PARSED


class Journal:
    """The judgements that are there, by key. Failed ones are asked again by the next run.

    A last line that was cut off by a kill is dropped. Raises ValueError for a file that is no journal.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self._lock = Path(path), threading.Lock()
        self.judgements: dict[str, Judgement] = {}
        whole = 0
        if self.path.exists():
            check_regular(self.path)
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
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if not whole:
            self._write({"format": FORMAT})

    def _take(self, entry, line):
        try:
            judgement = Judgement(**entry)
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
      asked: questions that this process has put to the endpoint.
    """

    def __init__(self, endpoint: Endpoint, journal: Journal, *, concurrency: int = 16):
        self.endpoint, self.journal, self.usage, self.asked = endpoint, journal, Usage(), 0
        self._concurrency, self._local = concurrency, threading.local()

    def ask(
        self, questions: Sequence[Question], progress: Callable[[Judgement], None] = lambda judgement: None
    ) -> list[Judgement]:
        """A judgement for every question, in their order; those that the journal has are not asked.

        Args:
          progress: called with each judgement that was made or found.

        Raises endpoint.Refused when the endpoint refuses what every request has in common; the answers until then are
        kept. Raises OSError for an image that cannot be read.
        """
        keys = [question.key(self.endpoint.model) for question in questions]
        todo, stop = {}, threading.Event()
        for key, question in zip(keys, questions, strict=True):
            found = self.journal.judgements.get(key)
            if found is not None and found.status != FAILED:
                progress(found)
            else:
                todo[key] = question
        waiting = iter(todo.items())
        with ThreadPoolExecutor(self._concurrency) as pool:
            pending = set()
            try:
                for key, question in waiting:
                    pending.add(pool.submit(self._settle, key, question, stop))
                    if len(pending) >= 2 * self._concurrency:
                        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for future in finished:
                            progress(future.result())
                for future in wait(pending).done:
                    progress(future.result())
            except BaseException:
                stop.set()  # wakes the threads that pause
                for future in pending:
                    future.cancel()
                raise
        return [self.journal.judgements[key] for key in keys]

    def _settle(self, key, question, stop) -> Judgement:
        """Asks, and keeps what came of it."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        usage, last = Usage(), ""

        def read(content):
            nonlocal last
            text, is_cut = read_text(content, usage)
            last = text
            try:
                return question.read(text)
            except Unparsed as error:
                raise Retry(f"{error}{' (it is cut at max_tokens)' if is_cut else ''}") from None

        facts = {"key": key, "item": question.item, "name": question.name}
        try:
            value = ask(
                self._local.session, self.endpoint, lambda n: question.body(self.endpoint, n), read, usage, stop
            )
            facts |= {"status": PARSED, "value": value, "answer": last}
        except Failed as error:
            facts |= {"status": UNPARSED if last else FAILED, "answer": last, "reason": str(error)}
        tokens = {"prompt_tokens": usage.prompt_tokens, "answer_tokens": usage.answer_tokens}
        self.usage.add(**tokens, retries=usage.retries)
        judgement = Judgement(**facts, **tokens)
        if not (stop.is_set() and judgement.status == FAILED):
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


def from_arguments(arguments: argparse.Namespace, key: str, journal: Path) -> Judge | None:
    """The judge of a command line; None where --judge is not given.

    Args:
      key: of the API; "" without one.
      journal: the file of judgements.

    Raises ValueError for options that do not fit, or a journal that is none.
    """
    if not arguments.judge:
        return None
    if not arguments.judge_model:
        raise ValueError(f"--judge={shown(arguments.judge)} needs --judge-model=NAME, the endpoint's name of the model")
    for name in ("judge_concurrency", "judge_attempts", "judge_timeout", "judge_max_tokens"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected a number above 0")
    endpoint = Endpoint(
        arguments.judge,
        arguments.judge_model,
        key,
        max_tokens=arguments.judge_max_tokens,
        timeout=arguments.judge_timeout,
        attempts=arguments.judge_attempts,
        flag="--judge",
    )
    return Judge(endpoint, Journal(journal), concurrency=arguments.judge_concurrency)
