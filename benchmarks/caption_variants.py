"""Influence or caption matching? The emoji benchmark, its attribution told other captions.

Only what the attribution is told about the training images changes; the model was trained with the
true captions and is asked as ever. A method that still finds the carriers does not find them by
their captions. It cannot be seen this way what a model learns from other captions: `write_corpus`
leaves a corpus to train one on.

- true: as the corpus has them.
- style silent: no caption names its style. object silent: no caption names its object.
- silent: every caption is empty.
- in LANGUAGE: objects are named in another language; a style is a proper name and stays.
- wrong: one caption in ten is that of an image of another object in another style.

Wrong captions part the two explanations image by image. A carrier under a wrong caption taught the
concept and does not say so; an image under a carrier's caption says so and did not teach it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headwater.attribution import Engine, Model
from headwater.benchmarks import record
from headwater.benchmarks.emoji import EMOJI, METRICS, OURS, make_study, named, read, worded
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.measure import BASELINES, measure
from headwater.benchmarks.runs import begin, digest, given
from headwater.benchmarks.study import Answers, Configuration, Say, Study, answer, ingested
from headwater.benchmarks.summary import summarise

VARIANTS = ("true", "style silent", "object silent", "silent", "wrong")
LANGUAGES = ("de", "ru", "zh")
# What no text enters, what it alone enters, and the rest of cross-attention, which it does not.
LAYERS = {
    "to_k, to_v": r"attn2\.to_[kv]\.",
    "to_q, to_out": r"attn2\.to_(q|out)\.",
    "self-attention": r"attn1\.",
}
WRONG = 0.1  # share of the captions
SMALL = {
    "rows": 200,
    "pairs": 8,
    "seeds": 1,
    "batch": 32,
    "layers": False,
    "variants": ["true", "silent", "wrong"],
    "languages": [],
}
_TRIES = 100
Indices = npt.NDArray[np.int64]
Truly = Callable[[], Answers]
Names = Mapping[tuple[str, str], str]  # (language, codepoints) -> name


def run(
    out: Path,
    *,
    corpus: str,
    model: str,
    rows: int = 4000,
    pairs: int = 106,
    seeds: int = 4,
    batch: int = 1024,
    methods: Sequence[str] = (OURS,),
    layers: bool = True,
    variants: Sequence[str] = VARIANTS,
    languages: Sequence[str] = LANGUAGES,
    wording: Sequence[str] = EMOJI,
    dtype: str = "auto",
    device: str = "auto",
    say: Say,
) -> pa.Table:
    """Put the questions of `emoji` to the methods once for every variant, and write the record.

    Args are those of `emoji.run`, and:
        layers: ask the first method also of each of `LAYERS` alone.
        variants: of the captions, beside the languages.
        languages: that objects are named in, as `names.parquet` abbreviates them.

    Returns:
        Every ranking, by `measure.SCHEMA`; `study` says the variant.
    """
    settings = given(locals())
    chosen = named(methods)
    if layers:
        chosen += of_layers(chosen[0])
    art, asked = read(Path(corpus), rows, pairs)
    names = read_names(Path(corpus), languages)
    told = {v: retold(v, art, wording, names) for v in (*variants, *map("in {}".format, languages))}
    network = Model.from_pretrained(model, device=device, dtype=dtype)
    source = digest(art, pa.Table.from_pylist(asked), pa.table(told))
    begun = begin(out, "caption-variants", settings, model=network, corpus=source, say=say)
    parts = begun.parts
    study = make_study(network, art, asked, wording, seeds=seeds, batch=batch)
    heard = {
        variant: replace(study, name=variant, corpus=replace(study.corpus, captions=captions))
        for variant, captions in told.items()
    }
    tables = {variant: [measure(each, (), say, parts=parts)] for variant, each in heard.items()}
    wrong: list[pa.Table] = []
    if "wrong" in told:
        whose = captions_of(art)
        for name in ("caption search (BM25)", "nearest latents"):
            wrong.append(meet(study, whose, name, BASELINES[name](heard["wrong"])))
    for configuration in chosen:
        truly = cache(partial(answer, study, configuration))

        def otherwise(each: Study, of: Configuration, truly: Truly = truly) -> Answers:
            """What is asked stays; only the rows change."""
            answers = truly() if each.name == "true" else told_otherwise(truly(), each)
            if each.name == "wrong":
                scores = answers.scores().cpu().numpy()
                parts.keep(meet(study, whose, of.name, scores), "wrong captions", of.name)
            return answers

        for variant, each in heard.items():
            tables[variant].append(
                measure(each, [configuration], say, baselines={}, answering=otherwise, parts=parts)
            )
        if "wrong" in told:  # kept before its rankings were
            wrong.append(parts.done("wrong captions", configuration.name))
    table = pa.concat_tables(part for of in tables.values() for part in of)
    pq.write_table(table, out / "caption-variants.parquet")
    lines = ["# caption-variants", "", *str(__doc__).splitlines(), record.told(begun.config), ""]
    lines += [*heard_words(network, told), *markdown(table)]
    if wrong:
        pq.write_table(pa.concat_tables(wrong), out / "wrong-captions.parquet")
        lines += met(pa.concat_tables(wrong))
    (out / "caption-variants.md").write_text("\n".join(lines) + "\n")
    begun.finish()
    return table


def told_otherwise(answers: Answers, study: Study) -> Answers:
    """The same questions to rows of the images under other captions."""
    engine = Engine(study.model, answers.configuration.recipe)
    found = ingested(engine, study.corpus, study.batch)
    return replace(
        answers,
        features=found.features,
        weights=found.weights,
        curvature=found.curvature,
        ingest_seconds=found.seconds,
    )


def of_layers(configuration: Configuration) -> list[Configuration]:
    """The same method with the gradients of each of `LAYERS` alone."""
    return [
        replace(
            configuration,
            name=f"{configuration.name}, {name}",
            recipe=replace(configuration.recipe, parameters=pattern),
        )
        for name, pattern in LAYERS.items()
    ]


def retold(variant: str, art: pa.Table, wording: Sequence[str], names: Names) -> tuple[str, ...]:
    """The caption of every image under a variant.

    Raises:
        BenchmarkError: an unknown variant, or a language without names.
    """
    full, no_object, no_style = wording
    rows = art.select(["caption", "name", "style"]).to_pylist()
    if variant == "true":
        return tuple(art["caption"].to_pylist())
    if variant == "style silent":
        return tuple(worded(no_style, row) for row in rows)
    if variant == "object silent":
        return tuple(worded(no_object, row) for row in rows)
    if variant == "silent":
        return ("",) * len(rows)
    if variant == "wrong":
        captions = art["caption"].to_pylist()
        return tuple(captions[i] for i in captions_of(art))
    if not variant.startswith("in "):
        raise BenchmarkError(
            f"variant {variant!r} is unknown; choose from {', '.join(VARIANTS)}, in LANGUAGE"
        )
    language = variant.removeprefix("in ")
    return tuple(
        # Unicode names every emoji in English first: a few have no other name yet.
        worded(full, row | {"name": names.get((language, point), row["name"])})
        for row, point in zip(rows, art["codepoints"].to_pylist(), strict=True)
    )


def read_names(folder: Path, languages: Sequence[str]) -> Names:
    """The names of objects in these languages, from `names.parquet`.

    Raises:
        BenchmarkError: no such file, or no such language in it.
    """
    if not languages:
        return {}
    path = folder / "names.parquet"
    if not path.is_file():
        raise BenchmarkError(f"{folder} holds no names.parquet; ask for no languages")
    rows = pq.read_table(path).to_pylist()
    known = {row["language"] for row in rows}
    if unknown := sorted(set(languages) - known):
        raise BenchmarkError(
            f"{path} has no names in {unknown[0]!r}; choose from {', '.join(sorted(known))}"
        )
    wanted = set(languages)
    return {
        (row["language"], row["codepoint"]): row["name"]
        for row in rows
        if row["language"] in wanted
    }


def captions_of(art: pa.Table, share: float = WRONG, seed: int = 0) -> Indices:
    """Whose caption each image gets: its own, or for a share of them that of another object in
    another style. A permutation, so that every caption is there as often as before.

    Raises:
        BenchmarkError: the images are too alike to part them so.
    """
    names, styles = (np.array(art[column].to_pylist()) for column in ("name", "style"))
    generator = np.random.default_rng(seed)
    count = round(share * len(art))

    def alike(a: Indices, b: Indices) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = (names[a] == names[b]) | (styles[a] == styles[b])
        return same

    for _ in range(_TRIES):
        chosen = generator.choice(len(art), count, replace=False)
        given = generator.permutation(chosen)
        for place in np.flatnonzero(alike(chosen, given)):
            fits = ~alike(chosen[place], given) & ~alike(chosen, given[place])
            if fits.any():  # a swap that leaves both right
                other = generator.choice(np.flatnonzero(fits))
                given[[place, other]] = given[[other, place]]
        if not alike(chosen, given).any():
            whose = np.arange(len(art))
            whose[chosen] = given
            return whose
    raise BenchmarkError(
        f"no way was found to give {count} of {len(art)} images the caption of another "
        "object in another style; ask for more --rows"
    )


def write_corpus(folder: Path, out: Path, variant: str, wording: Sequence[str] = EMOJI) -> None:
    """Leave the corpus under other captions in a new folder, to train a model on.

    The held-out pairs are copied as they are: whoever trains on silent captions has to ask about
    given pictures, as such a model does not know the words.
    """
    art = pq.read_table(folder / "train.parquet")
    languages = [variant.removeprefix("in ")] if variant.startswith("in ") else []
    captions = retold(variant, art, wording, read_names(folder, languages))
    column = art.schema.get_field_index("caption")
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        art.set_column(column, "caption", pa.array(captions, pa.string())), out / "train.parquet"
    )
    shutil.copy(folder / "heldout.parquet", out)


def meet(study: Study, whose: Indices, method: str, scores: npt.NDArray[np.floating]) -> pa.Table:
    """Where carriers under a wrong caption rank, and others under a carrier's caption.

    Args:
        study: whose questions are asked.
        whose: caption each image has, as `captions_of` gives it.
        method: that ranks.
        scores: [N, Q] of it.
    """
    records = []
    for number, question in enumerate(study.questions):
        shown, said = question.truth, question.truth[whose]
        first = np.zeros(len(shown), bool)
        order = np.argsort(-scores[:, number], kind="stable")
        first[order[: int((shown | said).sum())]] = True
        for kind, images in (
            ("shown and named", shown & said),
            ("shown only", shown & ~said),
            ("named only", said & ~shown),
        ):
            records.append(
                {
                    "method": method,
                    "question": number,
                    "concept": question.concept,
                    "kind": kind,
                    "images": int(images.sum()),
                    "found": int((images & first).sum()),
                }
            )
    return pa.Table.from_pylist(records)


def met(table: pa.Table) -> list[str]:
    """The share found, over all images of a kind and questions of a concept, of `meet`'s tables."""
    lines = [
        "## Wrong captions: the share found among as many images as show or name the concept",
        "",
        "| method | concept | shown and named | shown only | named only |",
        "|---|---|---|---|---|",
    ]
    sums: dict[tuple[str, str], dict[str, list[int]]] = {}
    for r in table.to_pylist():
        total = sums.setdefault((r["method"], r["concept"]), {}).setdefault(r["kind"], [0, 0])
        total[0] += r["found"]
        total[1] += r["images"]
    for (method, concept), kinds in sums.items():
        cells = [f"{a / b:.3f} of {b:,}" if b else "none" for a, b in kinds.values()]
        lines.append(f"| {method} | {concept} | {' | '.join(cells)} |")
    return [*lines, ""]


def heard_words(model: Model, told: Mapping[str, Sequence[str]]) -> list[str]:
    """How many words of each variant the model's tokenizers do not know."""
    lines = []
    for name, tokenizer in model.family.tokenizers.items():
        shares = []
        for variant, captions in told.items():
            words = tokenizer(list(dict.fromkeys(captions)), add_special_tokens=False).input_ids
            flat = [word for caption in words for word in caption]
            unknown = sum(word == tokenizer.unk_token_id for word in flat) / max(1, len(flat))
            shares.append(f"{variant} {unknown:.3f}")
        lines += [f"Share of words that the {name} does not know: {', '.join(shares)}.", ""]
    return lines


def markdown(table: pa.Table) -> list[str]:
    """A table for each concept: methods by variants, at the label-free lambda."""
    variants = list(dict.fromkeys(table["study"].to_pylist()))
    lines = []
    for concept, metric in METRICS.items():
        lines += [
            f"## {concept}: {metric.replace('_at_', '@').replace('_', ' ')}, label-free lambda",
            "",
            f"| method | {' | '.join(variants)} |",
            "|---" * (len(variants) + 1) + "|",
        ]
        rows: dict[str, list[str]] = {}
        for variant in variants:
            part = table.filter(pa.compute.field("study") == variant)
            for cell in summarise(part, {concept: metric}):
                text = f"{cell.label_free:.3f} ({cell.low:.3f} to {cell.high:.3f})"
                rows.setdefault(cell.method, []).append(text)
        lines += [f"| {method} | {' | '.join(cells)} |" for method, cells in rows.items()]
        lines.append("")
    return lines
