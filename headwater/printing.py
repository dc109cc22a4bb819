"""What the commands print: an ingest's summary and estimate, a query's result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bar import amount, duration

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

OUTLIERS_SHOWN = 5
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: object) -> str:
    """Strangers' text for a terminal: markup is not obeyed, nor are escape sequences."""
    return escape(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", str(text)))


@contextmanager
def spinner(label: str, quiet: bool) -> Iterator[None]:
    """A sign of life for work without a count."""
    if quiet:
        yield
        return
    with err.status(label):
        yield


def print_summary(summary: Any) -> None:
    """How many items went where, and which stand out."""
    lost = sum(summary.quarantined.values())
    out.print(printable(f"{summary.rows:,} rows in {summary.folder}, {lost:,} items quarantined"))
    if summary.unchanged or summary.replaced:
        out.print(f"{summary.unchanged:,} items unchanged, {len(summary.replaced):,} replaced")
    if summary.kept:
        name, reason = next(iter(summary.kept.items()))
        more = ", ..." if len(summary.kept) > 1 else ""
        out.print(
            printable(
                f"{len(summary.kept):,} of them unusable in this source, their older rows stay: "
                f"{name} ({reason}){more}"
            )
        )
    print_reasons(summary.quarantined)
    if summary.duplicates is not None:
        out.print(f"duplicates in the index: {duplicates_line(summary.duplicates)}")
    if summary.outliers:
        count = len(summary.outliers)
        out.print(f"{count:,} rows with an unusual gradient norm, kept and searchable:")
        for line in outlier_lines(summary.outliers):
            out.print(printable(f"  {line}"))


def print_reasons(quarantined: dict[str, int]) -> None:
    """Why items went into quarantine."""
    for reason, count in quarantined.items():
        out.print(printable(f"  {count:,} x {reason}"))


def duplicates_line(counts: Any) -> str:
    """How many items repeat an earlier one."""
    return f"{counts.exact:,} of a file, {counts.near:,} near by its looks"


def outlier_lines(outliers: Sequence[Any]) -> Iterator[str]:
    """One line for each of the items that stand out most."""
    for outlier in outliers[:OUTLIERS_SHOWN]:
        yield f"{outlier.item_id}: norm {outlier.gradient_norm:.3g}, z {outlier.z:+.1f}"


def print_estimate(expected: Any) -> None:
    """What the ingest would take."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("items", f"{expected.items:,}")
    table.add_row("rate", f"{expected.images_per_second:.1f} img/s")
    table.add_row("time", f"{duration(expected.seconds)}, then the curvature")
    table.add_row("memory", f"{amount(expected.peak_memory)} on each device")
    table.add_row("disk", amount(expected.disk_bytes))
    table.add_row("batch size", str(expected.batch_size))
    table.add_row(
        "quarantined", f"{sum(expected.quarantined.values()):,} of {expected.sampled:,} sampled"
    )
    out.print(table)
    print_reasons(expected.quarantined)
    out.print("nothing was written")


def print_result(result: Any) -> None:
    """The ranking and its roll-up."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("rank", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("item", "caption", "rights holder", "licence"):
        table.add_column(name, overflow="fold")
    for hit in result.hits:
        words = [hit.item_id, *(hit.item[c] for c in ("caption", "rights_holder", "licence"))]
        table.add_row(
            str(hit.rank), f"{hit.score:.4g}", *(printable(w) if w else "" for w in words)
        )
    out.print(table)
    for group in result.rollup("rights_holder", "licence"):
        holder, licence = (
            group["rights_holder"] or "rights holder not stated",
            group["licence"] or "licence not stated",
        )
        out.print(printable(f"{group['share']:4.0%}  {holder}, {licence}"))
    for warning in result.warnings:
        err.print(f"[bold yellow]warning:[/] {printable(warning)}")
    stable = (
        ""
        if result.agreement is None
        else (f"; one seed alone finds {result.agreement:.0%} of these hits")
    )
    out.print(f"{result.searched:,} images searched{stable}")
