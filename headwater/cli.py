"""The command `headwater`: ingest, query, inspect, demo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training images taught a text-to-image diffusion model a concept.",
)
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

Folder = Annotated[Path, typer.Argument(help="Folder of the index.", show_default=False)]
ModelPath = Annotated[
    str, typer.Option("--model", help="Diffusers pipeline folder or hub id.", show_default=False)
]
Lora = Annotated[
    str | None,
    typer.Option(help="LoRA of the model: file, folder or hub id.", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Where = Annotated[str | None, typer.Option(help="DuckDB condition over the item columns.")]


def main() -> None:
    """Run the command line; what the user can mend ends in one line and exit code 2."""
    from headwater import IndexStoreError, ModelError, QueryError, SourceError

    try:
        app()
    except (IndexStoreError, ModelError, QueryError, SourceError) as error:
        err.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}")
        sys.exit(2)
    except OSError as error:
        # A full disk, a missing permission: the system's own words name the file.
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)


@app.command()
def ingest(
    source: Annotated[str, typer.Argument(help="Parquet file or folder, or image folder.")],
    model: ModelPath,
    index: Annotated[Path, typer.Option("--out", help="Folder of the new index.")],
    method: Annotated[str, typer.Option(help="dsm, dtrak, das, dps or cfg.")] = "dtrak",
    parameters: Annotated[str, typer.Option(help="Parameters, by regular expression.")] = "auto",
    dim: Annotated[int | None, typer.Option(help="Width of a row.", show_default=False)] = None,
    timesteps: Annotated[int | None, typer.Option(help="Noise levels per image.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trajectory: Annotated[str, typer.Option(help="auto, noise or inversion.")] = "auto",
    noise: Annotated[str, typer.Option(help="image: each its own; shared: one for all.")] = "image",
    seed: Annotated[int, typer.Option(help="Of noise and projection.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 16,
    lora: Lora = None,
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(help="At most so many items.")] = None,
    where: Annotated[str | None, typer.Option(help="DuckDB condition over the columns.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of image bytes or path.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of unique, stable ids.")] = None,
    licence_column: Annotated[str | None, typer.Option(help="Column of SPDX licences.")] = None,
    rights_holder_column: Annotated[str | None, typer.Option(help="Column of owners.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Column of origins.")] = None,
    quiet: Quiet = False,
) -> None:
    """Compute one gradient row for every training image and store them as an index."""
    from headwater import ColumnNames, Model, Recipe, build_index

    given: dict[str, Any] = {"dim": dim, "timesteps": timesteps}
    recipe = Recipe(
        method=method,
        parameters=parameters,
        dtype=dtype,
        trajectory=trajectory,
        noise=noise,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    names = ColumnNames(
        image=image_column,
        caption=caption_column,
        id=id_column,
        licence=licence_column,
        rights_holder=rights_holder_column,
        source=source_column,
    )
    loaded = Model.from_pretrained(model, lora=lora, device=device, dtype=dtype)
    with ingest_bar("ingest", quiet) as progress:
        summary = build_index(
            source,
            loaded,
            index,
            recipe=recipe,
            columns=names,
            where=where,
            limit=limit,
            batch_size=batch_size,
            progress=progress,
        )
    print_summary(summary)


@app.command()
def query(
    index: Folder,
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="What has the concept.")] = "",
    contrast: Annotated[str, typer.Option(help="The same without it; default: nothing.")] = "",
    image: Annotated[Path | None, typer.Option(help="Ask about this picture.")] = None,
    method: Annotated[str, typer.Option(help="contrast, slider or image.")] = "contrast",
    seeds: Annotated[int | None, typer.Option(help="Pictures or noise draws.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first.")] = 0,
    top: Annotated[int, typer.Option(help="Length of the ranking.")] = 10,
    where: Where = None,
    damping: Annotated[float | None, typer.Option(help="Lambda / mean squared row.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of generated pictures.")] = None,
    lora: Lora = None,
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report.")] = None,
    quiet: Quiet = False,
) -> None:
    """Rank the training images that taught what PROMPT has and CONTRAST has not."""
    from headwater import Asking, Concept, Index, Model, QueryError, Section, write_report

    given: dict[str, Any] = {"seeds": seeds, "damping": damping, "guidance": guidance}
    asking = Asking(
        method=method,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    for target in filter(None, (json_file, html_file)):
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise QueryError(f"{target} cannot be written: give a file in a folder that exists")
    opened = Index(index)
    loaded = Model.from_pretrained(model, lora=lora, device=device, dtype=opened.recipe.dtype)
    with spinner("asking", quiet):
        result = opened.query(
            Concept(prompt, contrast, image), loaded, asking=asking, where=where, top=top
        )
    print_result(result)
    if json_file is not None:
        result.save_json(json_file)
    if html_file is not None:
        title = f"What taught “{prompt}”?" if prompt else "Which training images?"
        write_report(html_file, [Section("Ranking", result)], title=title)


@app.command()
def inspect(index: Folder) -> None:
    """Print what an index holds: counts, columns, recipe, feature space, quarantine."""
    from headwater.index import Catalog, StoredIndex

    stored = StoredIndex.open(index)
    manifest, summary = stored.manifest, Catalog(stored.items()).summary()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("items", f"{summary.rows:,}")
    table.add_row("searchable", f"{summary.ok:,}")
    table.add_row("quarantined", f"{summary.quarantined:,}")
    for reason, count in summary.reasons.items():
        table.add_row("", escape(f"{count:,} x {reason}"))
    table.add_row("row", f"{manifest.dim:,} x float16")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("feature space", manifest.feature_space_id)
    for name, value in manifest.recipe["recipe"].items():
        table.add_row("  " + name, escape(str(value)))
    for name, value in manifest.recipe["model"].items():
        table.add_row("  " + name, value[:16])
    table.add_row("columns", "")
    for name, kind in summary.columns.items():
        table.add_row("  " + escape(name), escape(kind))
    out.print(table)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")],
    quiet: Quiet = False,
) -> None:
    """Render a corpus, ingest it with the shipped model, and ask where two concepts came from."""
    from headwater.demo.run import run_demo

    with ingest_bar("ingest", quiet) as progress:
        report = run_demo(folder, progress=progress)
    print_summary(report.summary)
    for section in report.sections:
        out.print(f"\n[bold]{escape(section.title)}[/]")
        print_result(section.result)
    out.print(escape(f"\nreport: {report.html}\nresult: {report.json}"))


@contextmanager
def ingest_bar(label: str, quiet: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """A progress bar on the error stream, fed by the ingest job."""
    if quiet:
        yield None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[quarantined]} quarantined"),
        console=err,
    ) as bar:
        task = bar.add_task(label, total=None, rate="", quarantined=0)

        def advance(done: int, total: int, quarantined: int) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{done / elapsed:.1f} img/s" if elapsed else ""
            bar.update(task, completed=done, total=total, rate=rate, quarantined=quarantined)

        yield advance


@contextmanager
def spinner(label: str, quiet: bool) -> Iterator[None]:
    """A sign of life for work without a count."""
    if quiet:
        yield
        return
    with err.status(label):
        yield


def print_summary(summary: Any) -> None:
    """How many items went where."""
    lost = sum(summary.quarantined.values())
    out.print(escape(f"{summary.rows:,} rows in {summary.folder}, {lost:,} items quarantined"))
    for reason, count in summary.quarantined.items():
        out.print(escape(f"  {count:,} x {reason}"))


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
            str(hit.rank), f"{hit.score:.4g}", *(escape(str(w)) if w else "" for w in words)
        )
    out.print(table)
    for group in result.rollup("rights_holder", "licence"):
        holder, licence = (
            group["rights_holder"] or "rights holder not stated",
            group["licence"] or "licence not stated",
        )
        out.print(escape(f"{group['share']:4.0%}  {holder}, {licence}"))
    for warning in result.warnings:
        err.print(f"[bold yellow]warning:[/] {escape(warning)}")
    if result.agreement is not None:
        out.print(
            f"{result.searched:,} images searched; one seed alone finds "
            f"{result.agreement:.0%} of these hits"
        )
