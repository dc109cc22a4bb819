"""Fingerprints of a model's parts: what makes e(x_t, t, c) and its rows what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

# Settings of a scheduler that decide x_t or which timesteps are visited.
_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
)
# Where and with what a part was saved, which changes nothing that it computes.
_PROVENANCE = ("transformers_version", "architectures", "dtype", "torch_dtype")


def of_module(module: nn.Module | None) -> str:
    """SHA-256 over a module's settings and float32 weights, independent of its folder."""
    if module is None:
        return "none"
    digest = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", {})
    digest.update(_settings(config if isinstance(config, Mapping) else config.to_dict()))
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def of_scheduler(scheduler: Any) -> str:
    """SHA-256 over a scheduler's noise levels and timestep grid."""
    return hashlib.sha256(_settings({k: scheduler.config.get(k) for k in _SCHEDULE})).hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary, special tokens and length."""
    if tokenizer is None:
        return "none"
    facts = {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "length": tokenizer.model_max_length,
    }
    return hashlib.sha256(_settings(facts)).hexdigest()


def _settings(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON; what is unset counts as absent, so that a library may add defaults."""
    kept = {
        key: value
        for key, value in values.items()
        if key[:1] != "_" and key not in _PROVENANCE and value not in (None, False)
    }
    return json.dumps(kept, sort_keys=True, default=str).encode()
