"""Reads untrusted image files, and converts images to RGB of 8 bits.

A file must be regular (no device, no pipe), have at most MAX_BYTES and one of FORMATS. These do not include formats
that PIL hands to other programs, such as PostScript. The number of pixels in the header, at most MAX_PIXELS, is checked
before anything is decoded. Every error is a ValueError or FileNotFoundError with one line that names the image.
"""

import io
import os

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ModuleNotFoundError:  # of use for training data, and not needed
    simplejpeg = None

from unialign_jax.data import signatures
from unialign_jax.files import check_regular, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # PPM is PGM, PBM and PFM too
MAX_BYTES = 2**28
MAX_PIXELS = 2**26
MAX_RESIZED = 2**28  # pixels of an image before it is cropped
MAX_ASPECT = 100  # longer side to shorter: filling 512 x 512 with 1 x 60,000 pixels would take 512 x 30,000,000

# The 8-bit grey of each 16-bit one: value / 257, rounded. As 257 is odd, there are no ties.
_NEAREST = ((np.arange(65536) + 128) // 257).astype(np.uint8)
_ORIENTATION = 0x0112  # EXIF's tag of the camera's rotation
_START_OF_SCAN = b"\xff\xda"  # of a JPEG
_TURNING_MARKS = (b"\xff\xe1", b"MPF\0")  # of EXIF and XMP, which may turn a picture; of several pictures in a file
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class BadShape(ValueError):
    """An image of too many pixels, or of a shape that cannot be used."""


def read_bytes(path: str | os.PathLike) -> bytes:
    """The bytes of an image file. Raises FileNotFoundError or ValueError, see `files.check_regular`."""
    check_regular(path, MAX_BYTES)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # a file may grow, or not tell its size, as in /proc
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or first_line(error)}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes")
    return data


def open_image(data: bytes, name: str) -> Image.Image:
    """The image that `data` encodes, or the first of several frames. Only the header is read.

    Raises ValueError, whose message begins with `name`, for an unknown format, a broken header, and no or too many
    pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        found = signatures.guess(data[: signatures.HEAD])
        begins = f"; it begins like {found}" if found else ""
        reason = f"it is no image of a known format ({', '.join(FORMATS)}){begins}" if data else "it is empty"
    except Image.DecompressionBombError:
        raise BadShape(f"{name} cannot be decoded: it has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # PIL's readers raise many kinds on damaged bytes
        reason = first_line(error)
    else:
        check_shape(image, name)
        return image
    raise ValueError(f"{name} cannot be decoded: {reason}")


def check_shape(image: Image.Image, name: str) -> None:
    """Raises ValueError for an image without pixels, with too many, or with sides too different."""
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{name} is {width:,} x {height:,} pixels, expected at least one")
    if width * height > MAX_PIXELS:
        raise BadShape(f"{name} is {width:,} x {height:,} pixels, expected at most {MAX_PIXELS:,} in all")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadShape(
            f"{name} is {width:,} x {height:,} pixels, expected sides that differ by a factor of {MAX_ASPECT} at most"
        )


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """`data` as an upright RGB image, see `to_rgb`. Raises ValueError as `open_image`, and for damaged data."""
    with open_image(data, name) as image:
        return loaded_rgb(image, name)


def loaded_rgb(image: Image.Image, name: str) -> Image.Image:
    """`to_rgb` of an image that may not be decoded yet, without a copy if it was opened from a file.

    Raises ValueError, whose message begins with `name`, for damaged data.
    """
    try:
        image.load()
        return _upright_rgb(image) if isinstance(image, ImageFile.ImageFile) else to_rgb(image)
    except Exception as error:  # PIL's decoders raise many kinds on damaged bytes
        raise ValueError(f"{name} cannot be decoded: {first_line(error)}") from None


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """An image file as an upright RGB image. Raises FileNotFoundError or ValueError that names it."""
    return decode_rgb(read_bytes(path), str(path))


def decode_filled(data: bytes, name: str, height: int, width: int) -> np.ndarray:
    """`fill_size` of `decode_rgb`, as uint8 [height, width, 3].

    JPEGs that need no turning are decoded by simplejpeg where it is installed: libjpeg-turbo as in Pillow, and the same
    pixels, without Pillow's copies. Raises ValueError as `decode_rgb` and `fill_size`.
    """
    pixels = _decode_jpeg(data, name)
    if pixels is not None and pixels.shape[0] >= height and pixels.shape[1] >= width:
        top, left = (round((size - wanted) / 2) for size, wanted in zip(pixels.shape, (height, width), strict=False))
        if pixels.shape[0] == height or pixels.shape[1] == width:  # it just covers the size
            return pixels[top : top + height, left : left + width]  # not copied: a batch does it
    image = decode_rgb(data, name) if pixels is None else Image.fromarray(pixels)
    return np.asarray(fill_size(image, width, height))


def _decode_jpeg(data: bytes, name: str) -> np.ndarray | None:
    """The pixels of an upright JPEG in RGB or grey; None for another image, or one that Pillow is to judge."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    head = data[: data.find(_START_OF_SCAN)]
    try:
        if any(mark in head for mark in _TURNING_MARKS):  # Pillow takes 20 us to open a file
            with open_image(data, name) as image:
                if image.format != "JPEG" or image.getexif().get(_ORIENTATION, 1) != 1:
                    return None
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        is_usable = height * width <= MAX_PIXELS and max(height, width) <= MAX_ASPECT * min(height, width)
        if not is_usable or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB copy, 8 bits a channel, of an image of any mode.

    - Transparent pixels become white.
    - 16-bit grey (PNG, PGM) becomes value / 257, rounded, so that 65535 is white. Of 16-bit colours the upper eight
      bits stay, as PIL reads them.
    - Floats (TIFF, PFM) and 32-bit or signed integers (TIFF) have no defined white. If all are within 0 to 1, they are
      multiplied by 255; else the least becomes black and the greatest white. NaN becomes black, an infinity the end of
      the range. An image of a single value outside of 0 to 1 becomes black.

    Raises ValueError for floats none of which is finite, and PIL's own errors for damaged data.
    """
    found = _upright_rgb(image)
    return image.copy() if found is image else found


def _upright_rgb(image: Image.Image) -> Image.Image:
    is_sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        values = np.asarray(image)
        grey = _sixteen_bits(values) if is_sixteen else _without_white(values)
        clear = image.info.get("transparency")  # of a grey PNG, one value
        if isinstance(clear, int):
            grey = np.where(values == clear, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image.alpha_composite(layer)
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy takes as long as to decode


def _sixteen_bits(values: np.ndarray) -> np.ndarray:
    return _NEAREST[np.clip(values, 0, 65535)]


def _without_white(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("it holds no finite number")
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # in pieces, since float64 takes much memory
        scaled = (values[start : start + 256].astype(np.float64) - low) / ((high - low) or 1.0)
        scaled = np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
        grey[start : start + 256] = scaled * 255 + 0.5
    return grey


def fill_size(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image resized (bicubic, aspect kept) so that it just covers width x height, then cropped at its centre.

    Raises ValueError when the resized image would have more than MAX_RESIZED pixels.
    """
    size = covering_size(image, width, height)
    if size[0] * size[1] > MAX_RESIZED:
        raise ValueError(
            f"it is {image.width:,} x {image.height:,} pixels, whose shape is too far from {width:,} x {height:,}"
        )
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def covering_size(image: Image.Image, width: int, height: int) -> tuple[int, int]:
    """(width, height) of an image that is resized, its aspect kept, to just cover width x height."""
    if width * image.height >= height * image.width:
        return width, max(height, int(image.height * width / image.width))
    return max(width, int(image.width * height / image.height)), height
