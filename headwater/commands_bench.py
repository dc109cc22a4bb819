"""The commands `headwater bench ...` that time something: speed, query, sql, index."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .commands_studies import add_studies

bench = typer.Typer(no_args_is_help=True, help="Measurements that can be replayed.")
add_studies(bench)


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


@bench.command()
def query(
    size: Annotated[str, typer.Option("--model", help="Which, as for bench speed.")] = "sd-1.4",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of the global question.")] = 16,
    target: Annotated[
        Path | None, typer.Option("--out", help="Write this path with .md added.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ... or cpu.")] = "cuda",
) -> None:
    """Time a question about a given picture and one about drawn ones, on a random model."""
    from headwater.attribution import quiet_libraries

    with quiet_libraries():  # while they are imported
        from headwater.benchmarks.query_speed import run
    run(target, size=size, seeds=seeds, device=device, say=partial(print, flush=True))


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
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            help="Instead of the processor's codes, measure those that a GPU with so many bytes "
            "free holds in the place of rows.",
            min=1,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure search on generated rows with the norms, spectrum and neighbours of real ones."""
    from headwater.benchmarks.index_bench import run

    run(features, rows, target, folder, partial(print, flush=True), gpu_memory)
