"""Trains a small text-to-image model in about a minute on one GPU.

The autoencoder first, then text encoder and UNet together; the moving average of their weights is
watched while they train and the best one is kept (the later one among equals). Not covered:
bitwise repeatability on a GPU, and what is worth watching: that the caller says. Used for the
demo's model (``train_demo_model.py``) and for the benchmarks that train their own.
"""

# torch and diffusers annotate only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.small_models import (
    Settings,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_unet,
    count,
    token_ids,
)


class Progress:
    """Says lines with the time since the start, and keeps the seconds of each stage."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.start = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._say = say

    def say(self, text: str) -> None:
        self._say(f"[{time.monotonic() - self.start:7.1f} s] {text}")

    def stage_done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self.last, 2)
        self.last = now
        self.say(f"{name}: {self.seconds[name]} s")


# ---------------------------------------------------------------------------- steps


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.03 + 0.97 * 0.5 * (1.0 + math.cos(math.pi * share)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # in place: a captured graph reads this very tensor
        else:
            group["lr"] = rate


class Trainer:
    """AdamW on a loss whose random numbers lie in fixed tensors that ``draw`` refills.

    On a GPU a step is captured as one CUDA graph and replayed on new numbers. ``average`` are
    tensors that follow the ``live`` parameters as their moving average.
    """

    def __init__(
        self,
        draw: Callable[[], None],
        loss: Callable[[], torch.Tensor],
        live: Sequence[nn.Parameter],
        progress: Progress,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float,
        graph: bool,
        average: Sequence[torch.Tensor] = (),
        decay: float = 0.0,
    ) -> None:
        self.draw, self.loss = draw, loss
        self.live, self.average, self.decay = list(live), list(average), decay
        device = self.live[0].device
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.live,
            lr=torch.tensor(0.0, device=device) if on_gpu else 0.0,
            betas=betas,
            weight_decay=weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        if on_gpu and graph:
            try:
                self._capture()
            except RuntimeError as error:
                progress.say(f"no CUDA graph ({str(error).splitlines()[0]}); stepping eagerly")

    def fit(
        self, steps: int, rate: float, warmup: int, reports: int, report: Callable[..., None]
    ) -> None:
        """Take ``steps`` steps; ``report(step, mean loss since)`` about ``reports`` times."""
        every = max(1, steps // reports)
        # Sums on the device: reading the loss each step would make the host wait.
        total, summed = torch.zeros((), device=self.live[0].device), 0
        for step in range(1, steps + 1):
            set_rate(self.optimizer, cosine(step - 1, steps, rate, warmup))
            self.draw()
            if self.graph is None:
                total += self._eager()
            else:
                self.graph.replay()
                total += self._loss
            summed += 1
            if step % every and step != steps:
                continue
            mean = total.item() / summed
            if not math.isfinite(mean):
                raise BenchmarkError(
                    f"the loss is {mean} at step {step}; use a lower learning rate"
                )
            report(step, mean)
            total.zero_()
            summed = 0

    def _update(self) -> torch.Tensor:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.live, 1.0)
        self.optimizer.step()
        if self.average:
            with torch.no_grad():
                live = [p.detach() for p in self.live]
                torch._foreach_lerp_(self.average, live, 1.0 - self.decay)
        return loss.detach()

    def _eager(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self._update()

    def _capture(self) -> None:
        """Record one training step; three eager steps first, as the recording needs them."""
        set_rate(self.optimizer, 1e-6)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.draw()
                self._eager()
        torch.cuda.current_stream().wait_stream(side)
        # Gradients must be allocated inside the graph's own memory pool.
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._update()
        self.graph = graph


# ---------------------------------------------------------------------------- autoencoder


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_vae(vae: Any, images: torch.Tensor, cfg: Settings, progress: Progress) -> None:
    """Fit the autoencoder, new or trained before, to ``images`` [N, 3, 64, 64]."""
    device = images.device
    vae.train()
    generator = torch.Generator(device).manual_seed(cfg.seed + 1)
    rows = torch.empty(cfg.vae_batch_size, dtype=torch.long, device=device)
    noise = torch.empty(cfg.vae_batch_size, 4, 16, 16, device=device)

    def draw() -> None:
        rows.random_(0, len(images), generator=generator)
        noise.normal_(generator=generator)

    def loss() -> torch.Tensor:
        x = images[rows]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        pixel_loss = F.l1_loss(y, x) + F.mse_loss(y, x)
        # Differences of neighbours keep outlines and hatching crisp.
        (down_y, right_y), (down_x, right_x) = edges(y), edges(x)
        edge_loss = F.l1_loss(down_y, down_x) + F.l1_loss(right_y, right_x)
        # Nats per latent number; small, only to keep the latents smooth and bounded.
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        total: torch.Tensor = pixel_loss + 0.5 * edge_loss + 2e-4 * kl
        return total

    def report(step: int, mean_loss: float) -> None:
        progress.say(f"vae step {step}: loss {mean_loss:.4f}")

    live = list(vae.parameters())
    trainer = Trainer(draw, loss, live, progress, weight_decay=1e-4, graph=cfg.graph)
    trainer.fit(cfg.vae_steps, cfg.vae_learning_rate, max(1, cfg.vae_steps // 20), 8, report)
    vae.eval()


@torch.no_grad()
def latents_of(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and standard deviation of each image, scaled to unit overall deviation.

    Sets ``vae.config.scaling_factor`` from the data, as Stable Diffusion defines it: latents are
    multiplied by it before the UNet and divided by it before the decoder.
    """
    posteriors = [vae.encode(part).latent_dist for part in images.split(96)]
    mean = torch.cat([p.mean for p in posteriors])  # [N, 4, 16, 16]
    std = torch.cat([p.std for p in posteriors])
    # Variance of sampled latents = variance of the means + mean of the variances.
    deviation = (mean.var() + std.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=1.0 / deviation)
    return mean / deviation, std / deviation


class DenoisingTask:
    """The data of UNet training on the device, and the loss on one randomly drawn batch.

    Args:
        captions: for each image the captions that it may be shown with, equally many for all.
        shares: how often each of them is, summing to 1.
    """

    def __init__(
        self,
        vae: Any,
        images: torch.Tensor,
        tokenizer: Any,
        captions: Sequence[Sequence[str]],
        shares: Sequence[float],
        cfg: Settings,
    ) -> None:
        device = images.device
        self.mean, self.std = latents_of(vae, images)
        lines = sorted({line for row in captions for line in row})
        place = {line: i for i, line in enumerate(lines)}
        # There are only a few dozen different sentences: encode each once a step, then look up.
        self.ids = token_ids(tokenizer, lines).to(device)  # [L, MAX_TOKENS]
        self.caption_rows = torch.tensor(
            [[place[line] for line in row] for row in captions], device=device
        )  # [N, V]
        self.bounds = torch.tensor(list(shares), device=device).cumsum(0)[:-1]
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.generator = torch.Generator(device).manual_seed(cfg.seed + 2)
        shape = (cfg.batch_size, *self.mean.shape[1:])
        self.noise = torch.empty(shape, device=device)
        self.jitter = torch.empty(shape, device=device)
        self.chance = torch.empty(cfg.batch_size, device=device)
        self.rows = torch.empty(cfg.batch_size, dtype=torch.long, device=device)
        self.timesteps = torch.empty(cfg.batch_size, dtype=torch.long, device=device)

    def draw(self) -> None:
        self.noise.normal_(generator=self.generator)
        self.jitter.normal_(generator=self.generator)
        self.chance.uniform_(generator=self.generator)
        self.rows.random_(0, len(self.mean), generator=self.generator)
        self.timesteps.random_(0, len(self.alphas), generator=self.generator)

    def loss(self, text: Any, unet: Any) -> torch.Tensor:
        latents = self.mean[self.rows] + self.std[self.rows] * self.jitter  # [B, 4, 16, 16]
        alpha = self.alphas[self.timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * self.noise
        kind = (self.chance[:, None] >= self.bounds).sum(dim=1)
        states = text(input_ids=self.ids).last_hidden_state  # [L, MAX_TOKENS, text width]
        context = states[self.caption_rows[self.rows, kind]]
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda):
            predicted = unet(noisy, self.timesteps, encoder_hidden_states=context).sample
        return F.mse_loss(predicted.float(), self.noise)


@torch.no_grad()
def load_weights(module: nn.Module, weights: Sequence[torch.Tensor]) -> None:
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.copy_(weight)


def train_unet(
    task: DenoisingTask,
    vae: Any,
    tokenizer: Any,
    watch: Callable[[Any], float],
    cfg: Settings,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    """Train text encoder and UNet together; the pipeline of their best average weights, and notes.

    ``watch`` is asked eight times how good the pipeline of the average weights is.
    """
    device = task.mean.device
    torch.manual_seed(cfg.seed + 2)
    text = build_text_encoder(tokenizer, cfg.text_width).to(device).train()
    unet = build_unet(cfg).to(device).train()
    progress.say(f"text encoder {count(text):,} parameters, UNet {count(unet):,}")
    averaged_text, averaged_unet = copy.deepcopy(text).eval(), copy.deepcopy(unet).eval()
    pipe = assemble(vae, averaged_text, tokenizer, averaged_unet)
    live = [*text.parameters(), *unet.parameters()]
    average = [p.detach() for p in [*averaged_text.parameters(), *averaged_unet.parameters()]]
    decay = min(0.999, max(0.0, 1.0 - 10.0 / cfg.steps))
    trainer = Trainer(
        task.draw,
        lambda: task.loss(text, unet),
        live,
        progress,
        betas=(0.9, 0.99),
        weight_decay=0.02,
        graph=cfg.graph,
        average=average,
        decay=decay,
    )
    best_rate, best_step, best = -1.0, 0, [w.clone() for w in average]
    history: list[dict[str, float]] = []

    def report(step: int, mean_loss: float) -> None:
        nonlocal best_rate, best_step, best
        rate = watch(pipe)
        history.append({"step": step, "loss": round(mean_loss, 5), "joint": round(rate, 4)})
        progress.say(f"unet step {step}: loss {mean_loss:.4f}, never shown and right {rate:.3f}")
        if rate >= best_rate:
            best_rate, best_step, best = rate, step, [w.clone() for w in average]

    warmup = max(1, min(500, cfg.steps // 10))
    trainer.fit(cfg.steps, cfg.learning_rate, warmup, 8, report)
    texts = len(list(averaged_text.parameters()))
    load_weights(averaged_text, best[:texts])
    load_weights(averaged_unet, best[texts:])
    return pipe, {
        "history": history,
        "kept_step": best_step,
        "average_decay": decay,
        "cuda_graph": trainer.graph is not None,
        "scaling_factor": vae.config.scaling_factor,
    }
