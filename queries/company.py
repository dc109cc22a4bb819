"""The company of a concept: captions of the corpus that it is said beside."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import replace

from .concept import Asking, Concept

Pairs = tuple[tuple[str, str], ...]


def drawn_captions(items: Iterable[tuple[str, str | None]], count: int, seed: int) -> list[str]:
    """The first `count` different captions in an order drawn by `seed`; empty ones do not count.

    Args:
        items: (item id, caption); read once, and no more than `count` captions are held.
        count: of captions, at least 1.
        seed: of the order.

    Items stand in the order of a hash of seed and item id, so that others, added or deleted, never
    change which of two captions comes first.
    """
    first: dict[str, bytes] = {}  # caption -> hash of the first item that has it
    last = b""
    for item_id, caption in items:
        key = hashlib.sha256(f"{seed}/{item_id}".encode()).digest()
        if (len(first) == count and key >= last) or not (caption and caption.strip()):
            continue
        first[caption] = min(key, first.get(caption, key))
        if len(first) > count:
            del first[max(first, key=first.__getitem__)]
        last = max(first.values())
    return sorted(first, key=first.__getitem__)


def company_of(alone: str, captions: Iterable[str], count: int, said: Collection[str]) -> Pairs:
    """The concept beside captions, against these: `count` pairs, or as many as there are.

    Captions that are `said` in the question already are passed over.
    """
    fresh = [caption for caption in captions if caption not in said]
    return tuple(_beside(alone, caption) for caption in fresh[:count])


def accompanied(
    concept: Concept, asking: Asking, items: Iterable[tuple[str, str | None]]
) -> tuple[Concept, Asking]:
    """The concept with the company that it is to be asked in, and how many captions that is.

    Contexts that are such company already count: what comes out of this comes out of it again, and
    a saved question is asked as it was, of whatever corpus; that captions were missing is told the
    first time only.
    """
    there = sum(_beside(concept.alone, lacks) == (has, lacks) for has, lacks in concept.contexts)
    missing = asking.company - there
    if missing <= 0:
        return concept, asking
    said = {text for pair in concept.pairs for text in pair}
    captions = drawn_captions(items, missing + len(said), asking.seed)
    further = company_of(concept.alone, captions, missing, said)
    concept = replace(concept, contexts=(*concept.contexts, *further))
    return concept, replace(asking, company=there + len(further))


def _beside(alone: str, caption: str) -> tuple[str, str]:
    # What is too long for a text encoder is cut at its end: the concept stays.
    return f"{alone}, {caption}", caption
