"""Models of a world: trained on its pictures, and gated before anything is asked of them.

What a model draws of the combination that it was never shown must be recognised, every attribute
of it, in nine of ten pictures, by a classifier trained on fresh renders; otherwise the picture
that a benchmark asks about does not exist and the model is void: it stays on record, and the next
seed takes its place. The replicates share the autoencoder, which has seen every combination and is
not what is asked about; they differ in the seed of text encoder and UNet.

    OUT/settings.json   what the models were trained with
    OUT/vae/            the autoencoder
    OUT/model-SEED/     pipeline folder, with gate.json and samples.png (renders, then generated)

Training goes on where it was broken off, a model at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.recognition import (
    Classifier,
    classify,
    generate,
    sheet,
    train_classifier,
)
from headwater.benchmarks.small_models import (
    Settings,
    assemble,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    count,
)
from headwater.benchmarks.small_training import DenoisingTask, Progress, train_unet, train_vae
from headwater.benchmarks.worlds import Pictures, World, draw

RATE = 0.9
ACCURACY = 0.98
# Separate streams of randomness, so that no picture is drawn from the same numbers twice.
CORPUS_STREAM, AUTOENCODER_STREAM = 0, 1
CLASSIFIER_STREAM, CHECK_STREAM, SHEET_STREAM = 1001, 1002, 1003
MONITOR_STREAM, GATE_STREAM = 2001, 2002
_WATCHED = 16  # pictures each time while training


class GateError(BenchmarkError):
    """A model that does not draw what its benchmark asks about."""


def corpus(world: World, images: int) -> Pictures:
    """The training images: never one of the held-out combination."""
    return draw(world, world.round, images, CORPUS_STREAM)


def models(
    out: Path,
    world: World,
    pictures: Pictures,
    cfg: Settings,
    replicates: int,
    attempts: int,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[int, Path], dict[int, dict[str, Any]]]:
    """Models until so many pass the gate, at most `attempts`, with the seeds from `cfg.seed` up.

    They are trained where they are not there yet.

    Returns:
        The folders of those that pass, and the gate's records of those that do not, by seed.

    Raises:
        GateError: too few pass; the records of those that fail stay in their folders.
        BenchmarkError: `out` holds models that were trained with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_settings(out / "settings.json", world, len(pictures.keys), cfg)
    found: dict[int, Path] = {}
    void: dict[int, dict[str, Any]] = {}

    @cache
    def workshop() -> tuple[torch.Tensor, Any, Classifier, dict[str, float]]:
        images = pictures.images.to(device)
        vae = _autoencoder(out / "vae", world, len(images), cfg, device, progress)
        classifier, accuracy = recogniser(world, vae, cfg, device)
        progress.say(f"classifier on fresh renders: {accuracy}")
        progress.stage_done("classifier")
        return images, vae, classifier, accuracy

    for seed in range(cfg.seed, cfg.seed + attempts):
        folder, seeded = out / f"model-{seed}", replace(cfg, seed=seed)
        if not folder.exists():
            images, vae, classifier, accuracy = workshop()
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            pipe, notes = _train(world, pictures, images, vae, classifier, seeded, progress)
            pipe.save_pretrained(part, safe_serialization=True)
            progress.stage_done(f"model {seed}")
            judged = judge(part, world, pipe, classifier, accuracy, seeded)
            (part / "gate.json").write_text(json.dumps(judged | notes, indent=2) + "\n")
            part.rename(folder)
        record = json.loads((folder / "gate.json").read_text())
        if record["passed"]:
            found[seed] = folder
        else:
            void[seed] = record
            progress.say(_refusal(folder, record))
        if len(found) == replicates:
            return found, void
        if min(record["classifier_accuracy"].values()) < ACCURACY:
            break  # it judges the others, too
    refused = "; ".join(_refusal(out / f"model-{seed}", void[seed]) for seed in void)
    raise GateError(
        f"the run is void, {len(found)} of {replicates} models are not: {refused}; see "
        "gate.json and samples.png there, then train longer in another folder or allow more "
        "attempts"
    )


def untrained(world: World, folder: Path, cfg: Settings) -> Any:
    """The pipeline of a trained model with a text encoder and a UNet that have learnt nothing."""
    torch.manual_seed(cfg.seed)
    tokenizer = build_tokenizer(world.sentences())
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    return assemble(vae, build_text_encoder(tokenizer, cfg.text_width), tokenizer, build_unet(cfg))


def _refusal(folder: Path, record: Mapping[str, Any]) -> str:
    weakest = min(record["classifier_accuracy"].values())
    return (
        f"{folder} failed its gate: {record['asked']!r} is recognised in "
        f"{record['joint_rate']:.2f} of its pictures ({RATE} are needed), the classifier is right "
        f"in {weakest:.3f} of fresh renders ({ACCURACY} are needed)"
    )


def judge(
    folder: Path,
    world: World,
    pipe: Any,
    classifier: Classifier,
    accuracy: Mapping[str, float],
    cfg: Settings,
) -> dict[str, Any]:
    """What gate.json says of a model; draws samples.png in its folder."""
    rates, drawn = recognised(pipe, world, classifier, cfg.gate_images, GATE_STREAM, cfg)
    real = draw(world, [world.held_out], 4, SHEET_STREAM).images
    others = draw(world, world.shown, 16, SHEET_STREAM)
    seen = generate(
        pipe,
        [world.caption(values) for values in others.values],
        SHEET_STREAM,
        cfg.sampling_steps,
        cfg.guidance,
        cfg.seed,
    )
    sheet([torch.cat([real, drawn[:12].cpu()]), others.images, seen], folder / "samples.png")
    joint = rates.pop("joint")
    return {
        "passed": joint >= RATE and min(accuracy.values()) >= ACCURACY,
        "asked": world.caption(world.held_out),
        "joint_rate": round(joint, 4),
        "rates": {name: round(rate, 4) for name, rate in rates.items()},
        "classifier_accuracy": dict(accuracy),
        "parameters": {n: count(getattr(pipe, n)) for n in ("unet", "vae", "text_encoder")},
        "settings": asdict(cfg),
    }


def recognised(
    pipe: Any, world: World, classifier: Classifier, number: int, stream: int, cfg: Settings
) -> tuple[dict[str, float], torch.Tensor]:
    """How often each attribute of the held-out combination is seen, and all together ("joint").

    Of `number` pictures that the pipeline draws; they are the second result, [number, 3, 64, 64].
    """
    lines = [world.caption(world.held_out)] * number
    images = generate(pipe, lines, stream, cfg.sampling_steps, cfg.guidance, cfg.seed)
    right = classify(classifier, images).cpu() == torch.tensor(world.labels(world.held_out))
    rates = dict(zip(world.attributes, right.float().mean(0).tolist(), strict=True))
    return {**rates, "joint": right.all(1).float().mean().item()}, images


def recogniser(
    world: World, vae: Any, cfg: Settings, device: torch.device
) -> tuple[Classifier, dict[str, float]]:
    """A classifier of all combinations, and how often it is right on other renders.

    Each head knows one value more, "none of them", for pictures of no such thing: a model that
    draws them is not to pass by a lucky guess. It learns from renders alone, so that what the
    autoencoder loses is lost to it, too: its accuracy is told apart for decoded renders.
    """

    def labelled(number: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = draw(world, world.combinations, number, stream)
        labels = [world.labels(values) for values in pictures.values]
        return pictures.images.to(device), torch.tensor(labels, device=device)

    images, labels = labelled(cfg.classifier_images, CLASSIFIER_STREAM)
    # One step more than there are combinations: of each some.
    nothing = nonsense(images[:: len(world.combinations) + 1].cpu(), CLASSIFIER_STREAM).to(device)
    none = torch.tensor([[len(values) for values in world.attributes.values()]], device=device)
    classifier = train_classifier(
        torch.cat([images, nothing]),
        torch.cat([labels, none.expand(len(nothing), -1)]),
        [len(values) + 1 for values in world.attributes.values()],
        cfg,
    )
    images, labels = labelled(cfg.classifier_images // 4, CHECK_STREAM)
    with torch.no_grad():
        decoded = torch.cat([vae(part).sample.clamp(-1, 1) for part in images.split(64)])
    accuracy = {}
    for kind, seen in (("", images), (", decoded", decoded)):
        right = (classify(classifier, seen) == labels).float().mean(0).tolist()
        for attribute, share in zip(world.attributes, right, strict=True):
            accuracy[attribute + kind] = round(share, 4)
    return classifier, accuracy


def nonsense(images: torch.Tensor, seed: int) -> torch.Tensor:
    """For each image [N, 3, 64, 64] one of nothing: its tiles shuffled, blotches, or one colour."""
    generator = torch.Generator().manual_seed(seed)
    tiles = F.unfold(images, 8, stride=8)  # [N, 3 * 8 * 8, 64]
    found = F.fold(tiles[:, :, torch.randperm(64, generator=generator)], 64, 8, stride=8)
    for first, side in ((1, 4), (2, 1)):
        colours = torch.rand(len(found[first::3]), 3, side, side, generator=generator) * 2 - 1
        found[first::3] = F.interpolate(colours, 64, mode="bilinear")
    return found


def _same_settings(file: Path, world: World, images: int, cfg: Settings) -> None:
    wanted = json.loads(json.dumps({"world": world.name, "images": images, **asdict(cfg)}))
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=2) + "\n")
    there = json.loads(file.read_text())
    if there != wanted:
        other = sorted(k for k in wanted if there.get(k) != wanted[k])
        raise BenchmarkError(
            f"{file.parent} holds models that were trained with other settings "
            f"({', '.join(other)}); choose another folder or remove it"
        )


def _autoencoder(
    folder: Path, world: World, number: int, cfg: Settings, device: torch.device, progress: Progress
) -> Any:
    """The demo's, fitted to as many pictures of its own, equally many of EVERY combination.

    It knows no words and is not what is asked about: a codec, as a large model's is, that can show
    what is drawn. New ones that had never seen a red triangle decoded all triangles as blue.
    """
    with as_file(files("headwater.demo") / "model" / "vae") as demo:
        vae: Any = AutoencoderKL.from_pretrained(folder if folder.exists() else demo)
    vae = vae.float().to(device).eval()
    if not folder.exists():
        torch.manual_seed(cfg.seed)
        images = draw(world, world.combinations, number, AUTOENCODER_STREAM).images.to(device)
        train_vae(vae, images, cfg, progress)
        part = folder.with_name(folder.name + ".part")
        vae.save_pretrained(part)
        part.rename(folder)
        progress.stage_done("autoencoder")
    return vae


def _train(
    world: World,
    pictures: Pictures,
    images: torch.Tensor,
    vae: Any,
    classifier: Classifier,
    cfg: Settings,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    captions = [world.training_captions(values) for values in pictures.values]
    tokenizer = build_tokenizer(world.sentences())
    task = DenoisingTask(vae, images, tokenizer, captions, world.shares, cfg)

    def watch(pipe: Any) -> float:
        rates, _ = recognised(pipe, world, classifier, _WATCHED, MONITOR_STREAM, cfg)
        return rates["joint"]

    return train_unet(task, vae, tokenizer, watch, cfg, progress)
