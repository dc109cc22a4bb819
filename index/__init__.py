"""Rows on disk and how to search them: numpy, pyarrow, duckdb and faiss; no torch.

manifest   what an index holds and with which recipe it was made (`manifest.json`)
writer     changes to an index: parts, tombstones, curvature; one commit makes them count
parts      one part on disk: items, features and previews of the same rows
reader     an index as it was last committed: items, streamed rows, curvature, previews
catalog    `--where` expressions over item columns, run in a locked DuckDB
outliers   items whose gradient norm stands apart
search     exact maximum inner product over streamed rows (FAISS)
excerpt    some shards of an index, read as an index of their own
actors     search over Ray actors that each hold some shards
cluster    a connection to a Ray cluster
ledger     who did what and when, each line hashing the one before
rows       a feature row as stored: a unit vector in half precision and its length
lock       one writer at a time
files      durable writing: temporary name, fsync, rename
errors     `IndexStoreError` and `ClusterError`, for what a user can mend
"""

from __future__ import annotations

from .actors import SearchCluster
from .catalog import Catalog, Summary, filter_positions
from .cluster import connected
from .errors import ClusterError, IndexStoreError
from .manifest import (
    JOB_FILE,
    Manifest,
    Shard,
    part_files,
    part_name,
    read_manifest,
    write_manifest,
)
from .outliers import Outlier, norm_outliers
from .parts import EncodedRows, encode_items, merged_schema, save_table, stored_size, write_part
from .reader import StoredIndex
from .search import scores, search
from .writer import IndexWriter

__all__ = [
    "JOB_FILE",
    "Catalog",
    "ClusterError",
    "EncodedRows",
    "IndexStoreError",
    "IndexWriter",
    "Manifest",
    "Outlier",
    "SearchCluster",
    "Shard",
    "StoredIndex",
    "Summary",
    "connected",
    "encode_items",
    "filter_positions",
    "merged_schema",
    "norm_outliers",
    "part_files",
    "part_name",
    "read_manifest",
    "save_table",
    "scores",
    "search",
    "stored_size",
    "write_manifest",
    "write_part",
]
