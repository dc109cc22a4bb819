"""The error of the benchmarks: a setting, a file or a model that cannot be measured."""

from __future__ import annotations


class BenchmarkError(ValueError):
    """What stops a benchmark and its user can mend; the message names it and the remedy."""
