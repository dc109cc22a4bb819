"""The further pairs that a study's questions are asked in, and those that its corpus gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from headwater.benchmarks.errors import BenchmarkError
from headwater.queries import Asking, company_of, drawn_captions

if TYPE_CHECKING:
    from headwater.benchmarks.study import Corpus, Question, Study

# Queries that are contrasts in further pairs, and what a question does that has these.
FURTHER = {
    "effect": "says its concept alone",
    "contexts": "says its concept in other company",
    "company": "says its concept beside captions",
}
COMPANY = 4  # captions that `headwater-company` says a concept beside


def further_pairs(
    study: Study, kind: str, numbers: Sequence[int]
) -> list[tuple[list[str], list[str]]]:
    """The pairs that the questions of these numbers are asked in beside their own, side by side.

    Raises:
        BenchmarkError: the study's questions have not the same number of them, or one has none.
    """
    asked = [question.further(kind) for question in study.questions]
    if kind in FURTHER and (not all(asked) or len(set(map(len, asked))) > 1):
        raise BenchmarkError(
            f"{study.name}: not every question {FURTHER[kind]} as often; ask with contrast"
        )
    places = zip(*(asked[i] for i in numbers), strict=True)
    return [([has for has, _ in place], [lacks for _, lacks in place]) for place in places]


def in_company(questions: Sequence[Question], corpus: Corpus) -> tuple[Question, ...]:
    """The questions with the company that `headwater query --company` asks them in.

    Captions are drawn as from an index of this corpus. All questions get as many, so that they can
    be asked together: as many as the one that finds the fewest; none, where one does not say its
    concept alone.
    """
    said = [{question.prompt, question.contrast, question.alone} for question in questions]
    items = zip(corpus.keys, corpus.captions, strict=True)
    captions = drawn_captions(items, COMPANY + max(map(len, said), default=0), Asking.seed)
    found = [
        company_of(question.alone, captions, COMPANY, texts) if question.alone else ()
        for question, texts in zip(questions, said, strict=True)
    ]
    fewest = min(map(len, found), default=0)
    return tuple(
        replace(question, company=pairs[:fewest])
        for question, pairs in zip(questions, found, strict=True)
    )
