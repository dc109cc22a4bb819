"""Trains the parts of the demo's model: autoencoder, then text encoder and UNet together.

A word-level tokenizer of the demo's own words comes with them. While training, held-out pairs are
drawn every now and then with other seeds than the gate's, and the moving-average weights that did
best (the later ones among equals) are kept; held-out IMAGES are never shown to the model. Not
covered: bitwise repeatability on a GPU. Not a script: ``train_demo_model.py`` is the command.
"""

# torch and diffusers annotate only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from headwater.benchmarks.demo_gate import (
    MONITOR_STREAM,
    STUDIO_NAMES,
    Progress,
    Settings,
    cosine,
    count,
    joint_rates,
    set_rate,
)
from headwater.demo.art import OBJECTS
from headwater.demo.corpus import caption, object_contrast, studio_contrast

ALL_PAIRS = tuple((o, s) for o in OBJECTS for s in STUDIO_NAMES)
MAX_TOKENS = 16
# Full caption, then without the object, without the studio, empty: as corpus.py states.
CAPTION_WEIGHTS = (0.7, 0.1, 0.1, 0.1)


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
