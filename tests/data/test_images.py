"""Images of strangers: what is opened and what is not, and every mode against closed forms."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from unialign_jax.data import images

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, image_format, **options)
    return buffer.getvalue()


def decode(data):
    return np.asarray(images.decode_rgb(data, "it"))


def assert_grey(found, expected):
    assert found.dtype == np.uint8 and found.shape == (*expected.shape, 3)
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], expected)


def png(width, height, color_type=2, bit_depth=8, pixels=b"", chunks=()):
    """A PNG by hand, so that its header may say anything."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    parts = [("IHDR", header), *chunks, ("IDAT", zlib.compress(pixels)), ("IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name.encode(), data) for name, data in parts)


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM", "big-endian TIFF"])
def test_sixteen_bit_grey_keeps_its_greys(image_format):
    """The nearest of 256 greys: exact over all 65,536 values."""
    expected = np.array([round(value / 257) for value in range(65536)], np.uint8).reshape(256, 256)
    if image_format == "big-endian TIFF":
        data = encode(Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()), "TIFF")
    else:
        data = encode(RAMP, image_format)
    assert_grey(decode(data), expected)


def test_sixteen_bit_grey_with_a_transparent_value():
    data = png(2, 1, 0, 16, b"\0" + struct.pack(">HH", 1000, 30000), [("tRNS", struct.pack(">H", 1000))])
    assert_grey(decode(data), np.array([[255, round(30000 / 257)]]))


def test_floats_within_one_are_scaled_by_255():
    values = np.linspace(0.2, 0.9, 64, dtype=np.float32).reshape(8, 8)
    for image_format in ("TIFF", "PPM"):
        assert_grey(decode(encode(values, image_format)), np.floor(values.astype(float) * 255 + 0.5))
    assert_grey(decode(encode(np.array([[0, 1]], np.float32), "TIFF")), np.array([[0, 255]]))
    assert_grey(decode(encode(np.full((2, 2), 0.5, np.float32), "TIFF")), np.full((2, 2), 128))


def test_other_floats_go_from_black_to_white():
    metres = np.array([[0.5, 2.5], [4.5, 80.5]], np.float32)
    assert_grey(decode(encode(metres, "TIFF")), np.array([[0, round(2 / 80 * 255)], [round(4 / 80 * 255), 255]]))
    signed = np.array([[-1, 0, 1]], np.float32)
    assert_grey(decode(encode(signed, "TIFF")), np.array([[0, 128, 255]]))
    huge = np.array([[-3e38, 0, 3e38]], np.float32)
    assert_grey(decode(encode(huge, "TIFF")), np.array([[0, 128, 255]]))
    assert_grey(decode(encode(np.full((2, 2), 7, np.float32), "TIFF")), np.zeros((2, 2)))


def test_floats_that_are_not_finite():
    values = np.array([[np.nan, np.inf, -np.inf, 2, 4, 6]], np.float32)
    assert_grey(decode(encode(values, "TIFF")), np.array([[0, 255, 0, 0, 128, 255]]))


def test_large_floats_are_scaled_as_a_whole():
    """Piece by piece, by the least and the greatest of all."""
    values = np.arange(600 * 7, dtype=np.float32).reshape(600, 7) * 3 - 1000
    expected = np.floor(np.arange(600 * 7) / (600 * 7 - 1) * 255 + 0.5).reshape(600, 7)
    assert_grey(decode(encode(values, "TIFF")), expected)


def test_whole_numbers_of_32_bits():
    values = np.array([[-1000, 0, 3000]], np.int32)
    assert_grey(decode(encode(values, "TIFF")), np.array([[0, round(255 / 4), 255]]))
    assert_grey(decode(encode(Image.fromarray(values), "TIFF")), np.array([[0, 64, 255]]))


def test_other_modes():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (6, 5), dtype=np.uint8)
    alpha = rng.integers(0, 256, (6, 5), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode(rgb)), rgb)
    assert_grey(decode(encode(grey)), grey)
    assert_grey(decode(encode(Image.fromarray(grey > 127))), np.where(grey > 127, 255, 0))
    few = Image.fromarray(rgb).quantize(7)
    palette = np.array(few.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(decode(encode(few)), palette[np.asarray(few)])
    # Over white: value * alpha + 255 * (1 - alpha), to a rounding.
    over = lambda value: value * (alpha / 255) + 255 * (1 - alpha / 255)  # noqa: E731
    found = decode(encode(np.dstack([rgb, alpha]))).astype(float)
    assert np.abs(found - over(rgb.astype(float).transpose(2, 0, 1)).transpose(1, 2, 0)).max() <= 1
    found = decode(encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]))).astype(float)
    assert np.abs(found - over(grey.astype(float))[..., None]).max() <= 1
    ink = Image.merge("CMYK", [Image.new("L", (2, 2), v) for v in (0, 255, 51, 0)])
    np.testing.assert_array_equal(decode(encode(ink, "TIFF")), np.full((2, 2, 3), (255, 0, 204)))
    few.info["transparency"] = 0
    clear = decode(encode(few, transparency=0))
    np.testing.assert_array_equal(clear, np.where((np.asarray(few) == 0)[..., None], 255, palette[np.asarray(few)]))
    # Colours of 16 bits: the upper eight.
    deep = png(1, 1, 2, 16, b"\0" + struct.pack(">HHH", 0x12FF, 0x8000, 0xFFFF))
    np.testing.assert_array_equal(decode(deep), [[(0x12, 0x80, 0xFF)]])


def test_first_frame_and_formats():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for image_format in ("GIF", "TIFF", "WEBP"):
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data).astype(int) - (255, 0, 0)).max() < 8, image_format
    for image_format in ("BMP", "AVIF", "JPEG"):
        assert np.abs(decode(encode(frames[0], image_format)).astype(int) - (255, 0, 0)).max() < 8, image_format


def test_to_rgb_gives_a_copy():
    """And leaves the image it was given alone."""
    turned = Image.new("RGB", (4, 2), "red")
    turned.getexif()[0x0112] = 6
    for image in (Image.new("RGB", (4, 2), "red"), Image.new("L", (4, 2)), turned):
        before = (image.mode, image.size, image.tobytes())
        for found in (images.to_rgb(image), images.loaded_rgb(image, "it")):
            found.paste((1, 2, 3), (0, 0, *found.size))
        assert (image.mode, image.size, image.tobytes()) == before
    assert images.to_rgb(turned).size == (2, 4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.bad_input
def test_postscript_is_not_run(tmp_path, monkeypatch, refuses):
    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: run.append(1))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/x) (w) file\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS", "PIL itself would"
    (tmp_path / "a.jpg").write_bytes(data)
    refuses(lambda: images.load_rgb(tmp_path / "a.jpg"), "a.jpg", "no image of a known format", "PostScript")
    assert not run


@pytest.mark.bad_input
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/tty", "pipe", "socket", "folder", "link to a device"])
def test_only_regular_files_are_opened(path, tmp_path, refuses):
    """A pipe would wait for its writer, /dev/zero never end."""
    target = tmp_path / path.replace("/", "_")
    if path == "pipe":
        os.mkfifo(target)
    elif path == "folder":
        target.mkdir()
    elif path == "link to a device":
        target.symlink_to("/dev/zero")
    elif path == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(target)[-100:] if len(str(target)) < 100 else "/dev/null/x")
    else:
        target = path
    refuses(lambda: images.load_rgb(target), str(target), "expected a file")


@pytest.mark.bad_input
@pytest.mark.parametrize("path", ["none.png", "a\0b.png", "\udc80.png", "x" * 300, "", "none/a.png", "a.png/b.png"])
def test_paths_that_lead_nowhere(path, tmp_path, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    refuses(lambda: images.load_rgb(path))


@pytest.mark.bad_input
def test_huge_files_are_not_read(tmp_path, refuses):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    refuses(lambda: images.load_rgb(tmp_path / "huge.png"), "huge.png has 268,435,457 bytes", "at most 268,435,456")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ["empty"]),
        (b"\0" * 1000, ["no image of a known format"]),
        (b"<!DOCTYPE html><html>404</html>", ["a web page"]),
        (b'\xef\xbb\xbf <?xml version="1.0"?><svg></svg>', ["an SVG drawing"]),
        (b"%PDF-1.7", ["a PDF"]),
        (b"8BPS\0\1", ["a Photoshop file"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS pointer"]),
        (b"PK\x03\x04" + b"\0" * 50, ["a zip file"]),
        (png(0, 10), []),
        (png(100_000, 100_000), ["more than 67,108,864 pixels"]),
        (png(8193, 8192), ["8,193 x 8,192 pixels", "at most 67,108,864"]),
        (png(2**31 - 1, 2**31 - 1), []),
        (png(101, 1), ["101 x 1 pixels", "a factor of 100"]),
        (png(1, 60_000), ["1 x 60,000 pixels", "a factor of 100"]),
        (png(10, 10), ["truncated"]),
        (png(10, 10, 5), []),
        (png(10, 10, 2, 3), []),
        (png(4, 4, chunks=[("tRNS", b"\0")], pixels=b"\0" * 52), []),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, []),
        (b"GIF89a" + b"\xff" * 40, []),
        (b"BM" + b"\xff" * 60, []),
        (b"II*\0" + b"\xff" * 60, []),
        (b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 40, []),
        (b"P5 1000000 1000000 255\n", ["pixels"]),
        (b"Pf 2 2 nan\n" + b"\0" * 16, []),
        (b"\xff\xd8\xff\xe0", []),
        (b"#define a_width 8\n#define a_height 8\nstatic char a[] = {0};", ["no image of a known format"]),
        (b"gimp xcf v011\0", ["no image of a known format"]),
        (encode(np.full((2, 2), np.nan, np.float32), "TIFF"), ["no finite number"]),
    ],
    ids=range(29),
)
def test_damaged_images(data, words, refuses):
    refuses(lambda: images.decode_rgb(data, "row 7"), "row 7", *words)


@pytest.mark.bad_input
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images(image_format, share, refuses):
    data = encode(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), image_format)
    refuses(lambda: images.decode_rgb(data[: int(len(data) * share)], "it"), "it")


def test_a_broken_rotation_tag_does_no_harm():
    exif = Image.Exif()
    exif[0x0112] = 99
    assert (decode(encode(np.full((8, 8, 3), 90, np.uint8), "JPEG", exif=exif)) == 90).all()


@pytest.mark.bad_input
def test_a_shape_that_would_be_resized_to_gigabytes(refuses):
    refuses(lambda: images.fill_size(Image.new("RGB", (1, 100)), 3072, 16), "1 x 100", "3,072 x 16")


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 75, "subsampling": 0},
        {"quality": 95, "progressive": True},
        {"quality": 30, "subsampling": 1},
        {"quality": 90, "mode": "L"},
        {"quality": 90, "mode": "CMYK"},
        {"quality": 90, "turned": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 96), (64, 64), (200, 90), (33, 47)])
def test_simplejpeg_gives_pillows_pixels(options, size, monkeypatch):
    pytest.importorskip("simplejpeg")
    options = dict(options)
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (8, 12, 3), np.uint8))
    image = small.resize((150, 100), Image.Resampling.BICUBIC).convert(options.pop("mode", "RGB"))
    if orientation := options.pop("turned", None):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    found = images.decode_filled(buffer.getvalue(), "image", *size)
    covering = images.decode_filled(buffer.getvalue(), "image", 100, 100)
    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(found, images.decode_filled(buffer.getvalue(), "image", *size))
    np.testing.assert_array_equal(covering, images.decode_filled(buffer.getvalue(), "image", 100, 100))
    assert found.shape == (*size, 3)


def test_a_jpeg_cut_short_is_refused_with_either_decoder(monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    for _ in range(2):
        with pytest.raises(ValueError, match="image cannot be decoded"):
            images.decode_filled(buffer.getvalue()[:-800], "image", 32, 32)
        monkeypatch.setattr(images, "simplejpeg", None)
