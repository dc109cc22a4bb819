"""The demo's art: deterministic, held-out pairs absent, styles and objects told apart."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from headwater.demo.art import OBJECTS, STUDIOS, Studio, render
from headwater.demo.corpus import (
    HELD_OUT,
    SCHEMA,
    caption,
    make_corpus,
    object_contrast,
    studio_contrast,
    write_corpus,
)

STUDIO_NAMES = tuple(studio.name for studio in STUDIOS)


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    return make_corpus(images_per_pair=4)


def pixels(object_name: str, studio: Studio, seed: int) -> np.ndarray:
    return np.asarray(render(object_name, studio, np.random.default_rng(seed)))


@pytest.mark.parametrize("studio", STUDIOS, ids=STUDIO_NAMES)
def test_render_is_a_function_of_the_seed(studio: Studio) -> None:
    for object_name in OBJECTS:
        first = pixels(object_name, studio, 5)
        assert first.shape == (64, 64, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, pixels(object_name, studio, 5))
        assert not np.array_equal(first, pixels(object_name, studio, 6))


def test_render_advances_the_generator_alike_for_every_pair() -> None:
    after = set()
    for object_name in OBJECTS:
        for studio in STUDIOS:
            rng = np.random.default_rng(1)
            render(object_name, studio, rng)
            after.add(rng.integers(2**62))
    assert len(after) == 1


def test_same_seed_differs_between_objects_and_studios() -> None:
    drawings = {pixels(o, s, 9).tobytes() for o in OBJECTS for s in STUDIOS}
    assert len(drawings) == len(OBJECTS) * len(STUDIOS)


@pytest.mark.parametrize("size", [32, 96, 128])
def test_render_at_other_sizes(size: int) -> None:
    for studio in STUDIOS:
        picture = render("fish", studio, np.random.default_rng(0), size=size)
        assert picture.size == (size, size)
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=float)
        usual = render("fish", studio, np.random.default_rng(0))
        expected = np.asarray(usual.resize((16, 16), Image.Resampling.BOX), dtype=float)
        assert np.abs(small - expected).mean() < 12.0


def test_drawings_stay_inside_the_picture() -> None:
    # The rim shows the ground only, whatever position, size and tilt were drawn.
    for studio in STUDIOS:
        for object_name in OBJECTS:
            for seed in range(8):
                picture = pixels(object_name, studio, seed).astype(int)
                border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
                # Tessel's ground has two shades; a drawing cut by the edge differs by far more.
                spread = np.ptp(border, axis=0).max()
                assert spread <= 40, (studio.name, object_name, seed)


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'dragon'.*fish"):
        render("dragon", STUDIOS[0], np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"'Nobody'.*Alder"):
        render("fish", Studio("Nobody", "", "", ""), np.random.default_rng(0))


def test_studios_have_distinct_names_holders_and_licences() -> None:
    for field in ("name", "style", "rights_holder", "licence"):
        assert len({getattr(studio, field) for studio in STUDIOS}) == len(STUDIOS)


def test_held_out_pairs_are_absent_and_all_others_present(corpus: pa.Table) -> None:
    counts = Counter(zip(corpus["object"].to_pylist(), corpus["studio"].to_pylist(), strict=True))
    every = {(o, s) for o in OBJECTS for s in STUDIO_NAMES}
    assert set(HELD_OUT) < every
    assert len(set(HELD_OUT)) == len(HELD_OUT)
    assert set(counts) == every - set(HELD_OUT)
    assert set(counts.values()) == {4}


def test_every_object_and_studio_keeps_trained_partners() -> None:
    objects = Counter(o for o, _ in HELD_OUT)
    studios = Counter(s for _, s in HELD_OUT)
    assert all(len(STUDIOS) - objects[o] >= 4 for o in OBJECTS)
    assert all(len(OBJECTS) - studios[s] >= 4 for s in STUDIO_NAMES)
    assert set(objects) == set(OBJECTS)
    assert set(studios) == set(STUDIO_NAMES)


def test_corpus_rows_carry_what_the_renderer_drew(corpus: pa.Table) -> None:
    assert corpus.schema == SCHEMA
    by_name = {studio.name: studio for studio in STUDIOS}
    rows = corpus.to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert len({hashlib.sha256(row["image"]).digest() for row in rows}) == len(rows)
    for row in rows:
        studio = by_name[row["studio"]]
        assert row["caption"] == caption(row["object"], row["studio"])
        assert (row["rights_holder"], row["licence"]) == (studio.rights_holder, studio.licence)
    row = rows[-1]
    place = [0, 3, OBJECTS.index(row["object"]), STUDIO_NAMES.index(row["studio"])]
    drawn = render(row["object"], by_name[row["studio"]], np.random.default_rng(place))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), drawn)


def test_captions_are_reversible() -> None:
    full = {caption(o, s): (o, s) for o in OBJECTS for s in STUDIO_NAMES}
    assert len(full) == len(OBJECTS) * len(STUDIOS)
    contrasts = {object_contrast(s) for s in STUDIO_NAMES} | {studio_contrast(o) for o in OBJECTS}
    assert len(contrasts) == len(OBJECTS) + len(STUDIOS)
    assert not contrasts & set(full)
    for line, (object_name, studio_name) in full.items():
        words = line.split()
        assert [w for w in words if w in OBJECTS] == [object_name]
        assert [w for w in words if w in STUDIO_NAMES] == [studio_name]
        assert line.replace(object_name, "drawing") == object_contrast(studio_name)
        assert line.startswith(studio_contrast(object_name) + " by ")


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one(corpus: pa.Table) -> None:
    assert make_corpus(images_per_pair=1).equals(corpus.slice(0, corpus.num_rows // 4))


def test_another_seed_gives_other_drawings(corpus: pa.Table) -> None:
    other = make_corpus(images_per_pair=1, seed=1)
    assert not set(other["image"].to_pylist()) & set(corpus["image"].to_pylist())


def test_written_corpus_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_corpus(tmp_path / name, images_per_pair=1)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.read_table(tmp_path / "a.parquet").equals(make_corpus(images_per_pair=1))


def _features(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What tells the studio (colour and edge statistics), and the object (a centred shape)."""
    rgb = picture.astype(float) / 255.0
    grey = rgb.mean(axis=2)
    edges = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    ground = rgb[[0, 0, -1, -1, 1], [0, -1, 0, -1, 1]]
    style = np.concatenate(
        [
            [ground.mean(), ground.max(axis=1).mean() - ground.min(axis=1).mean()],
            np.quantile(grey, [0.02, 0.15, 0.85, 0.98]),
            2.0 * np.quantile(edges, [0.5, 0.75, 0.9]),
            [4.0 * edges.mean()],
        ]
    )
    distance = np.abs(rgb - np.median(rgb[[0, -1]].reshape(-1, 3), axis=0)).max(axis=2)
    inside = distance > 0.16
    y, x = np.nonzero(inside)
    box = Image.fromarray(inside[y.min() : y.max() + 1, x.min() : x.max() + 1])
    shape = box.convert("L").resize((16, 16), Image.Resampling.BOX)
    shape = shape.filter(ImageFilter.BoxBlur(1))
    ratio = np.log((y.max() - y.min() + 1) / (x.max() - x.min() + 1))
    return style, np.append(np.asarray(shape, dtype=float).ravel() / 255.0, 3.0 * ratio)


def test_studios_and_objects_are_told_apart_from_pixels() -> None:
    # Nearest centroid on renders of other seeds; objects are compared within a studio's style.
    def sample(seed: int) -> tuple[np.ndarray, np.ndarray]:
        pairs = [
            [_features(pixels(o, s, 100 * seed + 7 * i)) for i, o in enumerate(OBJECTS)]
            for s in STUDIOS
        ]
        return (
            np.array([[f[0] for f in row] for row in pairs]),  # [S, O, style]
            np.array([[f[1] for f in row] for row in pairs]),  # [S, O, shape]
        )

    known = [sample(seed) for seed in range(1, 9)]
    style_centres = np.mean([k[0] for k in known], axis=(0, 2))  # [S, style]
    shape_centres = np.mean([k[1] for k in known], axis=0)  # [S, O, shape]
    right_studio, right_object = [], []
    for seed in range(20, 24):
        styles, shapes = sample(seed)
        for s in range(len(STUDIOS)):
            for o in range(len(OBJECTS)):
                nearest = np.linalg.norm(style_centres - styles[s, o], axis=1).argmin()
                right_studio.append(nearest == s)
                nearest = np.linalg.norm(shape_centres[s] - shapes[s, o], axis=1).argmin()
                right_object.append(nearest == o)
    assert np.mean(right_studio) >= 0.95
    assert np.mean(right_object) >= 0.9
