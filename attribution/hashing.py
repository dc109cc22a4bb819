"""The counter-based hash that random projections are drawn by: nothing stored, every device agrees.

A word is 32 bits, held by an int64 in torch and by a uint32 in a kernel; the arithmetic is exact.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
Key = tuple[int, int]
_Word = TypeVar("_Word", int, Tensor)


def make_key(*numbers: int) -> Key:
    """Two words drawn from integers (a seed, a purpose, ...), so that close seeds share nothing."""
    first, second = 0x2545F491, 0x51ED270B
    for number in numbers:
        for half in (number & WORD, (number >> 32) & WORD):
            first, second = mix(first ^ half), mix((second + half) & WORD)
    return first, second


def words(counter: Tensor, key: Key) -> Tensor:
    """A uniform word in [0, 2^32) for each non-negative 64-bit count, int64."""
    return mix(mix((counter & WORD) ^ key[0]) ^ (counter >> 32) ^ key[1])


def scaled(word: Tensor, bound: int | Tensor) -> Tensor:
    """The word as a number in [0, bound), for bounds below 2^31; uniform to bound / 2^32."""
    return (word * bound) >> 32


def signs(start: int, count: int, key: Key, device: torch.device | str = "cpu") -> Tensor:
    """Signs of the coordinates from `start` on: float32 [count], +1 or -1.

    Coordinate c reads bit c mod 32 of the word that counts c div 32; a set bit is -1.
    """
    first = start >> 5
    counter = torch.arange(first, ((start + count - 1) >> 5) + 1, device=device)
    bits = words(counter, key).to(torch.int32)[:, None] >> torch.arange(
        32, dtype=torch.int32, device=device
    )
    lead = start - (first << 5)
    return 1 - 2 * (bits & 1).flatten()[lead : lead + count].float()


def mix(word: _Word) -> _Word:
    """A bijection of words in which every bit moves every other (two multiply-xorshift rounds)."""
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)
