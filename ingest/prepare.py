"""From chunks of a source to batches ready for a model: decoded, fitted, fingerprinted.

Reading and decoding run ahead of the device, in threads or processes, a few batches at most; the
order is that of the source.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.attribution import ImageRejected, decode, fit

from .errors import SourceError
from .images import fingerprints, thumbnail
from .plan import Chunk, Span
from .processes import Crew, Work
from .sources import SourceItem

# A 64 x 64 PNG takes 0.7 ms, much of it under the interpreter's lock: threads stop gaining near
# 2,000 images a second and slow down whatever else Python does. With processes an image costs this
# one 0.2 ms. Photographs take ten or a hundred times as long, hence as many as eight.
PREPARERS = min(8, os.cpu_count() or 1)
_AHEAD = PREPARERS + 2  # batches in memory before the device


@dataclass(frozen=True)
class PreparedBatch:
    """Some items in the order of the source; pixels of those that have a picture."""

    span: Span  # the records that it stands for
    keys: list[str]  # of every item; noise is drawn by them
    columns: list[dict[str, Any]]  # of every item; `status` and `error` say what became of it
    previews: list[bytes | None]
    usable: list[int]  # which items have a picture
    pixels: npt.NDArray[np.uint8]  # [len(usable), H, W, 3]
    bytes_read: int  # of encoded images


def prepare_batch(chunk: Chunk, size: tuple[int, int]) -> PreparedBatch:
    """Decode the items of a chunk for a model of `size` = (height, width).

    Of those that cannot be used is put down why.

    Raises:
        SourceError: something unforeseen in one of them; names the item.
    """
    items = chunk.items
    columns, previews, usable, pixels = [], [], [], []
    for position, item in enumerate(items):
        try:
            known, picture, preview = _prepare(item, size)
        except Exception as error:
            raise SourceError(
                f"item {item.item_id!r} ({item.uri}) cannot be prepared: "
                f"{type(error).__name__}: {error}; leave it out with --where"
            ) from error
        columns.append(known)
        previews.append(preview)
        if picture is not None:
            usable.append(position)
            pixels.append(picture)
    stacked = np.stack(pixels) if pixels else np.zeros((0, *size, 3), np.uint8)
    bytes_read = sum(len(item.data) for item in items if item.data is not None)
    keys = [item.key for item in items]
    return PreparedBatch(chunk.span, keys, columns, previews, usable, stacked, bytes_read)


@contextmanager
def prepared_batches(
    chunks: Iterable[Chunk],
    size: tuple[int, int],
    *,
    refuses: Callable[[str], str | None],
    processes: bool,
) -> Iterator[Iterator[PreparedBatch]]:
    """The batches of a source, one for each chunk, prepared ahead of whoever takes them.

    `refuses` gives the reason why a model cannot hear a caption,
    or None. `processes` takes processes instead of threads; whatever is
    running ends with the context.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(_threads(1))
        ahead = _read_ahead(reader, (_heard(chunk, refuses) for chunk in chunks))
        if processes:
            names = [f"image process {number}" for number in range(1, PREPARERS + 1)]
            crew = stack.enter_context(Crew(_serve, {name: (size,) for name in names}))
            yield crew.map(ahead)
        else:
            yield _in_threads(stack.enter_context(_threads(PREPARERS)), ahead, size)


def _serve(size: tuple[int, int]) -> tuple[None, Work]:
    """What an image process does; see `processes.Setup`."""

    def work(chunks: Iterator[Chunk | None]) -> Iterator[PreparedBatch]:
        yield from (prepare_batch(chunk, size) for chunk in chunks if chunk is not None)

    return None, work


def _heard(chunk: Chunk, refuses: Callable[[str], str | None]) -> Chunk:
    """The chunk, its items without their image where the model cannot hear the caption."""

    def heard(item: SourceItem) -> SourceItem:
        reason = item.error or refuses(item.caption)
        return replace(item, data=None, error=reason) if reason else item

    return replace(chunk, items=[heard(item) for item in chunk.items])


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that end with the context, without what they have not begun."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_ahead(pool: ThreadPoolExecutor, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same chunks, the next ones read by the pool's one thread meanwhile."""
    waiting = deque(pool.submit(next, chunks, None) for _ in range(2))
    while (chunk := waiting.popleft().result()) is not None:
        waiting.append(pool.submit(next, chunks, None))
        yield chunk


def _in_threads(
    pool: ThreadPoolExecutor, chunks: Iterator[Chunk], size: tuple[int, int]
) -> Iterator[PreparedBatch]:
    waiting: deque[Future[PreparedBatch]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(prepare_batch, chunk, size))
        if len(waiting) == _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _prepare(
    item: SourceItem, size: tuple[int, int]
) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None, bytes | None]:
    """Item columns, picture [H, W, 3] and preview; without a picture the reason stands in them."""
    columns: dict[str, Any] = {
        "item_id": item.item_id,
        "sha256": None,
        "phash": None,
        "uri": item.uri,
        "caption": item.caption,
        "licence": item.licence,
        "rights_holder": item.rights_holder,
        "source": item.source,
        "width": None,
        "height": None,
        **item.extra,
        "status": "ok",
        "error": None,
        "row_weight": 1.0,
        "gradient_norm": None,
    }
    error = item.error
    if error is None and item.data is not None:
        try:
            image = decode(item.data)
        except ImageRejected as rejected:
            error = str(rejected)
        else:
            columns["sha256"], columns["phash"] = fingerprints(item.data, image)
            columns["width"], columns["height"] = image.size
            return columns, fit(image, size), thumbnail(image)
    columns |= {"status": "quarantined", "error": error or "no image data"}
    return columns, None, None
