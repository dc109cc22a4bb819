"""An answer: ranked training images with their rights, and what the ranking rests on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from headwater.index import plain_json


@dataclass(frozen=True)
class Hit:
    """One training image in the answer."""

    rank: int  # from 1
    item_id: str
    score: float  # by the metric that was asked for; comparable within one result only
    item: Mapping[str, Any]  # every column of the item

    def as_dict(self) -> dict[str, Any]:
        """Rank, item id, score and every item column, as the JSON result has them."""
        own = {"rank": self.rank, "item_id": self.item_id, "score": self.score}
        return own | dict(self.item) | own  # a column `score` of the corpus is not the hit's


@dataclass(frozen=True)
class Result:
    """Everything a reader needs to judge and to repeat an answer."""

    question: Mapping[str, Any]  # prompt, contrast, image, where, top and every setting
    feature_space_id: str
    searched: int  # rows that could be ranked
    agreement: float | None  # mean share of the top hits that one seed alone finds too; 1 is stable
    warnings: tuple[str, ...]  # what a reader must know before relying on the ranking
    hits: tuple[Hit, ...]
    pictures: tuple[Image.Image, ...]  # what was asked about: one per seed, or the given one
    thumbnails: Callable[[Sequence[str]], Mapping[str, bytes]]  # item ids -> WebP previews

    def rollup(self, *columns: str) -> list[dict[str, Any]]:
        """Hits counted by the values of item columns: {columns..., hits, share}, most first.

        Raises:
            KeyError: a column that the items do not have.
        """
        groups: dict[tuple[Any, ...], int] = {}
        for hit in self.hits:
            key = tuple(hit.item[column] for column in columns)
            groups[key] = groups.get(key, 0) + 1
        ordered = sorted(groups.items(), key=lambda group: -group[1])
        return [
            dict(zip(columns, key, strict=True)) | {"hits": n, "share": n / len(self.hits)}
            for key, n in ordered
        ]

    def as_dict(self) -> dict[str, Any]:
        """The JSON object: question, feature space, evidence, roll-up and hits."""
        return {
            "question": dict(self.question),
            "feature_space_id": self.feature_space_id,
            "searched": self.searched,
            "agreement": self.agreement,
            "warnings": list(self.warnings),
            "rollup": self.rollup("rights_holder", "licence"),
            "hits": [hit.as_dict() for hit in self.hits],
        }

    def save_json(self, path: str | Path) -> None:
        """Write the JSON object to a file."""
        write_json(path, self.as_dict())


def write_json(path: str | Path, value: Any) -> None:
    """Write readable JSON: dates become text, bytes hexadecimal, NaN and infinities null."""
    text = json.dumps(plain_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")
