"""Judges a saved demo model: does it draw held-out object x studio pairs that can be recognised?

A classifier is trained on fresh renders of all pairs; then the SAVED folder draws the pairs that
the corpus never showed, and a picture counts when the classifier sees the right object AND the
right studio in it. A folder passes with a mean rate of at least 0.9, a classifier that is at least
0.98 right on other fresh renders, and at most 8 MB. The report folder gets gate.json, samples.png
(a row for each held-out pair: two renders, then generated) and grid.png (one generated picture of
each pair: a row for each studio, a column for each object).

Training asks ``joint_rates`` too, with other seeds than the gate's. Not a script:
``train_demo_model.py`` is the command.
"""

# diffusers annotates only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from headwater.benchmarks.recognition import (
    Classifier,
    classify,
    generate,
    sheet,
    train_classifier,
)
from headwater.benchmarks.small_models import Settings, count, to_tensor
from headwater.benchmarks.small_training import Progress
from headwater.demo.art import OBJECTS, STUDIOS, render
from headwater.demo.corpus import HELD_OUT, caption

STUDIO_NAMES = tuple(studio.name for studio in STUDIOS)
MAX_BYTES = 8_000_000
GATE_JOINT_RATE = 0.9
GATE_CLASSIFIER_ACCURACY = 0.98
# Separate streams of randomness, so that no picture is drawn from the same numbers twice.
CLASSIFIER_STREAM, CHECK_STREAM, SHEET_STREAM = 1001, 1002, 1003
MONITOR_STREAM, GATE_STREAM, GRID_STREAM = 2001, 2002, 2003


# ---------------------------------------------------------------------------- classifier


def labelled_renders(
    stream: int, images: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """About ``images`` fresh renders, equally many of ALL pairs: [N, 3, 64, 64], labels [N, 2]."""
    pictures, labels = [], []
    for o, object_name in enumerate(OBJECTS):
        for s, studio in enumerate(STUDIOS):
            for number in range(max(1, images // len(OBJECTS) // len(STUDIOS))):
                rng = np.random.default_rng([seed, stream, number, o, s])
                pictures.append(render(object_name, studio, rng))
                labels.append((o, s))
    return to_tensor(pictures).to(device), torch.tensor(labels, device=device)


def recogniser(
    cfg: Settings, device: torch.device, progress: Progress
) -> tuple[Classifier, dict[str, float]]:
    """Returns the classifier and its accuracy on renders that it was not trained on."""
    images, labels = labelled_renders(CLASSIFIER_STREAM, cfg.classifier_images, cfg.seed, device)
    classifier = train_classifier(images, labels, (len(OBJECTS), len(STUDIOS)), cfg)
    images, labels = labelled_renders(CHECK_STREAM, cfg.classifier_images // 4, cfg.seed, device)
    of_object, of_studio = (classify(classifier, images) == labels).float().mean(0).tolist()
    accuracy = {"object": of_object, "studio": of_studio}
    progress.say(f"classifier on fresh renders: {accuracy}")
    return classifier, accuracy


# ---------------------------------------------------------------------------- gate


def joint_rates(
    pipe: Any, classifier: Classifier, per_pair: int, stream: int, cfg: Settings
) -> dict[str, Any]:
    """Shares of generated held-out pictures whose object, studio, or both are recognised."""
    lines = [caption(o, s) for o, s in HELD_OUT for _ in range(per_pair)]
    images = generate(pipe, lines, stream, cfg.sampling_steps, cfg.guidance, cfg.seed)
    of_object, of_studio = classify(classifier, images).unbind(1)
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


def gate(
    folder: Path,
    report: Path,
    classifier: Classifier,
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
