"""Measures an ingest over several devices against one, and compares what they wrote.

    python benchmarks/two_devices.py --corpus CORPUS.parquet --model MODEL_DIR \\
        --devices cuda:0,cuda:1 --rows 18000 --batch 512 --out two-devices.md

The rate is that of the last three quarters of the images: starting processes is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from headwater import Model, build_index
from headwater.ingest import Progress


def main() -> None:
    """Ingest twice, compare rates and bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--rows", type=int, default=18_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = args.devices.split(",")
    kind = names[0].partition(":")[0]
    dtype = "bfloat16" if kind == "cuda" else "float32"
    model = Model.from_pretrained(args.model, device="cpu", dtype=dtype)
    lines = [
        f"{torch.cuda.get_device_name() if kind == 'cuda' else kind}, torch {torch.__version__}, "
        f"{args.rows:,} images, batch {args.batch}\n",
        "| devices | img/s | seconds in all |",
        "|---|---|---|",
    ]
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, len(names)):
            steps: list[Progress] = []
            started = time.perf_counter()

            def note(step: Progress, steps: list[Progress] = steps, since: float = started) -> None:
                if not steps:
                    print(f"first batch after {time.perf_counter() - since:.1f} s", flush=True)
                steps.append(step)

            build_index(
                args.corpus,
                model,
                Path(folder) / f"{len(rates)}",
                limit=args.rows,
                batch_size=args.batch,
                devices=names[:count],
                compile=False,
                progress=note,
            )
            whole = time.perf_counter() - started
            first = next(step for step in steps if step.done >= steps[-1].done / 4)
            rates.append((steps[-1].done - first.done) / (steps[-1].elapsed - first.elapsed))
            lines.append(f"| {','.join(names[:count])} | {rates[-1]:.0f} | {whole:.1f} |")
            print(lines[-1], flush=True)
        one, several = (Path(folder) / f"{run}" for run in (0, 1))
        files = sorted(
            path.relative_to(one)
            for path in one.rglob("*")
            if path.is_file() and path.name != "ledger.jsonl"  # which says what devices there were
        )
        same = [(one / path).read_bytes() == (several / path).read_bytes() for path in files]
    lines.append(
        f"\n{rates[1] / rates[0]:.2f} times the rate; {sum(same)} of {len(files)} files "
        "identical to the byte (all but the ledger were compared)."
    )
    print(lines[-1])
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
