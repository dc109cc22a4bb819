"""What is kept of an image beside its row: fingerprints and a preview."""

from __future__ import annotations

import hashlib
import io

import imagehash
from PIL import Image


def fingerprints(data: bytes, image: Image.Image) -> tuple[str, str]:
    """Return (sha256 of the file, perceptual hash of the picture): 64 and 16 hex digits.

    Equal perceptual hashes, or ones few bits apart, mark near duplicates (ImageHash's phash).
    """
    return hashlib.sha256(data).hexdigest(), str(imagehash.phash(image))


def thumbnail(image: Image.Image, side: int = 128) -> bytes:
    """Return a WebP preview at most `side` pixels wide and high; a smaller image keeps its size."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80, method=4)
    return file.getvalue()
