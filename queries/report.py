"""The answer as one self-contained HTML page: pictures, ranked thumbnails, rights."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from .result import Result

_PICTURES = 8  # at most so many of the asked-about pictures are shown


@dataclass(frozen=True)
class Section:
    """One question of a report."""

    title: str
    result: Result


def write_report(path: str | Path, sections: Sequence[Section], *, title: str) -> None:
    """Write a page that needs no other file and no network.

    Args:
        path: the HTML file.
        sections: one per question, in reading order.
        title: of the page.
    """
    environment = Environment(
        loader=PackageLoader("headwater.queries", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=title, sections=[_section(section) for section in sections]
    )
    Path(path).write_text(page, encoding="utf-8")


def _section(section: Section) -> dict[str, Any]:
    result = section.result
    previews = result.thumbnails([hit.item_id for hit in result.hits])
    return {
        "title": section.title,
        "question": result.question,
        "space": result.feature_space_id,
        "searched": result.searched,
        "agreement": result.agreement,
        "warnings": result.warnings,
        "pictures": [_png(picture) for picture in result.pictures[:_PICTURES]],
        "rollup": result.rollup("rights_holder", "licence"),
        "hits": [
            {"hit": hit, "preview": _data_uri("webp", previews[hit.item_id])}
            if hit.item_id in previews
            else {"hit": hit, "preview": None}
            for hit in result.hits
        ],
    }


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    shown = picture.convert("RGB")
    shown.thumbnail((512, 512))
    shown.save(buffer, "png")
    return _data_uri("png", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
