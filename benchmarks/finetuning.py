"""Teaches a pipeline new subjects: textual inversion, and fine-tuning of the cross-attention.

Textual inversion (Gal et al. 2022) trains the embeddings of new words and nothing else, so the
denoiser never learns from the exemplars. Custom Diffusion (Kumari et al. 2023) trains `to_k` and
`to_v` of the cross-attention beside them, on the exemplars and, so that nothing else is forgotten,
on pictures that the model was trained with before. Several subjects may be taught together, each
with a word of its own; they are drawn alike however many exemplars they have.

Any StableDiffusionPipeline that `Model` loads can be taught. Not covered: regularisation pictures
made by the model itself, augmentation, and LoRA.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwater.attribution import Model, ModelError, ddim_grid, quiet_libraries, seeded_noise
from headwater.attribution.conditions import Conditions

KEYS_AND_VALUES = (".attn2.to_k.", ".attn2.to_v.")


@dataclass(frozen=True)
class Pictures:
    """Pictures with their captions, as the model sees them."""

    x_0: Tensor  # [N, C, h, w] clean samples float32
    captions: tuple[str, ...]  # N


@dataclass(frozen=True)
class FineTuning:
    """How a model is taught. Saved with what it is used for, so that it can be repeated."""

    steps: int = 500
    batch: int = 16  # exemplars a step; as many prior pictures beside them
    token_rate: float = 5e-3  # Adam's learning rate of the new words' embeddings
    weight_rate: float = 1e-4  # of to_k and to_v; textual inversion has no use for it
    prior_weight: float = 1.0  # of the prior pictures' loss beside that of the exemplars
    seed: int = 0  # of the batches, noise levels and noise

    def __post_init__(self) -> None:
        """Refuse values that nothing can be trained with."""
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("token_rate", "weight_rate", "prior_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ModelError(f"{name} is {getattr(self, name)}; it must be 0 or more")


def textual_inversion(
    model: Model,
    exemplars: Pictures,
    words: Mapping[str, str],
    tuning: FineTuning,
    say: Callable[[str], object] = lambda _: None,
) -> Model:
    """A copy of the model that knows new words; its denoiser is the same to the bit.

    Args:
        model: in float32; it stays as it is.
        exemplars: the subjects, each caption naming at least one of the new words.
        words: new word -> known word whose embedding it begins with.
        tuning: `weight_rate` and `prior_weight` are of no account.
        say: told the loss now and then.

    Raises:
        ModelError: a model in another precision or without one text encoder, words that are known
            already, and captions without a new word.
    """
    return _teach(model, exemplars, None, words, tuning, (), say)


def custom_diffusion(
    model: Model,
    exemplars: Pictures,
    prior: Pictures,
    words: Mapping[str, str],
    tuning: FineTuning,
    say: Callable[[str], object] = lambda _: None,
) -> Model:
    """A copy of the model with new words and fine-tuned `to_k` and `to_v` of its cross-attention.

    Args and Raises are those of `textual_inversion`; `prior` are pictures of what the model knew
    before, whose captions name no new word.
    """
    return _teach(model, exemplars, prior, words, tuning, KEYS_AND_VALUES, say)


def add_words(pipeline: Any, embeddings: Mapping[str, Tensor]) -> Tensor:
    """Put new words and their embeddings [D] into a pipeline's tokenizer and text encoder.

    Returns:
        Their places in the vocabulary, int64.

    Raises:
        ModelError: a pipeline without one tokenizer and text encoder, a word that it knows, an
            embedding of another width.
    """
    tokenizer, encoder = _text_side(pipeline)
    width = encoder.get_input_embeddings().weight.shape[1]
    known = tokenizer.get_vocab()
    for word, embedding in embeddings.items():
        if word in known:
            raise ModelError(f"the model knows the word {word!r} already; choose another")
        if embedding.shape != (width,):
            raise ModelError(
                f"the embedding of {word!r} has shape {tuple(embedding.shape)}, those of the "
                f"model {(width,)}; it was made with another model"
            )
    tokenizer.add_tokens(list(embeddings))
    with quiet_libraries():
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    places = torch.tensor(tokenizer.convert_tokens_to_ids(list(embeddings)))
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[places] = torch.stack(list(embeddings.values())).to(table)
    return places


@torch.no_grad()
def denoising_loss(model: Model, pictures: Pictures, *, levels: int = 10, batch: int = 64) -> float:
    """Mean ||output - target||^2 per number, over pictures and noise levels of the sampler's grid.

    Each picture's noise is fixed by its place, so that two models can be compared.
    """
    total = 0.0
    for start in range(0, len(pictures.x_0), batch):
        x_0 = pictures.x_0[start : start + batch].to(model.device)
        states = model.encode_prompts(pictures.captions[start : start + batch])
        for level in ddim_grid(model, levels):
            keys = (f"{level}/{start + i}" for i in range(len(x_0)))
            eps = torch.stack([seeded_noise(0, key, tuple(x_0.shape[1:])) for key in keys])
            t = torch.full((len(x_0),), level, device=model.device)
            losses = _losses(model, x_0, eps.to(model.device), t, states)
            total += float(losses.sum()) / levels
    return total / len(pictures.x_0)


def _teach(
    model: Model,
    exemplars: Pictures,
    prior: Pictures | None,
    words: Mapping[str, str],
    tuning: FineTuning,
    trained: tuple[str, ...],
    say: Callable[[str], object],
) -> Model:
    if model.dtype is not torch.float32:
        raise ModelError(f"fine-tuning needs float32 weights, not {model.dtype}; load them so")
    pipeline = copy.deepcopy(model.family.pipeline)
    places = add_words(pipeline, _beginnings(pipeline, words))
    _check_captions(pipeline, exemplars, places, new=True)
    if prior is not None:
        _check_captions(pipeline, prior, places, new=False)
    device = str(model.device)
    student = Model.from_pipeline(pipeline, device=device, dtype="float32")  # all of it frozen
    table = pipeline.text_encoder.get_input_embeddings().weight
    chosen = torch.zeros(len(table), 1, device=table.device)
    chosen[places.to(table.device)] = 1.0
    weights = [
        parameter
        for name, parameter in student.denoiser.named_parameters()
        if any(part in f".{name}" for part in trained)
    ]
    if trained and not weights:
        raise ModelError(f"{student.family.name}: its denoiser has no cross-attention `attn2`")
    for parameter in (table, *weights):
        parameter.requires_grad_(True)
    hook = table.register_hook(lambda gradient: gradient * chosen)
    # Without weight decay Adam leaves a number alone whose gradient is always zero.
    groups = [{"params": [table], "lr": tuning.token_rate}]
    if weights:
        groups.append({"params": weights, "lr": tuning.weight_rate})
    optimizer = torch.optim.Adam(groups)
    task = _Task(student, exemplars, prior, tuning)
    shown = 0.0
    for step in range(1, tuning.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss()
        loss.backward()
        optimizer.step()
        if step % max(1, tuning.steps // 5) == 0:
            shown = float(loss.detach())
            say(f"fine-tuning step {step} of {tuning.steps}: loss {shown:.4f}")
    hook.remove()
    if not table[places.to(table.device)].isfinite().all():
        raise ModelError(f"fine-tuning diverged (loss {shown}); use lower rates")
    return Model.from_pipeline(pipeline, device=device, dtype="float32")


class _Task:
    """Batches and their loss."""

    def __init__(
        self, student: Model, exemplars: Pictures, prior: Pictures | None, tuning: FineTuning
    ) -> None:
        self.student, self.tuning = student, tuning
        device = student.device
        self.exemplars, self.prior = exemplars.x_0.to(device), None
        self.spoken = list(dict.fromkeys(exemplars.captions))
        place = {caption: i for i, caption in enumerate(self.spoken)}
        self.said = torch.tensor([place[caption] for caption in exemplars.captions], device=device)
        often = Counter(exemplars.captions)
        self.chance = torch.tensor([1 / often[c] for c in exemplars.captions], device=device)
        if prior is not None:
            self.prior = prior.x_0.to(device)
            # No word in them is trained, so what is heard of them stays as it is.
            self.prior_states = student.encode_prompts(prior.captions)
        self.levels = int(student.schedule.scheduler.config.num_train_timesteps)
        self.generator = torch.Generator(device).manual_seed(tuning.seed)

    def loss(self) -> Tensor:
        """Mean squared error of a fresh batch, that of the prior pictures weighted."""
        count, generator = self.tuning.batch, self.generator
        device = self.exemplars.device
        rows = torch.multinomial(self.chance, count, replacement=True, generator=generator)
        states = self.student.family.encode(self.spoken, device).rows(self.said[rows])
        x_0, weight = self.exemplars[rows], torch.ones(count, device=device)
        if self.prior is not None and self.prior_states is not None:
            shape = (count,)
            rows = torch.randint(len(self.prior), shape, generator=generator, device=device)
            states = Conditions.cat([states, self.prior_states.rows(rows)])
            x_0 = torch.cat([x_0, self.prior[rows]])
            weight = torch.cat([weight, weight * self.tuning.prior_weight])
        t = torch.randint(self.levels, (len(x_0),), generator=generator, device=device)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = _losses(self.student, x_0, eps, t, states)
        return (losses * weight).sum() / count


def _losses(model: Model, x_0: Tensor, eps: Tensor, t: Tensor, states: Conditions | None) -> Tensor:
    """Mean squared error [B] of what the denoiser was trained to put out."""
    a, s = model.coefficients(t)
    wanted = {"epsilon": eps, "v_prediction": a * eps - s * x_0, "sample": x_0}
    output = model.output(a * x_0 + s * eps, t, states)
    return F.mse_loss(output, wanted[model.schedule.prediction], reduction="none").mean((1, 2, 3))


def _text_side(pipeline: Any) -> tuple[Any, Any]:
    parts = pipeline.components
    tokenizer, encoder = parts.get("tokenizer"), parts.get("text_encoder")
    if tokenizer is None or encoder is None or parts.get("text_encoder_2") is not None:
        raise ModelError(
            f"{type(pipeline).__name__} cannot be taught words here; use a Stable Diffusion with "
            "one tokenizer and one text encoder"
        )
    return tokenizer, encoder


def _beginnings(pipeline: Any, words: Mapping[str, str]) -> dict[str, Tensor]:
    """The embedding that each new word begins with: that of a known word."""
    tokenizer, encoder = _text_side(pipeline)
    table = encoder.get_input_embeddings().weight.detach()
    found = {}
    for word, known in words.items():
        ids = tokenizer(known, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] in (tokenizer.unk_token_id, tokenizer.eos_token_id):
            raise ModelError(
                f"{word!r} cannot begin as {known!r}, which is not one word to the model; "
                "name one that is"
            )
        found[word] = table[ids[0]].clone()
    return found


def _check_captions(pipeline: Any, pictures: Pictures, places: Tensor, *, new: bool) -> None:
    """Refuse captions that name no new word, or with `new` false, that name one."""
    if not 0 < len(pictures.x_0) == len(pictures.captions):
        raise ModelError(
            f"{len(pictures.x_0)} pictures with {len(pictures.captions)} captions; "
            "give at least one, each with its own"
        )
    tokenizer, _ = _text_side(pipeline)
    captions = list(pictures.captions)
    length = tokenizer.model_max_length
    heard = tokenizer(captions, truncation=True, max_length=length).input_ids
    fresh = set(places.tolist())
    for caption, ids in zip(captions, heard, strict=True):
        if new and fresh.isdisjoint(ids):
            raise ModelError(
                f"caption {caption!r} of an exemplar names no new word in its first {length} tokens"
            )
        if not new and not fresh.isdisjoint(ids):
            raise ModelError(f"caption {caption!r} of a prior picture names a new word")
