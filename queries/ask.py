"""Asking an index: gradients, preconditioning, search, evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from headwater.attribution import (
    METHODS,
    Curvature,
    Engine,
    Model,
    Recipe,
    differences,
    feature_space,
    resolved,
)
from headwater.index import Catalog, Manifest, SearchCluster, StoredIndex, search
from headwater.index.metrics import Curvature as StoredCurvature

from .company import accompanied
from .concept import Asking, Concept, check
from .errors import QueryError
from .gradients import query_rows
from .result import Hit, Result

Thumbnails = Callable[[Sequence[str]], Mapping[str, bytes]]


@dataclass(frozen=True)
class Index:
    """An index that can be asked.

    >>> Index("idx/").query(Concept("a cat", contrast="an animal"), model, top=20)
    """

    folder: str | Path

    @cached_property
    def stored(self) -> StoredIndex:
        """The index on disk, opened at the first use."""
        return StoredIndex.open(self.folder)

    @cached_property
    def recipe(self) -> Recipe:
        """How the rows were computed."""
        return Recipe.from_dict(self.stored.manifest.recipe["recipe"])

    @cached_property
    def catalog(self) -> Catalog:
        """The items and their columns."""
        return Catalog(self.stored)

    @cached_property
    def curvature(self) -> Curvature:
        """The damped inverse of it is what queries are multiplied with.

        Raises:
            IndexStoreError: the index was written without it.
        """
        return Curvature.from_arrays(vars(self._stored_curvature))

    @cached_property
    def _stored_curvature(self) -> StoredCurvature:  # memory-mapped
        return StoredCurvature.of(self.stored)

    def query(
        self,
        concept: Concept,
        model: Model,
        *,
        asking: Asking | None = None,
        where: str | None = None,
        top: int = 10,
        bottom: bool = False,
        exact: bool = False,
        recipe: Recipe | None = None,
        cluster: SearchCluster | None = None,
    ) -> Result:
        """Rank training images by how much they taught the model the concept.

        Args:
            concept: what is asked about.
            model: the model whose training images the index holds.
            asking: how it is asked; the default is the measured best.
            where: DuckDB expression over the item columns; only matching items are ranked.
            top: length of the ranking.
            bottom: rank from the other end: what taught against it, lowest score first.
            exact: look at every row of a large index too, not at proposed ones only.
            recipe: refuse to answer unless the index was made with this recipe.
            cluster: actors that hold this index and rank its rows, with the same answer; None:
                this process does.

        Raises:
            QueryError: the concept is empty, the index was made with another model or recipe, or it
                has no captions for the company that is asked for.
            IndexStoreError: no index, one without the curvature that the question needs, a bad
                `where`, or fewer items than `top`.
            ClusterError: actors of the cluster were lost again and again.
        """
        asking = asking or Asking()
        check(concept, asking, conditional=model.conditional)
        self.check_model(model, recipe)
        ranking = cluster or _Here(self)
        if ranking.manifest != self.stored.manifest:
            raise QueryError(
                f"the cluster holds another index than {self.folder}, or an earlier state of it; "
                "start it again"
            )
        available = ranking.count(where)
        if not 1 <= top <= available:
            raise QueryError(
                f"top is {top}, but {available} items can be ranked"
                + (f" under {where!r}" if where else "")
                + (f"; choose 1 to {available}" if available else "; widen --where")
            )
        asking = asking.settled(lambda: self._stored_curvature.rows, lambda: self.curvature)
        wanted = asking.company
        concept, asking = self._accompanied(concept, asking, model)
        engine = Engine(model, self.recipe)
        rows, pictures = query_rows(engine, concept, asking)
        if not rows.isfinite().all():
            raise QueryError("the query gradient is not finite: the model overflows here")
        if not rows.any():
            raise QueryError(
                "the query gradient is zero: the model draws the same for prompt and contrast "
                "(words it does not know are alike to it); choose other words"
            )
        vectors = torch.cat([rows.mean(0, keepdim=True), rows])
        # The mean of all seeds, then each seed alone, in one pass over the rows.
        proposers: set[str] = set()
        scores, found = ranking.search(
            vectors.double().cpu().numpy(),
            top,
            where=where,
            metric=asking.metric,
            largest=not bottom,
            exact=exact,
            proposers=proposers,
        )
        items, thumbnails = ranking.items(found[0])
        agreement = float(np.isin(found[1:], found[0]).mean()) if len(rows) > 1 else None
        question = _question(concept, asking, where, top) | {"bottom": bottom, "exact": exact}
        hits = tuple(
            Hit(rank, item["item_id"], float(score), item)
            for rank, (item, score) in enumerate(zip(items, scores[0], strict=True), start=1)
        )
        self.stored.append_ledger("query", question | {"hits": [hit.item_id for hit in hits]})
        return Result(
            question=question,
            feature_space_id=self.stored.manifest.feature_space_id,
            searched=available,
            agreement=agreement,
            warnings=(
                *_warnings(asking, self.recipe),
                *_fewer(asking.company, wanted),
                *_told(bottom, proposers),
            ),
            hits=hits,
            pictures=tuple(pictures),
            thumbnails=thumbnails,
        )

    def _accompanied(
        self, concept: Concept, asking: Asking, model: Model
    ) -> tuple[Concept, Asking]:
        """With the company that was asked for, so that both can be saved and asked again."""
        columns = ("item_id", "caption")
        items = (
            pair
            for part in self.stored.searchable_items(columns)
            for pair in zip(*(part[name].to_pylist() for name in columns), strict=True)
        )
        found, settled = accompanied(concept, asking, items)
        if asking.company and not settled.company:
            raise QueryError(
                f"no item of {self.folder} has a caption to say {concept.alone!r} beside, other "
                "than those of the question; ask with --company 0"
            )
        for has, _ in found.contexts[len(concept.contexts) :]:
            if reason := model.refuses(has):
                raise QueryError(
                    f"{reason}: it hears no concept beside a caption; ask with --company 0"
                )
        return found, settled

    def check_model(self, model: Model, recipe: Recipe | None = None) -> None:
        """Refuse a model or a recipe whose rows could not be compared with the stored ones.

        Raises:
            QueryError: names each part that differs.
        """
        theirs = self.stored.manifest.recipe
        mine = feature_space(resolved(recipe or self.recipe, model), model.fingerprint)
        found = differences(mine, theirs)
        if found:
            raise QueryError(
                f"{self.folder} was made in another feature space; different: {', '.join(found)}; "
                "use the model and recipe it was made with, or ingest again"
            )


class _Here:
    """Ranks the rows of an index in this process, as `SearchCluster` does on a cluster."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.manifest: Manifest = index.stored.manifest

    def count(self, where: str | None) -> int:
        self._positions = self._index.stored.searchable(self._index.catalog.select(where))
        return len(self._positions)

    def search(
        self, queries: npt.NDArray[np.floating], top: int, *, where: str | None, **options: Any
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Rank what was counted."""
        positions = None if where is None else self._positions
        return search(self._index.stored, queries, top, positions=positions, **options)

    def items(self, positions: npt.NDArray[np.int64]) -> tuple[list[dict[str, Any]], Thumbnails]:
        return self._index.catalog.rows(positions), self._index.stored.thumbnails


def _warnings(asking: Asking, recipe: Recipe) -> tuple[str, ...]:
    if asking.method in ("slider", "journey", "reward") and not METHODS[recipe.method].loss_like:
        suited = ", ".join(name for name, method in METHODS.items() if method.loss_like)
        return (
            f"a {asking.method} has no defined direction against {recipe.method} rows: top and "
            f"bottom may be exchanged; ask with a contrast, or ingest with {suited}",
        )
    return ()


def _fewer(found: int, wanted: int) -> Iterator[str]:
    if found < wanted:
        yield (
            f"the concept was asked in the company of {found} captions, not {wanted}: the index "
            "has no more that differ from each other and from the question's words"
        )


def _told(bottom: bool, proposers: set[str]) -> Iterator[str]:
    if bottom:
        yield (
            "this is the other end of the ranking, lowest score first: the images that taught "
            "against the concept"
        )
    if proposers & {"accelerator", "cells"}:
        # One process may find cells enough and another not: over a cluster, some rows are so found.
        which = "short codes, of the nearest cells only," if "cells" in proposers else "short codes"
        yield (
            f"{which} proposed the rows that were scored: about one hit in "
            f"{'ten' if bottom else 'a hundred'} may be missing; --exact looks at every row"
        )


def _question(concept: Concept, asking: Asking, where: str | None, top: int) -> dict[str, Any]:
    picture: Any = concept.image
    if isinstance(picture, Image.Image):
        picture = f"a {picture.width} x {picture.height} picture given in memory"
    reward: Mapping[str, Any] = {}
    if concept.reward is not None:
        name = getattr(concept.reward.function, "__qualname__", repr(concept.reward.function))
        reward = {"reward": name, "reward_of": concept.reward.of}
    return {
        "prompt": concept.prompt,
        "contrast": concept.contrast,
        "alone": concept.alone or None,
        "contexts": [list(pair) for pair in concept.contexts],
        "image": None if picture is None else str(picture),
        "where": where,
        "top": top,
        **reward,
        **asdict(asking),
    }
