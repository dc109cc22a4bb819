"""Headwater: which training images taught a text-to-image diffusion model a concept.

>>> import headwater as hw
>>> model = hw.Model.from_pretrained("model/")
>>> hw.build_index("corpus.parquet", model, "idx/")
>>> result = hw.Index("idx/").query(hw.Concept("a cat", contrast="an animal"), model, top=20)
>>> result.rollup("rights_holder", "licence")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attribution import Model, ModelError, Recipe, Reward
    from .index import ClusterError, IndexStoreError, SearchCluster, Verification, sql, verify
    from .ingest import (
        ColumnNames,
        Compaction,
        Deletion,
        DeviceError,
        Estimate,
        IngestSummary,
        Progress,
        RayCluster,
        SourceError,
        build_index,
        compact,
        delete,
        estimate,
    )
    from .queries import Asking, Concept, Hit, Index, QueryError, Result, Section, write_report

# Torch takes seconds to import: a name is loaded when it is first used.
_HOME = {
    "Model": "attribution",
    "ModelError": "attribution",
    "Recipe": "attribution",
    "Reward": "attribution",
    "ClusterError": "index",
    "IndexStoreError": "index",
    "Verification": "index",
    "sql": "index",
    "verify": "index",
    "SearchCluster": "index",
    "ColumnNames": "ingest",
    "Compaction": "ingest",
    "Deletion": "ingest",
    "DeviceError": "ingest",
    "Estimate": "ingest",
    "IngestSummary": "ingest",
    "Progress": "ingest",
    "RayCluster": "ingest",
    "SourceError": "ingest",
    "build_index": "ingest",
    "compact": "ingest",
    "delete": "ingest",
    "estimate": "ingest",
    "Asking": "queries",
    "Concept": "queries",
    "Hit": "queries",
    "Index": "queries",
    "QueryError": "queries",
    "Result": "queries",
    "Section": "queries",
    "write_report": "queries",
}

__all__ = [
    "Asking",
    "ClusterError",
    "ColumnNames",
    "Compaction",
    "Concept",
    "Deletion",
    "DeviceError",
    "Estimate",
    "Hit",
    "Index",
    "IndexStoreError",
    "IngestSummary",
    "Model",
    "ModelError",
    "Progress",
    "QueryError",
    "RayCluster",
    "Recipe",
    "Result",
    "Reward",
    "SearchCluster",
    "Section",
    "SourceError",
    "Verification",
    "build_index",
    "compact",
    "delete",
    "estimate",
    "sql",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("headwater")
    if name not in _HOME:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
