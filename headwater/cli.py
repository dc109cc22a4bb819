"""The command `headwater`: ingest, query, inspect, sql, verify, delete, compact, demo, bench."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import commands_index
from .bar import amount, duration, ingest_bar
from .commands_change import compact, delete
from .interrupts import unfinished_told

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training images taught a text-to-image diffusion model a concept.",
)
bench = typer.Typer(no_args_is_help=True, help="Measurements that can be replayed.")
app.add_typer(bench, name="bench")
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
commands_index.register(app)

OUTLIERS_SHOWN = 5

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
EngineName = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="This process, or a Ray cluster.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Of the cluster; unset: RAY_ADDRESS, or a cluster of this machine."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Of the cluster; unset: one for each GPU, or by its processors."),
]
Where = Annotated[str | None, typer.Option(help="DuckDB condition over the item columns.")]


def main() -> None:
    """Run the command line; what the user can mend ends in one line and exit code 2."""
    from headwater import (
        ClusterError,
        DeviceError,
        IndexStoreError,
        ModelError,
        QueryError,
        SourceError,
    )

    try:
        app()
    except (
        ClusterError,
        DeviceError,
        IndexStoreError,
        ModelError,
        QueryError,
        SourceError,
    ) as error:
        err.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}")
        sys.exit(2)
    except OSError as error:
        # A full disk, a missing permission: the system's own words name the file.
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)


@app.command()
def ingest(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Parquet, tar shards, or folder; path or URL.")],
    model: ModelPath,
    index: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the index, new or to add to.", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="dsm, dtrak, das, dps or cfg.")] = "dtrak",
    parameters: Annotated[str, typer.Option(help="Parameters, by regular expression.")] = "auto",
    dim: Annotated[int | None, typer.Option(help="Width of a row.", show_default=False)] = None,
    timesteps: Annotated[int | None, typer.Option(help="Noise levels per image.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trajectory: Annotated[str, typer.Option(help="auto, noise or inversion.")] = "auto",
    noise: Annotated[str, typer.Option(help="image: each its own; shared: one for all.")] = "image",
    projection: Annotated[
        str, typer.Option(help="sjlt, mask, factored, trak or identity.")
    ] = "sjlt",
    seed: Annotated[int, typer.Option(help="Of noise and projection.")] = 0,
    lora: Lora = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per forward pass; unset: by the device's memory."),
    ] = None,
    devices: Annotated[
        str,
        typer.Option("--devices", "--device", help="auto, all, cpu, cuda:1, cuda:0,cuda:1, ..."),
    ] = "auto",
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    workers: Workers = None,
    deterministic: Annotated[
        bool, typer.Option(help="The same rows to the bit at every run, at some cost in speed.")
    ] = True,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Fuse the denoiser; unset: if it pays.",
            show_default=False,
        ),
    ] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Less memory, a quarter to a half more time.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time a few batches, print time and space, end.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished ingest and begin anew.")
    ] = False,
    id_prefix: Annotated[str, typer.Option(help="Put before every item's id.")] = "",
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
    """Compute one gradient row for every training image and store them as an index.

    An index that is there is added to. An ingest that was cut short goes on where it was when the
    same command is given again.
    """
    from headwater import ColumnNames, Model, RayCluster, Recipe, build_index, estimate
    from headwater.index import connected
    from headwater.ingest import devices_named, kind_of

    if index is None and not dry_run:
        raise typer.BadParameter("give the folder of the index, or --dry-run", param_hint="--out")
    given: dict[str, Any] = {"dim": dim, "timesteps": timesteps}
    recipe = Recipe(
        method=method,
        parameters=parameters,
        dtype=dtype,
        trajectory=trajectory,
        noise=noise,
        projection=projection,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    cluster, names = None, None if engine == "ray" else devices_named(devices)
    if engine == "ray":
        if dry_run:
            raise typer.BadParameter("measures here; leave out --engine", param_hint="--dry-run")
        ray = context.with_resource(connected(ray_address))
        cluster = RayCluster(ray_address, workers)
        on_gpus = devices == "all" or ray.cluster_resources().get("GPU", 0) > 0
        chosen = kind_of(devices) if devices not in ("auto", "all") else None
        names = [chosen or ("cuda" if on_gpus else "cpu")]
    if names is None:
        loaded = Model.from_pretrained(model, lora=lora, device=devices, dtype=dtype)
    else:
        # The devices' own processes hold their copies; this one would only take their memory.
        loaded = Model.from_pretrained(
            model, lora=lora, device="cpu", dtype=dtype, runs_on=kind_of(names[0])
        )
    job: dict[str, Any] = {
        "recipe": recipe,
        "columns": ColumnNames(
            image=image_column,
            caption=caption_column,
            id=id_column,
            licence=licence_column,
            rights_holder=rights_holder_column,
            source=source_column,
        ),
        "where": where,
        "limit": limit,
        "batch_size": batch_size,
        "devices": names,
        "deterministic": deterministic,
        "compile": compile,
        "low_memory": low_memory,
    }
    if index is None or dry_run:
        with spinner("timing a few batches", quiet):
            expected = estimate(source, loaded, **job)
        print_estimate(expected)
        return
    with unfinished_told(err, index), ingest_bar(err, quiet) as progress:
        summary = build_index(
            source,
            loaded,
            index,
            cluster=cluster,
            id_prefix=id_prefix,
            restart=restart,
            progress=progress,
            **job,
        )
    print_summary(summary)


app.command()(delete)
app.command()(compact)


@app.command()
def query(
    context: typer.Context,
    index: Folder,
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="What has the concept.")] = "",
    contrast: Annotated[str, typer.Option(help="The same without it; default: nothing.")] = "",
    image: Annotated[Path | None, typer.Option(help="Ask about this picture.")] = None,
    method: Annotated[str, typer.Option(help="contrast, slider or image.")] = "contrast",
    seeds: Annotated[int | None, typer.Option(help="Pictures or noise draws.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first.")] = 0,
    top: Annotated[int, typer.Option(help="Length of the ranking.")] = 10,
    bottom: Annotated[
        bool, typer.Option("--bottom", help="The other end: what taught against it.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Every row, also of a large index.")
    ] = False,
    where: Where = None,
    similarity: Annotated[str, typer.Option(help="ip or cosine.")] = "ip",
    preconditioning: Annotated[str, typer.Option(help="query, both or none.")] = "query",
    damping: Annotated[float | None, typer.Option(help="Lambda / mean squared row.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of generated pictures.")] = None,
    lora: Lora = None,
    device: Device = "auto",
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    workers: Workers = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report.")] = None,
    quiet: Quiet = False,
) -> None:
    """Rank the training images that taught what PROMPT has and CONTRAST has not."""
    from headwater import (
        Asking,
        Concept,
        Index,
        Model,
        QueryError,
        SearchCluster,
        Section,
        write_report,
    )

    given: dict[str, Any] = {"seeds": seeds, "damping": damping, "guidance": guidance}
    asking = Asking(
        method=method,
        seed=seed,
        similarity=similarity,
        preconditioning=preconditioning,
        **{name: value for name, value in given.items() if value is not None},
    )
    for target in filter(None, (json_file, html_file)):
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise QueryError(f"{target} cannot be written: give a file in a folder that exists")
    opened = Index(index)
    cluster = None
    if engine == "ray":
        actors = SearchCluster(index, actors=workers, address=ray_address)
        cluster = context.with_resource(actors)
    loaded = Model.from_pretrained(model, lora=lora, device=device, dtype=opened.recipe.dtype)
    with spinner("asking", quiet):
        result = opened.query(
            Concept(prompt, contrast, image),
            loaded,
            asking=asking,
            where=where,
            top=top,
            bottom=bottom,
            exact=exact,
            cluster=cluster,
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
    import pyarrow as pa

    from headwater.index import (
        Catalog,
        StoredIndex,
        duplicate_counts,
        duplicate_groups,
        norm_outliers,
    )

    stored = StoredIndex.open(index)
    manifest, items = stored.manifest, stored.items().take(stored.live_positions)
    summary = Catalog(stored).summary()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("items", f"{summary.rows:,}")
    table.add_row("searchable", f"{summary.ok:,}")
    table.add_row("quarantined", f"{summary.quarantined:,}")
    for reason, count in summary.reasons.items():
        table.add_row("", escape(f"{count:,} x {reason}"))
    found = stored.items().take(pa.array(stored.ok_positions))
    counts = duplicate_counts(duplicate_groups(found))
    table.add_row("duplicates", f"{counts.exact:,} of a file, {counts.near:,} near by its looks")
    if "opt_out" in found.column_names:  # indexes made before had no such column
        refused = len(found) - found["opt_out"].null_count
        table.add_row("opted out", f"{refused:,} by the column opt_out, searchable")
    outliers = norm_outliers(items)
    if manifest.deleted:
        table.add_row("deleted", f"{manifest.deleted:,}, on the disk until `compact`")
    table.add_row("outliers", f"{len(outliers):,} by gradient norm, searchable")
    for line in outlier_lines(outliers):
        table.add_row("", escape(line))
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

    with ingest_bar(err, quiet) as progress:
        report = run_demo(folder, progress=progress)
    print_summary(report.summary)
    for section in report.sections:
        out.print(f"\n[bold]{escape(section.title)}[/]")
        print_result(section.result)
    out.print(escape(f"\nreport: {report.html}\nresult: {report.json}"))


@bench.command()
def speed(
    models: Annotated[
        str, typer.Option(help="Which, separated by commas.")
    ] = "sd-1.4,sdxl,sd3-medium,flux",
    target: Annotated[
        Path | None, typer.Option("--out", help="Write this path with .md and with .jsonl added.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ... or cpu.")] = "cuda",
) -> None:
    """Time the engine on random models of real size, against the published loop."""
    import torch

    from headwater import DeviceError
    from headwater.attribution import quiet_libraries

    with quiet_libraries():  # while they are imported
        from headwater.benchmarks.speed import run
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(
            f"--device {device}: there is no CUDA device here, and models of real size need one; "
            "give --device cpu to wait for the processor"
        )
    names = tuple(name.strip() for name in models.split(","))
    run(target, names, device, partial(print, flush=True))


@bench.command("sql")
def bench_sql(
    items: Annotated[int, typer.Option(min=1, help="Of the index that is made.")] = 1_000_000,
    folder: Annotated[
        Path | None, typer.Option("--in", help="Keep the index here.", show_default=False)
    ] = None,
) -> None:
    """Time filters over the items of a large index and joins with the hits of a result."""
    from headwater.benchmarks.sql_bench import run

    run(items, folder, partial(print, flush=True))


@bench.command("index")
def bench_index(
    features: Annotated[
        Path, typer.Option(help="Real rows: an index, or a .npy file.", show_default=False)
    ],
    rows: Annotated[int, typer.Option(help="How many to generate.", min=1000)] = 100_000,
    target: Annotated[
        Path | None, typer.Option("--out", help="Write this path with .md and with .jsonl added.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the generated index lies meanwhile.")
    ] = None,
) -> None:
    """Measure search on generated rows with the norms, spectrum and neighbours of real ones."""
    from headwater.benchmarks.index_bench import run

    run(features, rows, target, folder, partial(print, flush=True))


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
    out.print(escape(f"{summary.rows:,} rows in {summary.folder}, {lost:,} items quarantined"))
    if summary.unchanged or summary.replaced:
        out.print(f"{summary.unchanged:,} items unchanged, {len(summary.replaced):,} replaced")
    if summary.kept:
        name, reason = next(iter(summary.kept.items()))
        out.print(
            escape(
                f"{len(summary.kept):,} of them unusable in this source, their older rows stay: "
                f"{name} ({reason})" + (", ..." if len(summary.kept) > 1 else "")
            )
        )
    print_reasons(summary.quarantined)
    if summary.outliers:
        count = len(summary.outliers)
        out.print(f"{count:,} rows with an unusual gradient norm, kept and searchable:")
        for line in outlier_lines(summary.outliers):
            out.print(escape(f"  {line}"))


def print_reasons(quarantined: dict[str, int]) -> None:
    """Why items went into quarantine."""
    for reason, count in quarantined.items():
        out.print(escape(f"  {count:,} x {reason}"))


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
