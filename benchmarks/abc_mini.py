"""The benchmark `abc-mini`: subjects taught to a small model here, so their teachers are known.

Mascots that code of ours invents (`subjects`) are in no corpus, so whatever a model knows of one it
has from its 1, 4 or 12 exemplars. All subjects of a run are taught to one copy of the model, each
with a word of its own, and the exemplars of one are distractors of all others, beside pictures that
the model was trained with before. The model then draws each subject: which images taught it?
Held-out emoji would not do: each is but another style of a subject that the model knows.

Two ways of teaching:
- `inversion`, textual inversion, leaves the network's weights alone. Whatever is found there, it is
  no influence on them: the exemplars are like the picture, or their captions name the word.
- `cross-attention`, fine-tuning of `to_k` and `to_v` (Custom Diffusion): the exemplars did teach
  the network.
Three ways of captioning the exemplars to the attribution (not to the training):
- `named`, as they were taught: the new word stands in them and in no other caption.
- `wrong`: the caption of some picture of the corpus, so that words neither help nor hinder.
- `silent`: without the new word. That is also the contrast of the questions, so a contrast, which
  takes away what such captions do, ranks these rows below others.
Only what `cross-attention` finds above `inversion` speaks for influence, and only without the
word's name of more than words. And only where the model draws its subjects: the share of drawn
pictures that have the colours of their own subject is told with each record.

Recall@min(10, n) and mean average precision of the exemplars. Without a corpus the demo's own is
taken, and its model.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from headwater.attribution import Model, fit
from headwater.benchmarks import record
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.finetuning import (
    FineTuning,
    Pictures,
    custom_diffusion,
    denoising_loss,
    textual_inversion,
)
from headwater.benchmarks.material import base_model
from headwater.benchmarks.measure import measure
from headwater.benchmarks.methods import chosen
from headwater.benchmarks.parts import NOWHERE
from headwater.benchmarks.runs import begin, digest, given
from headwater.benchmarks.study import Corpus, Question, Say, Study
from headwater.benchmarks.subjects import Mascot, colours
from headwater.demo.corpus import make_corpus
from headwater.queries.gradients import to_images

WAYS = ("inversion", "cross-attention")
CAPTIONS = ("named", "wrong", "silent")
# A caption with the word, the same without it, and the known word that a new one begins as.
EMOJI = ("a {} emoji", "an emoji", "emoji")
DEMO = ("a {}", "a drawing", "drawing")
# The demo's model and corpus, on two cores in some minutes.
SMALL: dict[str, Any] = {
    "rows": 120,
    "subjects": 2,
    "exemplars": [1, 4],
    "steps": 500,
    "weight_rate": 5e-3,
    "teach_batch": 8,
    "seeds": 2,
    "batch": 16,
    "methods": ["d-trak", "headwater"],
}
_REFERENCES = 8  # fresh draws of each subject that its pictures are compared with


@dataclass(frozen=True)
class Lesson:
    """What is taught: subjects, exemplar by exemplar, and what was known before."""

    words: tuple[str, ...]  # S
    counts: tuple[int, ...]  # S, exemplars of each subject
    # The corpus, then exemplars subject by subject: what ties with them ranks before them.
    images: tuple[Image.Image, ...]
    keys: tuple[str, ...]
    captions: tuple[str, ...]  # of the corpus alone
    fresh: tuple[Image.Image, ...]  # S x references, that nobody was taught with
    wording: tuple[str, str, str]

    @property
    def owner(self) -> list[int]:
        """The subject of each exemplar."""
        return [s for s, count in enumerate(self.counts) for _ in range(count)]

    def told(self, captions: str) -> tuple[str, ...]:
        """The captions of everything, those of the exemplars as `captions` of `CAPTIONS` says."""
        named, silent, _ = self.wording
        if captions == "named":
            own = [named.format(self.words[subject]) for subject in self.owner]
        elif captions == "silent":
            own = [silent] * len(self.owner)
        else:
            drawn = np.random.default_rng(0).integers(len(self.captions), size=len(self.owner))
            own = [self.captions[i] for i in drawn]
        return (*self.captions, *own)


def run(
    out: Path,
    *,
    corpus: str | None = None,
    model: str | None = None,
    rows: int = 1000,
    subjects: int = 10,
    exemplars: Sequence[int] = (1, 4, 12),
    ways: Sequence[str] = WAYS,
    captions: Sequence[str] = ("named", "wrong"),
    wording: Sequence[str] = (),
    steps: int = 800,
    teach_batch: int = 64,
    token_rate: float = 5e-3,
    weight_rate: float = 1e-3,
    seeds: int = 4,
    batch: int = 512,
    replicates: int = 1,
    methods: Sequence[str] = (),
    pictured: int = 6,
    dtype: str = "auto",
    device: str = "auto",
    say: Say,
) -> pa.Table:
    """Teach, draw, ask by every method, and write a record for each way and captioning.

    Args:
        out: folder of the records.
        corpus: folder with `train.parquet` (image_id, image, caption); None: the demo's.
        model: pipeline folder of the model that was trained on it; None: the demo's.
        rows: pictures of the corpus, drawn at random; 0 for all.
        subjects: for each number of exemplars.
        exemplars: how many a subject has.
        ways: of `WAYS`.
        captions: of `CAPTIONS`.
        wording: caption with `{}` for the word, caption without, known word that it begins as;
            none: as the emoji corpus or the demo's is worded.
        steps: of teaching.
        teach_batch: exemplars, and beside them pictures of the corpus, in a step.
        token_rate: learning rate of the words' embeddings.
        weight_rate: learning rate of `to_k` and `to_v`.
        seeds: pictures drawn of each subject.
        batch: images per forward pass of the attribution.
        replicates: other subjects, corpus pictures and trainings.
        methods: names of `methods.configurations`; none for all.
        pictured: questions in the sheets of top tens.
        dtype: precision of the attribution; teaching is in float32.
        device: cuda, cpu, or auto.
        say: is told each result.

    Returns:
        Every ranking, by `measure.SCHEMA`.

    Raises:
        BenchmarkError: a setting that is none, or no such corpus.
    """
    settings = given(locals())
    for name, wanted, known in (("ways", ways, WAYS), ("captions", captions, CAPTIONS)):
        if not wanted or set(wanted) - set(known):
            raise BenchmarkError(f"{name} {list(wanted)}: choose among {', '.join(known)}")
    for name, count in (("subjects", subjects), ("replicates", replicates), ("seeds", seeds)):
        if count < 1:
            raise BenchmarkError(f"{name} {count} is not positive")
    if not exemplars or min(exemplars) < 1:
        raise BenchmarkError(f"exemplars {list(exemplars)}: give one number or more, from 1 up")
    worded = tuple(wording) or (DEMO if corpus is None else EMOJI)
    if len(worded) != 3:
        raise BenchmarkError(f"wording {list(worded)} is not three: with, without, known word")
    configurations = chosen(methods)
    base = base_model(model, device, corpus)
    corpora = [read_corpus(corpus, rows, replicate) for replicate in range(replicates)]
    begun = begin(out, "abc-mini", settings, model=base, corpus=digest(*corpora), say=say)
    tables: list[pa.Table] = []
    recognition: dict[str, list[float]] = {}
    for replicate in range(replicates):
        counts = [count for count in exemplars for _ in range(subjects)]
        lesson = make_lesson(
            corpora[replicate], counts, (worded[0], worded[1], worded[2]), replicate
        )
        x_0 = encoded(base, lesson.images)
        tuning = FineTuning(steps, teach_batch, token_rate, weight_rate, seed=replicate)
        for way in ways:
            folder = out / "models" / f"replicate-{replicate}-{way}"
            if begun.parts.done("taught", replicate, way) is None:
                teach(base, lesson, x_0, way, tuning, say).family.pipeline.save_pretrained(folder)
                begun.parts.keep(pa.table({"folder": [str(folder)]}), "taught", replicate, way)
            taught = Model.from_pretrained(folder, device=str(base.device), dtype=dtype)
            for told in captions:
                study = make_study(
                    f"{way}, {told}", taught, lesson, x_0, told, seeds, batch, replicate
                )
                if told == captions[0]:
                    share = recognised(study, lesson.fresh)
                    recognition.setdefault(way, []).append(share)
                    say(f"{way}: {share:.2f} of the pictures are of their subject")
                table = measure(study, configurations, say, parts=begun.parts)
                tables.append(table)
                if replicate == 0:
                    folder = out / _folder(study.name)
                    folder.mkdir(parents=True, exist_ok=True)
                    shown = table["method"][-1].as_py()  # the last that its questions suffice for
                    rows_shown = record.spread(table, shown, pictured)
                    lines = record.top_ten(study, rows_shown, lesson.images.__getitem__)
                    record.grid(lines, folder / "abc-mini-top10.png")
    whole = pa.concat_tables(tables)
    metrics = {_kind(count): "recall_at_10" for count in exemplars}
    for name in dict.fromkeys(whole["study"].to_pylist()):
        mine = whole.filter(pc.equal(whole["study"], name))
        intro = _intro(name, len(counts), recognition)
        one = replace(begun, out=out / _folder(name), parts=NOWHERE)
        record.write(one, mine, metrics, intro=intro)
        one.finish()
    (out / "abc-mini.md").write_text(_overview(whole, recognition))
    begun.finish()
    return whole


def read_corpus(folder: str | None, rows: int, replicate: int) -> pa.Table:
    """Pictures that the model was trained with, drawn at random; the demo's own for None.

    Raises:
        BenchmarkError: no such corpus, or a smaller one.
    """
    if folder is None:
        table = make_corpus()
    else:
        path = Path(folder) / "train.parquet"
        if not path.is_file():
            raise BenchmarkError(f"{folder} holds no train.parquet; give the corpus's folder")
        table = pq.read_table(path, columns=["image_id", "image", "caption"])
    if rows > len(table):
        raise BenchmarkError(f"the corpus holds {len(table)} pictures, not {rows}; set fewer rows")
    if rows:
        drawn = np.random.default_rng([3, replicate]).choice(len(table), rows, replace=False)
        table = table.take(np.sort(drawn))
    return table


def make_lesson(
    known: pa.Table, counts: Sequence[int], wording: tuple[str, str, str], replicate: int
) -> Lesson:
    """Subjects with so many exemplars each, after pictures of the corpus."""
    images = [Image.open(io.BytesIO(d)).convert("RGB") for d in known["image"].to_pylist()]
    keys, fresh = known["image_id"].to_pylist(), []
    for number, count in enumerate(counts):
        mascot = Mascot.invent(replicate, number)
        draws = [
            mascot.draw(np.random.default_rng([replicate, number, draw]))
            for draw in range(count + _REFERENCES)
        ]
        images += draws[:count]
        fresh += draws[count:]
        keys += [f"subject-{number}/{draw}" for draw in range(count)]
    return Lesson(
        words=tuple(f"<new{number}>" for number in range(len(counts))),
        counts=tuple(counts),
        images=tuple(images),
        keys=tuple(keys),
        captions=tuple(known["caption"].to_pylist()),
        fresh=tuple(fresh),
        wording=wording,
    )


def encoded(model: Model, images: Sequence[Image.Image]) -> Tensor:
    """Pictures as the model sees them: x_0 [N, C, h, w]."""
    pixels = np.stack([fit(image, model.image_size) for image in images])
    return torch.cat([model.encode_pictures(part) for part in torch.from_numpy(pixels).split(512)])


def teach(
    base: Model, lesson: Lesson, x_0: Tensor, way: str, tuning: FineTuning, say: Say
) -> Model:
    """A copy of the base model that knows the subjects; the corpus is what it shall not forget."""
    start, count = len(lesson.captions), len(lesson.owner)
    shown = Pictures(x_0[start:], lesson.told("named")[start:])
    words = dict.fromkeys(lesson.words, lesson.wording[2])
    say(f"{way}: {len(words)} subjects, {count} exemplars")
    if way == "inversion":
        taught = textual_inversion(base, shown, words, tuning, say)
    else:
        prior = Pictures(x_0[:start], lesson.captions)
        taught = custom_diffusion(base, shown, prior, words, tuning, say)
    say(f"{way}: loss on the exemplars {denoising_loss(taught, shown):.4f}")
    return taught


def make_study(
    name: str,
    model: Model,
    lesson: Lesson,
    x_0: Tensor,
    captions: str,
    seeds: int,
    batch: int,
    replicate: int,
) -> Study:
    """Who taught each subject? Asked about pictures that the model draws of it."""
    named, silent, _ = lesson.wording
    owner = np.array([-1] * len(lesson.captions) + lesson.owner)
    # Another replicate's subject of this word is another subject, and so another picture.
    questions = tuple(
        Question(_kind(count), named.format(word), silent, f"{word} {replicate}", owner == number)
        for number, (word, count) in enumerate(zip(lesson.words, lesson.counts, strict=True))
    )
    corpus = Corpus(x_0, lesson.told(captions), lesson.keys)
    return Study(name, model, corpus, questions, seeds=seeds, batch=batch, replicate=replicate)


def recognised(study: Study, fresh: Sequence[Image.Image]) -> float:
    """Share of the drawn pictures whose colours are nearest to their own subject's; by chance 1/S.

    `fresh`, S x references, are draws that nobody was taught with. Of such draws of thirty mascots
    the colours tell more than 95 %.
    """
    subjects = len(study.questions)
    drawn = np.stack([colours(image) for image in to_images(study.model, study.pictures)])
    known = np.stack([colours(image) for image in fresh]).reshape(subjects, _REFERENCES, -1).mean(1)
    nearest = np.abs(drawn[:, None] - known[None]).sum(-1).argmin(1)
    return float((nearest == np.arange(subjects).repeat(study.seeds)).mean())


def _kind(count: int) -> str:
    return f"{count} exemplar{'s' * (count != 1)}"


def _folder(study: str) -> str:
    return study.replace(", ", "-")


def _intro(name: str, subjects: int, recognition: dict[str, list[float]]) -> str:
    way, told = name.split(", ")
    return (
        f"{subjects} invented subjects, taught by {way}; captions of their exemplars as the "
        f"attribution is told them: {told}. {np.mean(recognition[way]):.0%} of the drawn pictures "
        f"have the colours of their own subject (by chance {1 / subjects:.0%}); where few are, the "
        "model was not taught, and what is found is no influence."
    )


def _overview(table: pa.Table, recognition: dict[str, list[float]]) -> str:
    """Every method beside itself: taught and untaught weights, captions with and without words."""
    names = list(dict.fromkeys(table["study"].to_pylist()))
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in table.filter(table["label_free"]).to_pylist():
        found = row["recall_at_10"], row["average_precision"]
        values.setdefault((row["method"], row["study"]), []).append(found)
    lines = [
        "# abc-mini: what teaching adds to likeness and words",
        "",
        "Recall@min(10, n) / mean average precision over all subjects, lambda label-free. Pictures "
        "with the colours of their own subject: "
        + ", ".join(f"{way} {np.mean(shares):.0%}" for way, shares in recognition.items())
        + ".",
        "",
        f"| method | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for method in dict.fromkeys(table["method"].to_pylist()):
        means = (np.mean(values[method, name], axis=0) for name in names)
        cells = " | ".join(f"{recall:.3f} / {average:.3f}" for recall, average in means)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines) + "\n"
