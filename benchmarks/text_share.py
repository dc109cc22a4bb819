"""How much of a hit's score enters through the text, on the emoji corpus.

For the ten first images of every question, recomputed in parts:

- text share: the part of the score that enters through the layers fed by the text alone (`to_k`,
  `to_v`), as a share of the score; exact, see `attribution/shares.py`.
- without caption: the score that the image would have if the attribution were told no caption, as
  a share of its score. This is the stronger statement: the other layers' gradients are taken at
  the caption, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headwater.attribution import Engine, Model, text_share
from headwater.benchmarks import record
from headwater.benchmarks.emoji import EMOJI, OURS, make_study, named, read
from headwater.benchmarks.runs import begin, digest, given
from headwater.benchmarks.study import Answers, Configuration, Say, Study, answer, corpus_rows

SMALL = {"rows": 200, "pairs": 4, "seeds": 1, "batch": 32}
SHARES = ("text_share", "without_caption")


def run(
    out: Path,
    *,
    corpus: str,
    model: str,
    rows: int = 4000,
    pairs: int = 106,
    seeds: int = 4,
    batch: int = 1024,
    hits: int = 10,
    methods: Sequence[str] = (OURS,),
    wording: Sequence[str] = EMOJI,
    dtype: str = "auto",
    device: str = "auto",
    say: Say,
) -> pa.Table:
    """Split the scores of the first `hits` images of every question; args as of `emoji.run`.

    Returns:
        A row for each method, question and hit: method, question, concept, rank, key, carrier,
        score, text_share, without_caption.
    """
    settings = given(locals())
    chosen = named(methods)
    art, asked = read(Path(corpus), rows, pairs)
    network = Model.from_pretrained(model, device=device, dtype=dtype)
    source = digest(art, pa.Table.from_pylist(asked))
    begun = begin(out, "text-share", settings, model=network, corpus=source, say=say)
    study = make_study(network, art, asked, wording, seeds=seeds, batch=batch)

    def of_method(configuration: Configuration) -> pa.Table:
        return pa.Table.from_pylist(split(study, answer(study, configuration), hits))

    tables = []
    for configuration in chosen:
        make = partial(of_method, configuration)
        tables.append(begun.parts.once(make, configuration.name))
        say(f"{configuration.name}: {len(tables[-1])} scores split")
    table = pa.concat_tables(tables)
    pq.write_table(table, out / "text-share.parquet")
    lines = ["# text-share", "", *str(__doc__).splitlines(), record.told(begun.config), ""]
    (out / "text-share.md").write_text("\n".join([*lines, *markdown(table)]) + "\n")
    begun.finish()
    return table


def split(study: Study, answers: Answers, hits: int) -> list[dict[str, Any]]:
    """The first `hits` images of every question, with the parts of their scores."""
    engine = Engine(study.model, answers.configuration.recipe)
    scores = answers.scores()
    first = scores.topk(min(hits, len(scores)), dim=0).indices.cpu()  # [hits, Q]
    some = sorted(set(first.flatten().tolist()))
    place = {image: i for i, image in enumerate(some)}
    corpus = replace(
        study.corpus,
        x_0=study.corpus.x_0[some],
        captions=tuple(study.corpus.captions[i] for i in some),
        keys=tuple(study.corpus.keys[i] for i in some),
    )
    asked = answers.solved()
    shares = []
    for start in range(0, len(some), study.batch):
        part = slice(start, start + study.batch)
        inputs = corpus.x_0[part], corpus.captions[part], corpus.keys[part]
        shares.append(text_share(engine, *inputs, asked))
    of_text = torch.cat(shares, 1).cpu()  # [Q, images]
    silent = replace(corpus, captions=("",) * len(some))
    without, _ = corpus_rows(engine, silent, study.batch)
    bare = (asked @ without.double().mT / (asked @ answers.features[some].double().mT)).cpu()
    return [
        {
            "method": answers.configuration.name,
            "question": number,
            "concept": question.concept,
            "rank": rank + 1,
            "key": study.corpus.keys[image],
            "carrier": bool(question.truth[image]),
            "score": float(scores[image, number]),
            "text_share": float(of_text[number, place[image]]),
            "without_caption": float(bare[number, place[image]]),
        }
        for number, question in enumerate(study.questions)
        for rank, image in enumerate(first[:, number].tolist())
    ]


def markdown(table: pa.Table) -> list[str]:
    """Median and quartiles of either share, for carriers and for the others among the hits."""
    lines = [
        "| method | concept | hits | | text share: median (quartiles) | without caption |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault((row["method"], row["concept"], row["carrier"]), []).append(row)
    for (method, concept, carrier), rows in groups.items():
        cells = []
        for share in SHARES:
            low, middle, high = np.quantile([row[share] for row in rows], [0.25, 0.5, 0.75])
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        kind = "carriers" if carrier else "others"
        lines.append(f"| {method} | {concept} | {len(rows):,} | {kind} | {' | '.join(cells)} |")
    return [*lines, ""]
