"""An ingest over the machines of a Ray cluster: ranges of the source, each claimed by one worker.

A worker is an actor with a GPU, or with processors, and its own copy of the model. The driver hands
it one range at a time, so that a fast worker takes more of them, and makes whole ranges parts of
the index. Workers keep every batch in the folder of the index, which all machines must see: who
takes over the range of a lost worker goes on behind the last batch that was kept.
"""

from __future__ import annotations

import io
import logging
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headwater.attribution import (
    Engine,
    Execution,
    Model,
    ModelError,
    Recipe,
    quiet_libraries,
)
from headwater.index import ClusterError, Manifest, StoredIndex, connected

from .devices import Devices, save_model
from .errors import DeviceError, SourceError
from .held import Held
from .journal import Journal
from .plan import Job, Span, Todo
from .ranges import Done, Worker
from .sources import Source

_log = logging.getLogger(__name__)
ATTEMPTS = 3  # workers that a range may end before it is set aside
_SET_ASIDE = 3  # ranges set aside before the whole is given up: then it is not the records
_PATIENCE = 600.0  # seconds for the first worker to start: a node that scales up, a model to load


@dataclass(frozen=True)
class RayCluster:
    """Where an ingest runs instead of in this process."""

    # Of a running cluster; None: RAY_ADDRESS, else a cluster of this machine while it is needed.
    address: str | None = None
    # None: one for each GPU, or for as many processors as this process computes with. With more
    # than there is room for, the others start when machines join.
    workers: int | None = None


@dataclass(frozen=True)
class Task:
    """What the workers of an ingest share."""

    recipe: Recipe
    execution: Execution
    kind: str  # of device: `cuda` or `cpu`
    threads: int  # sums are cut by threads: as many as in the driver give its rows
    source: Source
    source_path: Path | None  # where it lies on every machine; None: it is no local path
    folder: Path  # of the index
    manifest: Manifest | None  # of the index as it was before; None for a new one


class RangeWorker:
    """What an actor does."""

    def __init__(self, task: Task, saved: npt.NDArray[np.uint8]) -> None:
        """Only keep what is given: an error here would come without its cause."""
        self._task = task
        self._saved = saved
        self._worker: Worker | None = None

    def ready(self) -> str:
        """Load the model; return what computes: the name of the GPU, or `cpu`."""
        task = self._task
        for path in filter(None, (task.folder, task.source_path)):
            if not path.exists():
                raise SourceError(
                    f"{path} is not there on {socket.gethostname()}; every machine of the cluster "
                    "must see the source and the index under the same path"
                )
        torch.set_num_threads(task.threads)
        with quiet_libraries():
            model: Model = torch.load(
                io.BytesIO(self._saved.data), map_location="cpu", weights_only=False
            )
        model = model.to(task.kind)
        self._devices = Devices(Engine(model, task.recipe, task.execution))
        device = model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def batch_size(self) -> int:
        """Return the batch size that suits the memory here."""
        return self._devices.batch_size()

    def run(self, job: Job, number: int, batch_size: int) -> Generator[Done, None, None]:
        """Compute and keep what is left of a range; tells of every batch that is kept."""
        task = self._task
        if self._worker is None:  # to read what a large index holds takes a while
            before = None if task.manifest is None else StoredIndex(task.folder, task.manifest)
            held = Held(before, content_keyed=task.source.content_keyed)
            self._worker = Worker(task.source, self._devices, held)
        journal = Journal(task.folder, job, task.source.extra_schema, begun=True)
        rest = journal.rest(number)
        if rest.start == rest.stop:  # whoever kept the last of it was lost before it could tell
            yield Done(Span(number, rest.start, rest.stop, rest.taken, rest.taken), (), 0)
        yield from self._worker.run(journal, [rest], batch_size)


class RayWorkers:
    """The workers of an ingest on a cluster; a context that ends them."""

    def __init__(self, cluster: RayCluster, model: Model, task: Task) -> None:
        """Say what to do where; `model` is copied to the workers when the context begins."""
        self._cluster = cluster
        self._model = model
        self._task = task
        self._starting: dict[Any, Any] = {}  # what `ready` will answer -> worker
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int]] = {}  # stream of `run` -> worker, range
        self._names: list[str] = []  # of devices
        self._refused: Exception | None = None  # why the last that could not start did not

    def __enter__(self) -> RayWorkers:
        """Start workers, and wait until one of them is ready.

        Raises:
            ClusterError: no Ray, no cluster, or no room for a worker in it.
            DeviceError, SourceError: no worker could start, for the reason given.
        """
        with ExitStack() as stack:
            self._ray = stack.enter_context(connected(self._cluster.address))
            stack.callback(self._end)
            self._shared = self._ray.put(self._task), self._ray.put(_saved(self._model))
            for _ in range(self._count()):
                self._start()
            self._admit()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers, and the cluster if it was started for them."""
        self._stack.close()

    @property
    def devices(self) -> list[str]:
        """The device of every worker that was ready."""
        return self._names

    def batch_size(self) -> int:
        """Return the batch size that suits the memory of the first worker that was ready."""
        errors = self._ray.exceptions
        try:
            return int(self._ray.get(self._idle[0].batch_size.remote()))
        except (errors.RayActorError, errors.RayTaskError) as error:
            raise _cause(error) from None

    def run(
        self, journal: Journal, todo: Sequence[Todo], batch_size: int
    ) -> Generator[Done, None, None]:
        """Do what is left of these ranges; tells of every batch that is kept.

        A range whose worker is lost or fails goes to another one. After ATTEMPTS it is set aside,
        and the others go on.

        Raises:
            DeviceError: ranges were set aside, or no worker is left. What was kept stays.
        """
        errors = self._ray.exceptions
        waiting = deque(part.number for part in todo)
        failed: Counter[int] = Counter()
        reached = {part.number: part.start for part in todo}
        aside: dict[int, Exception] = {}
        journal.begin()  # before workers look for it, and none of them has to
        job = self._ray.put(journal.job)
        while waiting or self._running:
            self._admit()
            while waiting and self._idle:
                worker, number = self._idle.pop(), waiting.popleft()
                stream = worker.run.options(num_returns="streaming").remote(job, number, batch_size)
                self._running[stream] = worker, number
            told, _ = self._ray.wait([*self._running, *self._starting])
            for stream in self._running.keys() & set(told):
                worker, number = self._running[stream]
                try:
                    done: Done = self._ray.get(next(stream))
                except StopIteration:
                    del self._running[stream]
                    self._idle.append(worker)
                except (errors.RayActorError, errors.RayTaskError) as error:
                    del self._running[stream]
                    self._kill(worker)
                    self._start()
                    failed[number] += 1
                    cause = _cause(error)
                    if failed[number] < ATTEMPTS:
                        _log.warning(
                            "a worker was lost over %s (%s); another goes on with it",
                            journal.job.part(number), _told(cause),
                        )  # fmt: skip
                        waiting.append(number)
                    else:
                        aside[number] = cause
                        if len(aside) == _SET_ASIDE:
                            raise _given_up(journal.job, aside, reached) from cause
                else:
                    reached[number] = done.span.stop
                    yield done
        if aside:
            raise _given_up(journal.job, aside, reached) from next(iter(aside.values()))

    def _count(self) -> int:
        """How many workers to ask for."""
        if self._cluster.workers is not None:
            return self._cluster.workers
        here = self._ray.cluster_resources()
        if self._task.kind == "cuda":
            return max(1, int(here.get("GPU", 0)))
        return max(1, int(here.get("CPU", 0)) // self._task.threads)

    def _needs(self) -> dict[str, float]:
        if self._task.kind == "cuda":
            return {"num_cpus": 1, "num_gpus": 1}
        return {"num_cpus": self._task.threads}

    def _start(self) -> None:
        actor = self._ray.remote(scheduling_strategy="SPREAD", **self._needs())(RangeWorker)
        worker = actor.remote(*self._shared)
        self._starting[worker.ready.remote()] = worker

    def _admit(self) -> None:
        """Take in workers that are ready; wait for one if nobody works.

        Raises:
            ClusterError: the cluster has no room for a worker.
            DeviceError, SourceError: no worker could start, for the reason given.
        """
        errors = self._ray.exceptions
        while self._starting:
            patience = 0 if self._idle or self._running else _PATIENCE
            told, _ = self._ray.wait(list(self._starting), timeout=patience)
            if not told:
                break
            worker = self._starting.pop(told[0])
            try:
                self._note_device(self._ray.get(told[0]))
            except (errors.RayActorError, errors.RayTaskError) as error:
                self._refused = _cause(error)
                _log.warning("a worker could not start: %s", _told(self._refused))
                self._kill(worker)
            else:
                self._idle.append(worker)
        if self._idle or self._running:
            return
        if self._starting:
            raise ClusterError(
                f"no worker could start in {_PATIENCE:.0f} seconds: each takes {self._needs()}, "
                f"and of the cluster is free {self._ray.available_resources()}"
            )
        if isinstance(self._refused, (DeviceError, ModelError, SourceError)):
            raise self._refused
        raise DeviceError(
            f"no worker could start: {_told(self._refused)}; look at the memory of the "
            "machines, and at Ray's logs"
        ) from self._refused

    def _note_device(self, name: str) -> None:
        if self._names and name not in self._names:
            _log.warning(
                "workers compute on %s and %s, whose rows differ in rounding: repeated, this "
                "ingest does not give the same bytes", ", ".join(sorted(set(self._names))), name,
            )  # fmt: skip
        self._names.append(name)

    def _kill(self, worker: Any) -> None:
        """End a worker for good: it must not write on beside the one that takes its range."""
        with suppress(Exception):
            self._ray.kill(worker)

    def _end(self) -> None:
        running = [worker for worker, _ in self._running.values()]
        for worker in [*self._idle, *running, *self._starting.values()]:
            self._kill(worker)


def _saved(model: Model) -> npt.NDArray[np.uint8]:
    """The bytes of a model: as an array they lie once on each machine, whatever reads them."""
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        path = Path(folder) / "model.pt"
        save_model(model, path)
        return np.fromfile(path, np.uint8)


def _cause(error: Exception) -> Exception:
    """What a worker raised; of one that died, what Ray says of its death."""
    return getattr(error, "cause", None) or error


def _told(error: Exception | None) -> str:
    """An error in one line: Ray's own have a traceback before what happened, or hints after it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    where = -1 if "creation task" in lines[0] else 0
    return f"{type(error).__name__}: {lines[where]}"


def _given_up(job: Job, aside: Mapping[int, Exception], reached: Mapping[int, int]) -> DeviceError:
    places = (
        f"{job.part(number)} (records {reached[number]} to {job.span(number)[1] - 1} of the "
        f"selection: {_told(error)})"
        for number, error in aside.items()
    )
    return DeviceError(
        f"given up after {ATTEMPTS} workers each: {'; '.join(places)}; what was computed is kept, "
        "run it again to go on; a record that ends every worker can only be left out from the "
        "start (--where with --restart)"
    )
