"""A corpus -> rows in an index.

sources    a corpus as a stream of items, selected by SQL
signature  what a source is, to tell whether it has changed
columns    which column is the image, the caption, the licence
signals    what a record says against its use for training
layouts    which kind of corpus lies at a path
places     paths, fsspec URLs, brace patterns
listing    the records of a corpus and its images, of whatever kind:
           parquet_files, arrow_files (with hub_layout), tar_shards, folders
images     fingerprints and previews
prepare    items decoded and fitted, a few batches ahead of the device
devices    where rows are computed: here, or in a process for each device
processes  processes that work through tasks, answers in order
tables     item columns and previews of a shard; quarantine
job        the ingest itself: source + model -> index
estimate   what an ingest would take, from a few batches
progress   how far an ingest has come
errors     `SourceError` and `DeviceError`, for what a user can mend
"""

from __future__ import annotations

from .columns import ColumnNames
from .devices import devices_named, kind_of
from .errors import DeviceError, SourceError
from .estimate import Estimate, estimate
from .images import fingerprints, thumbnail
from .job import IngestSummary, build_index
from .progress import Progress, ProgressCallback
from .signature import Signature, difference
from .sources import Source, SourceItem, open_source, unique_ids

__all__ = [
    "ColumnNames",
    "DeviceError",
    "Estimate",
    "IngestSummary",
    "Progress",
    "ProgressCallback",
    "Signature",
    "Source",
    "SourceError",
    "SourceItem",
    "build_index",
    "devices_named",
    "difference",
    "estimate",
    "fingerprints",
    "kind_of",
    "open_source",
    "thumbnail",
    "unique_ids",
]
