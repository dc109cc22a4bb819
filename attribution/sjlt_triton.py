"""The fused GPU kernel of `sjlt`: reads the gradient once, in its own precision.

A program owns a stripe of buckets for a few samples and walks a chunk of windows; signs come from
the hash in registers and are shared by its samples. Partial sums of the chunks are then added in
a fixed order, without atomics, so that a run repeats to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hashing import Key

_SAMPLES = 8  # samples a program holds: they share the cost of its signs
_STRIPE = 512  # buckets a program holds
_PROGRAMS = 128  # stripes x chunks aimed at for one group of samples: fills a large GPU from B = 16
_WINDOWS = 16  # windows a program reads at least, so that partial sums stay a small traffic


def add(
    rows: Tensor, square: Tensor, gradient: Tensor, offset: int, rotations: Tensor, key: Key
) -> None:
    """rows [B, dim] += P gradient and square [B] += |gradient|^2; the last axes are contiguous.

    How sums are cut depends on the parameter and the width alone, never on B: a row does not
    change with its batch.

    Args:
        rows, square: float32, on the gradient's device.
        gradient: [B, size] in any floating precision.
        offset: global coordinate of the gradient's first one, below 2^37.
        rotations: int32 [windows], as `SJLT.rotations` gives them.
        key: of the signs.
    """
    batch, size = gradient.shape
    dim, windows = rows.shape[1], len(rotations)
    if gradient.stride(1) != 1:
        gradient = gradient.contiguous()
    stripe = min(_STRIPE, triton.next_power_of_2(dim))
    stripes = triton.cdiv(dim, stripe)
    wanted = min(triton.cdiv(windows, _WINDOWS), triton.cdiv(_PROGRAMS, stripes))
    length = triton.cdiv(windows, wanted)
    chunks = triton.cdiv(windows, length)
    partial = rows.new_empty(chunks, batch, dim)
    squares = rows.new_empty(batch, chunks * stripes)
    with torch.cuda.device(gradient.get_device()):
        _project[(stripes, chunks, triton.cdiv(batch, _SAMPLES))](
            gradient,
            rotations,
            partial,
            squares,
            batch,
            size,
            dim,
            windows,
            length,
            gradient.stride(0),
            _signed(offset >> 5),
            offset & 31,
            _signed(key[0]),
            _signed(key[1]),
            SAMPLES=_SAMPLES,
            STRIPE=stripe,
        )
        _collect[(stripes, batch)](
            partial,
            squares,
            rows,
            square,
            batch,
            dim,
            chunks,
            chunks * stripes,
            rows.stride(0),
            STRIPE=stripe,
        )


def _signed(word: int) -> int:
    """The bits of a word as an int32, so that every launch has the same argument types."""
    return word - (1 << 32) if word >> 31 else word


# Sizes are kept out of the specialisation: one compiled kernel serves every parameter.
@triton.jit(
    do_not_specialize=[
        "batch",
        "size",
        "dim",
        "windows",
        "length",
        "stride",
        "first_word",
        "lead",
        "key_low",
        "key_high",
    ]
)
def _project(
    gradient: tl.tensor,
    rotations: tl.tensor,
    partial: tl.tensor,
    squares: tl.tensor,
    batch: tl.tensor,
    size: tl.tensor,
    dim: tl.tensor,
    windows: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    first_word: tl.tensor,
    lead: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    SAMPLES: tl.constexpr,
    STRIPE: tl.constexpr,
) -> None:
    chunk = tl.program_id(1)
    bucket = tl.program_id(0) * STRIPE + tl.arange(0, STRIPE)
    sample = tl.program_id(2) * SAMPLES + tl.arange(0, SAMPLES)
    here = (sample < batch)[:, None]
    source = gradient + sample.to(tl.int64)[:, None] * stride
    total = tl.zeros([SAMPLES, STRIPE], tl.float32)
    length_squared = tl.zeros([SAMPLES, STRIPE], tl.float32)
    start = chunk * length
    for window in range(start, tl.minimum(start + length, windows)):
        place = bucket - tl.load(rotations + window)
        # Neighbours but for the wrap: without the hint lanes are dealt over samples, and coalescing
        # and the sharing of signs are lost. Vector loads, which a wrap would break, stay out, since
        # nothing says that a place is aligned.
        place = tl.max_contiguous(tl.where(place < 0, place + dim, place), STRIPE)
        coordinate = window * dim + place
        inside = ((bucket < dim) & (coordinate < size))[None, :]
        value = tl.load(source + coordinate[None, :], mask=here & inside, other=0.0)
        value = value.to(tl.float32)
        counter = lead + coordinate
        word = first_word.to(tl.uint32) + (counter >> 5).to(tl.uint32)
        word = _mix(_mix(word ^ key_low.to(tl.uint32)) ^ key_high.to(tl.uint32))
        # The bit becomes the sign bit of 1.0.
        bit = (word << (31 - (counter & 31)).to(tl.uint32)) & 0x80000000
        total += value * (bit | 0x3F800000).to(tl.float32, bitcast=True)[None, :]
        length_squared += value * value
    row = chunk.to(tl.int64) * batch + sample
    tl.store(
        partial + row[:, None] * dim + bucket[None, :], total, mask=here & (bucket < dim)[None, :]
    )
    column = chunk * tl.num_programs(0) + tl.program_id(0)
    tl.store(
        squares + sample * (tl.num_programs(0) * tl.num_programs(1)) + column,
        tl.sum(length_squared, axis=1),
        mask=sample < batch,
    )


@triton.jit
def _mix(word: tl.tensor) -> tl.tensor:
    """`hashing.mix` in registers."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit(do_not_specialize=["batch", "dim", "chunks", "count", "stride"])
def _collect(
    partial: tl.tensor,
    squares: tl.tensor,
    rows: tl.tensor,
    square: tl.tensor,
    batch: tl.tensor,
    dim: tl.tensor,
    chunks: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    STRIPE: tl.constexpr,
) -> None:
    lane = tl.arange(0, STRIPE)
    bucket = tl.program_id(0) * STRIPE + lane
    sample = tl.program_id(1).to(tl.int64)
    inside = bucket < dim
    total = tl.zeros([STRIPE], tl.float32)
    for chunk in range(chunks):
        total += tl.load(partial + (chunk * batch + sample) * dim + bucket, mask=inside, other=0.0)
    target = rows + sample * stride + bucket
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)
    if tl.program_id(0) == 0:
        parts = tl.zeros([STRIPE], tl.float32)
        for start in range(0, count, STRIPE):
            column = start + lane
            parts += tl.load(squares + sample * count + column, mask=column < count, other=0.0)
        tl.store(square + sample, tl.load(square + sample) + tl.sum(parts, axis=0))
