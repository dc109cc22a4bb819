"""The commands `headwater bench STUDY`: methods compared on questions with known answers.

Each runs one module of headwater.benchmarks, whose `run` says what its settings are: those of the
full measurement, those of `--small`, or those of a record that is replayed.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

STUDIES = {
    "synthetic": "Shapes and colours, one pair of them never shown: who taught each half of it?",
    "faces": "Drawn faces with three attributes, one triple of them never shown.",
    "emoji": "Real art: object and style of pairs that the model never saw (--corpus, --model).",
    "caption-variants": "The emoji questions to rows of other captions: influence, or words?",
    "text-share": "How much of a hit's score enters through the text (--corpus, --model).",
    "beyond": "Ideas for more accuracy on the emoji questions, each with its gain and cost.",
    "abc": "AbC: exemplars of customised models among LAION images (--tree, --model).",
    "abc-mini": "AbC's question on emoji: new subjects, taught here (--corpus, --model).",
    "lds": "Linear datamodeling score: predicted against true effect of retraining on subsets.",
    "counterfactual": "Drop what a method ranks first, train again, measure what the model lost.",
}


def add_studies(app: typer.Typer) -> None:
    """Add a command for each study."""
    for name, says in STUDIES.items():
        app.command(name, help=says)(_command(name))


def _command(name: str) -> Callable[..., None]:
    def command(
        out: Annotated[Path, typer.Option(help="Folder of the record.", show_default=False)],
        corpus: Annotated[
            str | None, typer.Option(help="Folder of the corpus.", show_default=False)
        ] = None,
        model: Annotated[
            str | None, typer.Option(help="Its model's pipeline folder.", show_default=False)
        ] = None,
        tree: Annotated[
            str | None, typer.Option(help="Folder with AbC's files.", show_default=False)
        ] = None,
        small: Annotated[
            bool, typer.Option("--small", help="A version for two cores and some minutes.")
        ] = False,
        replay: Annotated[
            Path | None,
            typer.Option(help="Run a record's config.json again.", show_default=False),
        ] = None,
        setting: Annotated[
            list[str] | None,
            typer.Option("--set", help="KEY=VALUE, any setting; again for more."),
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, ... or cpu.")] = "auto",
    ) -> None:
        from headwater.attribution import quiet_libraries
        from headwater.benchmarks.errors import BenchmarkError

        for needed in ("bm25s", "matplotlib"):
            if find_spec(needed) is None:  # told now, not after the run
                raise BenchmarkError(f"{needed} is not installed; pip install 'headwater[bench]'")
        if small and replay is not None:
            raise BenchmarkError("--small and --replay exclude each other; a record has settings")
        with quiet_libraries():  # while they are imported
            from headwater.benchmarks.runs import replaying

            module = importlib.import_module(f"headwater.benchmarks.{name.replace('-', '_')}")
        known = inspect.signature(module.run).parameters
        settings: dict[str, Any] = dict(module.SMALL) if small else {}
        record: dict[str, Any] = {}
        if replay is not None:
            record = _recorded(replay, name)
            settings = dict(record["settings"])
        given = {"corpus": corpus, "model": model, "tree": tree}
        settings |= {key: value for key, value in given.items() if value is not None}
        settings |= dict(map(_pair, setting or ()))
        free = [key for key in known if key not in ("out", "device", "say")]
        for key in settings:
            if key not in free:
                raise BenchmarkError(
                    f"bench {name} has no setting {key!r}; choose {', '.join(free)}"
                )
        for key in free:
            if known[key].default is inspect.Parameter.empty and key not in settings:
                raise BenchmarkError(f"bench {name} needs --{key}")
        with replaying(record):
            module.run(out, device=device, say=partial(print, flush=True), **settings)

    return command


def _recorded(path: Path, name: str) -> dict[str, Any]:
    from headwater.benchmarks.errors import BenchmarkError

    try:
        record: dict[str, Any] = json.loads(path.read_text())
        benchmark, _ = record["benchmark"], dict(record["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} is no record of a benchmark ({type(error).__name__}: {error}); give the "
            "config.json that one wrote"
        ) from error
    if benchmark != name:
        raise BenchmarkError(f"{path} is of bench {benchmark}; replay it with that command")
    return record


def _pair(text: str) -> tuple[str, Any]:
    from headwater.benchmarks.errors import BenchmarkError

    key, sign, value = text.partition("=")
    if not sign:
        raise BenchmarkError(f"--set {text!r} has no '='; write KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # words need no quotes
