"""The command `headwater`: ingest, query, inspect, sql, verify, delete, compact, demo, bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .bar import ingest_bar
from .commands_bench import bench
from .commands_change import compact, delete
from .commands_index import inspect, sql, verify
from .interrupts import unfinished_told
from .printing import err, out, print_estimate, print_result, print_summary, printable, spinner

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training images taught a text-to-image diffusion model a concept.",
)
app.add_typer(bench, name="bench")
app.command()(sql)
app.command()(verify)

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
    from headwater.benchmarks.errors import BenchmarkError

    try:
        app()
    except (
        BenchmarkError,
        ClusterError,
        DeviceError,
        IndexStoreError,
        ModelError,
        QueryError,
        SourceError,
    ) as error:
        err.print(f"[bold red]error:[/] {printable(' '.join(str(error).split()))}")
        sys.exit(2)
    except OSError as error:
        # A full disk, a missing permission: the system's own words name the file.
        err.print(f"[bold red]error:[/] {printable(error)}")
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
    method: Annotated[
        str, typer.Option(help="dsm, dtrak, dtrak-text, das, das-mean, probe, mixed, dps or cfg.")
    ] = "dtrak",
    parameters: Annotated[str, typer.Option(help="Parameters, by regular expression.")] = "auto",
    dim: Annotated[int | None, typer.Option(help="Width of a row.", show_default=False)] = None,
    timesteps: Annotated[int | None, typer.Option(help="Noise levels per image.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trajectory: Annotated[str, typer.Option(help="auto, noise or inversion.")] = "auto",
    noise: Annotated[str, typer.Option(help="image: each its own; shared: one for all.")] = "image",
    levels: Annotated[
        str, typer.Option(help="Of the noise schedule, 0.5-1: noisier half.")
    ] = "0-1",
    scaling: Annotated[
        str, typer.Option(help="Unit norm per timestep, per layer of it, or none: raw gradients.")
    ] = "timestep",
    projection: Annotated[
        str, typer.Option(help="sjlt, mask, factored, trak or identity.")
    ] = "sjlt",
    seed: Annotated[int, typer.Option(help="Of noise, projection and probe.")] = 0,
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
    from headwater.index import JOB_FILE, MANIFEST_FILE, connected
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
        levels=levels,
        scaling=scaling,
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
        if index is not None and any((index / name).exists() for name in (MANIFEST_FILE, JOB_FILE)):
            out.print(
                printable(f"as for a new index: what {index} holds already was not taken off")
            )
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
    alone: Annotated[
        str, typer.Option(help="The concept without the rest: its effect with and without it.")
    ] = "",
    contexts: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            help="In other company, to find all that shows it: 'PROMPT | CONTRAST'; repeatable.",
        ),
    ] = None,
    company: Annotated[
        int, typer.Option(help="The same: --alone beside so many captions of the corpus.")
    ] = 0,
    image: Annotated[Path | None, typer.Option(help="Ask about this picture.")] = None,
    method: Annotated[str, typer.Option(help="contrast, slider, image or journey.")] = "contrast",
    seeds: Annotated[int | None, typer.Option(help="Pictures or noise draws.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first, and of --company.")] = 0,
    top: Annotated[int, typer.Option(help="Length of the ranking.")] = 10,
    bottom: Annotated[
        bool, typer.Option("--bottom", help="The other end: what taught against it.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Every row, also of a large index.")
    ] = False,
    where: Where = None,
    similarity: Annotated[
        str | None,
        typer.Option(help="standard (default of contrast), ip (of others), cosine or relative."),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option("--quality", help="Regardless of cost: twice the pictures."),
    ] = False,
    preconditioning: Annotated[str, typer.Option(help="query, both or none.")] = "query",
    damping: Annotated[
        float | None, typer.Option(help="Lambda / mean squared row; unset: by the corpus.")
    ] = None,
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
    from headwater.queries import QUALITY

    given: dict[str, Any] = {
        "seeds": seeds,
        "similarity": similarity,
        "damping": damping,
        "guidance": guidance,
    }
    asking = Asking(
        method=method,
        seed=seed,
        preconditioning=preconditioning,
        company=company,
        **((QUALITY if quality else {}) | {k: v for k, v in given.items() if v is not None}),
    )
    pairs = tuple(_pair(text) for text in contexts or ())
    concept = Concept(prompt, contrast, image, alone=alone, contexts=pairs)
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
            concept,
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
        taught = "What taught against" if bottom else "What taught"
        title = f"{taught} “{prompt}”?" if prompt else "Which training images?"
        write_report(html_file, [Section("Ranking", result)], title=title)


def _pair(context: str) -> tuple[str, str]:
    from headwater import QueryError

    sides = context.split(" | ")
    if len(sides) != 2:
        raise QueryError(
            f"--context {context!r} is no pair; write it as 'PROMPT | CONTRAST', "
            "with one ' | ' between what has the concept and the same without it"
        )
    return sides[0].strip(), sides[1].strip()


app.command()(inspect)


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
        out.print(f"\n[bold]{printable(section.title)}[/]")
        print_result(section.result)
    out.print(printable(f"\nreport: {report.html}\nresult: {report.json}"))
