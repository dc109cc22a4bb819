"""Rows on disk and how to search them: numpy, pyarrow, duckdb and faiss; no torch.

manifest   what an index holds and with which recipe it was made (`manifest.json`)
writer     a new index, shard by shard: items, features, previews, curvature
reader     a finished index: items, streamed rows, curvature, previews
catalog    `--where` expressions over item columns, run in a locked DuckDB
outliers   items whose gradient norm stands apart
search     the best rows for a query: exact, or exact scores of candidates found faster
metrics    inner product and cosine, preconditioned or not, as one scale per row
products   inner products with stored rows, by FAISS: the one kernel of scores
accelerator  candidates of a large index from one bit per direction (RaBitQ)
gpu        candidates of rows that lie in a GPU's memory
derived    files that can be made again, beside their checksums
ledger     who did what and when, each line hashing the one before
rows       a feature row as stored: a unit vector in half precision and its length
files      durable writing: temporary name, fsync, rename
errors     `IndexStoreError`, for what a user can mend
"""

from __future__ import annotations

from .catalog import Catalog, Summary, filter_positions
from .errors import IndexStoreError
from .manifest import Manifest, Shard, read_manifest, write_manifest
from .metrics import Metric
from .outliers import Outlier, norm_outliers
from .reader import StoredIndex
from .search import merge, scores, search
from .writer import IndexWriter, stored_size

__all__ = [
    "Catalog",
    "IndexStoreError",
    "IndexWriter",
    "Manifest",
    "Metric",
    "Outlier",
    "Shard",
    "StoredIndex",
    "Summary",
    "filter_positions",
    "merge",
    "norm_outliers",
    "read_manifest",
    "scores",
    "search",
    "stored_size",
    "write_manifest",
]
