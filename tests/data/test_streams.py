"""Streams: images and texts as the contract says, damaged records replaced and told."""

import io
import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data import streams as streams_lib
from unialign_jax.data.records import Record, RecordError, write_records
from unialign_jax.data.shapes.tasks import shapes_example, write_shapes
from unialign_jax.data.streams import Stream, StreamConfig, decode_image, encode_question
from unialign_jax.data.tokenizer import load_tokenizer

CONDITIONS = {"text_to_image": 0, "edit": 1, "perception": 1, "personalization": 3, "vqa": 0}
L = 32


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    write_shapes(path, 12, teacher_width=16)
    return path


def open_stream(world, kind, tokenizer, **changes):
    options = {"num_conditions": CONDITIONS[kind], "image_size": 64, "text_length": L} | changes
    return Stream(StreamConfig(kind, kind, str(world / kind), **options), tokenizer)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CONDITIONS)
def test_examples(world, tokenizer, kind):
    stream = open_stream(world, kind, tokenizer)
    assert len(stream) == 12
    for index in range(12):
        example, truth = stream[index], shapes_example(kind, 0, index)
        shapes = {name: (value.dtype.name, value.shape) for name, value in example.items()}
        expected = {
            "image": ("uint8", (64, 64, 3)),
            "conditions": ("uint8", (CONDITIONS[kind], 64, 64, 3)),
            "prompt_ids": ("int32", (L,)),
            "text_ids": ("int32", (L,)),
            "text_is_target": ("bool", (L,)),
            "teacher_image": ("float16", (16,)),
            "teacher_text": ("float16", (16,)),
            "replaced": ("bool", ()),
        }
        if not CONDITIONS[kind]:
            del expected["conditions"]
        assert shapes == expected
        assert not example["replaced"]
        np.testing.assert_array_equal(example["image"], truth.image)
        for k in range(CONDITIONS[kind]):
            np.testing.assert_array_equal(example["conditions"][k], truth.conditions[k % len(truth.conditions)])
        if kind == "vqa":
            assert (example["prompt_ids"] == tokenizer.eos_id).all()
            assert tokenizer.decode(example["text_ids"]) == f"Q: {truth.question} A: {truth.answer}"
            assert tokenizer.decode(example["text_ids"][example["text_is_target"]]) == truth.answer
            continue
        assert tokenizer.decode(example["text_ids"]) == truth.caption
        assert example["text_is_target"].all()
        prompt = truth.caption if kind == "text_to_image" else truth.instruction
        assert tokenizer.decode(example["prompt_ids"]) == prompt


def test_teacher_can_be_switched_off(world, tokenizer):
    stream = open_stream(world, "vqa", tokenizer, use_teacher=False)
    assert stream.teacher_width == 0 and not {"teacher_image", "teacher_text"} & set(stream[0])
    assert open_stream(world, "vqa", tokenizer).teacher_width == 16


def test_question_and_answer(tokenizer):
    ids, is_target = encode_question("what color is it?", "blue", tokenizer, 16)
    prefix = tokenizer.token_ids("Q: what color is it? A: ")
    answer = tokenizer.token_ids("blue")
    assert tokenizer.eos_id not in prefix
    assert ids.tolist() == prefix + answer + [1] * (16 - len(prefix) - len(answer))
    assert is_target.tolist() == [False] * len(prefix) + [True] * (16 - len(prefix))
    # No room: of a long question the middle goes; both ends, "A:", the answer and one EOS stay.
    ids, is_target = encode_question("is there a red " + "red " * 50 + "star?", "no", tokenizer, 16)
    kept = ids[~is_target].tolist()
    assert len(kept) == 14 and tokenizer.decode(kept) == "Q: is there a red red red red red star? A:"
    assert ids[is_target].tolist() == [*tokenizer.token_ids("no"), 1]
    # A long answer is cut, and still ends; the question stays.
    ids, is_target = encode_question("what?", "red " * 50, tokenizer, 16)
    assert ids[-1] == tokenizer.eos_id and tokenizer.decode(ids[~is_target]) == "Q: what? A:"
    assert (ids == tokenizer.token_ids("red")[0]).sum() == 15 - len(tokenizer.token_ids("Q: what? A: "))
    # Both are long: half each.
    ids, is_target = encode_question("blue " * 50, "red " * 50, tokenizer, 21)
    assert (~is_target).sum() == 10 and (ids == tokenizer.token_ids("red")[0]).sum() == 10
    # Asking: everything after the prefix is open.
    ids, is_target = encode_question("what color is it?", "", tokenizer, 16)
    assert (ids[is_target] == 1).all() and is_target.sum() == 16 - len(prefix)


def test_long_captions_are_cut_and_end(tmp_path, tokenizer):
    record = Record("k", encode(np.zeros((8, 8, 3), np.uint8)), caption="red " * 40)
    write_records(tmp_path / "d", [record], kind="text_to_image")
    config = StreamConfig("t", "text_to_image", str(tmp_path / "d"), image_size=8, text_length=10)
    example = Stream(config, tokenizer)[0]
    red = tokenizer.token_ids("red")
    assert example["text_ids"].tolist() == red * 9 + [1]
    assert "teacher_image" not in example


@pytest.mark.parametrize("width, height", [(64, 64), (100, 40), (33, 70), (64, 65), (640, 333)])
def test_resize_and_crop_as_torchvision(width, height):
    """Resize(shorter side, bicubic, antialias) then CenterCrop, as torchvision does on PIL images."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = 64
    # torchvision.transforms.functional: _compute_resized_output_size, then center_crop.
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    resized = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = int(round((new_height - size) / 2.0)), int(round((new_width - size) / 2.0))
    expected = resized[top : top + size, left : left + size]
    np.testing.assert_array_equal(decode_image(encode(pixels), size, size), expected)


def test_image_modes():
    gray = Image.fromarray(np.full((10, 10), 90, np.uint8))
    assert (decode_image(encode(gray), 10, 10) == 90).all()
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert (decode_image(encode(clear), 10, 10) == 255).all(), "transparent shows white"
    palette = Image.new("RGB", (10, 10), (0, 0, 255)).quantize(4)
    assert (decode_image(encode(palette), 10, 10) == (0, 0, 255)).all()
    cmyk = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    assert np.abs(decode_image(encode(cmyk, "JPEG", quality=100), 16, 16).astype(int) - (200, 30, 30)).max() < 4
    deep = Image.fromarray(np.full((10, 10), 30000, np.uint16))
    assert decode_image(encode(deep), 10, 10).shape == (10, 10, 3)
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    turned = decode_image(encode(half, "JPEG", exif=exif, quality=100), 16, 16)
    assert turned[:6].max() < 20 and turned[10:].min() > 235


@pytest.mark.parametrize("damage", ["empty", "text", "half PNG", "half JPEG"])
def test_damaged_images_raise_record_error(damage):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = {"empty": b"", "text": b"<html>404</html>", "half PNG": encode(pixels), "half JPEG": encode(pixels, "JPEG")}
    broken = data[damage][: len(data[damage]) // 2] if "half" in damage else data[damage]
    with pytest.raises(RecordError, match=f"image of {len(broken)} bytes cannot be decoded"):
        decode_image(broken, 32, 32)


def test_damaged_records_are_replaced_flagged_and_logged(tmp_path, tokenizer, caplog):
    def records():
        for i in range(10):
            data = encode(np.full((8, 8, 3), 20 * i, np.uint8))
            condition = encode(np.full((8, 8, 3), 20 * i + 1, np.uint8))
            if i in (3, 4, 9):
                data = data[:40]
            if i == 6:
                condition = b"nonsense"
            yield Record(f"key{i}", data, (condition,), caption="a", instruction="b")

    write_records(tmp_path / "d", records(), kind="edit")
    config = StreamConfig("my_edits", "edit", str(tmp_path / "d"), num_conditions=1, image_size=8, text_length=4)
    stream = Stream(config, tokenizer)
    stands_in = {3: 5, 4: 5, 9: 0, 6: 7}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for i in range(10):
                example = stream[i]
                source = stands_in.get(i, i)
                assert bool(example["replaced"]) == (i in stands_in)
                assert (example["image"] == 20 * source).all()
                assert (example["conditions"] == 20 * source + 1).all(), "nothing is mixed from two records"
    messages = [record.getMessage() for record in caplog.records if record.name == streams_lib.__name__]
    assert len(messages) == 4, "once for each damaged record"
    for index in stands_in:
        assert any(f"stream my_edits: record {index} " in m and f"'key{index}'" in m for m in messages)


def test_all_damaged_is_an_error(tmp_path, tokenizer):
    write_records(tmp_path / "d", [Record(f"k{i}", b"junk", caption="a") for i in range(3)], kind="text_to_image")
    stream = Stream(StreamConfig("t", "text_to_image", str(tmp_path / "d")), tokenizer)
    with pytest.raises(ValueError, match="stream t: record 1 of .* and the 2 after it cannot be decoded"):
        stream[1]
    with pytest.raises(IndexError, match="expected 0 to 2"):
        stream[3]


def test_bad_configurations(world, tokenizer):
    with pytest.raises(ValueError, match="s: unknown kind 'audio', expected one of text_to_image, edit"):
        StreamConfig("s", "audio", "x")
    with pytest.raises(ValueError, match="s: weight is -1"):
        StreamConfig("s", "vqa", "x", weight=-1)
    with pytest.raises(ValueError, match="s: weight is nan"):
        StreamConfig("s", "vqa", "x", weight=float("nan"))
    with pytest.raises(ValueError, match="num_conditions is 0, expected at least 1 for edit"):
        StreamConfig("s", "edit", "x")
    with pytest.raises(ValueError, match="num_conditions is 2, expected 0 for vqa"):
        StreamConfig("s", "vqa", "x", num_conditions=2)
    with pytest.raises(ValueError, match="text_length 1"):
        StreamConfig("s", "vqa", "x", text_length=1)
    with pytest.raises(ValueError, match="holds vqa records, the stream's kind is text_to_image"):
        Stream(StreamConfig("s", "text_to_image", str(world / "vqa")), tokenizer)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Stream(StreamConfig("s", "vqa", str(world / "absent")), tokenizer)


@pytest.mark.parametrize("length", range(2, 24))
def test_a_question_is_never_lost(tokenizer, length):
    """At any length and of any two texts: an EOS at the end, the answer's begin, and a fair share of the question."""
    for question_length, answer_length in itertools.product((1, 5, 12, 40), (0, 1, 9, 40)):
        question, answer = "blue " * question_length, "red " * answer_length
        prefix = tokenizer.token_ids(f"Q: {question} A: ")
        ids, is_target = encode_question(question, answer, tokenizer, length)
        kept, said = (~is_target).sum(), (ids == tokenizer.token_ids("red")[0]).sum()
        assert ids[-1] == tokenizer.eos_id and is_target[-1]
        assert (np.diff(is_target.astype(int)) >= 0).all(), "first the question, then the answer"
        assert kept >= min(len(prefix), (length - 1) // 2) and said >= min(answer_length, (length - 1) // 2)
        if len(prefix) + answer_length < length:
            assert (kept, said) == (len(prefix), answer_length)
        else:
            assert kept + said == length - 1, "no room is wasted"
