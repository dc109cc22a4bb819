"""The mathematics: model + image + cotangent -> projected per-sample gradient; curvature.

fingerprint.py what a model is, as hashes
images.py      one image file, decoded and fitted
conditions.py  what a denoiser hears beside x_t and t
family.py      what the kinds of pipelines have in common
pipelines.py   the kinds of pipelines
schedule.py    noise levels, and what an output says of x_0 and eps
model.py       a diffusers pipeline seen as e(x_t, t, c)
layers.py      per-sample weight gradients, layer type by layer type
hashing.py     the counter-based hash of projections
projection.py  random projection, kind by kind
sjlt.py        sparse Johnson-Lindenstrauss, and sjlt_triton.py its kernel on a GPU
factored.py    Kronecker-factored projection
objectives.py  training methods as cotangents
trajectory.py  where gradients are taken
recipe.py      what defines a feature space, and its identity
execution.py   how the engine runs: what changes speed and memory alone
capture.py     gradients caught in the backward pass, layer by layer
compiled.py    the same off a denoiser that is compiled as one graph
engine.py      rows of a batch
batching.py    how many images at once
rewards.py     query gradients
curvature.py   K = Phi^T Phi and preconditioned queries

Knows no files and no index.
"""

from .batching import BatchChoice, choose_batch
from .curvature import Curvature, Gram, dual_curvature
from .engine import Engine, Rows
from .errors import ModelError
from .execution import Execution
from .images import ImageRejected, as_seen, decode, fit
from .model import Model, quiet_libraries
from .objectives import METHODS, Point
from .recipe import Recipe, differences, feature_space, feature_space_id, resolved
from .rewards import (
    Reward,
    contrast_rows,
    image_rows,
    journey_rows,
    reward_rows,
    slider_rows,
)
from .trajectory import ddim_grid, generation_path, kept, seeded_noise, stretch

__all__ = [
    "METHODS",
    "BatchChoice",
    "Curvature",
    "Engine",
    "Execution",
    "Gram",
    "ImageRejected",
    "Model",
    "ModelError",
    "Point",
    "Recipe",
    "Reward",
    "Rows",
    "as_seen",
    "choose_batch",
    "contrast_rows",
    "ddim_grid",
    "decode",
    "differences",
    "dual_curvature",
    "feature_space",
    "feature_space_id",
    "fit",
    "generation_path",
    "image_rows",
    "journey_rows",
    "kept",
    "quiet_libraries",
    "resolved",
    "reward_rows",
    "seeded_noise",
    "slider_rows",
    "stretch",
]
