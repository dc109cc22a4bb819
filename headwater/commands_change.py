"""The commands that remove from an index: delete, compact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import out, printable

Folder = Annotated[Path, typer.Argument(help="Folder of the index.", show_default=False)]


def delete(
    index: Folder,
    where: Annotated[
        str | None,
        typer.Option(help="DuckDB condition over the item columns.", show_default=False),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(help="File of item ids, one on each line.", show_default=False),
    ] = None,
) -> None:
    """Remove items from every answer at once; `compact` then takes them from the disk."""
    from headwater import delete as delete_items

    lines = None
    if ids is not None:
        text = ids.read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    done = delete_items(index, where=where, ids=lines)
    out.print(
        printable(f"{len(done.deleted):,} items deleted from {index}, {done.remaining:,} remain")
    )
    if done.deleted:
        out.print(printable(f"their rows and previews stay on the disk until: compact {index}"))


def compact(index: Folder) -> None:
    """Take deleted items from the disk."""
    from headwater import compact as compact_index

    done = compact_index(index)
    out.print(
        printable(
            f"{done.removed:,} deleted items taken from the disk ({done.parts:,} parts), "
            f"{done.remaining:,} remain in {index}"
        )
    )
