"""Text to token ids and back: one class for the `shapes` tokenizer and T5's; and the teacher's tokenizer."""

import importlib.resources
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from unialign_jax.files import check_regular, first_line

NUM_SENTINELS = 100
MAX_TOKENIZER_FILE = 2**26  # bytes; T5's tokenizer.json has 2.4 million, Qwen's 7 million
TEACHER_PAD = "<|endoftext|>"  # Qwen's
_SHAPES_FILE = "shapes/tokenizer.json"  # of this folder


class Tokenizer:
    """Token ids in T5's layout: pad 0, eos 1, unk 2, the 100 sentinels last, `<extra_id_0>` the very last.

    Texts are padded with EOS, and `<extra_id_0>` is the mask token of the text diffusion process.

    Attributes:
      eos_id, pad_id, mask_id: special ids.
      vocab_size: number of ids, all of them predictable (32100 for T5; the embedding table may have more rows).
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        """`name` is for messages. The backend's own truncation and padding are switched off."""
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = backend.get_vocab_size()
        special = {token: backend.token_to_id(token) for token in ("</s>", "<pad>", "<unk>", "<extra_id_0>")}
        missing = [token for token, token_id in special.items() if token_id is None]
        if missing:
            raise ValueError(f"{name} has no {', '.join(missing)}: expected a T5 tokenizer")
        self.eos_id, self.pad_id, _, self.mask_id = special.values()
        if self.mask_id != self.vocab_size - 1:
            raise ValueError(
                f"{name} has <extra_id_0> at id {self.mask_id} of {self.vocab_size}: "
                "expected T5's layout, where it is the last"
            )
        sentinels = {backend.token_to_id(f"<extra_id_{i}>") for i in range(NUM_SENTINELS)} - {None}
        self._hidden_ids = sentinels | {self.pad_id, self.eos_id}

    def token_ids(self, text: str) -> list[int]:
        """The ids of `text`, without EOS and padding, of any length."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, length: int) -> np.ndarray:
        """`text` as int32 [length]: cut to length - 1, then padded with EOS."""
        if length < 1:
            raise ValueError(f"length is {length}: expected at least 1")
        ids = self.token_ids(text)[: length - 1]
        padded = np.full(length, self.eos_id, dtype=np.int32)
        padded[: len(ids)] = ids
        return padded

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text up to the first EOS, without pads and sentinels, its spaces changed by `clean_up`."""
        kept = []
        for token_id in np.asarray(ids).tolist():
            if token_id == self.eos_id:
                break
            if token_id not in self._hidden_ids and 0 <= token_id < self.vocab_size:
                kept.append(token_id)
        return clean_up(self._backend.decode(kept, skip_special_tokens=False))

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` into a folder that `load_tokenizer` (and transformers) can read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))


def clean_up(text: str) -> str:
    """ "It is n't , he 's" -> "It isn't, he's", as T5's tokenizer cleans up a decoded text in the released code.

    (It is transformers' `clean_up_tokenization_spaces`, which was on by default.) Corpora of captions separate words in
    this way, and so does a model trained on them. Training texts are not changed.
    """
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


def load_tokenizer(path: str | os.PathLike | None = None) -> Tokenizer:
    """The packaged `shapes` tokenizer (None), or the one in a T5 tokenizer folder.

    One file of a folder is read: `tokenizer.json` by `tokenizers`, or else `spiece.model` by transformers' T5. Code and
    names of classes beside it are never used, and nothing is downloaded. Raises FileNotFoundError when the folder
    has neither file, and ValueError when the file cannot be read or is not a T5 tokenizer.
    """
    if path is None:
        packaged = importlib.resources.files("unialign_jax.data").joinpath(_SHAPES_FILE)
        return Tokenizer(tokenizers.Tokenizer.from_str(packaged.read_text(encoding="utf-8")), _SHAPES_FILE)
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected the folder of tokenizer.json (or spiece.model)")
    file = folder / "tokenizer.json"
    if os.path.lexists(file):
        return Tokenizer(load_backend(folder), str(file))
    file = folder / "spiece.model"
    if os.path.lexists(file):
        return Tokenizer(_load_sentencepiece(file), str(file))
    raise FileNotFoundError(f"{folder} holds no tokenizer: expected tokenizer.json (or spiece.model) of a T5 tokenizer")


def load_backend(folder: str | os.PathLike) -> tokenizers.Tokenizer:
    """A folder's `tokenizer.json` of any model, such as the teacher's; its own truncation and padding are switched off.

    Raises FileNotFoundError when there is none, ValueError when it cannot be read.
    """
    file = Path(folder) / "tokenizer.json"
    check_regular(file, MAX_TOKENIZER_FILE)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # tokenizers raises bare Exception, and a panic of its own that is not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{file} cannot be read as a tokenizer: {first_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenize(
    backend: tokenizers.Tokenizer, texts: Iterable[str], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as the teacher reads them: (ids int32 [B, L], is_token bool [B, L]), padded at the end, no special tokens.

    Args:
      length: L, to which longer texts are cut; that of the longest text when None.
    """
    pad = backend.token_to_id(TEACHER_PAD) or 0
    encoded = [encoding.ids[:length] for encoding in backend.encode_batch(list(texts))]
    longest = max(map(len, encoded), default=0) if length is None else length
    ids = np.full((len(encoded), longest), pad, np.int32)
    is_token = np.arange(longest) < np.array([len(each) for each in encoded])[:, None]
    ids[is_token] = [token for each in encoded for token in each]
    return ids, is_token


def _load_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    check_regular(file, MAX_TOKENIZER_FILE)
    try:
        import sentencepiece  # noqa: F401 (transformers reads the file with it)
        import transformers
    except ImportError:
        raise ValueError(
            f"{file} needs two packages: `pip install transformers sentencepiece`, or put a tokenizer.json beside it"
        ) from None
    with tempfile.TemporaryDirectory() as alone:  # so that transformers sees no settings and no code
        shutil.copyfile(file, Path(alone) / "spiece.model")
        try:
            tokenizer = transformers.T5TokenizerFast.from_pretrained(
                alone, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ValueError(f"{file} cannot be read by transformers: {first_line(error)}") from None
    return tokenizer.backend_tokenizer
