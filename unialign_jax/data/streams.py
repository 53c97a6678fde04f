"""Streams: from a record on disk to an example of arrays, by index."""

import copy
import logging
import math
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer as Backend

from unialign_jax.data.caches import ENCODE_COMMAND, Cache, find_cache, size_name
from unialign_jax.data.images import decode_filled
from unialign_jax.data.kinds import find_kind
from unialign_jax.data.records import CAPTION_COMMAND, Record, RecordError, open_records
from unialign_jax.data.tokenizer import Tokenizer, tokenize

_log = logging.getLogger(__name__)

TEACHER_TOKENS = 512  # of a text that a teacher reads; the rest is cut
MAX_NEIGHBOURS = 256  # if as many records in a row cannot be decoded, the data set is broken


@dataclass(frozen=True)
class StreamConfig:
    """One stream of training data.

    Attributes:
      name: unique in a mixture; seeds the stream's order.
      kind: a key of `kinds.KINDS`; must be the folder's.
      path: the data folder.
      weight: share of the batches, relative to the other streams; 0 switches the stream off.
      num_conditions: K, condition images per example: 0 for a kind without any, else at least 1.
      image_size: height and width of all images, in pixels.
      bucket: (height, width) of all images in place of image_size; () without buckets.
      text_length: L, tokens per text.
      use_teacher: hand out teacher features: those cached in the folder, or else the records' own.
      use_latents: hand out the autoencoder's moments cached in the folder in place of images.
      teacher_cell: pixels a side of the cells of the teacher's grid that is handed out with its features; 0 for none.
    """

    name: str
    kind: str
    path: str
    weight: float = 1.0
    num_conditions: int = 0
    image_size: int = 64
    text_length: int = 48
    bucket: tuple[int, ...] = ()
    use_teacher: bool = True
    use_latents: bool = False
    teacher_cell: int = 0

    def __post_init__(self):
        try:
            kind = find_kind(self.kind)
        except ValueError as error:
            raise ValueError(f"stream {self.name}: {error}") from None
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"stream {self.name}: weight is {self.weight}, expected a finite number of at least 0")
        if (kind.num_conditions > 0) != (self.num_conditions > 0):
            expected = "at least 1" if kind.num_conditions else "0"
            raise ValueError(
                f"stream {self.name}: num_conditions is {self.num_conditions}, expected {expected} for {self.kind}"
            )
        if self.image_size < 1 or self.text_length < 2:
            raise ValueError(
                f"stream {self.name}: image_size {self.image_size} and text_length {self.text_length}, "
                "expected at least 1 and 2"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return tuple(self.bucket) or (self.image_size, self.image_size)


class Stream:
    """A data folder as a sequence of examples: `len(stream)`, `stream[index] -> dict of arrays`.

    An example, with H, W the size, K = num_conditions, L = text_length and T the teacher's width:

        image           uint8   [H, W, 3]     the target image
        conditions      uint8   [K, H, W, 3]  absent when K is 0
        prompt_ids      int32   [L]           input of the image pass: caption or instruction; all EOS for a question
        text_ids        int32   [L]           text that the text pass denoises: the caption, or "Q: ... A: ..."
        text_is_target  bool    [L]           where the text pass may mask: everywhere, or the answer and its padding
        teacher_image   float16 [T]           absent without teacher features
        teacher_text    float16 [T]
        teacher_grid    float16 [P, T]        with `teacher_cell`: a vector for each cell of the image, row by row
        teacher_ids       int32 [512]         with a teacher's tokenizer, in place of the features: the text pass's text
        teacher_is_token  bool  [512]
        replaced        bool    []            whether another record replaces one that cannot be decoded

    With `use_latents` the images are absent, and there are, with latents of [h, w, C],

        image_moments      float16 [h, w, 2C]     mean and log variance of the target's raw latents
        condition_moments  float16 [K, h, w, 2C]  absent when K is 0

    `stream[index]` is a pure function of the index, and safe in threads. A damaged record is replaced by the next sound
    one (cyclically), and logged once, by key.
    """

    def __init__(self, config: StreamConfig, tokenizer: Tokenizer, teacher_tokenizer: Backend | None = None):
        """Opens the folder.

        Args:
          teacher_tokenizer: for a teacher that runs in the train step; examples then have the text as its ids.

        Raises as `records.read_metadata` does, and ValueError for records of another kind or without captions; messages
        name the stream.
        """
        self.config = config
        self.tokenizer = tokenizer
        try:
            self.records = open_records(config.path)
        except (ValueError, OSError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"stream {config.name}: {error}") from None
        found = self.records.metadata.kind
        if found != config.kind:
            raise ValueError(
                f"stream {config.name}: {config.path} holds {found} records, the stream's kind is {config.kind}"
            )
        missing = self.records.metadata.parameters.get("without_caption")
        if missing and "caption" in find_kind(config.kind).fields:
            raise ValueError(
                f"stream {config.name}: {missing} of the {len(self.records)} records of {config.path} have no caption: "
                f"write them by `{CAPTION_COMMAND} --input={config.path} --endpoint=URL --model=NAME`"
            )
        self.teacher_tokenizer = teacher_tokenizer
        use_features = config.use_teacher and teacher_tokenizer is None
        self._teacher = self._open_cache("teacher") if use_features else None
        self._latents = self._open_cache("latents") if config.use_latents else None
        if config.use_latents and self._latents is None:
            raise ValueError(f"stream {config.name}: {config.path} has no cached latents, see `{ENCODE_COMMAND}`")
        if config.teacher_cell and use_features and self._teacher is None:
            raise ValueError(
                f"stream {config.name}: {config.path} has no grid of teacher features; store one by `prepare_data.py "
                f"encode --teacher-grid={config.teacher_cell}`, or set teacher.grid to 0"
            )
        self._indices = range(len(self.records))  # which of the records the examples are made of
        self._logged: set[int] = set()

    def _open_cache(self, name: str) -> Cache | None:
        config = self.config
        try:
            cache = find_cache(config.path, name, leave_out=() if config.teacher_cell else ("teacher_grid",))
        except ValueError as error:
            raise ValueError(f"stream {config.name}: {error}") from None
        if cache is None:
            return None
        found = cache.description
        if found.size != config.size:
            raise ValueError(
                f"stream {config.name}: {cache.directory} was made of images of {size_name(found.size)} pixels, the "
                f"stream has {size_name(config.size)}: encode again, see `{ENCODE_COMMAND}`"
            )
        cell = found.options.get("cell", 0)
        if name == "teacher" and config.teacher_cell not in (0, cell):
            has = f"a grid with cells of {cell} pixels" if cell else "no grid"
            raise ValueError(
                f"stream {config.name}: {cache.directory} has {has}, teacher.grid is {config.teacher_cell}: encode "
                f"again with --teacher-grid={config.teacher_cell}, see `{ENCODE_COMMAND}`"
            )
        count = found.arrays.get("condition_moments", (0,))[0]
        if name == "latents" and count != config.num_conditions:
            raise ValueError(
                f"stream {config.name}: {cache.directory} has {count} conditions of each record, the stream has "
                f"num_conditions {config.num_conditions}: encode again, see `{ENCODE_COMMAND}`"
            )
        return cache

    @property
    def networks(self) -> dict[str, str]:
        """Cache -> what identifies the network that made it, of the caches that examples come from."""
        caches = {"teacher": self._teacher, "latents": self._latents}
        return {name: cache.description.network for name, cache in caches.items() if cache is not None}

    def with_images(self) -> "Stream":
        """The same records with their images, whatever the stream caches."""
        copied = copy.copy(self)
        copied._latents = None
        return copied

    def part(self, start: int, stop: int) -> "Stream":
        """The stream of examples `start` to `stop` (exclusive). Replacements of damaged records come from inside it.

        Raises ValueError for an empty part, and for one outside of the stream.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"stream {self.config.name}: part {start} to {stop}, expected some of 0 to {len(self)}")
        part = copy.copy(self)
        part._indices, part._logged = self._indices[start:stop], set()
        return part

    @property
    def teacher_width(self) -> int:
        """T, or 0 when examples carry no teacher features."""
        if self._teacher is not None:
            return self._teacher.description.arrays["teacher_image"][-1]
        has_features = self.config.use_teacher and self.teacher_tokenizer is None
        return self.records.metadata.teacher_width if has_features else 0

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The example at `index`.

        Raises IndexError outside of [0, len), and ValueError when neither the record nor the next MAX_NEIGHBOURS can be
        decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of stream {self.config.name}: expected 0 to {len(self) - 1}")
        for offset in range(min(len(self), MAX_NEIGHBOURS + 1)):
            candidate = (index + offset) % len(self)
            try:
                example = self.load(candidate)
            except RecordError as error:
                self._log_once(candidate, error)
                last_error = error
            else:
                example["replaced"] = np.array(offset > 0)
                return example
        raise ValueError(
            f"stream {self.config.name}: record {self._indices[index]} of {self.config.path} and the {offset} after it "
            f"cannot be decoded: write the folder again (last error: {last_error})"
        )

    def load(self, index: int) -> dict[str, np.ndarray]:
        """The example at `index` without `replaced`. Raises RecordError when the record cannot be decoded."""
        config, number = self.config, self._indices[index]
        record = self.records[number]
        try:
            example = _cached(self._latents, number) if self._latents is not None else self._decode(record)
            if self._teacher is not None:
                example |= _cached(self._teacher, number)
            elif self.teacher_width:
                example |= {"teacher_image": record.teacher_image, "teacher_text": record.teacher_text}
            elif self.teacher_tokenizer is not None:
                example |= teacher_tokens(self.teacher_tokenizer, taught_text(record, config.kind))
        except RecordError as error:
            raise RecordError(f"key {record.key!r}: {error}") from error
        return example | encode_texts(record, config.kind, self.tokenizer, config.text_length)

    def _decode(self, record: Record) -> dict[str, np.ndarray]:
        config = self.config
        example = {"image": decode_image(record.image, *config.size)}
        if config.num_conditions:
            references = [decode_image(data, *config.size) for data in record.conditions[: config.num_conditions]]
            if not references:
                raise RecordError("it has no condition image")
            # Fewer references than K: its own, repeated in turn.
            example["conditions"] = np.stack([references[i % len(references)] for i in range(config.num_conditions)])
        return example

    def _log_once(self, index: int, error: RecordError) -> None:
        if index not in self._logged:
            self._logged.add(index)
            _log.warning(
                "stream %s: record %d cannot be decoded, a neighbour stands in (%s)",
                self.config.name,
                self._indices[index],
                error,
            )

    def __repr__(self) -> str:
        return f"Stream({self.config.name!r}, kind={self.config.kind!r}, records={len(self)})"


def _cached(cache: Cache, index: int) -> dict[str, np.ndarray]:
    found = cache[index]
    if found is None:
        raise RecordError("it could not be decoded when it was encoded")
    return found


def decode_image(data: bytes, height: int, width: int) -> np.ndarray:
    """PNG or JPEG bytes as uint8 [height, width, 3]: RGB, resized (bicubic) to just cover that, centre crop.

    The reference's training transform (Resize, CenterCrop), except that the camera's rotation tag is applied,
    transparent pixels become white, and grey of 16 bits is scaled (see `images.to_rgb`). Raises RecordError when the
    bytes are not a whole image.
    """
    try:
        return decode_filled(data, f"image of {len(data)} bytes", height, width)
    except ValueError as error:
        raise RecordError(str(error)) from None


def encode_texts(record: Record, kind: str, tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """prompt_ids int32 [L], text_ids int32 [L] and text_is_target bool [L] of one record (see `Stream`)."""
    asked = find_kind(kind).prompt
    if asked == "question":
        text_ids, is_target = encode_question(record.question, record.answer, tokenizer, length)
        prompt_ids = np.full(length, tokenizer.eos_id, dtype=np.int32)
    else:
        text_ids = tokenizer.encode(record.caption, length)
        is_target = np.ones(length, dtype=bool)
        prompt_ids = text_ids.copy() if asked == "caption" else tokenizer.encode(getattr(record, asked), length)
    return {"prompt_ids": prompt_ids, "text_ids": text_ids, "text_is_target": is_target}


def taught_text(record: Record, kind: str) -> str:
    """The text that a teacher reads of a record: all that the text pass reads, unmasked."""
    if find_kind(kind).prompt == "question":
        return f"Q: {record.question} A: {record.answer}"
    return record.caption


def teacher_tokens(tokenizer: Backend, text: str) -> dict[str, np.ndarray]:
    """A text as a teacher reads it: ids int32 [TEACHER_TOKENS], and where they are tokens, bool [TEACHER_TOKENS]."""
    ids, is_token = tokenize(tokenizer, [text], TEACHER_TOKENS)
    return {"teacher_ids": ids[0], "teacher_is_token": is_token[0]}


def encode_question(question: str, answer: str, tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """ "Q: {question} A: {answer}" as ids int32 [L], and a mask bool [L] that is true in the answer and the padding.

    Source: the reference's VQA training format, with an EOS after the answer and none after the prefix. Long texts are
    cut by `fit_question`. With an empty answer the result is the prompt for asking the question.
    """
    prefix = tokenizer.token_ids(f"Q: {question} A: ")
    answer_ids = tokenizer.token_ids(answer) if answer else []
    prefix, answer_ids = fit_question(prefix, answer_ids, tokenizer.token_ids("A: "), length)
    ids = np.full(length, tokenizer.eos_id, dtype=np.int32)
    ids[: len(prefix)] = prefix
    ids[len(prefix) : len(prefix) + len(answer_ids)] = answer_ids
    return ids, np.arange(length) >= len(prefix)


def fit_question(prefix: list, answer: list, ending: list, length: int) -> tuple[list, list]:
    """The ids of a question, which end in `ending` ("A: "), and of its answer, cut to fit into `length` with one EOS.

    If they do not fit, a text that is longer than half of the room is cut, down to half if necessary. A question loses
    its middle, so that its beginning, its end and `ending` stay. An answer loses its end.
    """
    room = length - 1
    kept = min(len(prefix), max(room - len(answer), room // 2))
    if kept < len(prefix):
        inner = max(0, kept - len(ending))
        body = prefix[: len(prefix) - len(ending)]
        prefix = (body[: inner - inner // 2] + body[len(body) - inner // 2 :] + ending)[:kept]
    return prefix, answer[: room - kept]
