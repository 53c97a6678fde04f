"""The packaged tokenizer's layout and round trips; T5 folders against transformers."""

import io
import json
import string
import struct
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from unialign_jax.data.shapes import train_tokenizer
from unialign_jax.data.shapes.tasks import shapes_texts
from unialign_jax.data.tokenizer import Tokenizer, clean_up, load_tokenizer

PIECES = ["▁the", "▁a", "▁cat", "▁dog", "▁sat", "▁on", "▁mat", "s", "ing", "▁", ".", ",", "?", ":", *"abcdefgQA"]
TEXTS = ["the cat sat on a mat.", "Q: dogs? A: ", "  the   cats, the\ndog ", "a bad cab: é", ""]


@pytest.fixture(scope="module")
def shapes_tokenizer():
    return load_tokenizer()


UNK = 2  # in T5's layout


def t5_pieces():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return vocab + [(piece, -2.0 - 0.1 * i) for i, piece in enumerate(PIECES)]


@pytest.fixture
def t5_folder(tmp_path):
    """A small folder in the form that T5's tokenizers are published in."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    backend = tokenizers.Tokenizer(models.Unigram(t5_pieces() + [(s, 0.0) for s in sentinels], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    backend.enable_truncation(4)  # as some published folders do; must not be obeyed
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    return tmp_path


def test_shapes_layout(shapes_tokenizer):
    tokenizer = shapes_tokenizer
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size <= 512
    backend = tokenizer._backend
    for i in range(100):
        assert backend.token_to_id(f"<extra_id_{i}>") == tokenizer.vocab_size - 1 - i
    assert tokenizer.mask_id == tokenizer.vocab_size - 1


def test_shapes_texts_are_short_and_known(shapes_tokenizer):
    for text in shapes_texts(200):
        ids = shapes_tokenizer.token_ids(text)
        assert len(ids) <= 31, text
        assert UNK not in ids
        assert shapes_tokenizer.decode(ids) == text


def test_any_english_text_survives(shapes_tokenizer):
    printable = "".join(sorted(set(string.printable) - set(string.whitespace)))
    for text in [printable, "Hello, World! It's 50% off (really) at $3 & <b>more</b>.", "x" * 100, "A b C"]:
        ids = shapes_tokenizer.token_ids(text)
        assert UNK not in ids
        assert shapes_tokenizer.decode(ids) == text
    assert shapes_tokenizer.decode(shapes_tokenizer.token_ids(" two  spaces\nand a line ")) == "two spaces and a line"
    assert UNK in shapes_tokenizer.token_ids("猫")


def test_the_packaged_file_is_what_the_script_makes(shapes_tokenizer):
    made = json.loads(train_tokenizer.train_shapes_tokenizer().to_str())
    packaged = json.loads(shapes_tokenizer._backend.to_str())
    assert made["model"]["vocab"] == packaged["model"]["vocab"], (
        "the world's words changed: run `python -m unialign_jax.data.shapes.train_tokenizer` and commit the file"
    )
    assert made["added_tokens"] == packaged["added_tokens"]


def test_encode_pads_and_cuts(shapes_tokenizer):
    tokenizer = shapes_tokenizer
    ids = tokenizer.encode("a red star", 6)
    assert ids.dtype == np.int32
    assert ids.tolist() == [*tokenizer.token_ids("a red star"), 1, 1, 1]
    assert tokenizer.encode("a red star", 3).tolist() == [*tokenizer.token_ids("a red"), 1]
    assert tokenizer.encode("", 2).tolist() == [1, 1]
    with pytest.raises(ValueError, match="length is 0"):
        tokenizer.encode("a", 0)


def test_decode_stops_at_eos_and_drops_sentinels(shapes_tokenizer):
    tokenizer = shapes_tokenizer
    red, star = tokenizer.token_ids("red star")
    mask = tokenizer.mask_id
    assert tokenizer.decode([mask, red, mask - 5, star, 0, 1, red]) == "red star"
    assert tokenizer.decode(np.array([1, red], np.int32)) == ""
    assert tokenizer.decode([red, 5000, star]) == "red star"  # rows of an embedding table beyond the vocabulary


def test_save_and_load(shapes_tokenizer, tmp_path):
    shapes_tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert again.token_ids("a large red star!") == shapes_tokenizer.token_ids("a large red star!")
    assert again.mask_id == shapes_tokenizer.mask_id


def test_t5_folder_equals_transformers(t5_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(t5_folder)
    ours = load_tokenizer(t5_folder)
    assert ours.vocab_size == len(theirs)
    assert ours.mask_id == theirs.convert_tokens_to_ids("<extra_id_0>") == ours.vocab_size - 1
    assert (ours.eos_id, ours.pad_id, UNK) == (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=True, truncation=False, padding=False).input_ids
        assert [*ours.token_ids(text), ours.eos_id] == expected, text
        padded = (expected + [ours.eos_id] * 24)[:24]
        assert ours.encode(text, 24).tolist() == padded
        assert ours.decode(expected) == theirs.decode(expected).replace("</s>", "").rstrip(" ")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It is n't , he 's", "It isn't, he's"),
        ("I 'm here . You 're there ! They 've gone ?", "I'm here. You're there! They've gone?"),
        ("a dog ' s life", "a dog's life"),
        ("it isn't, he's 5.5 .5", "it isn't, he's 5.5.5"),
        (" . , a", "., a"),
        ('nothing to do: "a" - b ;', 'nothing to do: "a" - b ;'),
    ],
)
def test_spaces_are_cleaned_up_as_by_transformers(shapes_tokenizer, t5_folder, text, expected):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(t5_folder)
    assert clean_up(text) == theirs.clean_up_tokenization(text) == expected
    ids = shapes_tokenizer.token_ids(text)
    assert shapes_tokenizer.decode(ids) == clean_up(shapes_tokenizer._backend.decode(ids))


def test_spiece_only_folder(t5_folder, monkeypatch):
    pytest.importorskip("sentencepiece")
    (t5_folder / "spiece.model").write_bytes(sentencepiece_model(t5_pieces()))
    from_json = load_tokenizer(t5_folder)
    (t5_folder / "tokenizer.json").unlink()
    # What transformers' AutoTokenizer would ask about and, told "y", run.
    marker = t5_folder / "ran"
    (t5_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (t5_folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    from_spiece = load_tokenizer(t5_folder)
    assert not marker.exists() and sys.stdin.tell() == 0
    assert from_spiece.mask_id == from_json.mask_id
    for text in TEXTS:
        assert from_spiece.token_ids(text) == from_json.token_ids(text)


def sentencepiece_model(pieces) -> bytes:
    """A serialized sentencepiece ModelProto: pieces (field 1), trainer (2) and normalizer (3) settings."""

    def message(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def varint(number, value):
        bits = value & (2**64 - 1)
        out = bytearray([*divmod(number << 3, 128)[::-1]] if number >= 16 else [number << 3])
        if number >= 16:
            out[0] |= 0x80
        while bits >= 128:
            out.append(bits & 0x7F | 0x80)
            bits >>= 7
        return bytes(out) + bytes([bits])

    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    model = b""
    for piece, score in pieces:
        content = message(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + varint(3, kinds.get(piece, 1))
        model += message(1, content)
    model += message(2, varint(3, 1) + varint(40, 2) + varint(41, -1) + varint(42, 1) + varint(43, 0))
    return model + message(3, message(1, b"identity") + varint(3, 1) + varint(4, 1))


def test_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no tokenizer: expected tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has no </s>, <pad>, <unk>, <extra_id_0>: expected a T5 tokenizer"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "words")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="spiece.model"):
        load_tokenizer(tmp_path)
