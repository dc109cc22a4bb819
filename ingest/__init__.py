"""A corpus -> rows in an index.

sources   a corpus as a stream of items, selected by SQL
listing   what lies at a path: Parquet, image folders, their metadata
columns   which column is the image, the caption, the licence
images    fingerprints and previews
job       the ingest itself: source + model -> index
errors    `SourceError`, for what a user can mend
"""

from __future__ import annotations

from .columns import ColumnNames
from .errors import SourceError
from .images import fingerprints, thumbnail
from .job import IngestSummary, build_index
from .sources import Source, SourceItem, open_source

__all__ = [
    "ColumnNames",
    "IngestSummary",
    "Source",
    "SourceError",
    "SourceItem",
    "build_index",
    "fingerprints",
    "open_source",
    "thumbnail",
]
