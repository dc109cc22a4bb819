"""What small models are trained on: drawings of the demo, or emoji that all styles have."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.material import base_model, drawings, emoji, evenly, joined


def emoji_corpus(folder: Path) -> Path:
    """Three styles of five names, one name lacking in the third."""
    rows = []
    for place, style in enumerate(("noto", "flat", "black")):
        for number, name in enumerate(("cat", "dog", "fish", "house", "red")):
            if (style, name) == ("black", "red"):
                continue
            png = io.BytesIO()
            Image.new("RGB", (64, 64), (40 * number, 60 * place, 90)).save(png, format="PNG")
            rows.append(
                {
                    "image_id": f"{style}-{name}",
                    "image": png.getvalue(),
                    "caption": f"a {name} emoji in {style} style",
                    "name": name,
                    "style": style,
                }
            )
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def test_emoji_are_the_names_that_all_styles_have(tmp_path: Path) -> None:
    base = base_model(None, "cpu", None)
    corpus = emoji_corpus(tmp_path / "emoji")
    found = emoji(base, corpus, styles=("noto", "black"), names=0, unseen=3, pixels=32)
    assert (len(found.trained), len(found.unseen)) == (5, 3)
    both = joined(found.trained, found.unseen)
    assert set(both.labels["object"]) == {"cat", "dog", "fish", "house"}
    assert set(both.keys) == {f"{s}-{n}" for s in ("noto", "black") for n in both.labels["object"]}
    for i, key in enumerate(both.keys):
        style, name = key.split("-")
        assert both.lacking["object"][i] == f"an emoji in {style} style"
        assert both.lacking["style"][i] == f"a {name} emoji"
        assert (both.labels["object"][i], both.labels["style"][i]) == (name, style)
    colour = torch.tensor([40 * 1, 60 * 2, 90.0]) / 127.5 - 1
    expected: Tensor = base.encode_images(colour.view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(both.x_0[both.keys.index("black-dog")], expected[0])
    fewer = emoji(base, corpus, styles=("noto", "flat"), names=2, unseen=1, pixels=32)
    assert len(fewer.trained) == 3
    with pytest.raises(BenchmarkError, match="choose other styles"):
        emoji(base, corpus, styles=("noto", "none"), names=0, unseen=0, pixels=32)
    with pytest.raises(BenchmarkError, match="needs --model"):  # the demo knows no such words
        base_model(None, "cpu", str(corpus))
    with pytest.raises(BenchmarkError, match=r"train.parquet does not exist; --corpus"):
        emoji(base, tmp_path, styles=("noto",), names=0, unseen=0, pixels=32)


def test_drawings_go_round_all_pairs() -> None:
    base = base_model(None, "cpu", None)
    found = drawings(base, per_pair=1, unseen=60, pixels=32)
    assert len(found.trained) == 40
    assert len(set(found.trained.captions)) == 40
    unseen = list(found.unseen.captions)
    assert sorted(unseen[:40]) == sorted(found.trained.captions)
    assert len(set(unseen[40:])) == 20
    assert {line.split()[1] for line in unseen[40:]} == set(found.trained.labels["object"])
    assert len({*found.trained.keys, *found.unseen.keys}) == 100
    assert all(key.startswith("unseen/") for key in found.unseen.keys)
    assert not any(torch.equal(x, y) for x in found.unseen.x_0 for y in found.trained.x_0)


def test_few_are_taken_evenly() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
