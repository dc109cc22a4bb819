"""Duplicates against a plain loop over all pairs; real pictures, re-encoded."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from headwater.index import IndexStoreError, duplicate_counts, duplicate_groups
from headwater.ingest import fingerprints


def slowly(items: pa.Table, radius: int) -> list[tuple[str | None, str | None, int | None]]:
    """The definition: item by item, every earlier one looked at."""
    rows = items.to_pylist()
    leaders: list[dict[str, str]] = []
    found: list[tuple[str | None, str | None, int | None]] = []
    for number, row in enumerate(rows):
        same = [
            r["item_id"] for r in rows[:number] if row["sha256"] and r["sha256"] == row["sha256"]
        ]
        near: tuple[str | None, int | None] = (None, None)
        if row["phash"] is not None and int(row["phash"], 16).bit_count() == 32:
            alike = [n for n in range(number) if rows[n]["phash"] == row["phash"]]
            apart = [
                ((int(row["phash"], 16) ^ int(other["phash"], 16)).bit_count(), place)
                for place, other in enumerate(leaders)
            ]
            if alike and found[alike[0]][1] is not None:  # one hash, one group
                near = found[alike[0]][1:]
            elif apart and min(apart)[0] <= radius:
                near = (leaders[min(apart)[1]]["item_id"], min(apart)[0])
            else:
                leaders.append(row)
        found.append((same[0] if same else None, *near))
    return found


def told(groups: pa.Table) -> list[tuple[str | None, str | None, int | None]]:
    names = ("duplicate_of", "near_duplicate_of", "near_distance")
    return list(zip(*(groups[name].to_pylist() for name in names), strict=True))


def hashed_items(seed: int, count: int) -> pa.Table:
    """Families of hashes a few bits apart, with repeats, nulls, and hashes without meaning."""
    rng = np.random.default_rng(seed)
    hashes: list[str | None] = []
    for _ in range(count):
        kind = rng.integers(10)
        if kind == 0:
            hashes.append(None)
        elif kind == 1:
            hashes.append(f"{1 << int(rng.integers(4)):016x}")
        else:
            bits = np.random.default_rng(int(rng.integers(count // 8 + 1))).permutation(64)
            ones, zeros = bits[:32].copy(), bits[32:].copy()
            for _ in range(rng.integers(6)):  # each swap moves two bits
                a, b = rng.integers(32, size=2)
                ones[a], zeros[b] = zeros[b], ones[a]
            hashes.append(f"{sum(1 << int(bit) for bit in ones):016x}")
    files = [None if h is None else f"{h}-{rng.integers(2)}" for h in hashes]
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(count)],
            "sha256": pa.array(files, pa.string()),
            "phash": pa.array(hashes, pa.string()),
        }
    )


@pytest.mark.parametrize("radius", range(9))
def test_groups_are_those_of_the_plain_loop(radius: int) -> None:
    items = hashed_items(radius, 400)
    found = duplicate_groups(items, radius)
    expected = slowly(items, radius)
    assert told(found) == expected
    assert found["item_id"].to_pylist() == items["item_id"].to_pylist()
    counts = duplicate_counts(found)
    assert counts.exact == sum(exact is not None for exact, _, _ in expected) > 0
    assert counts.near == sum(e is None and near is not None for e, near, _ in expected) > 0
    # Chunks of the table do not matter.
    parts = pa.concat_tables([items.slice(0, 150), items.slice(150)])
    assert duplicate_groups(parts, radius).equals(found)


def test_items_without_images() -> None:
    items = hashed_items(0, 5).slice(0, 0)
    assert duplicate_groups(items).num_rows == 0
    assert duplicate_counts(duplicate_groups(items)).exact == 0
    nothing = pa.array([None, None], pa.string())
    items = pa.table({"item_id": ["a", "b"], "sha256": nothing, "phash": nothing})
    assert told(duplicate_groups(items)) == [(None, None, None)] * 2


@pytest.mark.parametrize(
    ("phash", "radius", "message"),
    [("00ff", 4, "'00ff' is not 16"), ("z" * 16, 4, "'z+' is not 16"), ("0" * 16, 9, "0 to 8")],
)
def test_what_is_refused(phash: str, radius: int, message: str) -> None:
    items = pa.table({"item_id": ["a"], "sha256": ["x"], "phash": [phash]})
    with pytest.raises(IndexStoreError, match=message):
        duplicate_groups(items, radius)


def drawing(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), tuple(rng.integers(0, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.integers(0, 70, 4).tolist()
        draw.ellipse((x, y, x + w + 5, y + h + 5), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_encoded_anew_are_found_and_others_are_not() -> None:
    rows = []
    for n in range(30):
        image = drawing(n)
        small = image.resize((64, 64), Image.Resampling.LANCZOS)
        for name, data in (
            (f"{n}", encoded(image, "PNG")),
            (f"{n} again", encoded(image, "PNG")),
            (f"{n} jpeg", encoded(image, "JPEG", quality=85)),
            (f"{n} small", encoded(small, "PNG")),
        ):
            sha256, phash = fingerprints(data, Image.open(io.BytesIO(data)).convert("RGB"))
            rows.append({"item_id": name, "sha256": sha256, "phash": phash})
    for colour in ("red", "white", "black"):
        data = encoded(Image.new("RGB", (8, 8), colour), "PNG")
        sha256, phash = fingerprints(data, Image.open(io.BytesIO(data)))
        rows.append({"item_id": colour, "sha256": sha256, "phash": phash})
    found = duplicate_groups(pa.Table.from_pylist(rows)).to_pylist()
    for row in found:
        number, _, how = row["item_id"].partition(" ")
        assert row["duplicate_of"] == (number if how == "again" else None)
        # Never another picture; plain colours are none of each other.
        assert row["near_duplicate_of"] in (None, number)
    near = sum(row["near_duplicate_of"] is not None for row in found)
    assert near >= 30 + 0.85 * 60
