"""Fingerprints of a model's parts: what makes e(x_t, t, c) and its rows what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

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
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
# Where and with what a part was saved, which changes nothing that it computes.
_PROVENANCE = ("transformers_version", "architectures", "dtype", "torch_dtype")


def of_module(module: nn.Module) -> str:
    """SHA-256 over a module's settings, adapters and float32 weights, wherever they were saved."""
    digest = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", {})
    digest.update(_settings(config if isinstance(config, Mapping) else config.to_dict()))
    tensors = sorted(module.state_dict().items())
    with ThreadPoolExecutor() as threads:  # hashlib and the copies leave the interpreter free
        for (name, tensor), weights in zip(
            tensors, threads.map(_of_tensor, (tensor for _, tensor in tensors)), strict=True
        ):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + weights)
    for name, part in module.named_modules():
        # The strength of an adapter's layers is no weight of theirs.
        if isinstance(scaling := getattr(part, "scaling", None), Mapping):
            digest.update(_settings({"layer": name, "scaling": scaling}))
    return digest.hexdigest()


def _of_tensor(tensor: Tensor) -> bytes:
    values: Any = tensor.detach().cpu().contiguous().float().numpy()
    return hashlib.sha256(memoryview(values.reshape(-1)).cast("B")).digest()


def of_scheduler(scheduler: Any) -> str:
    """SHA-256 over a scheduler's kind, noise levels and timestep grid."""
    facts = {"kind": type(scheduler).__name__} | {k: scheduler.config.get(k) for k in _SCHEDULE}
    return of_facts(facts)


def of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary, special tokens and length."""
    facts = {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "length": tokenizer.model_max_length,
    }
    return of_facts(facts)


def of_facts(facts: Mapping[str, Any]) -> str:
    """SHA-256 over named values."""
    return hashlib.sha256(_settings(facts)).hexdigest()


def _settings(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON; what is unset counts as absent, so that a library may add defaults."""
    kept = {
        key: value
        for key, value in values.items()
        if key[:1] != "_" and key not in _PROVENANCE and value not in (None, False)
    }
    return json.dumps(kept, sort_keys=True, default=str).encode()
