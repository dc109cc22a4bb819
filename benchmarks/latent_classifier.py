"""A small classifier of latents: which label of each kind of concept does a picture show?"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwater.benchmarks.material import Pictures

_BATCH = 128


class LatentClassifier(nn.Module):
    """Convolutions over [B, C, h, w] and one linear head per kind of concept."""

    def __init__(self, channels: int, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        widths = (channels, 48, 96, 96)
        layers: list[nn.Module] = []
        for i in range(3):
            stride = 1 if i == 0 else 2
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=stride, padding=1),
                nn.GroupNorm(8, widths[i + 1]),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.labels = {kind: tuple(names) for kind, names in labels.items()}
        self.heads = nn.ModuleDict(
            {kind: nn.Linear(16 * widths[-1], len(names)) for kind, names in self.labels.items()}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [B, labels] for each kind."""
        features = self.trunk(x)
        return {kind: head(features) for kind, head in self.heads.items()}

    @torch.no_grad()
    def probabilities(self, x_0: Tensor) -> Tensor:
        """[B, L] over the labels of all kinds, in the order of `named`."""
        parts = [
            torch.cat([logits.softmax(1) for logits in self(part).values()], 1)
            for part in x_0.split(4096)
        ]
        return torch.cat(parts)

    @property
    def named(self) -> list[tuple[str, str]]:
        """(kind, label) of each probability."""
        return [(kind, label) for kind, labels in self.labels.items() for label in labels]


def labels_of(pictures: Pictures, kinds: Sequence[str]) -> dict[str, list[str]]:
    """Every label of each kind."""
    return {kind: sorted(set(pictures.labels[kind])) for kind in kinds}


def trained_classifier(
    pictures: Pictures, apart: Pictures, kinds: Sequence[str], steps: int, seed: int = 0
) -> tuple[LatentClassifier, dict[str, float]]:
    """A classifier of the pictures' labels, and the share it gets right of those kept apart."""
    labels = labels_of(pictures, kinds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = LatentClassifier(pictures.x_0.shape[1], labels)
    device = pictures.x_0.device
    classifier = classifier.to(device).train()
    targets = {kind: _numbers(pictures, kind, labels[kind]) for kind in kinds}
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1.0, weight_decay=0.05)
    generator = torch.Generator(device).manual_seed(seed)
    spread = pictures.x_0.std()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(pictures), (_BATCH,), device=device, generator=generator)
        x = pictures.x_0[rows]
        # Drawn pictures are never as clean as real ones.
        noise = torch.empty_like(x).normal_(generator=generator)
        share = torch.rand(len(x), 1, 1, 1, device=device, generator=generator)
        found = classifier(x + 0.3 * spread * share * noise)
        losses = [F.cross_entropy(found[kind], targets[kind][rows]) for kind in kinds]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    classifier.requires_grad_(False).eval()
    accuracy = {}
    for kind in kinds:
        right = classifier(apart.x_0)[kind].argmax(1) == _numbers(apart, kind, labels[kind])
        accuracy[kind] = round(float(right.float().mean()), 4)
    return classifier, accuracy


def _numbers(pictures: Pictures, kind: str, labels: Sequence[str]) -> Tensor:
    places = [labels.index(label) for label in pictures.labels[kind]]
    return torch.tensor(places, device=pictures.x_0.device)
