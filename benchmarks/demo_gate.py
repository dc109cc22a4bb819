"""Judges a saved demo model: does it draw held-out object x studio pairs that can be recognised?

A classifier is trained on fresh renders of all pairs; then the SAVED folder draws the pairs that
the corpus never showed, and a picture counts when the classifier sees the right object AND the
right studio in it. A folder passes with a mean rate of at least 0.9, a classifier that is at least
0.98 right on other fresh renders, and at most 8 MB. The report folder gets gate.json, samples.png
(a row for each held-out pair: two renders, then generated) and grid.png (one generated picture of
each pair: a row for each studio, a column for each object).

Training asks ``joint_rates`` too, with other seeds than the gate's. Settings, progress lines and
the small helpers of both are here as well. Not a script: ``train_demo_model.py`` is the command.
"""

# diffusers annotates only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

from headwater.demo.art import OBJECTS, STUDIOS, render
from headwater.demo.corpus import HELD_OUT, caption

STUDIO_NAMES = tuple(studio.name for studio in STUDIOS)
MAX_BYTES = 8_000_000
GATE_JOINT_RATE = 0.9
GATE_CLASSIFIER_ACCURACY = 0.98
# Separate streams of randomness, so that no picture is drawn from the same numbers twice.
CLASSIFIER_STREAM, CHECK_STREAM, SHEET_STREAM = 1001, 1002, 1003
MONITOR_STREAM, GATE_STREAM, GRID_STREAM = 2001, 2002, 2003


# ---------------------------------------------------------------------------- shared with training


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


# ---------------------------------------------------------------------------- classifier


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


# ---------------------------------------------------------------------------- gate


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
