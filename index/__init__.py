"""Rows on disk and how to search them: numpy, pyarrow, duckdb and faiss; no torch.

manifest   what an index holds and with which recipe it was made (`manifest.json`)
writer     changes to an index: new files beside the old ones, one commit makes them count
settling   an index after a crash: what was committed is finished, what was not is removed
parts      one part on disk: items, features and previews of the same rows
reader     an index as it was last committed: items, streamed rows, curvature, previews
catalog    `--where` expressions over item columns
sql        `headwater sql`: whole queries over items and hits, read-only
duck       the locked DuckDB that both run in
export     a table as CSV, JSON or Parquet
verify     whether an index is whole: hashes, counts, the ledger's chain
duplicates  exact and near duplicates among items
outliers   items whose gradient norm stands apart
search     the best rows for a query: exact, or exact scores of candidates found faster
metrics    inner product and cosine, preconditioned or not, as one scale per row
products   inner products with stored rows, by FAISS: the one kernel of scores
exact      exact scores of stored rows, a block at a time, and the best of them
accelerator  candidates of a large index from short codes, of some cells or of all
whitening  rows made short where queries are long: where codes and cells are made
codes      one bit per direction of a whitened row (RaBitQ), a segment of shards at a time
cells      an inverted file before the codes, and how much of it a search must look at
space      where the codes of an index are made: its whitening and its cells, as kept
gpu        candidates of rows that lie in a GPU's memory, or of codes of them
gpu_cells  four bits per direction of a whitened row, in an inverted file on a GPU
derived    files that can be made again, used only as this user wrote them
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

from .accelerator import calibrations
from .actors import SearchCluster
from .catalog import Catalog, Summary, filter_positions
from .cluster import connected
from .duplicates import DuplicateCounts, duplicate_counts, duplicate_groups
from .errors import ClusterError, IndexStoreError
from .exact import merge
from .export import plain_json, write_csv, write_json_rows, write_parquet
from .manifest import FILE_NAME as MANIFEST_FILE
from .manifest import (
    JOB_FILE,
    Manifest,
    Shard,
    part_files,
    part_name,
    read_manifest,
    write_manifest,
)
from .metrics import Metric
from .outliers import Outlier, norm_outliers
from .parts import EncodedRows, encode_items, merged_schema, save_table, stored_size, write_part
from .reader import StoredIndex
from .search import scores, search
from .sql import sql
from .verify import Damage, Verification, verify
from .writer import IndexWriter

__all__ = [
    "JOB_FILE",
    "MANIFEST_FILE",
    "Catalog",
    "ClusterError",
    "Damage",
    "DuplicateCounts",
    "EncodedRows",
    "IndexStoreError",
    "IndexWriter",
    "Manifest",
    "Metric",
    "Outlier",
    "SearchCluster",
    "Shard",
    "StoredIndex",
    "Summary",
    "Verification",
    "calibrations",
    "connected",
    "duplicate_counts",
    "duplicate_groups",
    "encode_items",
    "filter_positions",
    "merge",
    "merged_schema",
    "norm_outliers",
    "part_files",
    "part_name",
    "plain_json",
    "read_manifest",
    "save_table",
    "scores",
    "search",
    "sql",
    "stored_size",
    "verify",
    "write_csv",
    "write_json_rows",
    "write_manifest",
    "write_parquet",
    "write_part",
]
