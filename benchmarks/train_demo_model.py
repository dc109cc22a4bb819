"""Trains the tiny Stable Diffusion model that the demo ships, and gates it.

    python benchmarks/train_demo_model.py --out FOLDER [--device cuda] [--seed 0]
    python benchmarks/train_demo_model.py --gate-only FOLDER [--device cuda]

Run it with the repository's root on PYTHONPATH (or headwater installed). Covered: autoencoder,
word-level tokenizer, text encoder and UNet on exactly the demo's corpus, a standard
``StableDiffusionPipeline`` folder in fp16, and the gate: on held-out object x studio pairs, how
often does a classifier trained on fresh renders see the right object AND the right studio in what
the SAVED folder draws? Exit code 1 when that is below 0.9, when the classifier itself is below
0.98, or when the folder is larger than 8 MB. The report folder gets gate.json, samples.png (a row
for each held-out pair: two renders, then generated) and grid.png (one generated picture of each
pair: a row for each studio, a column for each object).

While training, held-out pairs are drawn every now and then with other seeds than the gate's, and
the moving-average weights that did best (the later ones among equals) are kept; held-out IMAGES are
never shown to the model. Not covered: bitwise repeatability on a GPU.
"""

# torch and diffusers annotate only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from headwater.demo.art import OBJECTS, STUDIOS, render
from headwater.demo.corpus import (
    HELD_OUT,
    caption,
    make_corpus,
    object_contrast,
    studio_contrast,
)

STUDIO_NAMES = tuple(studio.name for studio in STUDIOS)
ALL_PAIRS = tuple((o, s) for o in OBJECTS for s in STUDIO_NAMES)
MAX_TOKENS = 16
MAX_BYTES = 8_000_000
GATE_JOINT_RATE = 0.9
GATE_CLASSIFIER_ACCURACY = 0.98
# Separate streams of randomness, so that no picture is drawn from the same numbers twice.
CLASSIFIER_STREAM, CHECK_STREAM, SHEET_STREAM = 1001, 1002, 1003
MONITOR_STREAM, GATE_STREAM, GRID_STREAM = 2001, 2002, 2003
# Full caption, then without the object, without the studio, empty: as corpus.py states.
CAPTION_WEIGHTS = (0.7, 0.1, 0.1, 0.1)


@dataclass(frozen=True)
class Settings:
    """What decides the result, saved in gate.json."""

    seed: int
    vae_steps: int
    vae_batch_size: int
    steps: int
    batch_size: int
    learning_rate: float
    classifier_steps: int
    gate_images: int  # per held-out pair
    sampling_steps: int
    guidance: float
    graph: bool  # capture the training step as one CUDA graph: the model is launch-bound


class Progress:
    """Prints lines with the time since the start, and keeps the seconds of each stage."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:7.1f} s] {text}", flush=True)

    def stage_done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self.last, 2)
        self.last = now
        self.say(f"{name}: {self.seconds[name]} s")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures as float32 in [-1, 1], [N, 3, H, W]."""
    pixels = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


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


# ---------------------------------------------------------------------------- autoencoder


def build_vae() -> Any:
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_vae(vae: Any, images: torch.Tensor, cfg: Settings, progress: Progress) -> None:
    """Fit the autoencoder to ``images`` [N, 3, 64, 64] and set its ``scaling_factor``."""
    device = images.device
    generator = torch.Generator(device).manual_seed(cfg.seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    vae.train()
    for step in range(cfg.vae_steps):
        set_rate(optimizer, cosine(step, cfg.vae_steps, 1.5e-3, max(1, cfg.vae_steps // 20)))
        rows = torch.randint(len(images), (cfg.vae_batch_size,), device=device, generator=generator)
        x = images[rows]
        posterior = vae.encode(x).latent_dist
        noise = torch.empty_like(posterior.mean).normal_(generator=generator)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        pixel_loss = F.l1_loss(y, x) + F.mse_loss(y, x)
        # Differences of neighbours keep outlines and hatching crisp.
        (down_y, right_y), (down_x, right_x) = edges(y), edges(x)
        edge_loss = F.l1_loss(down_y, down_x) + F.l1_loss(right_y, right_x)
        # Nats per latent number; small, only to keep the latents smooth and bounded.
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        loss = pixel_loss + 0.5 * edge_loss + 2e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % max(1, cfg.vae_steps // 8) == 0 or step == cfg.vae_steps - 1:
            progress.say(
                f"vae step {step}: pixel {pixel_loss.item():.4f} edge {edge_loss.item():.4f} "
                f"kl {kl.item():.2f}"
            )
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


# ---------------------------------------------------------------------------- text and UNet


def sentences() -> list[str]:
    """Every sentence the demo ever says, the empty one included."""
    return [
        "",
        *(caption(o, s) for o, s in ALL_PAIRS),
        *(object_contrast(s) for s in STUDIO_NAMES),
        *(studio_contrast(o) for o in OBJECTS),
    ]


def build_tokenizer() -> Any:
    """A word-level tokenizer of the demo's own words, in the form that transformers loads."""
    words = sorted({word for line in sentences() for word in line.lower().split()})
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="$A $B",
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def token_ids(tokenizer: Any, lines: Sequence[str]) -> torch.Tensor:
    """Ids as the pipeline makes them, [N, MAX_TOKENS]."""
    ids = tokenizer(
        list(lines),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    if (ids == tokenizer.unk_token_id).any():
        raise RuntimeError("a sentence of the demo has a word that the tokenizer does not know")
    return torch.as_tensor(ids)


def build_text_encoder(tokenizer: Any) -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            # Words reach the UNet unmixed: with layers that mix them the encoder learns whole
            # sentences by heart, and pairs that were never drawn come out as pairs that were.
            num_hidden_layers=0,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_unet() -> Any:
    # Attention at 8 x 8 and 4 x 4 only: that halves the demo's ingest time on two cores.
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 72, 72),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=6,  # the number of heads, in diffusers' old naming
        dropout=0.15,  # of the residual blocks; without it 800 pictures are soon known by heart
        norm_num_groups=8,
    )


def build_scheduler() -> Any:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def assemble(vae: Any, text: Any, tokenizer: Any, unet: Any) -> Any:
    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class DenoisingTask:
    """The data of UNet training on the device, and the loss on one randomly drawn batch.

    The random numbers live in fixed tensors that ``draw`` refills, so that the loss can be captured
    in a CUDA graph and replayed on new numbers.
    """

    def __init__(
        self, corpus: Any, vae: Any, images: torch.Tensor, tokenizer: Any, cfg: Settings
    ) -> None:
        device = images.device
        self.mean, self.std = latents_of(vae, images)
        rows = corpus.select(["object", "studio", "caption"]).to_pylist()
        variants = [
            [r["caption"], object_contrast(r["studio"]), studio_contrast(r["object"]), ""]
            for r in rows
        ]
        lines = sorted({line for four in variants for line in four})
        place = {line: i for i, line in enumerate(lines)}
        # There are only a few dozen different sentences: encode each once a step, then look up.
        self.ids = token_ids(tokenizer, lines).to(device)  # [L, MAX_TOKENS]
        self.variant_rows = torch.tensor(
            [[place[line] for line in four] for four in variants], device=device
        )  # [N, 4]
        self.bounds = torch.tensor(CAPTION_WEIGHTS, device=device).cumsum(0)[:-1]
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
        states = text(input_ids=self.ids).last_hidden_state  # [L, MAX_TOKENS, 96]
        context = states[self.variant_rows[self.rows, kind]]
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
    classifier: nn.Module,
    cfg: Settings,
    progress: Progress,
) -> tuple[Any, Any, dict[str, Any]]:
    """Train text encoder and UNet together; returns both with their best average weights."""
    device = task.mean.device
    text = build_text_encoder(tokenizer).to(device).train()
    unet = build_unet().to(device).train()
    progress.say(f"text encoder {count(text):,} parameters, UNet {count(unet):,}")
    averaged_text, averaged_unet = copy.deepcopy(text).eval(), copy.deepcopy(unet).eval()
    pipe = assemble(vae, averaged_text, tokenizer, averaged_unet)
    live = [*text.parameters(), *unet.parameters()]
    average = [p.detach() for p in [*averaged_text.parameters(), *averaged_unet.parameters()]]
    decay = min(0.999, max(0.0, 1.0 - 10.0 / cfg.steps))
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        live,
        lr=torch.tensor(cfg.learning_rate, device=device) if on_gpu else cfg.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.02,
        fused=on_gpu,
        capturable=on_gpu,
    )

    def update() -> torch.Tensor:
        loss = task.loss(text, unet)
        loss.backward()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in live], 1.0 - decay)
        return loss.detach()

    def eager() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        return update()

    step_function = eager
    captured = False
    if on_gpu and cfg.graph:
        try:
            graph, loss_of_graph = capture(task, optimizer, eager, update)

            def replay() -> torch.Tensor:
                graph.replay()
                return loss_of_graph

            step_function = replay
            captured = True
        except RuntimeError as error:
            progress.say(f"no CUDA graph ({str(error).splitlines()[0]}); stepping eagerly")
    every = max(1, cfg.steps // 8)
    # Sums on the device: reading the loss each step would make the host wait.
    total, steps_summed = torch.zeros((), device=device), 0
    best_rate, best_step, best = -1.0, 0, [w.clone() for w in average]
    history: list[dict[str, float]] = []
    for step in range(1, cfg.steps + 1):
        set_rate(
            optimizer,
            cosine(step - 1, cfg.steps, cfg.learning_rate, max(1, min(500, cfg.steps // 10))),
        )
        task.draw()
        total += step_function()
        steps_summed += 1
        if step % every and step != cfg.steps:
            continue
        mean_loss = total.item() / steps_summed
        if not math.isfinite(mean_loss):
            raise RuntimeError(f"the loss is {mean_loss} at step {step}; use a lower rate")
        total.zero_()
        steps_summed = 0
        rates = joint_rates(pipe, classifier, 8, MONITOR_STREAM, cfg)["joint"]
        rate = float(np.mean(list(rates.values())))
        history.append({"step": step, "loss": round(mean_loss, 5), "joint": round(rate, 4)})
        progress.say(f"unet step {step}: loss {mean_loss:.4f}, held-out pairs right {rate:.3f}")
        if rate >= best_rate:
            best_rate, best_step, best = rate, step, [w.clone() for w in average]
    texts = len(list(averaged_text.parameters()))
    load_weights(averaged_text, best[:texts])
    load_weights(averaged_unet, best[texts:])
    return (
        averaged_text,
        averaged_unet,
        {
            "history": history,
            "kept_step": best_step,
            "average_decay": decay,
            "cuda_graph": captured,
        },
    )


def capture(
    task: DenoisingTask, optimizer: torch.optim.Optimizer, eager: Any, update: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Record one training step; three eager steps first, as the recording needs them."""
    set_rate(optimizer, 1e-6)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            task.draw()
            eager()
    torch.cuda.current_stream().wait_stream(side)
    # Gradients must be allocated inside the graph's own memory pool.
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = update()
    return graph, loss


# ---------------------------------------------------------------------------- gate


class Classifier(nn.Module):
    """A small convolutional network with one head for the object and one for the studio."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
                nn.GroupNorm(8, widths[i + 1]),
                nn.SiLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(128 * 16, 128), nn.SiLU())
        self.object_head = nn.Linear(128, len(OBJECTS))
        self.studio_head = nn.Linear(128, len(STUDIOS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.hidden(self.trunk(x))
        return self.object_head(features), self.studio_head(features)


def labelled_renders(
    stream: int, per_pair: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fresh renders of ALL pairs: images [N, 3, 64, 64], object [N] and studio [N] numbers."""
    pictures, objects, studios = [], [], []
    for o, object_name in enumerate(OBJECTS):
        for s, studio in enumerate(STUDIOS):
            for number in range(per_pair):
                rng = np.random.default_rng([seed, stream, number, o, s])
                pictures.append(render(object_name, studio, rng))
                objects.append(o)
                studios.append(s)
    return (
        to_tensor(pictures).to(device),
        torch.tensor(objects, device=device),
        torch.tensor(studios, device=device),
    )


def train_classifier(
    cfg: Settings, device: torch.device, progress: Progress
) -> tuple[nn.Module, dict[str, float]]:
    """Returns the classifier and its accuracy on renders that it was not trained on."""
    torch.manual_seed(cfg.seed + 3)
    classifier = Classifier().to(device)
    per_pair = 80 if cfg.classifier_steps >= 200 else 8
    images, objects, studios = labelled_renders(CLASSIFIER_STREAM, per_pair, cfg.seed, device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(cfg.classifier_steps):
        set_rate(optimizer, cosine(step, cfg.classifier_steps, 1e-3, 20))
        rows = torch.randint(len(images), (192,), device=device)
        x = images[rows]
        # A decoder softens and speckles pictures; neither changes what they show.
        share = torch.rand(len(x), 1, 1, 1, device=device)
        x = share * x + (1.0 - share) * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)
        of_object, of_studio = classifier(x)
        loss = F.cross_entropy(of_object, objects[rows]) + F.cross_entropy(of_studio, studios[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    classifier.eval()
    images, objects, studios = labelled_renders(CHECK_STREAM, per_pair // 4, cfg.seed, device)
    of_object, of_studio = classify(classifier, images)
    accuracy = {
        "object": (of_object == objects).float().mean().item(),
        "studio": (of_studio == studios).float().mean().item(),
    }
    progress.say(f"classifier on fresh renders: {accuracy}")
    return classifier, accuracy


@torch.no_grad()
def classify(classifier: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = [classifier(part) for part in images.split(256)]
    return (
        torch.cat([h[0].argmax(dim=1) for h in heads]),
        torch.cat([h[1].argmax(dim=1) for h in heads]),
    )


def generate(
    pipe: Any, lines: Sequence[str], stream: int, steps: int, guidance: float, seed: int
) -> torch.Tensor:
    """One picture per line through the pipeline itself, [-1, 1], [N, 3, 64, 64]."""
    pictures = []
    for start in range(0, len(lines), 192):
        part = list(lines[start : start + 192])
        # Drawn on the CPU, one generator each: the same start on every device and batch size.
        generators = [
            torch.Generator("cpu").manual_seed(seed * 10_000_000 + stream * 1000 + start + i)
            for i in range(len(part))
        ]
        out = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        pictures.append(out.float() * 2.0 - 1.0)
    return torch.cat(pictures)


def joint_rates(
    pipe: Any, classifier: nn.Module, per_pair: int, stream: int, cfg: Settings
) -> dict[str, Any]:
    """Shares of generated held-out pictures whose object, studio, or both are recognised."""
    lines = [caption(o, s) for o, s in HELD_OUT for _ in range(per_pair)]
    images = generate(pipe, lines, stream, cfg.sampling_steps, cfg.guidance, cfg.seed)
    of_object, of_studio = classify(classifier, images)
    shape = (len(HELD_OUT), per_pair)
    objects = torch.tensor([OBJECTS.index(o) for o, _ in HELD_OUT], device=images.device)
    studios = torch.tensor([STUDIO_NAMES.index(s) for _, s in HELD_OUT], device=images.device)
    right_object = of_object.view(shape) == objects[:, None]
    right_studio = of_studio.view(shape) == studios[:, None]

    def named(right: torch.Tensor) -> dict[str, float]:
        shares = right.float().mean(dim=1).tolist()
        return {caption(*p): round(v, 4) for p, v in zip(HELD_OUT, shares, strict=True)}

    return {
        "joint": named(right_object & right_studio),
        "object": named(right_object),
        "studio": named(right_studio),
        "images": images.view(*shape, 3, 64, 64),
    }


def sheet(rows: Sequence[torch.Tensor], path: Path) -> None:
    """Rows of pictures [C, 3, 64, 64] as one PNG, twice enlarged."""
    lines = []
    for row in rows:
        padded = F.pad(row.float().cpu().clamp(-1, 1), (2, 2, 2, 2), value=0.0)
        lines.append(torch.cat(list(padded), dim=2))
    pixels = torch.cat(lines, dim=1).add(1.0).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


def gate(
    folder: Path,
    report: Path,
    classifier: nn.Module,
    accuracy: dict[str, float],
    training: dict[str, Any] | None,
    cfg: Settings,
    device: torch.device,
    progress: Progress,
) -> bool:
    """Judge the saved folder; writes the report folder and says whether the model passes."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(
        device
    )
    pipe.set_progress_bar_config(disable=True)
    rates = joint_rates(pipe, classifier, cfg.gate_images, GATE_STREAM, cfg)
    images = rates.pop("images")
    mean_rate = float(np.mean(list(rates["joint"].values())))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    passed = (
        mean_rate >= GATE_JOINT_RATE
        and min(accuracy.values()) >= GATE_CLASSIFIER_ACCURACY
        and size <= MAX_BYTES
    )
    report.mkdir(parents=True, exist_ok=True)
    by_name = {studio.name: studio for studio in STUDIOS}
    rows = []
    for (object_name, studio_name), drawn in zip(HELD_OUT, images, strict=True):
        real = [
            render(object_name, by_name[studio_name], np.random.default_rng([SHEET_STREAM, i]))
            for i in range(2)
        ]
        rows.append(torch.cat([to_tensor(real), drawn[:12].cpu()]))
    sheet(rows, report / "samples.png")
    everything = generate(
        pipe,
        [caption(o, s) for s in STUDIO_NAMES for o in OBJECTS],
        GRID_STREAM,
        cfg.sampling_steps,
        cfg.guidance,
        cfg.seed,
    )
    sheet(list(everything.split(len(OBJECTS))), report / "grid.png")
    progress.stage_done("gate")
    result = {
        "passed": passed,
        "mean_joint_rate": round(mean_rate, 4),
        "required_joint_rate": GATE_JOINT_RATE,
        "rates": rates,
        "classifier_accuracy": accuracy,
        "folder_bytes": size,
        "parameters": {
            name: count(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")
        },
        "settings": asdict(cfg),
        "streams": {"gate": GATE_STREAM, "monitor": MONITOR_STREAM},
        "training": training,
        "seconds": progress.seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (report / "gate.json").write_text(json.dumps(result, indent=2) + "\n")
    for line, rate in rates["joint"].items():
        progress.say(f"{line}: {rate:.2f}")
    progress.say(
        f"gate {'passed' if passed else 'FAILED'}: mean joint rate {mean_rate:.3f} "
        f"(needs {GATE_JOINT_RATE}), {size:,} bytes (at most {MAX_BYTES:,})"
    )
    return passed


# ---------------------------------------------------------------------------- command


def train(
    out: Path, classifier: nn.Module, cfg: Settings, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Train every part on the demo's corpus and save the pipeline folder."""
    torch.manual_seed(cfg.seed)
    corpus = make_corpus()
    pictures = [Image.open(io.BytesIO(png)) for png in corpus["image"].to_pylist()]
    images = to_tensor(pictures).to(device)
    vae = build_vae().to(device)
    progress.say(f"corpus of {len(images)} images; autoencoder {count(vae):,} parameters")
    train_vae(vae, images, cfg, progress)
    progress.stage_done("vae")
    tokenizer = build_tokenizer()
    task = DenoisingTask(corpus, vae, images, tokenizer, cfg)
    progress.say(
        f"scaling factor {vae.config.scaling_factor:.4f}, posterior deviation "
        f"{task.std.mean().item():.3f} of the latents' own"
    )
    text, unet, notes = train_unet(task, vae, tokenizer, classifier, cfg, progress)
    progress.stage_done("unet")
    pipe = assemble(vae, text, tokenizer, unet).to(torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # written for their owner only, but shipped inside a package
    return {**notes, "scaling_factor": vae.config.scaling_factor}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--gate-only", type=Path, metavar="FOLDER", help="judge a saved folder")
    parser.add_argument("--report", type=Path, help="default: FOLDER-report beside the folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--vae-batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--classifier-steps", type=int, default=800)
    parser.add_argument("--gate-images", type=int, default=20)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--no-graph", action="store_true", help="step eagerly on CUDA too")
    args = parser.parse_args()
    if (args.out is None) == (args.gate_only is None):
        parser.error("give either --out FOLDER or --gate-only FOLDER")
    if args.out is not None and args.out.exists():
        parser.error(f"{args.out} exists; remove it or choose another --out")
    if args.gate_only is not None and not (args.gate_only / "model_index.json").is_file():
        parser.error(f"{args.gate_only} is no pipeline folder (no model_index.json)")
    return args


def main() -> int:
    args = arguments()
    cfg = Settings(
        seed=args.seed,
        vae_steps=args.vae_steps,
        vae_batch_size=args.vae_batch_size,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        classifier_steps=args.classifier_steps,
        gate_images=args.gate_images,
        sampling_steps=args.sampling_steps,
        guidance=args.guidance,
        graph=not args.no_graph,
    )
    folder: Path = args.out or args.gate_only
    report: Path = args.report or folder.with_name(folder.name + "-report")
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    progress = Progress()
    progress.say(f"torch {torch.__version__} on {device}; {asdict(cfg)}")
    classifier, accuracy = train_classifier(cfg, device, progress)
    progress.stage_done("classifier")
    training = None
    if args.out is not None:
        training = train(args.out, classifier, cfg, device, progress)
    return 0 if gate(folder, report, classifier, accuracy, training, cfg, device, progress) else 1


if __name__ == "__main__":
    sys.exit(main())
