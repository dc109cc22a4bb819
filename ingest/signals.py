"""What a record says against its use for training, from columns that data sets carry."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa

# Directives of X-Robots-Tag and robots meta tags that img2dataset, too, takes for a refusal.
_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")
_ROBOTS = frozenset({"x_robots_tag", "x_robots", "robots", "robots_tag", "robots_meta"})
# A value that is set, and not "no", is the signal.
_FLAGS = frozenset(
    {
        *_DIRECTIVES,
        *("opt_out", "optout", "opted_out", "ai_opt_out", "spawning_opt_out"),
        *("no_ai", "no_train", "no_training", "do_not_train", "disallowed"),
        *("tdm_reservation", "tdm_reserved", "tdm_opt_out"),  # W3C TDMRep: 1 is reserved
    }
)
# Assertions of C2PA and CAWG (notAllowed, constrained) and PLUS in IPTC metadata (DMI-PROHIBITED).
_MINING = re.compile(
    r"(c2pa_|cawg_|plus_)?(training_mining|data_?mining|ai_(generative_)?training|ai_inference)"
)
_REFUSALS = ("notallowed", "not_allowed", "constrained", "prohibited")
_NO = frozenset({"", "0", "0.0", "false", "f", "no", "n", "none", "null", "nan", "unset"})
_FAILED_BY_ROBOTS = "disallowed by X-Robots-Tag"  # img2dataset's error_message


def signal_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns in which a refusal may stand, in their order."""
    return tuple(name for name in schema.names if _kind(name) is not None)


def opt_out(record: dict[str, Any], columns: tuple[str, ...]) -> str | None:
    """Return which of `columns` refuse training and what they say, None if none does.

    >>> opt_out({"noai": True, "tdm_reservation": 0}, ("noai", "tdm_reservation"))
    'noai=True'
    """
    said = (f"{name}={record[name]}" for name in columns if _refuses(name, record[name]))
    return "; ".join(said) or None


def failed_download(record: dict[str, Any]) -> str | None:
    """Return why img2dataset got no image of a record, in its words; None if it did."""
    status = record.get("status")
    if isinstance(status, str) and status.startswith("failed"):
        return f"{status}: {record.get('error_message') or 'no reason given'}"
    return None


def _kind(name: str) -> str | None:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if plain in _ROBOTS:
        return "robots"
    if plain in _FLAGS:
        return "flag"
    if plain == "error_message":
        return "download"
    return "mining" if _MINING.fullmatch(plain) else None


def _refuses(name: str, value: Any) -> bool:
    if value is None:
        return False
    text = json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
    text, kind = text.strip().lower(), _kind(name)
    if kind == "robots":
        return any(word in _DIRECTIVES for word in re.split(r"[^a-z]+", text))
    if kind == "mining":
        return any(word in text for word in _REFUSALS)
    if kind == "download":
        return _FAILED_BY_ROBOTS.lower() in text
    return text not in _NO
