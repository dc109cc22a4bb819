"""Images: seen as a person sees them, refused whole when broken, fingerprints and previews."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headwater.attribution import ImageRejected, decode, fit
from headwater.ingest import fingerprints, thumbnail

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "PPM": {}, "TGA": {}}


def picture(width: int = 24, height: int = 16) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_come_back_exactly(format: str) -> None:
    image = decode(encoded(picture(), format, **LOSSLESS[format]))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(pixels(image), pixels(picture()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "AVIF", "JPEG2000"])
def test_lossy_formats_come_back_nearly(format: str) -> None:
    smooth = picture(4, 4).resize((48, 32), Image.Resampling.BICUBIC)
    difference = pixels(decode(encoded(smooth, format))).astype(int) - pixels(smooth)
    assert np.abs(difference).mean() < 12


def test_exif_rotation_is_applied() -> None:
    for orientation, turn in ((3, 2), (6, 3), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = decode(encoded(picture(), "PNG", exif=exif))
        np.testing.assert_array_equal(pixels(image), np.rot90(pixels(picture()), turn))


def test_alpha_lies_on_white() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3] = (0, 128, 255)
    image = Image.fromarray(rgba)
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True)):
        difference = pixels(decode(data))[0].astype(int) - expected
        assert np.abs(difference).max() <= 1
        assert (pixels(decode(data))[1] == 255).all()


def test_grey_with_alpha_lies_on_white() -> None:
    grey = Image.fromarray(np.full((2, 2), 10, np.uint8))
    grey.putalpha(Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8)))
    np.testing.assert_array_equal(pixels(decode(encoded(grey, "PNG")))[0], [[255] * 3, [10] * 3])


def test_palettes_with_and_without_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [0, 0, 255]]])
    np.testing.assert_array_equal(pixels(decode(encoded(image, "PNG"))), colours)
    for format in ("PNG", "GIF"):
        seen = pixels(decode(encoded(image, format, transparency=1)))
        np.testing.assert_array_equal(seen[0, 1], [255, 255, 255])
        np.testing.assert_array_equal(seen[1, 1], [0, 0, 255])


def test_a_transparent_colour_in_rgb_lies_on_white() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((0, 0), (1, 2, 3))
    seen = pixels(decode(encoded(image, "PNG", transparency=(1, 2, 3))))
    np.testing.assert_array_equal(seen[0], [[255, 255, 255], [9, 9, 9]])


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    samples = np.array([[0, 257 * 100, 65535, 128, 129]], np.uint16)
    for format in ("PNG", "TIFF"):
        seen = pixels(decode(encoded(Image.fromarray(samples), format)))
        assert seen[0, :, 0].tolist() == [0, 100, 255, 0, 1]
        assert (seen[..., 0] == seen[..., 2]).all()


def test_other_modes() -> None:
    black = decode(encoded(Image.new("1", (4, 4), 0), "PNG"))
    assert not pixels(black).any()
    red = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels(red).astype(int) - [255, 0, 0]).max() < 8
    with pytest.raises(ImageRejected, match="floating-point"):
        decode(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(ImageRejected, match="32-bit"):
        decode(encoded(Image.new("I", (2, 2), 70_000), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(decode(data))[0, 0], [255, 0, 0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not an image|broken"),
        (encoded(picture(), "PNG")[:-200], "truncated file"),
        (encoded(picture(), "JPEG")[:-200], "truncated file"),
        (encoded(picture(), "WEBP")[:-20], "truncated file"),
        (encoded(picture(), "GIF")[:-200], "truncated file"),
    ],
)
def test_broken_files_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected, match=reason) as caught:
        decode(data)
    assert len(str(caught.value)) < 120
    assert "\n" not in str(caught.value)


FILES = {
    format: encoded(picture(), format, **LOSSLESS.get(format, {}))
    for format in (*LOSSLESS, "JPEG", "GIF", "AVIF", "JPEG2000", "ICO")
}


@settings(deadline=None, max_examples=150)
@given(format=st.sampled_from(sorted(FILES)), part=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_whole_or_refused(format: str, part: float) -> None:
    data = FILES[format]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow grumbles about cut TIFF files
        try:
            image = decode(data[: int(part * len(data))])
        except ImageRejected:
            return
    np.testing.assert_array_equal(pixels(image), pixels(decode(data)))


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (8, 8)}])
def test_jpeg_2000_cut_anywhere_is_refused(options: dict[str, Any]) -> None:
    # OpenJPEG leaves a tile black whose data were cut off exactly behind its header.
    data = encoded(picture(), "JPEG2000", **options)
    for length in range(len(data)):
        with pytest.raises(ImageRejected):
            decode(data[:length])
    padded = decode(data + bytes(9))
    np.testing.assert_array_equal(pixels(padded), pixels(decode(data)))


@settings(deadline=None, max_examples=150)
@given(
    format=st.sampled_from(sorted(FILES)),
    place=st.integers(0, 10_000),
    junk=st.binary(min_size=1, max_size=12),
)
def test_a_corrupt_file_never_raises_anything_else(format: str, place: int, junk: bytes) -> None:
    data = bytearray(FILES[format])
    place %= len(data)
    data[place : place + len(junk)] = junk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(bytes(data), max_pixels=100_000)
        except ImageRejected:
            return
    assert image.mode == "RGB"


def test_absurd_sizes_are_named_before_a_pixel_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = bytearray(encoded(Image.new("1", (64, 64)), "BMP"))
    data[18:26] = (30_000).to_bytes(4, "little") * 2  # the header's width and height
    with pytest.raises(ImageRejected, match="image is 30000 x 30000 pixels, limit 64000000"):
        decode(bytes(data))
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(ImageRejected, match="image is 24 x 16 pixels, limit 383"):
        decode(FILES["PNG"], max_pixels=383)
    assert decode(FILES["PNG"], max_pixels=384).size == (24, 16)


def test_fit_crops_the_centre_and_gives_height_first() -> None:
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (100, 0, 200, 100))
    square = fit(image, (50, 50))
    assert square.shape == (50, 50, 3)
    assert square.dtype == np.uint8
    assert (square[:, 3:-3] == [255, 0, 0]).all()
    resized = image.resize((150, 50), Image.Resampling.LANCZOS).crop((50, 0, 100, 50))
    np.testing.assert_array_equal(square, pixels(resized))
    assert fit(image, (10, 40)).shape == (10, 40, 3)
    np.testing.assert_array_equal(fit(picture(), (16, 24)), pixels(picture()))


def test_fit_antialiases() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = fit(Image.fromarray(board), (8, 8))
    assert np.abs(small.astype(int) - 127).max() < 12


def test_fit_does_not_blow_up_thin_images() -> None:
    assert fit(Image.new("RGB", (1, 200_000)), (64, 64)).shape == (64, 64, 3)


def test_fingerprints() -> None:
    smooth = picture(5, 5).resize((80, 80), Image.Resampling.BICUBIC)
    png, jpeg = encoded(smooth, "PNG"), encoded(smooth, "JPEG", quality=80)
    sha, phash = fingerprints(png, decode(png))
    assert sha == hashlib.sha256(png).hexdigest()
    assert len(phash) == 16
    other_sha, near = fingerprints(jpeg, decode(jpeg))
    assert other_sha != sha
    assert (int(phash, 16) ^ int(near, 16)).bit_count() <= 4
    _, far = fingerprints(png, picture(80, 80))
    assert (int(phash, 16) ^ int(far, 16)).bit_count() > 12


def test_thumbnail() -> None:
    preview = thumbnail(picture(400, 200))
    assert preview == thumbnail(picture(400, 200))
    shown = Image.open(io.BytesIO(preview))
    assert (shown.format, shown.size) == ("WEBP", (128, 64))
    assert Image.open(io.BytesIO(thumbnail(picture(24, 16)))).size == (24, 16)
    assert Image.open(io.BytesIO(thumbnail(Image.new("RGB", (20_000, 2))))).size == (128, 1)
