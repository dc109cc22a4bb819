"""Every kind of pipeline: gradients against autograd, and ingest and query through its folder."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import Command, png
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from headwater import Asking, Concept, Index, QueryError, build_index
from headwater.attribution import (
    Engine,
    Model,
    ModelError,
    Point,
    Recipe,
    decode,
    fit,
)
from headwater.attribution.conditions import Conditions


def model_of(kind: str) -> tuple[Model, list[str]]:
    make, captions = tiny.KINDS[kind]
    return Model.from_pipeline(make(), device="cpu"), captions


def recipe_of(kind: str, **settings: object) -> Recipe:
    given = {"timesteps": 2, "steps": 6} | settings
    return Recipe(**given)  # type: ignore[arg-type]


def pictures(model: Model) -> torch.Tensor:
    return torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(3))


def singles(point: Point, dtype: torch.dtype) -> Iterator[Point]:
    """Each sample of a point alone."""
    for i in range(len(point.x_t)):

        def row(value: object, i: int = i) -> object:
            if isinstance(value, Conditions):
                return value.rows(slice(i, i + 1)).to(dtype)
            if not isinstance(value, torch.Tensor):
                return value
            return value[i : i + 1].to(dtype) if value.is_floating_point() else value[i : i + 1]

        yield Point(*(row(getattr(point, name)) for name in Point.__dataclass_fields__))  # type: ignore[arg-type]


def autograd_rows(engine: Engine, point: Point) -> torch.Tensor:
    """A point's rows by a loop of torch.autograd.grad, in float64 where diffusers can."""
    model = engine.model
    dtype = torch.float32 if model.family.float32_only else torch.float64
    denoiser = copy.deepcopy(model.denoiser).to(dtype)
    reference = replace(model, denoiser=denoiser, dtype=dtype)
    named = dict(denoiser.named_parameters())
    parameters = [named[slot.name].requires_grad_() for slot in engine.selection.slots]
    through, rows = engine.method.through_input, []
    for single in singles(point, dtype):
        single = replace(single, x_t=single.x_t.requires_grad_(through))
        e = reference.noise(single.x_t, single.t, single.states)
        assert e.dtype == dtype
        v = engine.method.cotangent(reference, single, e)
        found = torch.autograd.grad(e, parameters, v, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(rows).double()


@pytest.mark.parametrize("method", ["dtrak", "dps"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_equal_an_autograd_loop(kind: str, method: str) -> None:
    model, captions = model_of(kind)
    engine = Engine(model, recipe_of(kind, method=method, projection="identity"))
    for point in engine.points(pictures(model), captions, ["one", "two"]):
        rows, norms, _ = engine.raw_gradient(
            point, engine.method.cotangent, engine.method.through_input
        )
        expected = autograd_rows(engine, point)
        assert expected.any(dim=1).all()
        assert torch.cosine_similarity(rows.double(), expected).min() >= 0.99999
        torch.testing.assert_close(norms.double(), expected.norm(dim=1), rtol=1e-4, atol=0)


def test_default_selection_is_where_text_meets_image() -> None:
    chosen = {
        kind: Engine(model_of(kind)[0], recipe_of(kind)).selection
        for kind in ("sd", "sdxl", "sd3", "pixart", "dit")
    }
    for kind in ("sd", "sdxl", "pixart"):
        assert all("attn2." in slot.name for slot in chosen[kind].slots), kind
    assert any("add_q_proj" in slot.name for slot in chosen["sd3"].slots)
    assert all("attn1." in slot.name for slot in chosen["dit"].slots)


def corpus_of(captions: list[str], folder: Path) -> Path:
    count = 6
    table = pa.table(
        {
            "image_id": [f"img-{i}" for i in range(count)],
            "image": [png(i) for i in range(count)],
            "caption": [captions[i % len(captions)] for i in range(count)],
        }
    )
    pq.write_table(table, folder / "corpus.parquet")
    return folder / "corpus.parquet"


@pytest.mark.parametrize("method", ["dtrak", "dps"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_ingest_and_query_through_the_folder(kind: str, method: str, tmp_path: Path) -> None:
    make, captions = tiny.KINDS[kind]
    folder = tiny.saved(make(), tmp_path / "model")
    if kind == "dit":  # the published folders name their classes; diffusers' own saving does not
        listed = json.loads((folder / "model_index.json").read_text())
        listed["id2label"] = {"0": "cat, kitten", "2": "fish"}
        (folder / "model_index.json").write_text(json.dumps(listed))
    corpus = corpus_of(captions, tmp_path)
    model = Model.from_pretrained(folder, device="cpu")
    recipe = recipe_of(kind, method=method, dim=64)
    size = 4 if method == "dtrak" else None  # None: the engine is timed on this kind first
    summary = build_index(corpus, model, tmp_path / "index", recipe=recipe, batch_size=size)
    assert (summary.rows, summary.quarantined) == (6, {})

    # What is stored is what the pipeline in memory gives for one picture alone.
    memory = Model.from_pipeline(make(), device="cpu")
    engine = Engine(memory, recipe)
    x_0 = memory.encode_pictures(fit(decode(png(1)), memory.image_size)[None])
    alone = engine.rows(x_0, [captions[1]], ["img-1"]).features[0]
    index = Index(tmp_path / "index")
    stored = np.concatenate([index.stored.features(s) for s in index.stored.manifest.shards])
    assert np.linalg.norm(stored[1] - alone.numpy() / alone.norm().item()) <= 2e-3

    asking = Asking(seeds=2, steps=4, guidance=3.0)
    concept = Concept(captions[0], captions[1])
    if kind == "pixel":
        asking, concept = replace(asking, method="image"), Concept(image=Image.new("RGB", (9, 9)))
    result = index.query(concept, Model.from_pretrained(folder, device="cpu"), asking=asking, top=6)
    scores = [hit.score for hit in result.hits]
    assert sorted(hit.item_id for hit in result.hits) == [f"img-{i}" for i in range(6)]
    assert np.isfinite(scores).all()
    assert len(set(scores)) == 6


def test_caption_that_is_no_class_is_quarantined(tmp_path: Path) -> None:
    model, _ = model_of("class")
    corpus = corpus_of(["1", "a cat", "", "4", "3", "2"], tmp_path)
    summary = build_index(
        corpus, model, tmp_path / "index", recipe=recipe_of("class", dim=64), batch_size=6
    )
    assert summary.rows == 3
    assert summary.quarantined == {
        "caption 'a cat' is no class of this model (0 to 3)": 1,
        "no caption, and this model knows no picture without a class": 1,
        "caption '4' is no class of this model (0 to 3)": 1,
    }
    index = Index(tmp_path / "index")
    with pytest.raises(QueryError, match="'house' is no class"):
        index.query(Concept("house", "1"), model, asking=Asking(seeds=1, steps=2), top=1)
    with pytest.raises(QueryError, match="without a class"):
        index.query(Concept("1"), model, asking=Asking(seeds=1, steps=2), top=1)
    further = Concept("1", "2", contexts=(("3", "house"),))
    with pytest.raises(QueryError, match="'house' is no class"):
        index.query(further, model, asking=Asking(seeds=1, steps=2), top=1)


def test_guidance_needs_a_class_that_is_none() -> None:
    model, captions = model_of("class")
    engine = Engine(model, recipe_of("class", method="cfg"))
    with pytest.raises(ModelError, match="another method than cfg"):
        engine.rows(pictures(model), captions, ["one", "two"])
    model, captions = model_of("dit")
    engine = Engine(model, recipe_of("dit", method="cfg"))
    assert engine.rows(pictures(model), captions, ["one", "two"]).features.any(dim=1).all()


def test_class_by_name_is_the_class_by_number() -> None:
    model, _ = model_of("dit")
    found = model.encode_prompts(["kitten", "0", "cat", "2", ""])
    assert found is not None
    assert found.tensors["class_labels"].tolist() == [0, 0, 0, 2, 1000]
    assert model.refuses("kitten") is None
    assert model.refuses("") is None
    assert "0 to 999, or one of its 4 class names" in str(model.refuses("horse"))
    with pytest.raises(ModelError, match="'1000' is no class"):
        model.encode_prompts(["1000"])


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "flux"])
def adapted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A pipeline's folder, and beside it an adapter as a training script saves it."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = tiny.KINDS[request.param][0]()
    tiny.saved(pipeline, folder / "model")
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # as trained: an adapter begins with B = 0
        for name, parameter in denoiser.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    part = "unet" if "unet" in pipeline.components else "transformer"
    settings = denoiser.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(
        folder / "adapter",
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(denoiser),
            f"{part}_lora_adapter_metadata": settings | {"target_modules": ["to_q", "to_v"]},
        },
    )
    return folder / "model", folder / "adapter"


def test_adapter_alone_is_attributed(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = adapted
    plain = Model.from_pretrained(folder, device="cpu")
    model = Model.from_pretrained(folder, lora=adapter, device="cpu")
    changed = {name for name, mark in model.fingerprint.items() if plain.fingerprint[name] != mark}
    assert changed == {"denoiser"}
    engine = Engine(model, Recipe(projection="identity", timesteps=2, steps=6))
    assert engine.recipe.parameters == "lora_"
    assert all("lora_" in slot.name for slot in engine.selection.slots)
    captions = ["a red cat", "a blue dog"]
    for point in engine.points(pictures(model), captions, ["one", "two"]):
        rows, _, e = engine.raw_gradient(point, engine.method.cotangent)
        assert (e - plain.noise(point.x_t, point.t, point.states)).abs().max() > 1e-4
        cosine = torch.cosine_similarity(rows.double(), autograd_rows(engine, point))
        assert cosine.min() >= 0.99999
    corpus = corpus_of(captions, tmp_path)
    recipe = Recipe(timesteps=2, steps=6, dim=64)
    build_index(corpus, model, tmp_path / "index", recipe=recipe)
    index = Index(tmp_path / "index")
    asking = Asking(seeds=1, steps=4)
    hits = index.query(Concept(*captions), model, asking=asking, top=6).hits
    assert len({hit.score for hit in hits}) == 6
    with pytest.raises(QueryError, match=r"model\.denoiser"):
        index.query(Concept(*captions), plain, asking=asking, top=6)


def test_strength_of_an_adapter_is_part_of_the_model() -> None:
    marks = []
    for alpha in (2, 4):
        pipeline = tiny.stable_diffusion()
        torch.manual_seed(0)
        pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q"]))
        marks.append(Model.from_pipeline(pipeline, device="cpu").fingerprint)
    assert marks[0]["denoiser"] != marks[1]["denoiser"]


def test_adapter_that_does_not_fit_is_refused(model_folder: Path, tmp_path: Path) -> None:
    def load(lora: Path, folder: Path = model_folder) -> Model:
        return Model.from_pretrained(folder, lora=lora, device="cpu")

    for missing in (tmp_path / "nowhere", Path("nowhere.safetensors")):
        with pytest.raises(ModelError, match="does not exist; check --lora"):
            load(missing)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no adapter")
    with pytest.raises(ModelError, match="cannot be loaded as a LoRA"):
        load(broken)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"unet.mid_block.attentions.7.to_q.lora_A.weight": torch.ones(2, 16)}, foreign)
    with pytest.raises(ModelError, match=r"foreign\.safetensors"):
        load(foreign)
    pipeline = tiny.stable_diffusion()
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    weights = get_peft_model_state_dict(pipeline.text_encoder, adapter_name="default")
    pipeline.save_lora_weights(tmp_path / "text", text_encoder_lora_layers=weights)
    with pytest.raises(ModelError, match="adapts no layer of the denoiser"):
        load(tmp_path / "text")
    pixels = tiny.saved(tiny.pixel_diffusion(), tmp_path / "pixels")
    with pytest.raises(ModelError, match="DDPMPipeline takes no LoRA"):
        load(foreign, pixels)


def test_adapter_on_the_command_line(
    headwater: Command,
    adapted: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    folder, adapter = adapted
    corpus, out = corpus_of(["a red cat", "a blue dog"], tmp_path), tmp_path / "index"
    model = ("--model", folder, "--lora", adapter / "pytorch_lora_weights.safetensors")
    small = ("--dim", 64, "--timesteps", 2, "--device", "cpu", "--quiet")
    code, _, err = headwater("ingest", corpus, *model, "--out", out, *small)
    assert code == 0, err
    assert "No LoRA keys" not in caplog.text  # that the text encoders stay as they are is usual
    assert Index(out).recipe.parameters == "lora_"
    ask = ("--prompt", "a red cat", "--seeds", 1, "--top", 3, "--device", "cpu", "--quiet")
    code, found, err = headwater("query", out, *model, *ask)
    assert code == 0, err
    assert "img-" in found
