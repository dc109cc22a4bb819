"""The ingest job: a source and a model become an index."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from headwater.attribution import (
    Engine,
    Gram,
    ImageRejected,
    Model,
    Recipe,
    decode,
    dual_curvature,
    feature_space,
    feature_space_id,
    fit,
)
from headwater.index import IndexWriter

from .columns import ColumnNames
from .errors import SourceError
from .images import fingerprints, thumbnail
from .sources import Source, SourceItem, open_source

SHARD_ITEMS = 2048  # items a shard holds: about 16 MB of rows at 4096 dimensions


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did."""

    folder: Path
    feature_space_id: str
    items: int
    rows: int
    quarantined: dict[str, int]  # reason -> items, most frequent first


@dataclass(frozen=True)
class _Prepared:
    """An item on its way: either pixels to compute a row from, or the reason why not."""

    columns: dict[str, Any]
    pixels: npt.NDArray[np.uint8] | None  # [H, W, 3]
    preview: bytes | None


_BEFORE_EXTRA = [
    *(pa.field(name, pa.string()) for name in ("item_id", "sha256", "phash", "uri", "caption")),
    *(pa.field(name, pa.string()) for name in ("licence", "rights_holder", "source")),
    *(pa.field(name, pa.int32()) for name in ("width", "height")),
]
_AFTER_EXTRA = [
    *(pa.field(name, pa.string()) for name in ("status", "error")),
    pa.field("row_weight", pa.float32()),
]

Progress = Callable[[int, int, int], None]  # (items done, items in all, of them quarantined)


def build_index(
    source: str | Path,
    model: Model,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    columns: ColumnNames | None = None,
    where: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> IngestSummary:
    """Compute one row for every image of `source` and write them as an index to `out`.

    Args:
        source: Parquet file, folder of Parquet files, or folder of images with captions.
        model: the model that was trained on these images.
        out: folder of the new index; must not exist or be empty.
        recipe: how rows are computed; the default is the measured best.
        columns: which source columns hold what, where convention does not find them.
        where: DuckDB expression over the source's own columns; only matching items are read.
        limit: at most so many items.
        batch_size: images per forward pass; changes speed and memory, not results.
        progress: called after every batch.

    Raises:
        SourceError: nothing to read, or nothing usable in it. `out` is then not left behind.
        ModelError, IndexStoreError: the recipe or the output folder cannot be used.
    """
    if batch_size < 1:
        raise SourceError(f"--batch-size {batch_size} is not positive")
    recipe, out = recipe or Recipe(), Path(out)
    items = open_source(
        source,
        columns=columns or ColumnNames(),
        where=where,
        limit=limit,
        captions_required=model.conditional,
    )
    engine = Engine(model, recipe)
    space = feature_space(engine.recipe, model.fingerprint)
    existed = out.exists()
    writer = IndexWriter.create(
        out, feature_space_id=feature_space_id(space), recipe=space, dim=engine.projector.dim
    )
    try:
        quarantined = _write_items(items, engine, writer, batch_size, progress)
        manifest = writer.manifest
        if manifest.rows == manifest.quarantined:
            reason, count = quarantined.most_common(1)[0]
            raise SourceError(
                f"no usable image in {items.label}: {manifest.rows} items, "
                f"of which {count} with: {reason}; check the image column and the files"
            )
        writer.finish()
    except BaseException:
        # An unfinished index cannot be opened; leaving it would only block the next attempt.
        # A folder that was there before stays (it may be a link or a mount point), emptied.
        for path in out.iterdir() if existed else [out]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
    return IngestSummary(
        out,
        manifest.feature_space_id,
        manifest.rows,
        manifest.rows - manifest.quarantined,
        dict(quarantined.most_common()),
    )


def _write_items(
    items: Source, engine: Engine, writer: IndexWriter, batch_size: int, progress: Progress | None
) -> Counter[str]:
    """Write every shard and the curvature; the reasons of quarantine, counted."""
    quarantined: Counter[str] = Counter()
    dim = engine.projector.dim
    # With fewer rows than dimensions the N x N form is smaller, and the rows fit in memory.
    gram = Gram(dim) if len(items) >= dim else None
    effective: list[npt.NDArray[np.float32]] = []
    done, stream = 0, iter(items)
    while True:
        rows: list[npt.NDArray[np.float32]] = []
        finished: list[_Prepared] = []
        while batch := list(islice(stream, min(batch_size, SHARD_ITEMS - len(finished)))):
            prepared = [_prepare(item, engine.model) for item in batch]
            features, prepared = _compute(engine, prepared)
            rows.append(features)
            finished += prepared
            quarantined.update(p.columns["error"] for p in prepared if p.columns["error"])
            done += len(batch)
            if progress is not None:
                progress(done, len(items), quarantined.total())
        if not finished:
            break
        stored = writer.add_shard(
            _items_table(finished, items.extra_schema),
            np.concatenate(rows),
            _previews_table(finished),
        )
        usable = stored[[p.columns["status"] == "ok" for p in finished]]
        if gram is None:
            effective.append(usable)
        else:
            gram.add(torch.from_numpy(usable))
    if gram is not None and gram.rows:
        writer.write_curvature({"gram": gram.matrix.numpy()} | gram.curvature().arrays())
    elif any(map(len, effective)):
        curvature = dual_curvature(torch.from_numpy(np.concatenate(effective)))
        writer.write_curvature(curvature.arrays())
    return quarantined


def _prepare(item: SourceItem, model: Model) -> _Prepared:
    """Decode an item, or put down why it cannot be used."""
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
    }
    error = item.error or model.refuses(item.caption)
    if error is None and item.data is not None:
        try:
            image = decode(item.data)
        except ImageRejected as rejected:
            error = str(rejected)
        else:
            columns["sha256"], columns["phash"] = fingerprints(item.data, image)
            columns["width"], columns["height"] = image.size
            return _Prepared(columns, fit(image, model.image_size), thumbnail(image))
    columns |= {"status": "quarantined", "error": error or "no image data"}
    return _Prepared(columns, None, None)


def _compute(
    engine: Engine, batch: list[_Prepared]
) -> tuple[npt.NDArray[np.float32], list[_Prepared]]:
    """Rows [n, dim] of a batch; what has no finite, non-zero row is quarantined with the reason."""
    rows = np.zeros((len(batch), engine.projector.dim), np.float32)
    usable = [i for i, prepared in enumerate(batch) if prepared.pixels is not None]
    if not usable:
        return rows, batch
    images = [image for prepared in batch if (image := prepared.pixels) is not None]
    x_0 = engine.model.encode_pictures(np.stack(images))
    captions = [batch[i].columns["caption"] for i in usable]
    keys = [batch[i].columns["item_id"] for i in usable]
    found = engine.rows(x_0, captions if engine.model.conditional else [""] * len(keys), keys)
    features, weights = found.features.cpu().numpy(), found.weights.cpu().numpy()
    batch = list(batch)
    for place, i in enumerate(usable):
        reason = _unusable(features[place], float(weights[place]))
        columns = batch[i].columns | {"row_weight": float(weights[place])}
        if reason:
            columns |= {"status": "quarantined", "error": reason, "row_weight": 1.0}
        else:
            rows[i] = features[place]
        batch[i] = replace(batch[i], columns=columns, pixels=None)
    return rows, batch


def _unusable(row: npt.NDArray[np.float32], weight: float) -> str | None:
    if not np.isfinite(row).all() or not np.isfinite(weight):
        return "gradient is not finite (NaN or infinity)"
    if not row.any():
        return "gradient is zero (with cfg: an item without caption)"
    return None


def _items_table(batch: list[_Prepared], extra: pa.Schema) -> pa.Table:
    """The items of a shard, user columns in the types that the source gave them."""
    schema = pa.schema([*_BEFORE_EXTRA, *extra, *_AFTER_EXTRA])
    rows = [{"row_weight": 1.0, **prepared.columns} for prepared in batch]
    arrays = []
    for field in schema:
        try:
            arrays.append(pa.array([row[field.name] for row in rows], field.type))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(
                f"column {field.name!r} ({field.type}) cannot be carried along: {reason}; "
                "leave it out of the source or store it as text"
            ) from error
    return pa.table(arrays, schema=schema)


def _previews_table(batch: list[_Prepared]) -> pa.Table:
    shown = [(p.columns["item_id"], p.preview) for p in batch if p.preview is not None]
    return pa.table(
        {
            "item_id": pa.array([name for name, _ in shown], pa.string()),
            "image": pa.array([image for _, image in shown], pa.binary()),
        }
    )
