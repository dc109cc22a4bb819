"""Where rows are computed: in this process, or in a process of its own for each device."""

from __future__ import annotations

import re
import resource
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headwater.attribution import (
    Engine,
    Execution,
    Model,
    Recipe,
    choose_batch,
    quiet_libraries,
)

from .errors import DeviceError
from .processes import Crew, Work

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """A batch on its way to a device."""

    pixels: npt.NDArray[np.uint8]  # [n, H, W, 3], fitted to the model
    captions: list[str]
    keys: list[str]
    places: list[int]  # ascending; a picture runs in pass place // width, at place % width in it
    width: int  # pictures in every pass, whatever the batch holds of them


@dataclass(frozen=True)
class BatchRows:
    """A batch on its way back."""

    features: Float32  # [n, dim]
    weights: Float32  # [n]
    norms: Float32  # [n]
    peak_memory: int  # bytes so far: reserved on a GPU, resident of the process on a CPU


class Devices:
    """Computes rows batch by batch; made by `open_devices`."""

    def __init__(
        self, engine: Engine, crew: Crew | None = None, *, image_processes: bool = False
    ) -> None:
        self.engine = engine  # of this process; with a crew it only knows the recipe and the width
        self.image_processes = image_processes  # threads may not prepare as fast as rows are made
        self._crew = crew

    def batch_size(self) -> int:
        """The batch size that suits the memory of the (first) device."""
        if self._crew is not None:
            return int(self._crew.facts[0])
        return _suitable_batch(self.engine)

    def rows(self, batches: Iterator[Pictures]) -> Iterator[BatchRows]:
        """The rows of each batch, in order; the next batches are taken meanwhile.

        Raises:
            DeviceError: a device ran out of memory, or its process failed or died.
        """
        if self._crew is not None:
            return self._crew.map(batches)
        return compute_rows(self.engine, batches)


@contextmanager
def open_devices(
    engine: Engine, execution: Execution, names: Sequence[str] | None, *, choose: bool
) -> Iterator[Devices]:
    """The devices of an ingest, ready to compute; whatever was started ends with the context.

    Args:
        engine: of this process. It computes itself where `names` is None.
        execution: of the engines in the other processes.
        names: torch devices, one process each with its own copy of the model.
        choose: whether `batch_size` will be asked for.
    """
    if names is None:
        yield Devices(engine)
        return
    # Every row must come from the same kind of arithmetic, whichever device took its batch.
    if not names or len({kind_of(name) for name in names}) > 1:
        raise DeviceError(f"--devices {','.join(names)}: give one or several devices of one kind")
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        saved = Path(folder) / "model.pt"
        save_model(engine.model, saved)
        threads = torch.get_num_threads()
        arguments = {
            f"{name} (worker {number})": (
                *(str(saved), engine.recipe, execution, name, threads),
                choose and number == 1,
            )
            for number, name in enumerate(names, start=1)
        }
        crew = Crew(_serve, arguments)
    with crew:
        yield Devices(engine, crew, image_processes=kind_of(names[0]) == "cuda")


def kind_of(device: str) -> str:
    """`cuda` of `cuda:1`."""
    return device.partition(":")[0]


def devices_named(text: str) -> list[str] | None:
    """The devices that `--devices` names; None: this process does the work, on the processor.

    `auto` is the first CUDA device where there is one, `all` every CUDA device.

    Raises:
        DeviceError: `all` where there is none.
    """
    if text == "auto":
        return ["cuda:0"] if torch.cuda.is_available() else None
    if text == "all":
        if not torch.cuda.is_available():
            raise DeviceError("--devices all: there is no CUDA device here; use auto or cpu")
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in text.split(",")]
    return names if len(names) > 1 or kind_of(names[0]) == "cuda" else None


def compute_rows(engine: Engine, batches: Iterable[Pictures | None]) -> Iterator[BatchRows]:
    """The rows of each batch, in order; None among the batches says that the next is not there yet.

    On a GPU a batch is handed out when the next one is under way: the GPU goes from one to the
    other without waiting for this process, which copies, checks and sends meanwhile.
    """
    overlapping = engine.model.device.type == "cuda"
    started: _Started | None = None
    for batch in batches:
        following = None if batch is None else _Started(engine, batch)
        if started is not None:
            yield started.finished()
        started = following
        if started is not None and not overlapping:
            yield started.finished()
            started = None
    if started is not None:
        yield started.finished()


class _Started:
    """A batch whose work was handed to the device; on a GPU it may still go on.

    A row depends to rounding on the width of its pass and on its place in it, never on the other
    rows. Both are fixed by the job, and places without a picture are filled: so a row is the same
    to the bit wherever batches were cut.
    """

    def __init__(self, engine: Engine, batch: Pictures) -> None:
        self._device = engine.model.device
        self._dim = engine.projector.dim
        engine.batch_size = batch.width
        passes: dict[int, list[int]] = {}
        for picture, place in enumerate(batch.places):
            passes.setdefault(place // batch.width, []).append(picture)
        try:
            self._passes = [_pass(engine, batch, pictures) for pictures in passes.values()]
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self._device}: out of memory with {batch.width} images at once; "
                "lower --batch-size or add --low-memory, with --restart if the ingest had begun"
            ) from error
        if self._device.type == "cuda":
            self._copied = torch.cuda.current_stream(self._device).record_event()

    def finished(self) -> BatchRows:
        if self._device.type == "cuda" and self._passes:
            self._copied.synchronize()
        found = [(torch.zeros(0, self._dim), torch.zeros(0), torch.zeros(0))]
        found += [(f[own], w[own], n[own]) for (f, w, n), own in self._passes]
        features, weights, norms = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return BatchRows(features, weights, norms, peak_memory(self._device))


def _pass(
    engine: Engine, batch: Pictures, pictures: list[int]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
    """Features, weights and norms of a pass on their way to the host, and which rows count."""
    places = [batch.places[picture] % batch.width for picture in pictures]
    filled = pictures[:1] * batch.width
    for picture, place in zip(pictures, places, strict=True):
        filled[place] = picture
    pixels = torch.from_numpy(batch.pixels[filled])
    if engine.model.device.type == "cuda":
        # From pinned memory the copy runs beside the computation of the batch before.
        pixels = pixels.pin_memory().to(engine.model.device, non_blocking=True)
    captions, keys = ([values[p] for p in filled] for values in (batch.captions, batch.keys))
    rows = engine.rows(engine.model.encode_pictures(pixels), captions, keys)
    return (_to_host(rows.features), _to_host(rows.weights), _to_host(rows.norms)), places


def _to_host(part: Tensor) -> Tensor:
    return part.detach().to("cpu", non_blocking=True)  # into pinned memory


def _suitable_batch(engine: Engine) -> int:
    batch_size = choose_batch(engine).batch_size
    device = engine.model.device
    if device.type == "cuda":  # what the trial took is not what the ingest takes
        torch.cuda.reset_peak_memory_stats(device)
    return batch_size


def peak_memory(device: torch.device) -> int:
    """The most bytes taken so far: reserved by torch on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage begins with what the parent had at the fork
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes


def save_model(model: Model, path: Path) -> None:
    """Put a model where its copies are made from.

    A file rather than the pipes or shared memory: it is written once for every device, works for
    models that were built or changed in memory, needs no /dev/shm and no second copy in memory;
    rather than the model's own folder, which an adapted model does not equal.
    """
    try:
        torch.save(model, path)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DeviceError(
            f"the model cannot be copied for --devices ({type(error).__name__}: {reason}); "
            f"look at the space in {tempfile.gettempdir()} (TMPDIR moves it), or leave --devices"
        ) from error


def _serve(
    saved: str, recipe: Recipe, execution: Execution, device: str, threads: int, choose: bool
) -> tuple[int | None, Work]:
    """What the process of a device does; see `processes.Setup`."""
    torch.set_num_threads(threads)  # sums are cut by threads: the parent's number, the same rows
    with quiet_libraries():
        model: Model = torch.load(saved, map_location="cpu", mmap=True, weights_only=False)
    model = model.to(device)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    engine = Engine(model, recipe, execution)
    return _suitable_batch(engine) if choose else None, lambda batches: compute_rows(
        engine, batches
    )
