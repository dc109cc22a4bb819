"""One image file: decoded as a person sees it, and fitted for the model."""

from __future__ import annotations

import io
import struct
import zlib
from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
# What Pillow's readers raise on broken files; each of them has its own taste.
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError),
    *(AttributeError, RuntimeError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
_opening = Lock()


class ImageRejected(ValueError):
    """An image that cannot be used; the message is the reason noted in the quarantine."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB as a person sees it: EXIF rotation applied, alpha on white.

    Reads what Pillow reads (of an animation the first frame); 16-bit samples are scaled to 8.
    Raises ImageRejected when the file is empty, broken or cut short, or has more than
    `max_pixels` pixels; a half-decoded image is never returned.
    """
    if not data:
        raise ImageRejected("empty file")
    if _riff_cut_short(data) or _codestream_cut_short(data):
        raise ImageRejected("truncated file")
    try:
        image = _open(data)
        width, height = image.size
        if width * height > max_pixels:
            image.close()
            raise ImageRejected(f"image is {width} x {height} pixels, limit {max_pixels}")
        image.load()
        return as_seen(image)
    except ImageRejected:
        raise
    except UnidentifiedImageError:
        raise ImageRejected("not an image, or of a format that cannot be read") from None
    except _BROKEN as error:
        text = " ".join(str(error).split())
        if "truncated" in text.lower() or isinstance(error, EOFError):
            raise ImageRejected("truncated file") from error
        raise ImageRejected(f"broken file ({text or type(error).__name__})") from error


def as_seen(image: Image.Image) -> Image.Image:
    """An image in RGB as a person sees it: EXIF rotation applied, alpha on white.

    Raises ImageRejected for pixels without a defined brightness.
    """
    return _to_rgb(ImageOps.exif_transpose(image))


def fit(image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the centre of `image` at `size` = (height, width): uint8 [H, W, 3].

    The largest centred part of the right shape is resized with an antialiasing filter (Lanczos),
    which equals resizing the shorter side and cropping, without the long side ever growing.
    """
    height, width = size
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted, dtype=np.uint8)


def _open(data: bytes) -> Image.Image:
    Image.init()
    # An EPS file is a program, which Pillow would hand to Ghostscript.
    formats = [name for name in Image.ID if name != "EPS"]
    with _opening:
        # Our own limit holds and names the size; Pillow's, process-wide, is put back at once.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image)
    if image.mode == "F":
        raise ImageRejected("floating-point pixels have no defined brightness")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    samples = np.asarray(image).astype(np.int64)  # [H, W]
    if samples.min() < 0 or samples.max() > 65535:
        raise ImageRejected("32-bit pixels have no defined brightness")
    return Image.fromarray(((samples + 128) // 257).astype(np.uint8)).convert("RGB")


def _riff_cut_short(data: bytes) -> bool:
    """A WebP states its length; Pillow's message for a short one says nothing of that."""
    if data[:4] != b"RIFF" or len(data) < 8:
        return False
    return len(data) < 8 + int.from_bytes(data[4:8], "little")


def _codestream_cut_short(data: bytes) -> bool:
    """A JPEG 2000 ends with a marker that its pixels cannot hold; Pillow may draw a cut one black.

    ISO/IEC 15444-1, A.4.4. In a JP2 file the codestream stands behind other boxes.
    """
    if data[:4] != b"\xffO\xffQ" and data[4:8] != b"jP  ":
        return False
    return data.find(b"\xff\xd9", max(0, data.find(b"\xffO\xffQ"))) < 0
