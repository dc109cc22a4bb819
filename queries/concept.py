"""What is asked: a concept, and how it is turned into gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from headwater.attribution import METHODS, Curvature, Reward
from headwater.index import IndexStoreError
from headwater.index.metrics import Metric

from .errors import QueryError

# What lambda is chosen by when none is given. A concept is what several images share: directions
# that carry the energy of fewer images than this are damped. A contrast takes as many as a quarter
# of the root of all images, and `MOST` of them at most. A whole picture is told from others by as
# many directions as the rows can afford: this share of them is not damped.
# Measured, and why a concept's is no share: docs/damping.md.
MOST = 20.0
DAMPINGS = {"slider": 10.0, "reward": 10.0}
SHARES = {"image": 0.25, "journey": 0.25}
KINDS = ("contrast", "slider", "image", "journey", "reward")
# What finds best, regardless of cost, what taught a concept (fields of Asking). Not in company,
# which finds more that shows it and ranks first what hurts less when removed: docs/influence.md.
QUALITY: dict[str, Any] = {"seeds": 16}


@dataclass(frozen=True)
class Concept:
    """What `prompt` has and `contrast` has not.

    `alone` names the concept without the rest of the prompt: then its effect is averaged over both,
    with the rest and without it, which ranks better (attribution.rewards.contrast_rows).

    `contexts` are further pairs (prompt, contrast) that say the same concept in other company:
    "a fish by Studio B" and "a drawing by Studio B". All are asked of the same pictures, and the
    effect is averaged over them, the own pair and, where it is given, `alone`.

    With `image` the question is about that picture (local), without it about the pictures that
    the model makes for the prompt (global). A `reward` defines the concept by a function instead.
    """

    prompt: str = ""
    contrast: str = ""
    image: str | Path | Image.Image | None = None
    reward: Reward | None = None
    alone: str = ""
    contexts: tuple[tuple[str, str], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(with the concept, without it): the own pair, the contexts', the one without a rest."""
        alone = ((self.alone, ""),) if self.alone else ()
        return ((self.prompt, self.contrast), *self.contexts, *alone)


@dataclass(frozen=True)
class Asking:
    """How a concept is asked. Saved with the result, so that it can be replayed."""

    method: str = "contrast"  # one of KINDS
    seeds: int = 8  # pictures generated, or noise draws over the given one; results are averaged
    seed: int = 0  # of the first, and of the captions drawn as company
    steps: int = 50  # DDIM steps of a generated picture
    guidance: float = 7.5  # of a generated picture
    # lambda in units of the rows' mean squared length; None: `label_free`, settled by the index
    damping: float | None = None
    # "ip", "cosine", "relative", "standard" (headwater.index.metrics); None: `usual_similarity`
    similarity: str | None = None
    preconditioning: str = "query"  # or "none", or "both" sides by K^-1/2
    batch_size: int = 16  # pictures per forward pass; changes speed, not results
    # Captions of the corpus that the concept, said alone, is asked beside: further contexts, drawn
    # when an index is asked. Those that the concept has already count, and none is drawn for them.
    company: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no question can be asked with."""
        if self.method in METHODS:
            raise QueryError(
                f"{self.method!r} is a training method, fixed when the index was made (`headwater "
                f"inspect` shows which); a query's method is one of {', '.join(KINDS)}"
            )
        if self.method not in KINDS:
            raise QueryError(f"query method {self.method!r} is unknown; choose {', '.join(KINDS)}")
        for name in ("seeds", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise QueryError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.company < 0:
            raise QueryError(f"company is {self.company}; it must be at least 0")
        given = () if self.damping is None else (self.damping,)
        try:
            Metric(self._similarity, self.preconditioning, *given)
        except IndexStoreError as error:
            raise QueryError(str(error)) from error
        if not math.isfinite(self.guidance):
            raise QueryError(f"guidance is {self.guidance}; it must be finite (default 7.5)")

    @property
    def _similarity(self) -> str:
        return self.similarity or usual_similarity(self.method, self.preconditioning)

    @property
    def metric(self) -> Metric:
        """What rows are ranked by.

        Raises:
            QueryError: it takes a damping, and none was given or settled by an index.
        """
        if self.preconditioning == "none":
            return Metric(self._similarity, self.preconditioning)
        if self.damping is None:
            raise QueryError("damping is None, as it is until an index settles it; give a number")
        return Metric(self._similarity, self.preconditioning, self.damping)

    def settled(self, rows: Callable[[], int], curvature: Callable[[], Curvature]) -> Asking:
        """With the similarity and the damping that are taken where none was given.

        What is saved shall replay, whatever rows are added or deleted by then.
        """
        damping = self.damping
        if damping is None and self.preconditioning != "none":
            damping = label_free(self.method, rows, curvature)
        return replace(self, similarity=self._similarity, damping=damping)


def usual_similarity(method: str, preconditioning: str) -> str:
    """What rows are ranked by when nothing else is asked for.

    Whose scores for questions like the corpus scatter widely is high in every contrast, whatever
    it is about: `standard` divides by that. Published methods are defined by inner products.
    """
    return "standard" if (method, preconditioning) == ("contrast", "query") else "ip"


def label_free(method: str, rows: Callable[[], int], curvature: Callable[[], Curvature]) -> float:
    """The damping that a question of this kind is asked with when none is given.

    `rows` counts those that the corpus's curvature is of, and `curvature` reads it, which a large
    index takes a while for: each is called by the kinds alone that depend on it.
    """
    if method in DAMPINGS:
        return DAMPINGS[method]
    if method == "contrast":
        return min(MOST, math.sqrt(rows()) / 4)
    return curvature().damping(SHARES[method])


def check(concept: Concept, asking: Asking, *, conditional: bool) -> None:
    """Refuse a concept that the method cannot see.

    Raises:
        QueryError: equal sides of a contrast or a context, company for a concept that is not said
            alone, a missing or superfluous reward, text for a model that takes none.
    """
    _check_contexts(concept)
    if not conditional and (concept.prompt or concept.contrast):
        text = concept.prompt or concept.contrast
        raise QueryError(
            f"this model takes no text, so {text!r} means nothing to it; "
            "ask with --method image or journey, or with a reward from Python"
        )
    if asking.method in ("contrast", "slider"):
        if not conditional:
            raise QueryError(
                f"--method {asking.method} compares two prompts and this model takes no text; "
                "ask with --method image, or with a reward from Python"
            )
        if not (concept.prompt or concept.contrast):
            raise QueryError("no concept was given; say with --prompt what is asked about")
        if concept.prompt == concept.contrast:
            raise QueryError(
                f"prompt and contrast are both {concept.prompt!r}, so the concept between them is "
                "nothing (a zero gradient); leave out of --contrast what you ask about"
            )
    if asking.method != "contrast":
        contexts = ", ".join(" | ".join(pair) for pair in concept.contexts)
        options: dict[str, str | int] = {
            "--alone": concept.alone,
            "--context": contexts,
            "--company": asking.company,
        }
        if asking.method != "slider":
            options = {"contrast": concept.contrast, **options}
        for option, value in options.items():
            if value:
                raise QueryError(
                    f"method {asking.method!r} takes no {option} ({value!r} was given); "
                    "leave it out, or ask with method 'contrast'"
                )
    if concept.alone and not (concept.prompt and concept.contrast):
        raise QueryError(
            f"--alone {concept.alone!r} is the concept without the rest of the prompt; give "
            "the prompt with both, and the rest as --contrast"
        )
    if asking.company and not concept.alone:
        raise QueryError(
            f"--company {asking.company} says what --alone names beside captions of the corpus; "
            "give --alone, or leave it out"
        )
    if asking.method == "journey" and concept.image is not None:
        raise QueryError(
            "method 'journey' follows the path on which the model draws a picture, and a given "
            "picture has none; leave out --image, or ask with method 'image'"
        )
    for text in (text for pair in concept.pairs for text in pair):
        if text != text.encode("utf-8", "replace").decode():
            raise QueryError(f"{text!r} is no valid Unicode text; type it again")
    if (asking.method == "reward") != (concept.reward is not None):
        raise QueryError(
            "method 'reward' and Concept(reward=...) belong together: give both or neither"
        )


def _check_contexts(concept: Concept) -> None:
    for pair in concept.contexts:
        if isinstance(pair, str) or len(pair) != 2:
            raise QueryError(
                f"context {pair!r} is no pair; give the concept in other company, and that "
                "company without it: contexts=((prompt, contrast), ...)"
            )
        if pair[0] == pair[1]:
            raise QueryError(
                f"both sides of a context are {pair[0]!r}, so the concept between them is nothing; "
                "leave out of its second side what you ask about"
            )
    counts: Counter[str] = Counter()
    for prompt, contrast in concept.pairs:
        counts[prompt] += 1
        counts[contrast] -= 1
    if concept.contexts and not any(counts.values()):
        raise QueryError(
            f"the contexts take back what {concept.prompt!r} asks against {concept.contrast!r}; "
            "put the side that has the concept first"
        )
