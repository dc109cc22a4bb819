"""What a picture shows, by a small classifier; and pictures drawn to be looked at by it.

The classifier has one head for each attribute of a picture. It is trained on fresh renders, blurred
and speckled a little as a decoder does, and its accuracy is measured on others. The gates of
models that benchmarks or the demo train stand on it.
"""

# diffusers annotates only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from headwater.benchmarks.small_models import Settings
from headwater.benchmarks.small_training import cosine, set_rate


class Classifier(nn.Module):
    """A small convolutional network on [N, 3, 64, 64] with a head for each attribute."""

    def __init__(self, classes: Sequence[int], width: int) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
                nn.GroupNorm(8, widths[i + 1]),
                nn.SiLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64 * width, 4 * width), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(4 * width, number) for number in classes)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.hidden(self.trunk(x))
        return [head(features) for head in self.heads]


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, classes: Sequence[int], cfg: Settings
) -> Classifier:
    """Fit a classifier to ``images`` [N, 3, 64, 64] and ``labels`` [N, attributes]."""
    device = images.device
    torch.manual_seed(cfg.seed + 3)
    classifier = Classifier(classes, cfg.classifier_width).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(cfg.classifier_steps):
        set_rate(optimizer, cosine(step, cfg.classifier_steps, 1e-3, 20))
        rows = torch.randint(len(images), (cfg.batch_size,), device=device)
        x = images[rows]
        # A decoder softens and speckles pictures; neither changes what they show.
        share = torch.rand(len(x), 1, 1, 1, device=device)
        x = share * x + (1.0 - share) * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)
        truth = labels[rows].unbind(1)
        losses = [F.cross_entropy(o, y) for o, y in zip(classifier(x), truth, strict=True)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    """The number of the likeliest value of each attribute, [N, attributes]."""
    parts = [
        torch.stack([head.argmax(dim=1) for head in classifier(part)], 1)
        for part in images.split(256)
    ]
    return torch.cat(parts)


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


def sheet(rows: Sequence[torch.Tensor], path: Path) -> None:
    """Rows of pictures [C, 3, 64, 64] as one PNG, twice enlarged; C may differ."""
    lines = []
    longest = max(len(row) for row in rows)
    for row in rows:
        padded = F.pad(row.float().cpu().clamp(-1, 1), (2, 2, 2, 2), value=0.0)
        line = torch.cat(list(padded), dim=2)
        lines.append(F.pad(line, (0, 68 * (longest - len(row)))))
    pixels = torch.cat(lines, dim=1).add(1.0).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)
