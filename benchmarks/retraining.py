"""Trains many small text-conditional UNets at once, each on its own subset of the pictures.

They are stacked (`stacked.py`): one forward pass, one backward pass and one optimiser for all.
Models of one seed begin with the same weights and see the same noise levels and noise, so that
what differs between them is their subset. Text encoder and autoencoder are a given pipeline's and
stay as they are.
"""

# diffusers annotates only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from headwater.attribution import Model
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.stacked import Convolution, concatenated, stack, taken

_WARM = 3  # steps of training before one is recorded as a CUDA graph
Say = Callable[[str], object]


@dataclass(frozen=True)
class Training:
    """How every model is trained."""

    widths: tuple[int, ...] = (32, 64)  # channels per level; text is heard at all but the first
    steps: int = 2000
    batch: int = 32  # pictures per model and step
    learning_rate: float = 2e-3  # the peak of a cosine
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a training of nothing."""
        if self.steps < 1 or self.batch < 1 or not self.widths:
            raise BenchmarkError(
                f"{self.steps} steps of {self.batch} pictures with channels {self.widths} train "
                "nothing; give at least one of each"
            )


@dataclass(frozen=True)
class Lessons:
    """What can be trained on: pictures and, for each, the sentences that may stand beside it."""

    x_0: Tensor  # [N, C, h, w] clean samples, float32
    states: Tensor  # [L, T, D] text states of all sentences
    sentences: Tensor  # [N, V] int64: the variants of each picture's caption, as rows of `states`
    shares: Tensor  # [V] how often each variant is shown; they add up to 1


def lessons_of(
    base: Model, x_0: Tensor, variants: Sequence[Sequence[str]], shares: Sequence[float]
) -> Lessons:
    """Pictures [N, C, h, w] with what may be said of each, `variants` [N][V].

    Raises:
        BenchmarkError: a base that is no Stable Diffusion with noise prediction.
    """
    if base.family.name != "StableDiffusionPipeline" or base.schedule.prediction != "epsilon":
        raise BenchmarkError(
            f"{base.family.name} predicting {base.schedule.prediction} lends no text encoder and "
            "autoencoder here; give a Stable Diffusion pipeline that predicts epsilon"
        )
    lines = sorted({line for said in variants for line in said})
    place = {line: i for i, line in enumerate(lines)}
    sentences = [[place[line] for line in said] for said in variants]
    return Lessons(
        x_0=x_0,
        states=text_states(base, lines),
        sentences=torch.tensor(sentences, device=x_0.device),
        shares=torch.tensor(shares, device=x_0.device),
    )


def text_states(base: Model, lines: Sequence[str]) -> Tensor:
    """Text states [L, T, D], as the base's pipeline gives them to its UNet."""
    heard = base.encode_prompts(lines)
    assert heard is not None  # a Stable Diffusion hears the empty prompt too
    return heard.tensors["encoder_hidden_states"]


@dataclass(frozen=True)
class Job:
    """One model to be trained."""

    members: Tensor  # [n] int64: the pictures it sees, as rows of the lessons
    seed: int  # of its first weights and of its noise


def small_unet(base: Model, widths: Sequence[int], side: int, seed: int) -> Any:
    """An untrained UNet for the base's text and for latents of `side` x `side`."""
    config = base.denoiser.config
    attends = [level > 0 for level in range(len(widths))]
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends]
    up = ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=side,
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=4,  # the number of heads, in diffusers' old naming
            norm_num_groups=8,
        )


def with_denoiser(base: Model, denoiser: nn.Module) -> Model:
    """The base with another denoiser, plain or stacked, frozen.

    For samplers and losses; the fingerprint remains the base's.
    """
    denoiser.requires_grad_(False).eval()
    return replace(base, denoiser=denoiser, dtype=torch.float32)


def pipeline_of(base: Model, unet: nn.Module) -> Any:
    """A standard pipeline of this UNet and the base's other parts."""
    parts = {**base.family.pipeline.components, "unet": unet}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def saved_model(
    base: Model, stacked: nn.Module, place: int, training: Training, folder: Path
) -> Model:
    """Model `place` of a stack, saved as a standard pipeline and loaded from there in float32."""
    config: Any = stacked.config
    unet = taken(stacked, place, small_unet(base, training.widths, config.sample_size, 0))
    pipeline_of(base, unet).save_pretrained(folder)
    return Model.from_pretrained(folder, device=str(base.device), dtype="float32")


# ---------------------------------------------------------------------------- training


def train(
    base: Model,
    lessons: Lessons,
    jobs: Sequence[Job],
    training: Training,
    *,
    at_once: int,
    say: Say,
) -> nn.Module:
    """A stack of one trained UNet per job, `at_once` of them trained together.

    What falls is the mean squared error of the noise, computed in bfloat16 on a GPU. Which jobs
    stand beside it changes a model in rounding alone.

    Raises:
        BenchmarkError: an empty subset, or a loss that is not finite.
    """
    for place, job in enumerate(jobs):
        if not len(job.members):
            raise BenchmarkError(
                f"the subset of model {place} is empty; leave pictures to train on"
            )
    parts = []
    for start in range(0, len(jobs), at_once):
        began = time.monotonic()
        part, losses = _train(base, lessons, jobs[start : start + at_once], training, say)
        if not losses.isfinite().all():
            worst = start + int(losses.isfinite().logical_not().nonzero()[0])
            raise BenchmarkError(
                f"the loss of model {worst} is not finite; lower the learning rate "
                f"({training.learning_rate})"
            )
        parts.append(part)
        say(
            f"{len(losses)} models, {training.steps} steps: {time.monotonic() - began:.1f} s, "
            f"loss {float(losses.mean()):.4f}"
        )
    return concatenated(parts)


class _Draws:
    """The random numbers of a step, in fixed tensors, so that a recorded step reads them anew.

    Each seed has its own generator: its numbers depend on no other model.
    """

    def __init__(self, seeds: Sequence[int], lessons: Lessons, batch: int, levels: int) -> None:
        device, count = lessons.x_0.device, len(seeds)
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.levels = levels
        self.noise = torch.empty(count, batch, *lessons.x_0.shape[1:], device=device)
        self.chance = torch.empty(count, 2, batch, device=device)  # of the picture, the sentence
        self.t = torch.empty(count, batch, dtype=torch.int64, device=device)

    def advance(self) -> None:
        """Draw the next step's."""
        for place, generator in enumerate(self.generators):
            self.noise[place].normal_(generator=generator)
            self.chance[place].uniform_(generator=generator)
            self.t[place].random_(0, self.levels, generator=generator)


class _Step:
    """The training loss of each model on its own draw; batches are laid out as stacked.py says."""

    def __init__(self, base: Model, lessons: Lessons, jobs: Sequence[Job], batch: int) -> None:
        device = lessons.x_0.device
        seeds = sorted({job.seed for job in jobs})
        levels = base.schedule.scheduler.config.num_train_timesteps
        self.base, self.lessons = base, lessons
        self.draws = _Draws(seeds, lessons, batch, levels)
        self.of_seed = torch.tensor([seeds.index(job.seed) for job in jobs], device=device)
        members = [job.members.to(device) for job in jobs]
        self.members = nn.utils.rnn.pad_sequence(members, batch_first=True)  # [M, largest]
        self.sizes = torch.tensor([len(own) for own in members], device=device)[:, None]
        self.bounds = lessons.shares.cumsum(0)[:-1]

    def losses(self, stacked: nn.Module) -> Tensor:
        """[M], with their graph."""
        lessons, draws, of_seed = self.lessons, self.draws, self.of_seed
        picture, sentence = draws.chance[of_seed].unbind(1)  # [M, B]
        # A float32 just below 1 times a large size may round up to it.
        place = (picture * self.sizes).long().minimum(self.sizes - 1)
        rows = self.members.gather(1, place).mT.flatten()  # [B M]
        variants = torch.bucketize(sentence.mT.flatten(), self.bounds, right=True)
        t = draws.t[of_seed].mT.flatten()
        eps = draws.noise[of_seed].transpose(0, 1).flatten(0, 1)
        a, s = self.base.schedule.coefficients(t)
        x_t = a * lessons.x_0[rows] + s * eps
        states = lessons.states[lessons.sentences[rows, variants]]
        # Without the cache: a recorded step would find weights there that were cast before it.
        with torch.autocast(
            x_t.device.type, torch.bfloat16, enabled=x_t.is_cuda, cache_enabled=False
        ):
            e = stacked(x_t, t, encoder_hidden_states=states).sample
        each = (e.float() - eps).square().flatten(1).mean(1)
        means: Tensor = each.view(-1, len(of_seed)).mean(0)
        return means


def _train(
    base: Model, lessons: Lessons, jobs: Sequence[Job], training: Training, say: Say
) -> tuple[nn.Module, Tensor]:
    """The trained stack and its models' losses [M], averaged over the last tenth of the steps."""
    device = lessons.x_0.device
    side = lessons.x_0.shape[-1]
    first = {job.seed: small_unet(base, training.widths, side, job.seed) for job in jobs}
    stacked = stack([first[job.seed] for job in jobs]).to(device).train()
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        stacked.parameters(),
        lr=torch.zeros((), device=device) if on_gpu else 0.0,
        weight_decay=training.weight_decay,
        fused=on_gpu,
        capturable=on_gpu,
    )
    batch = _Step(base, lessons, jobs, training.batch)
    latest = torch.zeros(len(jobs), device=device)

    def step() -> None:
        losses = batch.losses(stacked)
        losses.sum().backward()
        optimizer.step()
        latest.copy_(losses.detach())

    if on_gpu:
        _choose_convolution(stacked, batch, say)
    stream = torch.cuda.Stream() if on_gpu else None
    graph: torch.cuda.CUDAGraph | None = None
    total, last = torch.zeros_like(latest), max(1, training.steps // 10)
    for number in range(training.steps):
        batch.draws.advance()
        _set_rate(optimizer, _rate(number, training))
        if stream is not None and number == _WARM:
            graph = _recorded(step, optimizer, say)
        if graph is not None:
            graph.replay()
        else:
            optimizer.zero_grad(set_to_none=True)
            _beside(stream, step)
        if number >= training.steps - last:
            total += latest
    return stacked, total / last


def _rate(number: int, training: Training) -> float:
    """A cosine to zero after a linear start over a twentieth of the steps."""
    warmup = max(1, training.steps // 20)
    if number < warmup:
        return training.learning_rate * (number + 1) / warmup
    share = (number - warmup) / max(1, training.steps - warmup)
    return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # in place: a recorded step reads this very tensor
        else:
            group["lr"] = rate


def _beside(stream: torch.cuda.Stream | None, step: Callable[[], None]) -> None:
    """Run a step on a stream of its own, as those before a recording must."""
    if stream is None:
        step()
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


def _recorded(
    step: Callable[[], None], optimizer: torch.optim.Optimizer, say: Say
) -> torch.cuda.CUDAGraph | None:
    """A step as one CUDA graph: small models wait for the host otherwise."""
    optimizer.zero_grad(set_to_none=True)  # gradients belong into the graph's own memory
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        say(f"no CUDA graph ({str(error).splitlines()[0]}); stepping eagerly")
        return None
    return graph


def _choose_convolution(stacked: nn.Module, batch: _Step, say: Say) -> None:
    """Take the kind of convolution that is faster on this GPU for these shapes."""
    batch.draws.noise.zero_()
    batch.draws.chance.zero_()
    batch.draws.t.zero_()
    layers = [module for module in stacked.modules() if isinstance(module, Convolution)]
    seconds = {}
    for gathered in (False, True):
        for layer in layers:
            layer.gathered = gathered
        for _ in range(2):  # the first compiles and plans
            torch.cuda.synchronize()
            began = time.monotonic()
            batch.losses(stacked).sum().backward()
            torch.cuda.synchronize()
            seconds[gathered] = time.monotonic() - began
            stacked.zero_grad(set_to_none=True)
    faster = min(seconds, key=seconds.__getitem__)
    for layer in layers:
        layer.gathered = faster
    say(f"seconds a step, grouped and gathered: {seconds[False]:.3f}, {seconds[True]:.3f}")
