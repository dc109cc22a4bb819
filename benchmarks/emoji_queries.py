"""Asks an emoji index about held-out object x style pairs: precision, and a picture of the top 10.

    python benchmarks/emoji_queries.py --index INDEX --model MODEL --heldout heldout.parquet \
        --pairs IMAGE_ID [IMAGE_ID ...] --out FOLDER

Two questions a pair, each about the pictures that the model makes for "a X emoji in Y style":
which images taught X (contrast "an emoji in Y style"; right: same name) and which taught Y
(contrast "a X emoji"; right: same style). Writes `queries.md` and `top10.png`.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from headwater import Asking, Concept, Index, Model, Result

TOP, CELL, GAP, LABEL = 10, 96, 6, 34


def main() -> None:
    """Ask every pair twice and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", required=True, help="image_id of held-out pairs")
    parser.add_argument("--pictured", type=int, default=3, help="queries shown in the picture")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    columns = ["image_id", "caption", "name", "style"]
    by_id = {
        row["image_id"]: row for row in pq.read_table(args.heldout, columns=columns).to_pylist()
    }
    index, model = Index(args.index), Model.from_pretrained(args.model)
    items = index.stored.items()
    names, styles = items["name"].to_pylist(), items["style"].to_pylist()
    lines = [
        "| query | right in the index | right in the top 10 | seeds agree | seconds |",
        "|---|---|---|---|---|",
    ]
    rows: list[Any] = []
    objects: list[Any] = []
    object_styles: list[Any] = []
    for pair in args.pairs:
        asked = by_id[pair]
        for column, value, contrast, count in (
            ("name", asked["name"], f"an emoji in {asked['style']} style", names),
            ("style", asked["style"], f"a {asked['name']} emoji", styles),
        ):
            started = time.perf_counter()
            result = index.query(
                Concept(asked["caption"], contrast=contrast), model, asking=Asking(), top=TOP
            )
            seconds = time.perf_counter() - started
            right = sum(hit.item[column] == value for hit in result.hits)
            there = count.count(value)
            (objects if column == "name" else object_styles).append(right / min(TOP, there))
            title = f"{column} “{value}”, asked of “{asked['caption']}”"
            lines.append(
                f"| {title} | {there} | {right} | {result.agreement:.2f} | {seconds:.1f} |"
            )
            rows.append((title, column, value, result))
            print(lines[-1], flush=True)
    lines += [
        "",
        f"Object: recall@min(10, n) {sum(objects) / len(objects):.3f} over {len(objects)} queries. "
        f"Style: precision@10 {sum(object_styles) / len(object_styles):.3f} "
        f"over {len(object_styles)} queries.",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "queries.md").write_text("\n".join(lines) + "\n")
    pictured = [rows[i * (len(rows) // args.pictured)] for i in range(args.pictured - 1)]
    sheet([*pictured, rows[-1]]).save(args.out / "top10.png")
    print(lines[-1])


def sheet(rows: list[tuple[str, str, str, Result]]) -> Image.Image:
    """A line for each query: one generated picture, then its hits, the right ones framed green."""
    width = (TOP + 1) * (CELL + GAP) + 4 * GAP
    page = Image.new("RGB", (width, len(rows) * (CELL + LABEL + GAP)), "white")
    draw = ImageDraw.Draw(page)
    for number, (title, column, value, result) in enumerate(rows):
        top = number * (CELL + LABEL + GAP)
        draw.text((GAP, top + 8), title, fill="black")
        previews = result.thumbnails([hit.item_id for hit in result.hits])
        cells = [(result.pictures[0], "black")] + [
            (
                Image.open(io.BytesIO(previews[hit.item_id])),
                "green" if hit.item[column] == value else "red",
            )
            for hit in result.hits
        ]
        for place, (picture, colour) in enumerate(cells):
            left = GAP + place * (CELL + GAP) + (2 * GAP if place else 0)
            shown = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(shown, (left, top + LABEL))
            box = (left - 2, top + LABEL - 2, left + CELL + 1, top + LABEL + CELL + 1)
            draw.rectangle(box, outline=colour, width=3)
    return page


if __name__ == "__main__":
    main()
