"""What defines a feature space: the recipe of its rows, and its identity together with a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from .errors import ModelError
from .layers import default_parameters
from .model import DTYPES, Model
from .objectives import METHODS, TRAJECTORIES
from .projection import KINDS
from .trajectory import shares, stretch

# Raise it when code changes what a recipe computes: old indexes then say so instead of mixing.
CODE_VERSION = 2
NOISES = ("image", "shared")
SCALINGS = ("timestep", "layer", "none")
# Fields that recipes did not have when this code version's first indexes were made: a feature
# space names them only where they differ from their defaults, which are what was computed then.
_ADDED = ("scaling", "levels")


@dataclass(frozen=True)
class Recipe:
    """How an image becomes a row. Saved with the index, so that a query repeats it exactly.

    `auto` stands for what suits the model (`resolved`); what is saved is never `auto`.
    """

    method: str = "dtrak"  # which cotangent, trajectory and row weight: see objectives.METHODS
    parameters: str = "auto"  # regular expression; auto: where text meets image, or the adapter
    trajectory: str = "auto"  # where gradients are taken; auto: as the method was published
    noise: str = "image"  # "image": each draws its own noise; "shared": one draw for all
    timesteps: int = 10  # noise levels per image, evenly spread over the schedule
    levels: str = "0-1"  # share of the noise schedule that they are spread over, clean end first
    steps: int = 50  # DDIM grid that the noise levels are taken from, and the inversion walks
    guidance: float = 7.5  # of the inversion; without it the residual carries no concept
    projection: str = "sjlt"  # unbiased, and as fast as reading the gradient once
    dim: int = 2048  # width of a row; 2 bytes each on disk
    # Of a noise level's gradient before it is summed: "timestep": to unit norm; "layer": each
    # layer's part to unit norm; "none": as it is.
    scaling: str = "timestep"
    dtype: str = "auto"  # of the denoiser's passes; cotangents and rows are always float32
    seed: int = 0  # of projection, noise and probe

    def __post_init__(self) -> None:
        """Refuse values that nothing can be computed with."""
        if self.method not in METHODS:
            raise ModelError(f"method {self.method!r} is unknown; choose {', '.join(METHODS)}")
        if self.projection not in KINDS:
            raise ModelError(
                f"projection {self.projection!r} is unknown; choose {', '.join(KINDS)}"
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ModelError(f"dtype {self.dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
        if self.trajectory not in ("auto", *TRAJECTORIES):
            raise ModelError(
                f"trajectory {self.trajectory!r} is unknown; choose auto, {', '.join(TRAJECTORIES)}"
            )
        if self.noise not in NOISES:
            raise ModelError(f"noise {self.noise!r} is unknown; choose {' or '.join(NOISES)}")
        if self.scaling not in SCALINGS:
            raise ModelError(f"scaling {self.scaling!r} is unknown; choose {', '.join(SCALINGS)}")
        available = len(stretch(range(self.steps), self.levels))
        if not 1 <= self.timesteps <= available:
            where = f" in levels {self.levels}" if self.levels != Recipe.levels else ""
            raise ModelError(
                f"timesteps {self.timesteps} must lie between 1 and the {available} DDIM steps"
                + where
            )
        if not math.isfinite(self.guidance):
            raise ModelError(f"guidance is {self.guidance}; it must be finite (default 7.5)")
        if self.dim < 1:
            raise ModelError(f"--dim {self.dim} is not positive; 1024 to 16384 are usual")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that an index was made with.

        Raises:
            ModelError: fields that this version does not know.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ModelError(f"recipe has unknown fields {', '.join(unknown)}; update headwater")
        return cls(**values)


def resolved(recipe: Recipe, model: Model) -> Recipe:
    """The recipe with every `auto` replaced by what suits the model, and each value in one form.

    Raises:
        ModelError: the recipe names another dtype than the model was loaded in.
    """
    loaded = next(name for name, dtype in DTYPES.items() if dtype is model.dtype)
    if recipe.dtype not in ("auto", loaded):
        raise ModelError(
            f"the recipe says dtype {recipe.dtype}, the model was loaded as {loaded}; "
            "give Recipe and Model.from_pretrained the same"
        )
    parameters, trajectory = recipe.parameters, recipe.trajectory
    if parameters == "auto":
        parameters = default_parameters(model.denoiser)
    if trajectory == "auto":
        trajectory = METHODS[recipe.method].trajectory
    low, high = shares(recipe.levels)
    return replace(
        recipe,
        dtype=loaded,
        parameters=parameters,
        trajectory=trajectory,
        levels="-".join(np.format_float_positional(share, trim="-") for share in (low, high)),
    )


def feature_space(recipe: Recipe, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """Everything two rows must share to be comparable, as one JSON object."""
    values = asdict(recipe)
    for name in _ADDED:
        if values[name] == getattr(Recipe, name):
            del values[name]
    return {"code": CODE_VERSION, "recipe": values, "model": dict(fingerprint)}


def feature_space_id(space: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a feature space, first 16 hex digits."""
    canonical = json.dumps(space, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The parts in which two feature spaces differ, for an error message."""
    found = []
    for key in sorted(set(mine) | set(theirs)):
        left, right = mine.get(key), theirs.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += [f"{key}.{part}" for part in differences(left, right)]
        elif left != right:
            found.append(f"{key} ({_short(left)} against {_short(right)})")
    return found


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 16 else text[:12] + "..."
