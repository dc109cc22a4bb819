"""Which column of a corpus is the image, the caption, the licence: by flag or by convention."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pyarrow as pa

from .errors import SourceError

# In order of preference; compared without regard to case.
CONVENTIONS: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "img", "image_bytes", "jpg", "png", "webp"),
        *("file_name", "image_path", "path", "filepath"),
    ),
    "caption": ("caption", "text", "prompt", "description", "txt"),
    "id": ("image_id", "id", "item_id", "key"),
    "licence": ("licence", "license"),
    "rights_holder": ("rights_holder", "copyright_holder", "copyright", "artist", "author"),
    "source": ("source", "source_url", "url"),
}
RESERVED = frozenset(
    {
        *("item_id", "sha256", "phash", "uri", "caption", "licence", "rights_holder", "source"),
        *("status", "error", "row_norm", "row_weight", "gradient_norm", "width", "height"),
        *("opt_out", "rank", "score"),
    }
)


@dataclass(frozen=True)
class ColumnNames:
    """The user's names for what Headwater needs; None: find it by convention, or there is none."""

    image: str | None = None  # bytes, {bytes, path}, or a path relative to the source file
    caption: str | None = None
    id: str | None = None  # becomes item_id; made from image and caption, or the path, if absent
    licence: str | None = None  # an SPDX identifier
    rights_holder: str | None = None
    source: str | None = None  # where the image came from, a web address for instance

    def taken(self) -> set[str]:
        """Return the names that are set."""
        return {name for name in asdict(self).values() if name is not None}


def find_columns(schema: pa.Schema, asked: ColumnNames, label: str) -> ColumnNames:
    """Return `asked` with every gap filled by convention from `schema`, where a column fits.

    Raises SourceError when a column asked for does not exist or cannot serve, or when two names
    differ only in case.
    """
    spelled: dict[str, str] = {}
    for name in schema.names:
        if (other := spelled.setdefault(name.lower(), name)) != name:
            raise SourceError(
                f"columns {other!r} and {name!r} of {label} differ only in case, "
                "which DuckDB does not tell apart; rename one"
            )
    found: dict[str, str | None] = {}
    for role, name in asdict(asked).items():
        if name is None:
            found[role] = _by_convention(schema, role)
            continue
        if name not in schema.names:
            raise SourceError(
                f"{label} has no column {name!r} ({flag(role)}); "
                f"its columns: {', '.join(schema.names)}"
            )
        kind = schema.field(name).type
        if not _serves(role, kind):
            need = "image bytes or paths" if role == "image" else "text or numbers"
            raise SourceError(
                f"column {name!r} of {label} ({flag(role)}) holds {kind}, not {need}; "
                f"its columns: {', '.join(schema.names)}"
            )
        found[role] = name
    return ColumnNames(**found)


def flag(role: str) -> str:
    """Return the command line's flag for a role: `--rights-holder-column`."""
    return f"--{role.replace('_', '-')}-column"


def kept_columns(schema: pa.Schema, names: ColumnNames) -> dict[str, str]:
    """Return {user's column: item column} for the columns kept beside the mapped ones.

    A name that the items table reserves becomes `original_NAME`. Binary columns are not kept:
    items are text and numbers, shown in tables and JSON.
    """
    kept: dict[str, str] = {}
    everything = {name.lower() for name in schema.names}
    for field in schema:
        if field.name in names.taken() or holds_binary(field.type):
            continue
        name = field.name
        if name.lower() in RESERVED:
            name = f"original_{name}"
            while name.lower() in everything:
                name = f"original_{name}"
        kept[field.name] = name
    return kept


def dropped_columns(schema: pa.Schema, names: ColumnNames) -> list[str]:
    """Return the columns that `kept_columns` leaves out because they hold bytes."""
    return [f.name for f in schema if f.name not in names.taken() and holds_binary(f.type)]


def holds_binary(kind: pa.DataType) -> bool:
    """Return whether values of this type are or contain bytes."""
    if is_bytes(kind):
        return True
    if pa.types.is_dictionary(kind):
        return holds_binary(kind.value_type)
    return any(holds_binary(kind.field(i).type) for i in range(kind.num_fields))


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether this is one of Arrow's types for bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether this is one of Arrow's types for text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _by_convention(schema: pa.Schema, role: str) -> str | None:
    by_lower: dict[str, str] = {name.lower(): name for name in schema.names}
    for candidate in CONVENTIONS[role]:
        name = by_lower.get(candidate)
        if name is not None and _serves(role, schema.field(name).type):
            return name
    return None


def _serves(role: str, kind: pa.DataType) -> bool:
    if role != "image":
        # A column of nothing but nulls has the type null and serves as one without values.
        return not (pa.types.is_nested(kind) or holds_binary(kind))
    if pa.types.is_struct(kind):
        parts = {field.name: field.type for field in kind}
        return ("bytes" in parts and is_bytes(parts["bytes"])) or (
            "path" in parts and is_text(parts["path"])
        )
    return is_bytes(kind) or is_text(kind)
