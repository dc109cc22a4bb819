"""Commands that read an index without a model: sql, verify, inspect."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from .bar import amount
from .printing import duplicates_line, err, out, outlier_lines, printable

if TYPE_CHECKING:  # Arrow and DuckDB take a while to import
    import pyarrow as pa

    from .index import Verification

TERMINAL_ROWS = 50
CELL_CHARACTERS = 200
LEFTOVERS_SHOWN = 5

Folder = Annotated[Path, typer.Argument(help="Folder of the index.", show_default=False)]


def sql(
    index: Folder,
    query: Annotated[
        str, typer.Argument(help="One SELECT over items (and hits).", show_default=False)
    ],
    hits: Annotated[
        Path | None,
        typer.Option(help="What `query --json` wrote: the view hits.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"At most so many rows; unset: {TERMINAL_ROWS} on the screen, all in a file.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write CSV, - for standard output.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write JSON, - for standard output.", show_default=False),
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write Parquet.", show_default=False)] = None,
) -> None:
    """Ask the items of an index in DuckDB's SQL; nothing is changed, nothing else can be read.

    The view items has position and every item column, without deleted items and with quarantined
    ones (status); duplicates has the items that repeat an earlier one, and which; with --hits, the
    view hits has rank, item_id and score of a result.
    """
    from headwater.index import sql as run
    from headwater.index import write_csv, write_json_rows, write_parquet

    files: list[tuple[Path, Callable[[pa.Table, Path], None]]] = [
        (path, write)
        for path, write in (
            (csv, write_csv),
            (json_file, write_json_rows),
            (parquet, write_parquet),
        )
        if path is not None
    ]
    if parquet == Path("-"):
        raise typer.BadParameter("give a file", param_hint="--parquet")
    if csv == json_file == Path("-"):
        raise typer.BadParameter("only one of --csv and --json can be -")
    shown = TERMINAL_ROWS if limit is None else limit
    # One row more than is shown tells whether there are more.
    rows = run(index, query, hits=hits, limit=limit if files else shown + 1)
    for path, write in files:
        if path == Path("-"):
            _to_standard_output(rows, write)
        else:
            write(rows, path)
            err.print(printable(f"{rows.num_rows:,} rows in {path}"))
    if not files:
        _print_rows(rows.slice(0, shown), more=rows.num_rows > shown)


def verify(
    index: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Check every file of an index against its hashes and counts; exit code 1 if one is damaged.

    The ledger's hashes show what was changed in it, but not whether lines were removed from its
    end since the last ingest, deletion or compaction: note the hash printed here elsewhere.
    """
    from headwater.index import verify as run

    with Progress(
        TextColumn("verify"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)
        found = run(
            index, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        _print_verification(found)
    if not found.whole:
        raise typer.Exit(1)


def inspect(index: Folder) -> None:
    """Print what an index holds: counts, columns, recipe, feature space, quarantine."""
    import pyarrow as pa

    from headwater.index import (
        Catalog,
        StoredIndex,
        calibrations,
        duplicate_counts,
        norm_outliers,
    )

    stored = StoredIndex.open(index)
    manifest, known = stored.manifest, stored.item_schema.names
    summary = Catalog(stored).summary()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("items", f"{summary.rows:,}")
    table.add_row("searchable", f"{summary.ok:,}")
    table.add_row("quarantined", f"{summary.quarantined:,}")
    for reason, count in summary.reasons.items():
        table.add_row("", printable(f"{count:,} x {reason}"))
    repeats = stored.duplicates()
    told = "not looked for" if repeats is None else duplicates_line(duplicate_counts(repeats))
    table.add_row("duplicates", told)
    if "opt_out" in known:  # indexes made before had no such column
        column = stored.items(["opt_out"])["opt_out"].take(pa.array(stored.ok_positions))
        refused = len(column) - column.null_count
        table.add_row("opted out", f"{refused:,} by the column opt_out, searchable")
    if manifest.deleted:
        table.add_row("deleted", f"{manifest.deleted:,}, on the disk until `compact`")
    outliers: Sequence[Any] = ()
    if "gradient_norm" in known:
        norms = stored.items(["item_id", "status", "gradient_norm"])
        outliers = norm_outliers(norms.take(pa.array(stored.live_positions)))
    table.add_row("outliers", f"{len(outliers):,} by gradient norm, searchable")
    for line in outlier_lines(outliers):
        table.add_row("", printable(line))
    table.add_row("row", f"{manifest.dim:,} x float16")
    table.add_row("shards", f"{len(manifest.shards):,}")
    for name, measured in calibrations(stored).items():
        for line in measured.told():
            table.add_row(f"cells, {name}", printable(line))
    table.add_row("feature space", printable(manifest.feature_space_id))
    for name, value in manifest.recipe.get("recipe", {}).items():
        table.add_row("  " + printable(name), printable(value))
    for name, value in manifest.recipe.get("model", {}).items():
        table.add_row("  " + printable(name), printable(value[:16]))
    table.add_row("columns", "")
    for name, kind in summary.columns.items():
        table.add_row("  " + printable(name), printable(kind))
    out.print(table)


def _to_standard_output(rows: pa.Table, write: Callable[[pa.Table, Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        write(rows, path)
        sys.stdout.flush()
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _print_rows(rows: pa.Table, *, more: bool) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for field in rows.schema:
        table.add_column(printable(field.name), overflow="fold", justify=_justify(str(field.type)))
    for row in rows.to_pylist():
        table.add_row(*(printable(_cell(row[name])) for name in rows.column_names))
    out.print(table)
    if more:
        shown = f"the first {rows.num_rows:,} rows; there are more"
        out.print(f"{shown}: --limit N, or --csv, --json, --parquet")
    else:
        out.print(f"{rows.num_rows:,} rows")


def _justify(kind: str) -> Any:
    numbers = ("int", "uint", "float", "double", "half", "decimal")
    return "right" if kind.startswith(numbers) else "left"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CELL_CHARACTERS else text[: CELL_CHARACTERS - 3] + "..."


def _print_verification(found: Verification) -> None:
    for damage in found.damaged:
        out.print(f"[bold red]damaged:[/] {printable(f'{damage.file}: {damage.problem}')}")
    out.print(
        printable(f"{found.files:,} files, {amount(found.bytes)}, {found.rows:,} rows checked")
    )
    out.print(f"ledger: {found.ledger_lines:,} lines, last hash {found.ledger_head}")
    if found.unfinished:
        out.print("an ingest runs or was cut short: run it again and it goes on")
    for name in found.leftovers[:LEFTOVERS_SHOWN]:
        out.print(printable(f"left over, part of nothing: {name}"))
    if len(found.leftovers) > LEFTOVERS_SHOWN:
        out.print(f"and {len(found.leftovers) - LEFTOVERS_SHOWN:,} more files left over")
    if found.whole:
        out.print(printable(f"{found.folder} is whole"))
    else:
        first = found.damaged[0].file
        out.print(
            printable(
                f"{found.folder} is damaged, first in {first}: restore the files from a copy, "
                "or ingest again"
            )
        )
