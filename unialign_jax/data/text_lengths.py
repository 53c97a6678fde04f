"""The lengths of texts, and how many of them a text length cuts, so that a run reports the loss before it begins."""

from dataclasses import dataclass

from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.kinds import find_kind
from unialign_jax.data.records import Record, RecordError
from unialign_jax.data.streams import Stream, fit_question
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.files import one_line

LOOKED_AT = 256  # records of a stream at the start of a run


@dataclass
class _Tally:
    """Counts of the texts of one field so far; tokens without EOS."""

    count: int = 0
    words: int = 0
    characters: int = 0
    most_words: int = 0
    tokens: int = 0
    most_tokens: int = 0
    cut: int = 0
    lost: int = 0  # tokens
    example: str = ""  # the first text that is cut: its key, and where


class TextLengths:
    """Counts the texts of records of one kind: words always, tokens and cuts with a tokenizer and a length."""

    def __init__(self, kind: str, tokenizer: Tokenizer | None = None, length: int | None = None):
        row = find_kind(kind)
        self.tokenizer, self.length = tokenizer, length
        self._asks = row.prompt == "question"
        fields = ("question", "answer") if self._asks else ("caption", "instruction")
        self._ending = [] if tokenizer is None else tokenizer.token_ids("A: ")
        self.fields = {name: _Tally() for name in fields if name in row.fields}

    def add(self, record: Record) -> None:
        self._add(record, self._encode(record))

    def check(self, record: Record) -> list[tuple[int, int]]:
        """`add`, for a record of people's rows: raises BadRow for a question that leaves an answer no room.

        Gives the tokens of each field, and how many of them are kept; without a tokenizer words, all of them kept.
        """
        ids = self._encode(record)
        if self._asks and self.length is not None and len(ids[0]) > self.length - 2:
            needed = len(ids[0]) + 2
            detail = f"{record.key} needs {needed} tokens for an answer of one, the text length is {self.length}"
            raise BadRow("question longer than the text length", detail)
        return self._add(record, ids)

    def merge(self, tallies: dict[str, dict]) -> None:
        """Adds what another one counted, as `dataclasses.asdict` of each of its `fields`."""
        for name, other in tallies.items():
            tally = self.fields[name]
            for field, value in other.items():
                own = getattr(tally, field)
                most = field.startswith("most_")
                setattr(tally, field, max(own, value) if most else own or value if field == "example" else own + value)

    def _encode(self, record) -> list[list[int]]:
        """The ids of every field; [] without a tokenizer."""
        if self.tokenizer is None:
            return []
        texts = [getattr(record, name) for name in self.fields]
        if self._asks:
            texts[0] = f"Q: {texts[0]} A: "
        return [self.tokenizer.token_ids(text) for text in texts]

    def _add(self, record, ids) -> list[tuple[int, int]]:
        for name, tally in self.fields.items():
            text = getattr(record, name)
            words = len(text.split())
            tally.count += 1
            tally.words += words
            tally.characters += len(text)
            tally.most_words = max(tally.most_words, words)
        kept = ids
        if ids and self.length is not None:
            cut = [one[: self.length - 1] for one in ids]
            kept = fit_question(*ids, self._ending, self.length) if self._asks else cut
        for (name, tally), one, left in zip(self.fields.items() if ids else (), ids, kept, strict=True):
            tally.tokens += len(one)
            tally.most_tokens = max(tally.most_tokens, len(one))
            if len(left) < len(one):
                tally.cut += 1
                tally.lost += len(one) - len(left)
                tally.example = tally.example or one_line(self._example(record.key, name, left))
        if not ids:
            return [(len(getattr(record, name).split()),) * 2 for name in self.fields]
        return [(len(one), len(left)) for one, left in zip(ids, kept, strict=True)]

    def _example(self, key, name, kept):
        if name == "question":
            return f'{key} becomes "{_shortened(self.tokenizer.decode(kept))}"'
        return f'{key} ends after "{_shortened(self.tokenizer.decode(kept), end=True)}"'

    def lines(self) -> list[str]:
        """A line for each field with the lengths of its texts."""
        found = []
        for name, tally in self.fields.items():
            if tally.count:
                line = (
                    f"{name}: {tally.count:,} texts of {tally.words / tally.count:.0f} words on average "
                    f"({tally.characters / tally.count:.0f} characters), {tally.most_words:,} at most"
                )
                if self.tokenizer is not None:
                    line += f"; {tally.tokens / tally.count:.0f} tokens on average, {tally.most_tokens:,} at most"
                found.append(line)
        return found

    def cuts(self) -> list[str]:
        """A line for each field with texts that are cut: how many, how much of them, and an example."""
        return [
            f"{tally.cut:,} of {tally.count:,} {name}s do not fit text_length {self.length} and are cut: "
            f"{tally.lost:,} of {tally.tokens:,} tokens ({tally.lost / tally.tokens:.0%}) are lost; {tally.example}"
            for name, tally in self.fields.items()
            if tally.cut
        ]


def look_at(stream: Stream, most: int = LOOKED_AT) -> TextLengths:
    """The text lengths of up to `most` records of a stream, evenly spaced; no image is decoded."""
    found = TextLengths(stream.config.kind, stream.tokenizer, stream.config.text_length)
    count = min(most, len(stream))
    for number in range(count):
        try:
            found.add(stream.records[number * len(stream) // count])
        except RecordError:  # the stream logs it when it reads it
            continue
    return found


def cuts_of(stream: Stream) -> list[str]:
    """The texts that the stream's text length cuts, a line for each field; [] when nothing is cut."""
    number = min(LOOKED_AT, len(stream))
    among = "" if number == len(stream) else f" (of {number} records looked at, evenly spaced among {len(stream):,})"
    return [f"stream {stream.config.name}: {line}{among}" for line in look_at(stream).cuts()]


def _shortened(text: str, most: int = 60, end: bool = False) -> str:
    if len(text) <= most:
        return text
    return f"… {text[-most:].lstrip()}" if end else f"{text[: most // 2].rstrip()} … {text[-most // 2 :].lstrip()}"
