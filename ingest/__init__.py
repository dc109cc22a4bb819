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
plan       what an ingest was asked, its ranges, what is still to do
journal    the work of an ingest, kept batch by batch
held       what an index already holds of a source
ranges     ranges computed and kept: all here, or some by each worker of a cluster
ray_engine workers on the machines of a Ray cluster
seal       the end of an ingest: unique ids, replaced rows, duplicates, one commit
spectrum   the curvature of an index after a change of its rows
job        the ingest itself: source + model -> index
maintenance  items deleted, and deleted rows taken from the disk
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
from .maintenance import Compaction, Deletion, compact, delete
from .plan import read_job
from .progress import Progress, ProgressCallback
from .ray_engine import RayCluster
from .signature import Signature, difference
from .sources import Source, SourceItem, open_source

__all__ = [
    "ColumnNames",
    "Compaction",
    "Deletion",
    "DeviceError",
    "Estimate",
    "IngestSummary",
    "Progress",
    "ProgressCallback",
    "RayCluster",
    "Signature",
    "Source",
    "SourceError",
    "SourceItem",
    "build_index",
    "compact",
    "delete",
    "devices_named",
    "difference",
    "estimate",
    "fingerprints",
    "kind_of",
    "open_source",
    "read_job",
    "thumbnail",
]
