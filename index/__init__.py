"""Rows on disk and how to search them: numpy, pyarrow, duckdb and faiss; no torch.

manifest   what an index holds and with which recipe it was made (`manifest.json`)
writer     a new index, shard by shard: items, features, previews, curvature
reader     a finished index: items, streamed rows, curvature, previews
catalog    `--where` expressions over item columns, run in a locked DuckDB
duplicates exact and near duplicates among items
outliers   items whose gradient norm stands apart
search     exact maximum inner product over streamed rows (FAISS)
ledger     who did what and when, each line hashing the one before
rows       a feature row as stored: a unit vector in half precision and its length
files      durable writing: temporary name, fsync, rename
errors     `IndexStoreError`, for what a user can mend
"""

from __future__ import annotations

from .catalog import Catalog, Summary, filter_positions
from .duplicates import DuplicateCounts, duplicate_counts, duplicate_groups
from .errors import IndexStoreError
from .manifest import Manifest, Shard, read_manifest, write_manifest
from .outliers import Outlier, norm_outliers
from .reader import StoredIndex
from .search import scores, search
from .writer import IndexWriter, stored_size

__all__ = [
    "Catalog",
    "DuplicateCounts",
    "IndexStoreError",
    "IndexWriter",
    "Manifest",
    "Outlier",
    "Shard",
    "StoredIndex",
    "Summary",
    "duplicate_counts",
    "duplicate_groups",
    "filter_positions",
    "norm_outliers",
    "read_manifest",
    "scores",
    "search",
    "stored_size",
    "write_manifest",
]
