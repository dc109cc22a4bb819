"""Search over Ray actors that each hold some shards, for an index larger than one machine.

An actor reads the items of its shards and maps their rows into memory; a query is ranked by all
actors at once and their best rows are merged. Every machine must see the index folder under the
same path, so any actor can take over the shards of one that was lost.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .catalog import filter_positions
from .cluster import connected
from .errors import ClusterError, IndexStoreError
from .exact import merge
from .excerpt import Excerpt, split_shards
from .manifest import FILE_NAME, Manifest, read_manifest
from .reader import Int64
from .rows import Float32
from .search import search

_log = logging.getLogger(__name__)
_ATTEMPTS = 3  # actors that may be lost over one run of shards before the search is given up
_PATIENCE = 120.0  # seconds for the first actor to start: processes, imports, a node that scales up

Thumbnails = Callable[[Sequence[str]], Mapping[str, bytes]]
Part = tuple[int, int]  # a run of shards: first, one past the last


class ShardHolder:
    """What an actor does: rank the rows of the runs of shards that it is asked about."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self._folder = Path(folder)
        self._manifest = manifest
        self._parts: dict[Part, Excerpt] = {}
        self._tables: dict[Part, pa.Table] = {}
        self._selected: dict[Part, tuple[str | None, Int64]] = {}

    def ready(self, *, on_gpu: bool) -> None:
        """Return once the actor runs; IndexStoreError when its machine does not see the index."""
        if not on_gpu:  # Ray leaves the machine's GPUs in the sight of an actor that has none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not (self._folder / FILE_NAME).exists():
            raise IndexStoreError(
                f"{self._folder} is not there on {socket.gethostname()}; every machine of the "
                "cluster must see the index under the same path"
            )

    def schema(self, part: Part) -> pa.Schema:
        """Return names and types of the item columns of these shards."""
        return self._opened(part).item_schema

    def count(self, part: Part, schema: pa.Schema, where: str | None) -> int:
        """Return how many rows can be ranked under `where`."""
        return len(self._positions(part, schema, where))

    def best(
        self,
        part: Part,
        schema: pa.Schema,
        where: str | None,
        queries: npt.NDArray[np.floating],
        top: int,
        options: Mapping[str, Any],
    ) -> tuple[Float32, Int64, set[str]]:
        """Return the best rows of these shards, at most `top`: scores, positions in the index, and
        who proposed them."""
        positions = self._positions(part, schema, where)
        top = min(top, len(positions))
        proposers: set[str] = set()
        if not top:
            nothing = np.empty((len(queries), 0), np.float32)
            return nothing, nothing.astype(np.int64), proposers
        excerpt = self._opened(part)
        chosen = None if where is None else positions  # None spares the search a look at them
        scores, found = search(
            excerpt, queries, top, positions=chosen, proposers=proposers, **options
        )
        return scores, found + excerpt.first_row, proposers

    def items(
        self, part: Part, schema: pa.Schema, positions: Int64
    ) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """Return every column of the items at `positions` of the index, and their previews."""
        excerpt = self._opened(part)
        taken = self._items(part, schema).take(pa.array(positions - excerpt.first_row))
        rows = taken.to_pylist()
        return rows, excerpt.thumbnails([row["item_id"] for row in rows])

    def _positions(self, part: Part, schema: pa.Schema, where: str | None) -> Int64:
        kept = self._selected.get(part)
        if kept is None or kept[0] != where:
            excerpt, asked = self._opened(part), None
            if where is not None:
                # `position` is that in the index, as in a search of one process.
                first = excerpt.first_row
                asked = filter_positions(self._items(part, schema), where, first) - first
            kept = self._selected[part] = where, excerpt.searchable(asked)
        return kept[1]

    def _items(self, part: Part, schema: pa.Schema) -> pa.Table:
        """The items of these shards with every column that any shard of the index has."""
        if part not in self._tables:
            items = self._opened(part).items()
            self._tables[part] = pa.concat_tables(
                [schema.empty_table(), items], promote_options="permissive"
            )
        return self._tables[part]

    def _opened(self, part: Part) -> Excerpt:
        if part not in self._parts:
            self._parts[part] = Excerpt(self._folder, self._manifest, *part)
        return self._parts[part]


class SearchCluster:
    """An index whose shards are held by Ray actors; a context that ends them.

    >>> with SearchCluster("idx/", actors=8) as cluster:
    ...     scores, positions = cluster.search(queries, 50, where="licence = 'MIT'")
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        actors: int | None = None,
        gpus: float = 0,
        address: str | None = None,
    ) -> None:
        """Look at the index in `folder`; the actors start with the context.

        Args:
            folder: of the index, on a file system that every machine of the cluster sees.
            actors: how many share the shards; default: as many as the processors of the cluster,
                or its GPUs where `gpus` asks for them, have room for.
            gpus: of each actor: 0, 1 or what share of one; an actor searches on one GPU.
            address: of a running cluster; see `connected`.

        Raises:
            IndexStoreError: no index.
        """
        self.folder = Path(folder).absolute()
        self.manifest = read_manifest(self.folder)
        if not self.manifest.shards:
            raise IndexStoreError(f"{self.folder} holds no items; ingest a corpus into it")
        self._wanted = actors
        self._gpus = gpus
        self._address = address

    def __enter__(self) -> SearchCluster:
        """Start the actors and wait until one of them is ready.

        Raises:
            ClusterError: no Ray, no cluster, or no room for an actor in it.
            IndexStoreError: the index is damaged, or not there on a machine of the cluster.
        """
        with ExitStack() as stack:
            self._ray = stack.enter_context(connected(self._address))
            stack.callback(self._end)
            self._parts = split_shards(self.manifest, self._wanted or self._room())
            self._owners: dict[Part, Any] = {}
            self._ready: list[Any] = []
            self._starting: dict[Any, Any] = {}  # what `ready` will answer -> actor
            self._shared = self._ray.put(self.manifest)
            for _ in self._parts:
                self._start()
            schemas = self._each("schema", dict.fromkeys(self._parts, ()))
            self._schema = pa.unify_schemas(
                [schemas[part] for part in self._parts], promote_options="permissive"
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the actors, and the cluster if it was started for them."""
        self._stack.close()

    def count(self, where: str | None = None) -> int:
        """Return how many rows can be ranked under `where`.

        Raises IndexStoreError when `where` is not one boolean expression over the item columns.
        """
        return sum(self._all("count", self._schema, where))

    def search(
        self,
        queries: npt.NDArray[np.floating],
        top: int,
        *,
        where: str | None = None,
        largest: bool = True,
        proposers: set[str] | None = None,
        **options: Any,
    ) -> tuple[Float32, Int64]:
        """Return the `top` best rows for each query, as `search` over the whole index does.

        `options` and `proposers` are those of `search`. Raises its errors, and ClusterError when
        the actors of a run of shards were lost again and again.
        """
        available = self.count(where)
        if not 1 <= top <= available:
            raise IndexStoreError(
                f"{top} results asked for, {available} rows can be searched in {self.folder}; "
                "choose fewer, or a wider selection"
            )
        options["largest"] = largest
        shared = self._ray.put(queries)
        found = self._all("best", self._schema, where, shared, top, options)
        sign = np.float32(1 if largest else -1)
        if proposers is not None:
            proposers.update(*(by for _, _, by in found))
        scores, positions = merge([(sign * part, rows) for part, rows, _ in found], top)
        return scores * sign + np.float32(0), positions  # + 0 turns -0 into 0

    def items(self, positions: npt.ArrayLike) -> tuple[list[dict[str, Any]], Thumbnails]:
        """Return the items at `positions`, every column by its name, and what gives their previews.

        The previews (WebP) are asked for by item id, also when the actors have ended.
        """
        asked = np.asarray(positions, dtype=np.int64)
        ends = np.cumsum([shard.items for shard in self.manifest.shards])
        homes = np.searchsorted(ends, asked, side="right")
        wanted = {
            (start, stop): asked[(homes >= start) & (homes < stop)] for start, stop in self._parts
        }
        calls = {part: (self._schema, rows) for part, rows in wanted.items() if len(rows)}
        known: dict[int, dict[str, Any]] = {}
        previews: dict[str, bytes] = {}
        for part, (rows, images) in self._each("items", calls).items():
            known.update(zip(wanted[part].tolist(), rows, strict=True))
            previews |= images

        def thumbnails(item_ids: Sequence[str]) -> Mapping[str, bytes]:
            return {name: previews[name] for name in item_ids if name in previews}

        return [known[position] for position in asked.tolist()], thumbnails

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        answers = self._each(method, dict.fromkeys(self._parts, arguments))
        return [answers[part] for part in self._parts]

    def _each(self, method: str, calls: Mapping[Part, tuple[Any, ...]]) -> dict[Part, Any]:
        """The answer to each call; another actor is asked where one was lost."""
        errors = self._ray.exceptions
        lost: Counter[Part] = Counter()
        answers: dict[Part, Any] = {}
        running: dict[Any, tuple[Part, Any]] = {}
        waiting = list(calls)
        while waiting or running:
            self._assign()
            for part in waiting:
                actor = self._owners[part]
                answer = getattr(actor, method).remote(part, *calls[part])
                running[answer] = part, actor
            waiting = []
            for answer in self._ray.wait(list(running))[0]:
                part, actor = running.pop(answer)
                try:
                    answers[part] = self._ray.get(answer)
                except errors.RayActorError as error:
                    lost[part] += 1
                    self._replace(actor)
                    if lost[part] == _ATTEMPTS:
                        first, last = (self.manifest.shards[i].name for i in (part[0], part[1] - 1))
                        raise ClusterError(
                            f"{_ATTEMPTS} actors were lost over {first} to {last} of "
                            f"{self.folder}; if memory ran out, give more actors: each holds less"
                        ) from error
                    waiting.append(part)
                except errors.RayTaskError as error:
                    raise error.cause from None
        return answers

    def _assign(self) -> None:
        """Take in actors that are ready, and give every run of shards to one of them.

        Raises:
            ClusterError: there is none, and none comes.
        """
        if self._starting:
            patience = 0 if self._ready else _PATIENCE
            done, _ = self._ray.wait(list(self._starting), timeout=patience)
            while done:
                actor = self._starting.pop(done[0])
                try:
                    self._ray.get(done[0])
                    self._ready.append(actor)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                if not self._starting:
                    break
                done, _ = self._ray.wait(list(self._starting), timeout=0)
        if not self._ready:
            raise ClusterError(
                f"no search actor could start within {_PATIENCE:.0f} seconds; the cluster has "
                f"{_said(self._ray.available_resources())} free, an actor takes "
                f"{_said({'CPU': 1, 'GPU': self._gpus})}"
            )
        load = {id(actor): 0 for actor in self._ready}
        fair = -(-len(self._parts) // len(self._ready))
        homeless = []
        for part in self._parts:
            owner = id(self._owners.get(part))
            if load.get(owner, fair) < fair:
                load[owner] += 1
            else:
                homeless.append(part)
        for part in homeless:
            self._owners[part] = min(self._ready, key=lambda actor: load[id(actor)])
            load[id(self._owners[part])] += 1

    def _room(self) -> int:
        """How many actors the cluster has room for."""
        whole = self._ray.cluster_resources()
        processors = int(whole.get("CPU", 1))
        if not self._gpus:
            return max(1, processors)
        gpus = int(whole.get("GPU", 0))
        # A share lies on one GPU: what is left of each is lost.
        gpus = gpus * int(1 / self._gpus + 1e-9) if self._gpus < 1 else int(gpus / self._gpus)
        return max(1, min(processors, gpus))

    def _start(self) -> None:
        holder = self._ray.remote(num_cpus=1, num_gpus=self._gpus, scheduling_strategy="SPREAD")
        actor = holder(ShardHolder).remote(str(self.folder), self._shared)
        self._starting[actor.ready.remote(on_gpu=self._gpus > 0)] = actor

    def _replace(self, actor: Any) -> None:
        """Start another actor for one that was lost, unless that is done already."""
        if actor not in self._ready:
            return
        _log.warning("a search actor was lost; its shards go to the others, another one starts")
        self._ready.remove(actor)
        self._start()

    def _end(self) -> None:
        for actor in [*self._ready, *self._starting.values()]:
            with suppress(Exception):
                self._ray.kill(actor)


def _said(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
