"""The benchmark `abc`: exemplars of customised models, sought among 100,000 images of LAION.

A Stable Diffusion 1.4 that was fine-tuned on a few exemplars of a subject or style drew pictures of
it. Which images taught it: are the exemplars among the first of all? `abc_tree` says what is read.

Which weights. Rows compare only within one network, and there are two to choose from:

`weights="customised"`: the fine-tuned network, which the exemplars did teach, as in
    AttributeByUnlearning's code. LAION's rows are other ones for each of the 20 models. At the
    14.5 and 2.6 rows a second of one H200 (`results/speed.md`: our recipe, Concept-TRAK's) that is
    1.9 and 10.7 hours for a model, 38 and 214 for all. Rows are removed when their model is done.
`weights="base"`: SD-1.4 itself, to which only the word's embedding is new, as in Concept-TRAK's
    code. LAION's rows are the same for all models: 1.9 and 10.7 hours in all, 0.8 GB for a recipe.
    The network never learned from the exemplars: what ranks them first is likeness, not influence.

Methods of one recipe share its rows. Whatever was finished stays under `OUT/done` and whatever
rows were made under `OUT/rows`, so that a run that was stopped goes on where it was.

Not covered: mirror images of the corpus, and asking along the path that drew the picture (the
pictures are given, without their seeds: a slider asks along the recipe's own trajectory).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from headwater.attribution import (
    Engine,
    Model,
    Recipe,
    feature_space,
    feature_space_id,
    quiet_libraries,
    resolved,
)
from headwater.benchmarks import record
from headwater.benchmarks.abc_tree import (
    Customised,
    Laion,
    check_files,
    customise,
    read_pictures,
    read_tree,
)
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.measure import BASELINES, latent_scores, measure
from headwater.benchmarks.methods import chosen
from headwater.benchmarks.runs import begin, given
from headwater.benchmarks.study import (
    Configuration,
    Corpus,
    Ingested,
    Question,
    Say,
    Study,
    answer,
    corpus_rows,
    curvature_of,
)

WEIGHTS = ("customised", "base")
# Some minutes of a GPU; no version of SD-1.4 is one for two cores.
SMALL: dict[str, Any] = {
    "laion": 1000,
    "models": 4,
    "pictures": 5,
    "methods": ["d-trak", "concept-trak", "headwater"],
}
_BLOCK = 1000  # rows that are made, and written, at a time


def run(
    out: Path,
    *,
    tree: str,
    model: str,
    tasks: str | None = None,
    weights: str = "customised",
    folders: Sequence[str] = ("models", "synth"),
    laion: int = 100_000,
    models: int = 0,
    pictures: int = 0,
    seeds: int = 4,
    batch: int = 64,
    methods: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    say: Say,
) -> pa.Table:
    """Rank exemplars and LAION for every picture by every method, and write the record.

    Args:
        out: folder of the record, and of what a stopped run goes on from.
        tree: AbC's folder.
        model: the base model, SD-1.4.
        tasks: AbC's list of tasks; None: `all_tasks.json` in the tree.
        weights: "customised" or "base", see above.
        folders: of the tree, where models and their pictures lie.
        laion: distractors.
        models: the first so many of each kind; 0 for all.
        pictures: of each model, the first so many; 0 for all.
        seeds: noise draws over each picture.
        batch: images per forward pass.
        methods: names of `methods.configurations`; none for all.
        dtype: precision of the denoiser's passes.
        device: cuda, cpu, or auto.
        say: is told each result.

    Returns:
        Every ranking, by `measure.SCHEMA`.

    Raises:
        BenchmarkError: a part of the tree that is missing or broken, a setting that is none.
    """
    settings = given(locals())
    if weights not in WEIGHTS:
        raise BenchmarkError(f"weights {weights!r} is unknown; choose {' or '.join(WEIGHTS)}")
    if len(folders) != 2:
        raise BenchmarkError(f"folders {list(folders)} are not two: of models and of pictures")
    configurations = chosen(methods)
    asked = read_tree(tree, tasks=tasks, laion=laion, folders=(folders[0], folders[1]))
    base = Model.from_pretrained(model, device=device, dtype=dtype)
    asked.laion.check(base)
    wanted = _first(asked.customised, models, pictures)
    for customised in wanted:  # what is missing is told now, not after hours
        check_files(customised, weights=weights == "customised")
    rows = _RowStore(out / "rows", asked.laion, batch, say)
    begun = begin(out, "abc", settings, model=base, corpus=rows.digest, say=say)
    table = pa.concat_tables(
        _one_model(
            out, Path(tree), base, customised, place, configurations, rows, weights, seeds, say
        )
        for place, customised in enumerate(wanted)
    )
    kinds = dict.fromkeys(table["concept"].to_pylist(), "recall_at_10")
    intro = _intro(table, weights, laion)
    record.write(begun, table, kinds, intro=intro)
    begun.finish()
    return table


def _one_model(
    out: Path,
    tree: Path,
    base: Model,
    customised: Customised,
    place: int,
    configurations: Sequence[Configuration],
    rows: _RowStore,
    weights: str,
    seeds: int,
    say: Say,
) -> pa.Table:
    """All rankings for the pictures of one model, by what is done already and what is not."""
    with quiet_libraries():
        model = customise(base, customised, weights=weights == "customised")
    given = read_pictures([task.picture for task in customised.tasks], model)
    exemplars = Corpus(
        read_pictures(customised.exemplars, model),
        (customised.caption,) * len(customised.exemplars),
        tuple(str(path.relative_to(tree)) for path in customised.exemplars),
    )
    study = _study(model, customised, exemplars, rows.laion, given, tree, seeds, rows.batch)
    study = replace(study, replicate=place)  # intervals draw models and pictures again
    teller = base if weights == "base" else model  # who tells of LAION

    def ingest(engine: Engine, corpus: Corpus, batch: int) -> Ingested:
        mine = corpus_rows(engine, exemplars, batch)
        theirs, seconds = rows.of(Engine(teller, engine.recipe))
        features, weights = (torch.cat([a, b]) for a, b in zip(theirs, mine, strict=True))
        return Ingested(features, weights, curvature_of(features), seconds)

    def latents(study: Study) -> npt.NDArray[np.float64]:
        blocks = [*(rows.block(start) for start in rows.starts), exemplars]
        return np.concatenate([latent_scores(replace(study, corpus=b)) for b in blocks])

    shown = torch.cat([given, exemplars.x_0])
    identity = {
        "model": [model.fingerprint, teller.fingerprint, str(model.dtype)],
        "laion": rows.digest,
        "exemplars": [customised.caption, *exemplars.keys],
        "questions": [[q.picture, q.prompt, q.contrast] for q in study.questions],
        "pictures": hashlib.sha256(shown.cpu().numpy().tobytes()).hexdigest(),
        "seeds": seeds,
    }
    baselines = BASELINES | {"nearest latents": latents}
    make = partial(measure, study, say=say, baselines=baselines)
    tables = [_once(out / "done", identity | {"baselines": list(baselines)}, partial(make, ()))]
    for configuration in configurations:
        answering = partial(answer, ingest=ingest)
        make = partial(measure, study, [configuration], say, baselines={}, answering=answering)
        space = feature_space(resolved(configuration.recipe, model), model.fingerprint)
        asked = identity | {"space": space, "configuration": asdict(configuration)}
        tables.append(_once(out / "done", asked, make))
    if weights == "customised":
        for configuration in configurations:
            rows.forget(configuration.recipe, model)
    return pa.concat_tables(tables)


def _study(
    model: Model,
    customised: Customised,
    exemplars: Corpus,
    laion: Laion,
    given: Tensor,
    tree: Path,
    seeds: int,
    batch: int,
) -> Study:
    """The questions about one model's pictures.

    The exemplars come last in the corpus: what ties with them ranks before them.
    """
    truth = np.arange(len(laion) + len(exemplars)) >= len(laion)
    names = [str(task.picture.relative_to(tree)) for task in customised.tasks]
    questions = tuple(
        Question(customised.kind, task.prompt, task.contrast, name, truth)
        for name, task in zip(names, customised.tasks, strict=True)
    )
    corpus = Corpus(
        # LAION's latents stay on disk: rows and baselines read them block by block.
        torch.empty(len(truth), 0),
        (*laion.captions, *exemplars.captions),
        (*(f"laion/{i}" for i in range(len(laion))), *exemplars.keys),
    )
    pictures = dict(zip(names, given, strict=True))
    return Study("abc", model, corpus, questions, seeds=seeds, batch=batch, given=pictures)


class _RowStore:
    """LAION's rows by feature space, in blocks that are written when they are whole."""

    def __init__(self, folder: Path, laion: Laion, batch: int, say: Say) -> None:
        self.folder, self.laion, self.batch, self.say = folder, laion, batch, say
        self.starts = range(0, len(laion), _BLOCK)
        whole = hashlib.sha256("\n".join(laion.captions).encode())
        for start in self.starts:
            whole.update(np.ascontiguousarray(laion.latents[start]).tobytes())
        self.digest = whole.hexdigest()[:16]

    def of(self, engine: Engine) -> tuple[tuple[Tensor, Tensor], float]:
        """Features [N, dim] and weights [N], and the seconds that they took when they were made."""
        folder = self._folder(engine.recipe, engine.model)
        features = torch.empty(len(self.laion), engine.projector.dim)
        weights, seconds = torch.empty(len(self.laion)), 0.0
        for start in self.starts:
            stop = min(start + _BLOCK, len(self.laion))
            path = folder / f"rows-{start:08d}-{stop:08d}.npz"
            if not path.is_file():
                self._make(engine, start, path)
            with np.load(path, allow_pickle=False) as held:
                features[start:stop] = torch.from_numpy(held["features"])
                weights[start:stop] = torch.from_numpy(held["weights"])
                seconds += float(held["seconds"])
        return (features.to(engine.model.device), weights.to(engine.model.device)), seconds

    def block(self, start: int) -> Corpus:
        """The images of one block."""
        stop = min(start + _BLOCK, len(self.laion))
        keys = tuple(f"laion/{i}" for i in range(start, stop))
        return Corpus(self.laion.x_0(start, stop), self.laion.captions[start:stop], keys)

    def forget(self, recipe: Recipe, model: Model) -> None:
        """Remove the rows of a model that nobody will ask for again."""
        folder = self._folder(recipe, model)
        if folder.exists():
            shutil.rmtree(folder)

    def _folder(self, recipe: Recipe, model: Model) -> Path:
        space = feature_space_id(feature_space(resolved(recipe, model), model.fingerprint))
        return self.folder / f"{space}-{self.digest}"

    def _make(self, engine: Engine, start: int, path: Path) -> None:
        began = time.perf_counter()
        features, weights = corpus_rows(engine, self.block(start), self.batch)
        held = features.cpu().numpy(), weights.cpu().numpy()
        seconds = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        with unfinished.open("wb") as file:
            np.savez(file, features=held[0], weights=held[1], seconds=seconds)
        os.replace(unfinished, path)
        self.say(f"rows {start} to {start + len(features)} of {len(self.laion)}: {seconds:.1f} s")


def _once(folder: Path, identity: dict[str, Any], make: Callable[[], pa.Table]) -> pa.Table:
    """What `make` gives, or what it gave an earlier run of the same identity."""
    text = json.dumps(identity, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"
    if not path.is_file():
        table = make()
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    return pq.read_table(path)


def _first(customised: Sequence[Customised], models: int, pictures: int) -> list[Customised]:
    """The first so many models of each kind, with the first so many pictures; 0: all of them."""
    kept: list[Customised] = []
    for one in customised:
        if not models or sum(other.kind == one.kind for other in kept) < models:
            kept.append(replace(one, tasks=one.tasks[: pictures or None]))
    return kept


def _intro(table: pa.Table, weights: str, laion: int) -> str:
    free = [row for row in table.to_pylist() if row["label_free"]]
    lines = [
        f"{len({row['picture'] for row in free})} pictures of AbC (Wang et al. 2023), the "
        f"exemplars of each among {laion:,} images of LAION; weights: {weights}. Caption search "
        "finds the new word, which stands in the exemplars' captions and in no other.",
        "",
        "| method, all pictures, label-free | recall@10 | mAP |",
        "|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in free):
        mine = [row for row in free if row["method"] == method]
        recall, average = (
            np.nanmean([row[metric] for row in mine])
            for metric in ("recall_at_10", "average_precision")
        )
        lines.append(f"| {method} | {recall:.3f} | {average:.3f} |")
    return "\n".join(lines)
