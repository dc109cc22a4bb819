"""How much of each concept stacked models still know: in what they draw, and in their loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.attribution import Model, ddim_grid, generation_path, seeded_noise
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.latent_classifier import LatentClassifier
from headwater.benchmarks.material import Pictures, evenly
from headwater.benchmarks.noised import SAMPLES, Noised, heard, noised, predicted
from headwater.benchmarks.retraining import text_states, with_denoiser


@dataclass(frozen=True)
class Sampling:
    """How models draw."""

    captions: int = 40  # evenly taken from those of the corpus
    draws: int = 8  # of each caption
    steps: int = 25
    guidance: float = 7.5


@dataclass(frozen=True)
class Probe:
    """The same captions, noise and unseen pictures for every model."""

    base: Model
    judge: LatentClassifier
    sampling: Sampling
    states: Tensor  # [D, T, W] of the captions to draw
    noise: Tensor  # [D, C, h, w] that the drawings begin with
    named: Tensor  # [D, L] float64: whether the caption names the judge's label
    unseen: Noised
    shown: Tensor  # [U, L] float64: whether the unseen picture shows it


def probe_of(
    base: Model,
    judge: LatentClassifier,
    trained: Pictures,
    unseen: Pictures,
    sampling: Sampling,
    noises: int,
) -> Probe:
    """Captions of the trained pictures are drawn, and the unseen ones have their loss taken.

    Raises:
        BenchmarkError: a label of the judge that no caption or no unseen picture has.
    """
    first = {caption: place for place, caption in reversed(list(enumerate(trained.captions)))}
    asked = trained.rows(evenly(sorted(first.values()), sampling.captions))
    copies = [(place, n) for place in range(len(asked)) for n in range(sampling.draws)]
    places = [place for place, _ in copies]
    shape = trained.x_0.shape[1:]
    noise = torch.stack(
        [seeded_noise(0, f"draw/{asked.captions[place]}#{n}", shape) for place, n in copies]
    )
    named, shown = _shows(judge, asked), _shows(judge, unseen)
    for (_, label), by, of in zip(judge.named, named.sum(0), shown.sum(0), strict=True):
        if not by or not of:
            raise BenchmarkError(
                f"{label} is in {by:.0f} of the captions to draw and in {of:.0f} of the unseen "
                "pictures; take more of them"
            )
    return Probe(
        base,
        judge,
        sampling,
        text_states(base, asked.captions)[places],
        noise.to(base.device),
        named[places].to(base.device),
        noised(base, unseen, noises),
        shown.to(base.device),
    )


def _shows(judge: LatentClassifier, pictures: Pictures) -> Tensor:
    columns = [torch.from_numpy(pictures.carriers(kind, label)) for kind, label in judge.named]
    return torch.stack(columns, 1).double()


@torch.no_grad()
def presence(probe: Probe, stacked: nn.Module, samples: int = SAMPLES) -> Tensor:
    """Mean probability of each label in what is drawn for captions that name it: [M, L] float64."""
    model = with_denoiser(probe.base, stacked)
    models = len(next(stacked.parameters()))
    grid = ddim_grid(model, probe.sampling.steps)
    total = torch.zeros(models, probe.named.shape[1], dtype=torch.float64, device=probe.base.device)
    size = max(1, samples // models)
    for start in range(0, len(probe.noise), size):
        part = slice(start, start + size)
        states = probe.states[part].repeat_interleave(models, 0)
        null = probe.base.encode_prompts([""] * len(states))
        x_0, _ = generation_path(
            model,
            probe.noise[part].repeat_interleave(models, 0),
            heard(states),
            null,
            grid=grid,
            timesteps=[],
            guidance=probe.sampling.guidance,
        )
        found = probe.judge.probabilities(x_0).double().view(-1, models, total.shape[1])
        total += (found * probe.named[part, None]).sum(0)
    return (total / probe.named.sum(0)).cpu()


@torch.no_grad()
def losses(probe: Probe, stacked: nn.Module) -> Tensor:
    """Mean denoising loss of each label's unseen pictures: [M, L] float64."""
    models = len(next(stacked.parameters()))
    total = torch.zeros(models, probe.shown.shape[1], dtype=torch.float64, device=probe.base.device)
    for batch in predicted(probe.base, stacked, probe.unseen):
        each = batch.residual.square().mean(2).double()  # [b, M]
        total += each.mT @ probe.shown[batch.picture]
    return (total / (probe.shown.sum(0) * len(probe.unseen.t))).cpu()
