"""What people's folders hold beside sound pictures: each handled as docs/data.md says, and counted by its reason."""

import io
import json
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.streams import decode_image

GREY = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)


def saved(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_of(width, height):
    """A PNG whose header promises a size and whose data are a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def frames(image_format, count=3):
    images = [Image.new("RGB", (64, 48), (60 * n, 0, 0)) for n in range(count)]
    return saved(images[0], image_format, save_all=True, append_images=images[1:])


def rotated(picture):
    image = Image.open(io.BytesIO(picture(5)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "JPEG", exif=exif)


def images(picture):
    """name -> (its bytes, the reason that it is rejected for, or None)."""
    layer = Image.new("RGBA", (64, 48), (255, 0, 0, 0))
    palette = layer.convert("P")
    palette.info["transparency"] = 0
    return {
        "truncated.jpg": (picture(1)[:300], "image cannot be decoded"),
        "half.png": (picture(1, "PNG")[:200], "image cannot be decoded"),
        "zero.jpg": (b"", "image cannot be decoded"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "image cannot be decoded"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image cannot be decoded"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image cannot be decoded"),
        "noise.jpg": (np.random.default_rng(0).bytes(5000), "image cannot be decoded"),
        "one_pixel.png": (saved(Image.new("RGB", (1, 1)), "PNG"), "image too small"),
        "small.png": (saved(Image.new("RGB", (31, 64)), "PNG"), "image too small"),
        "long.png": (saved(Image.new("RGB", (300, 40)), "PNG"), "image too long or too wide"),
        "strip.png": (png_of(30_000, 10), "image cannot be decoded"),
        "bomb.png": (png_of(60_000, 60_000), "image cannot be decoded"),
        "big_bomb.png": (png_of(2**31 - 1, 2**31 - 1), "image cannot be decoded"),
        "animated.gif": (frames("GIF"), "image is animated"),
        "animated.webp": (frames("WEBP"), "image is animated"),
        "animated.png": (frames("PNG"), "image is animated"),
        "pages.tiff": (frames("TIFF"), None),
        "still.gif": (frames("GIF", 1), None),
        "cmyk.jpg": (saved(Image.new("CMYK", (64, 48), (0, 255, 255, 0)), "JPEG"), None),
        "palette.png": (saved(palette, "PNG", transparency=0), None),
        "alpha.png": (saved(layer, "PNG"), None),
        "sixteen.png": (saved(Image.fromarray(GREY), "PNG"), None),
        "grey.jpg": (saved(Image.new("L", (64, 48), 128), "JPEG"), None),
        "rotated.jpg": (rotated(picture), None),
    }


NAMES = """
    truncated.jpg half.png zero.jpg page.jpg drawing.svg script.jpg noise.jpg one_pixel.png small.png long.png strip.png
    bomb.png big_bomb.png animated.gif animated.webp animated.png pages.tiff still.gif cmyk.jpg palette.png alpha.png
    sixteen.png grey.jpg rotated.jpg
""".split()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", NAMES)
def test_images(prepare, tmp_path, picture, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    data, reason = images(picture)[name]
    for file, content in (("a.jpg", picture(1)), (f"b_{name}", data), ("c.jpg", picture(2))):
        (folder / file).write_bytes(content)
        (folder / f"{file.rpartition('.')[0]}.txt").write_text("a text")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = ["--min-side=32", "--max-aspect=4", "--max-bad-fraction=0.5"]
    found = prepare(folder, "text_to_image", *options)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"
    kept = ["mine/a.jpg", *([] if reason else [f"mine/b_{name}"]), "mine/c.jpg"]
    assert [record.key for record in found.records] == kept
    report = json.loads((found.folder / "report.json").read_text())
    assert report["reasons"] == ({reason: 1} if reason else {})
    if reason:
        assert f"b_{name}: {reason}: " in found.said
        return
    shown = decode_image(found.records[1].image, 32, 32)
    middle = {"cmyk.jpg": (255, 0, 0), "palette.png": 255, "alpha.png": 255, "grey.jpg": 128, "still.gif": 0}
    if name in middle:
        np.testing.assert_allclose(shown, np.broadcast_to(middle[name], shown.shape), atol=3)
    if name == "sixteen.png":
        assert shown[0].mean() < 15 and shown[-1].mean() > 240
    if name == "rotated.jpg":
        expected = decode_image(saved(Image.open(io.BytesIO(picture(5))).rotate(270, expand=True), "PNG"), 32, 32)
        assert np.abs(shown.astype(int) - expected).mean() < 12


def test_animated_images_may_give_their_first_frame(prepare, tmp_path):
    (tmp_path / "a.gif").write_bytes(frames("GIF"))
    (tmp_path / "a.txt").write_text("x")
    assert len(prepare(tmp_path, "text_to_image", "--animated=first").records) == 1


TEXTS = {  # bytes of a text, the reason or what becomes of it
    "nul": (b"a\0b", "text holds a NUL"),
    "latin-1": ("ein Fluß".encode("latin-1"), "text is not Unicode"),
    "utf-16": ("text".encode("utf-16"), "text is not Unicode"),
    "a megabyte": (b"x" * 2**20, "text too long"),
    "many megabytes": (b"x" * 2**23, "text file cannot be read"),
    "empty": (b"", "text missing"),
    "blank": (b" \n\t ", "text missing"),
    "only a mark": (b"\xef\xbb\xbf", "text missing"),
    "two words": (b"two words", "text too short"),
    "many words": (b"word " * 50, "text too long"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", TEXTS)
def test_texts(prepare, tmp_path, picture, name):
    data, reason = TEXTS[name]
    folder = tmp_path / "mine"
    folder.mkdir()
    for stem, text in (("a", b"three whole words"), ("b", data), ("c", b"and three more")):
        (folder / f"{stem}.jpg").write_bytes(picture(ord(stem)))
        (folder / f"{stem}.txt").write_bytes(text)
    found = prepare(folder, "text_to_image", "--max-bad-fraction=0.5", "--min-words=3", "--max-words=40")
    assert [record.key for record in found.records] == ["mine/a.jpg", "mine/c.jpg"]
    assert json.loads((found.folder / "report.json").read_text())["reasons"] == {reason: 1}


PATHS = [  # (a path in a row, its reason without --image-root, and with one)
    ("gone.jpg", "image file cannot be read", "image file cannot be read"),
    ("../secret.jpg", None, "image outside of the folder"),
    ("in/../../secret.jpg", None, "image outside of the folder"),
    ("{}/secret.jpg", None, "image outside of the folder"),
    ("link.jpg", None, "image outside of the folder"),
    ("/etc/passwd", "image cannot be decoded", "image outside of the folder"),
    ("https://x.org/a.jpg", "image is a URL", "image is a URL"),
    ("s3://bucket/a.jpg", "image is a URL", "image is a URL"),
    ("data:image/png;base64,AAAA", "image is a URL", "image is a URL"),
    ("in", "image file cannot be read", "image file cannot be read"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize("has_root", [False, True])
@pytest.mark.parametrize("number", range(len(PATHS)))
def test_paths(prepare, tmp_path, picture, number, has_root):
    """A list of one's own may lead anywhere; with --image-root, none leads out of it."""
    folder = tmp_path / "mine"
    (folder / "in").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(1))
    (tmp_path / "secret.jpg").write_bytes(picture(2))
    (folder / "link.jpg").symlink_to("../secret.jpg")
    path, *reasons = PATHS[number]
    rows = [{"image": "a.jpg", "caption": "x"}, {"image": path.format(tmp_path), "caption": "y"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [f"--image-root={folder}"] * has_root
    found = prepare(folder / "rows.jsonl", "text_to_image", "--max-bad-fraction=0.5", *options)
    reason = reasons[has_root]
    assert [record.caption for record in found.records] == ["x", *([] if reason else ["y"])]
    assert json.loads((found.folder / "report.json").read_text())["reasons"] == ({reason: 1} if reason else {})


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_leads_nowhere_else(prepare, tmp_path, picture, name):
    """A folder of images is from a stranger more often than a list is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "secret.jpg").write_bytes(picture(2))
    (tmp_path / "mine" / "a.jpg").write_bytes(picture(1))
    lines = {
        "metadata.csv": "file_name,text\na.jpg,x\n../secret.jpg,y\n",
        "metadata.jsonl": '{"file_name": "a.jpg", "text": "x"}\n{"file_name": "../secret.jpg", "text": "y"}\n',
    }
    (tmp_path / "mine" / name).write_text(lines[name])
    found = prepare(tmp_path / "mine", "text_to_image", "--max-bad-fraction=0.5")
    assert [record.caption for record in found.records] == ["x"]
    assert "1 x image outside of the folder" in found.said


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content",
    [
        "",
        "file_name,text\n",
        "file_name,text\na.jpg\n",
        "file_name\na.jpg\n",
        'file_name,text\na.jpg,"open\n',
        "\0\0\n\0",
    ],
    ids=range(6),
)
def test_tables_of_no_use(prepare, tmp_path, picture, content, command_refuses):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").write_bytes(picture(1))
    (tmp_path / "mine" / "metadata.csv").write_text(content)
    arguments = [
        f"--source={tmp_path / 'mine'}",
        "--stream=text_to_image",
        f"--output={tmp_path / 'o'}",
        "--processes=1",
    ]
    if "open" in content:  # what is left open ends with the file, as csv has it
        assert prepare(tmp_path / "mine").records[0].caption == "open"
        return
    command_refuses("prepare_data", [*arguments, "--min-side=1"], "rows")
    assert not [path for path in tmp_path.iterdir() if path.name != "mine"]


@pytest.mark.bad_input
@pytest.mark.parametrize("count, reason", [(0, "images missing"), (65, "too many images"), (2, None)])
def test_references(prepare, tmp_path, picture, count, reason):
    """A wrong number of references: none, and more than a record may have."""
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(picture(ord(name)))
    good = {"references": ["a.jpg"], "image": "b.jpg", "instruction": "i", "caption": "x"}
    rows = [good, good | {"references": ["a.jpg"] * count}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepare(tmp_path / "rows.jsonl", "personalization", "--max-bad-fraction=0.5")
    assert len(found.records) == (1 if reason else 2)
    assert json.loads((found.folder / "report.json").read_text())["reasons"] == ({reason: 1} if reason else {})
    if not reason:
        assert len(found.records[1].conditions) == 2


def test_images_shrunk_to_the_side_of_training(prepare, tmp_path, picture):
    """A larger JPEG is encoded anew at that shorter side; a smaller one stays as it is, byte for byte."""
    sizes = {"a": (90, 60), "b": (50, 80), "c": (40, 30)}
    for name, size in sizes.items():
        (tmp_path / f"{name}.jpg").write_bytes(picture(7, size=size))
        (tmp_path / f"{name}.txt").write_text("x")
    found = {record.key[-5]: record.image for record in prepare(tmp_path, "text_to_image", "--side=40").records}
    shown = {name: Image.open(io.BytesIO(data)) for name, data in found.items()}
    assert {name: image.size for name, image in shown.items()} == {"a": (60, 40), "b": (40, 64), "c": (40, 30)}
    assert {image.format for image in shown.values()} == {"JPEG"}
    assert found["c"] == (tmp_path / "c.jpg").read_bytes()
    resized = Image.fromarray(decode_image((tmp_path / "a.jpg").read_bytes(), 40, 60))
    assert found["a"] == saved(resized, "JPEG", quality=95), "training's own resizing"
