"""Times `sjlt` on a device: microseconds an add, and the bandwidth at which it reads the gradient.

    python benchmarks/projection_speed.py

On a GPU the kernel stands beside the plain torch path and beside a copy of the gradient on the
same device, which is the speed to reach (a copy reads and writes; its read alone is counted).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from headwater.attribution.layers import Slot
from headwater.attribution.sjlt import SJLT

BATCHES = (1, 16, 64)
SIZES = (320, 36_864, 102_400, 409_600, 1_638_400)
DIMS = (1024, 4096, 16_384)


def main() -> None:
    """Print a Markdown table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    print("| B | size | dim | dtype | add, us | read GB/s | torch path, us | copy, read GB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in BATCHES:
        for size in SIZES:
            for dtype in dtypes:
                gradient = torch.randn(batch, size, device=device).to(dtype)
                slot = Slot("w", "weight", 0, (size,))
                square = torch.zeros(batch, device=device)
                target = torch.empty_like(gradient)
                copy = seconds(lambda: target.copy_(gradient), device)  # noqa: B023
                volume = gradient.numel() * gradient.element_size() / 1e9
                for dim in DIMS:
                    rows, sjlt = torch.zeros(batch, dim, device=device), SJLT(dim, 0)
                    both = [
                        seconds(lambda: add(rows, square, gradient, slot), device)  # noqa: B023
                        for add in (sjlt.add, sjlt.add_windows)
                    ]
                    print(
                        f"| {batch} | {size:,} | {dim:,} | {str(dtype).removeprefix('torch.')} "
                        f"| {both[0] * 1e6:.1f} | {volume / both[0]:.0f} | {both[1] * 1e6:.0f} "
                        f"| {volume / copy:.0f} |",
                        flush=True,
                    )


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the best of five rounds that last some 20 ms each."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def once(times: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return (time.perf_counter() - started) / times

    once(3)
    times = max(1, int(0.02 / once(3)))
    return min(once(times) for _ in range(5))


if __name__ == "__main__":
    main()
