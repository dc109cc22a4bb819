"""Trains the tiny Stable Diffusion model that the demo ships, and gates it.

    python benchmarks/train_demo_model.py --out FOLDER [--device cuda] [--seed 0]
    python benchmarks/train_demo_model.py --gate-only FOLDER [--device cuda]

Run it with the repository's root on PYTHONPATH (or headwater installed). Covered: autoencoder,
word-level tokenizer, text encoder and UNet on exactly the demo's corpus (``small_training.py``), a
standard ``StableDiffusionPipeline`` folder in fp16, and the gate (``demo_gate.py``): on held-out
object x studio pairs, how often does a classifier trained on fresh renders see the right object AND
the right studio in what the SAVED folder draws? Exit code 1 when that is below 0.9, when the
classifier itself is below 0.98, or when the folder is larger than 8 MB. The report folder gets
gate.json, samples.png and grid.png.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from headwater.benchmarks.demo_gate import (
    MONITOR_STREAM,
    STUDIO_NAMES,
    gate,
    joint_rates,
    recogniser,
)
from headwater.benchmarks.recognition import Classifier
from headwater.benchmarks.small_models import (
    Settings,
    build_tokenizer,
    build_vae,
    count,
    to_tensor,
)
from headwater.benchmarks.small_training import DenoisingTask, Progress, train_unet, train_vae
from headwater.demo.art import OBJECTS
from headwater.demo.corpus import caption, make_corpus, object_contrast, studio_contrast

# Full caption, then without the object, without the studio, empty: as corpus.py states.
CAPTION_SHARES = (0.7, 0.1, 0.1, 0.1)


def sentences() -> list[str]:
    """Every sentence the demo ever says, the empty one included."""
    return [
        "",
        *(caption(o, s) for o in OBJECTS for s in STUDIO_NAMES),
        *(object_contrast(s) for s in STUDIO_NAMES),
        *(studio_contrast(o) for o in OBJECTS),
    ]


def train(
    out: Path, classifier: Classifier, cfg: Settings, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Train every part on the demo's corpus and save the pipeline folder."""
    corpus = make_corpus()
    pictures = [Image.open(io.BytesIO(png)) for png in corpus["image"].to_pylist()]
    images = to_tensor(pictures).to(device)
    torch.manual_seed(cfg.seed)
    vae = build_vae().to(device)
    progress.say(f"corpus of {len(images)} images; autoencoder {count(vae):,} parameters")
    train_vae(vae, images, cfg, progress)
    progress.stage_done("vae")
    tokenizer = build_tokenizer(sentences())
    captions = [
        [r["caption"], object_contrast(r["studio"]), studio_contrast(r["object"]), ""]
        for r in corpus.select(["object", "studio", "caption"]).to_pylist()
    ]
    task = DenoisingTask(vae, images, tokenizer, captions, CAPTION_SHARES, cfg)
    progress.say(
        f"scaling factor {vae.config.scaling_factor:.4f}, posterior deviation "
        f"{task.std.mean().item():.3f} of the latents' own"
    )

    def watch(pipe: Any) -> float:
        rates = joint_rates(pipe, classifier, 8, MONITOR_STREAM, cfg)["joint"]
        return float(np.mean(list(rates.values())))

    pipe, notes = train_unet(task, vae, tokenizer, watch, cfg, progress)
    progress.stage_done("unet")
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # written for their owner only, but shipped inside a package
    return notes


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
    progress = Progress(partial(print, flush=True))
    progress.say(f"torch {torch.__version__} on {device}; {asdict(cfg)}")
    classifier, accuracy = recogniser(cfg, device, progress)
    progress.stage_done("classifier")
    training = None
    if args.out is not None:
        training = train(args.out, classifier, cfg, device, progress)
    return 0 if gate(folder, report, classifier, accuracy, training, cfg, device, progress) else 1


if __name__ == "__main__":
    sys.exit(main())
