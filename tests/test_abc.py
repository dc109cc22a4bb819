"""AbC on a miniature of the published tree: real pipelines, two models, a dozen "LAION" images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from conftest import png

from headwater.attribution import Model
from headwater.benchmarks import abc, record
from headwater.benchmarks.abc_tree import WEIGHTS, Tree, customise, read_pictures, read_tree
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.finetuning import FineTuning, Pictures, custom_diffusion
from headwater.benchmarks.measure import BASELINES, measure
from headwater.benchmarks.methods import chosen, configurations
from headwater.benchmarks.study import Configuration, Corpus, Question, Study
from headwater.queries.gradients import to_images

LAION = 12
CASES = {  # model -> test case, its place there, training prompt, prompts, exemplars
    "imagenet/fish": (
        "test_unobserved_imagenet",
        1,
        "<new1> fish",
        ["a red <new1> fish", "a drawing of <new1> fish"],
        1,
    ),
    "artchive/blue": (
        "test_artchive",
        0,
        "a drawing in <new1> style",
        ["the cat in <new1> style", "the dog in <new1> style"],
        2,
    ),
}
METHODS = ("d-trak", "headwater")


def quick(names: Sequence[str]) -> list[Configuration]:
    """The methods at few noise levels and in few dimensions."""
    few = {"timesteps": 2, "steps": 4, "dim": 64}
    return [replace(c, recipe=replace(c.recipe, **few)) for c in chosen(names)]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tiny.stable_diffusion(), tmp_path_factory.mktemp("abc") / "base")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Model:
    return Model.from_pretrained(base_folder, device="cpu")


@pytest.fixture(scope="session")
def taught() -> dict[str, Model]:
    """The customised models, as whoever made the tree had them; filled by `tree`."""
    return {}


@pytest.fixture(scope="session")
def tree(base: Model, taught: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout, file by file."""
    root = tmp_path_factory.mktemp("tree")
    captions = [f"a {colour} {thing}" for thing in ("cat", "dog", "house") for colour in ("red",)]
    captions = [captions[i % 3] + " in the studio" * (i % 2) for i in range(LAION)]
    (root / "laion_subset").mkdir()
    (root / "laion_subset" / "captions.txt").write_text("\n".join(captions) + "\n")
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(LAION, 4, 8, 8, generator=generator)
    both = torch.cat([x_0, x_0.flip(3)]).half()
    np.save(root / "laion_latents.npy", both.numpy())
    states = base.encode_prompts(captions)
    assert states is not None
    heard = states.tensors["encoder_hidden_states"].half()
    np.save(root / "laion_text_embeddings.npy", heard.numpy())
    tasks, entries = [], {}
    for number, (name, (case, place, prompt, prompts, count)) in enumerate(CASES.items()):
        exemplars = [f"exemplar/{name}/{i}.png" for i in range(count)]
        for i, exemplar in enumerate(exemplars):
            (root / exemplar).parent.mkdir(parents=True, exist_ok=True)
            (root / exemplar).write_bytes(png(100 * number + i))
        entries[case] = [{"exemplar": ["dataset/exemplar/other.png"]}] * place
        entries[case].append({"exemplar": [f"dataset/{e}" for e in exemplars], "synth": {}})
        shown = Pictures(
            read_pictures([root / e for e in exemplars], base), (prompt,) * len(exemplars)
        )
        tuning = FineTuning(steps=5, batch=2, token_rate=0.1, weight_rate=0.01)
        prior = Pictures(x_0[:4], tuple(captions[:4]))
        model = custom_diffusion(base, shown, prior, {"<new1>": "cat"}, tuning)
        taught[name] = model
        folder = root / "models" / name
        folder.mkdir(parents=True)
        encoder = model.family.text_encoders["text_encoder"]
        vector = encoder.get_input_embeddings().weight[-1].clone()
        torch.save({"<new1>": vector}, folder / "<new1>.bin")
        kept = {k: v.clone() for k, v in model.denoiser.named_parameters() if ".attn2.to_" in k}
        kept = {k: v for k, v in kept.items() if "to_k" in k or "to_v" in k}
        torch.save(kept, folder / WEIGHTS)
        for i, text in enumerate(prompts):
            picture = root / "synth" / name / f"{i:05d}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            drawn = torch.randn(1, *model.sample_shape, generator=generator)
            to_images(model, drawn)[0].save(picture)
            tasks.append(
                {
                    "synth_image_path": str(picture.relative_to(root)),
                    "prompt": text,
                    "test_case": case,
                    "test_case_ind": place,
                    "model_path": f"models/{name}",
                    "train_prompt": prompt,
                    "category": "fish",
                }
            )
    (root / "json").mkdir()
    for case, listed in entries.items():
        (root / "json" / f"{case}.json").write_text(json.dumps(listed))
    (root / "all_tasks.json").write_text(json.dumps(tasks))
    return root


@pytest.fixture
def read(tree: Path) -> Tree:
    return read_tree(tree, laion=LAION)


def test_the_tree_is_read(tree: Path, read: Tree) -> None:
    fish, blue = read.customised
    assert (fish.name, fish.kind) == ("imagenet/fish", "unobserved_imagenet")
    assert fish.caption == "<new1> fish"
    assert fish.exemplars == (tree / "exemplar/imagenet/fish/0.png",)
    assert [task.prompt for task in fish.tasks] == CASES["imagenet/fish"][3]
    assert [task.contrast for task in fish.tasks] == ["a red fish", "a drawing of fish"]
    assert len(blue.exemplars) == 2
    assert blue.tasks[0].contrast == "the cat in style"
    assert len(read.laion) == LAION
    assert read.laion.captions[1] == "a red dog in the studio"
    stored = np.load(tree / "laion_latents.npy")
    np.testing.assert_array_equal(read.laion.x_0(3, 5).numpy(), stored[3:5].astype(np.float32))
    assert isinstance(read.laion.latents, np.memmap)


def test_a_customised_model_is_the_one_that_was_saved(
    read: Tree, base: Model, taught: dict[str, Model]
) -> None:
    for one in read.customised:
        assert customise(base, one, weights=True).fingerprint == taught[one.name].fingerprint
        inverted = customise(base, one, weights=False).fingerprint
        assert inverted["denoiser"] == base.fingerprint["denoiser"]
        assert inverted["text_encoder"] == taught[one.name].fingerprint["text_encoder"]


def test_weights_as_the_trainer_names_them_inside_its_processors(
    read: Tree, base: Model, taught: dict[str, Model], tmp_path: Path
) -> None:
    one = read.customised[0]
    weights = torch.load(one.folder / WEIGHTS)
    renamed = {
        name.replace(".to_k.", ".processor.to_k_custom_diffusion.").replace(
            ".to_v.", ".processor.to_v_custom_diffusion."
        ): tensor
        for name, tensor in weights.items()
    }
    assert not renamed.keys() & weights.keys()
    torch.save(renamed, tmp_path / WEIGHTS)
    torch.save(torch.load(one.folder / "<new1>.bin"), tmp_path / "new1.bin")
    moved = type(one)(**{**vars(one), "folder": tmp_path})
    assert customise(base, moved, weights=True).fingerprint == taught[one.name].fingerprint


def test_other_folders_are_read_in_the_place_of_models_and_synth(tree: Path) -> None:
    read = read_tree(tree, laion=LAION, folders=("models-ti", "synth-ti"))
    assert read.customised[0].folder == tree / "models-ti/imagenet/fish"
    assert read.customised[0].tasks[0].picture == tree / "synth-ti/imagenet/fish/00000.png"
    assert read.customised[0].name == "imagenet/fish"


def run(out: Path, tree: Path, base_folder: Path, **settings: Any) -> pa.Table:
    given = {"laion": LAION, "seeds": 2, "batch": 16, "methods": METHODS, "say": lambda _: None}
    return abc.run(
        out, tree=str(tree), model=str(base_folder), device="cpu", **{**given, **settings}
    )


def rankings(table: pa.Table) -> list[dict[str, Any]]:
    dropped = ("ingest_seconds", "query_seconds")
    return list(table.drop_columns(dropped).to_pylist())


@pytest.fixture(autouse=True)
def in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick methods, and no curves, which are tested with the record."""
    monkeypatch.setattr(abc, "chosen", quick)
    for name in ("plot_lambda", "plot_cost"):
        monkeypatch.setattr(record, name, lambda *args: None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abc, "_BLOCK", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("weights", abc.WEIGHTS)
def test_every_ranking_is_that_of_the_whole_corpus_in_memory(
    weights: str, tree: Path, base_folder: Path, base: Model, read: Tree, tmp_path: Path
) -> None:
    table = run(tmp_path, tree, base_folder, weights=weights)
    expected = []
    for place, one in enumerate(read.customised):
        model = customise(base, one, weights=weights == "customised")
        count = len(one.exemplars)
        exemplars = read_pictures(one.exemplars, model)
        corpus = Corpus(
            torch.cat([read.laion.x_0(0, LAION), exemplars]),
            read.laion.captions + (one.caption,) * count,
            (
                *(f"laion/{i}" for i in range(LAION)),
                *(str(path.relative_to(tree)) for path in one.exemplars),
            ),
        )
        names = [str(task.picture.relative_to(tree)) for task in one.tasks]
        pictures = read_pictures([task.picture for task in one.tasks], model)
        truth = np.array([False] * LAION + [True] * count)
        questions = tuple(
            Question(one.kind, task.prompt, task.contrast, name, truth)
            for name, task in zip(names, one.tasks, strict=True)
        )
        given = dict(zip(names, pictures, strict=True))
        study = Study(
            "abc", model, corpus, questions, seeds=2, batch=16, given=given, replicate=place
        )
        for baseline, of in BASELINES.items():
            expected += rankings(measure(study, (), lambda _: None, baselines={baseline: of}))
        expected += rankings(measure(study, quick(METHODS), lambda _: None, baselines={}))
    found = rankings(table)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        # Rows of other batches differ in rounding, which may exchange two that score alike.
        assert (mine.pop("top") or [])[:2] == (theirs.pop("top") or [])[:2]
        assert mine == pytest.approx(theirs, nan_ok=True)
    assert {row["carriers"] for row in found} == {1, 2}
    told = (tmp_path / "abc.md").read_text()
    assert "## unobserved_imagenet: recall@10" in told
    assert f"4 pictures of AbC (Wang et al. 2023), the exemplars of each among {LAION}" in told
    assert "mAP" in told
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["weights"] == weights


def test_caption_search_finds_the_new_word(tree: Path, base_folder: Path, tmp_path: Path) -> None:
    table = run(tmp_path, tree, base_folder, methods=METHODS[1:], pictures=1)
    found = [r for r in rankings(table) if r["method"] == "caption search (BM25)"]
    assert [row["recall_at_10"] for row in found] == [1.0] * 2


class Stopped(Exception):
    pass


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The keys of every batch of rows that is computed."""
    seen: list[tuple[str, ...]] = []
    original = abc.corpus_rows

    def counted(engine: Any, corpus: Corpus, batch: int) -> Any:
        seen.append(corpus.keys)
        return original(engine, corpus, batch)

    monkeypatch.setattr(abc, "corpus_rows", counted)
    return seen


@pytest.mark.usefixtures("small_blocks")
def test_a_stopped_run_goes_on_where_it_was(
    tree: Path, base_folder: Path, tmp_path: Path, blocks: list[tuple[str, ...]]
) -> None:
    whole = rankings(run(tmp_path / "whole", tree, base_folder, methods=METHODS))
    unbroken = len(blocks)
    blocks.clear()

    def stopping_after(count: int) -> Callable[[str], None]:
        left = [count]

        def say(text: str) -> None:
            if text.startswith("rows "):
                left[0] -= 1
                if not left[0]:
                    raise Stopped

        return say

    for count in (1, 2, 3):  # inside of a method, in the second, in the second model
        with pytest.raises(Stopped):
            run(tmp_path / "b", tree, base_folder, methods=METHODS, say=stopping_after(count))
    assert rankings(run(tmp_path / "b", tree, base_folder, methods=METHODS)) == whole
    of_laion = [keys for keys in blocks if keys[0].startswith("laion/")]
    assert len(of_laion) == 2 * 2 * 2  # models x recipes x blocks, each once
    assert unbroken == len(of_laion) + 2 * 2
    blocks.clear()
    run(tmp_path / "b", tree, base_folder, methods=METHODS)
    assert not blocks


@pytest.mark.usefixtures("small_blocks")
def test_with_the_base_weights_the_corpus_is_computed_once(
    tree: Path, base_folder: Path, tmp_path: Path, blocks: list[tuple[str, ...]]
) -> None:
    run(tmp_path / "base", tree, base_folder, methods=METHODS[1:], weights="base")
    assert sum(keys[0].startswith("laion/") for keys in blocks) == 2
    assert len(list((tmp_path / "base" / "rows").rglob("*.npz"))) == 2
    blocks.clear()
    run(tmp_path / "own", tree, base_folder, methods=METHODS[1:], weights="customised")
    assert sum(keys[0].startswith("laion/") for keys in blocks) == 2 * 2
    assert not list((tmp_path / "own" / "rows").rglob("*.npz"))


def test_fewer_models_and_pictures(tree: Path, base_folder: Path, tmp_path: Path) -> None:
    table = run(tmp_path, tree, base_folder, methods=METHODS[1:], models=1, pictures=1)
    assert set(table["picture"].to_pylist()) == {
        "synth/imagenet/fish/00000.png",
        "synth/artchive/blue/00000.png",
    }


@pytest.fixture
def copied(tree: Path, tmp_path: Path) -> Path:
    """The tree once more, to be spoilt."""
    root = tmp_path / "copy"
    for path in tree.rglob("*"):
        if path.is_file():
            place = root / path.relative_to(tree)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return root


@pytest.mark.parametrize(
    "missing",
    [
        "all_tasks.json",
        "json/test_artchive.json",
        "laion_latents.npy",
        "laion_text_embeddings.npy",
        "laion_subset/captions.txt",
        "models/imagenet/fish/<new1>.bin",
        f"models/imagenet/fish/{WEIGHTS}",
        "exemplar/imagenet/fish/0.png",
        "synth/imagenet/fish/00001.png",
    ],
)
@pytest.mark.parametrize("how", ["gone", "broken"])
def test_a_missing_or_broken_file_is_named(
    missing: str, how: str, copied: Path, base_folder: Path, tmp_path: Path
) -> None:
    if how == "gone":
        (copied / missing).unlink()
    elif missing.endswith(".txt"):
        (copied / missing).write_text("a red cat\n")
    else:
        (copied / missing).write_bytes(b"{]")
    with pytest.raises(BenchmarkError) as caught:
        run(tmp_path / "out", copied, base_folder, methods=METHODS[1:])
    assert missing in str(caught.value)
    assert not (tmp_path / "out" / "rows").exists() or how == "broken"  # before hours of work
    assert "download_abc.sh" in str(caught.value) or "ask for fewer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_belong_together_is_refused(
    copied: Path, base_folder: Path, base: Model, tmp_path: Path
) -> None:
    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(BenchmarkError, match=match):
            run(tmp_path / "out", copied, base_folder, **settings)

    refused("weights 'mixed' is unknown; choose customised or base", weights="mixed")
    refused("folders .* are not two", folders=("models",))
    refused(f"holds {LAION} of {LAION + 1} rows", laion=LAION + 1)
    refused("--laion 0 is not positive", laion=0)
    refused("method 'trac' is unknown", methods=("trac",))
    captions = copied / "laion_subset" / "captions.txt"
    lines = captions.read_text().splitlines()
    captions.write_text("\n".join(lines[1:] + lines[:1]))
    refused("row 0, is not what the model hears of line 1")
    captions.write_text("\n".join(lines))
    latents = np.load(copied / "laion_latents.npy")
    np.save(copied / "laion_latents.npy", latents * 6)
    refused("multiply the latents by the VAE's scaling_factor")
    np.save(copied / "laion_latents.npy", latents[:, :, :4])
    refused(r"holds \(4, 4, 8\), the model draws \(4, 8, 8\)")
    np.save(copied / "laion_latents.npy", latents)
    weights = copied / "models/imagenet/fish" / WEIGHTS
    torch.save({"mid_block.attn2.to_k.weight": torch.zeros(2, 2)}, weights)
    refused("mid_block.attn2.to_k.weight .* is no parameter of the model's UNet")
    torch.save({}, weights)
    refused("holds no weights")
    torch.save({"<new1>": torch.zeros(3)}, weights.with_name("<new1>.bin"))
    refused("those of the model")
    with pytest.raises(BenchmarkError, match="folder nowhere does not exist"):
        read_tree("nowhere")


def test_the_small_version_names_methods_that_there_are() -> None:
    assert set(abc.SMALL["methods"]) <= configurations().keys()
