"""Fine-tuning: what it changes, what it leaves alone, and that the result is a model like any."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from headwater.attribution import Model, ModelError, ddim_grid, seeded_noise
from headwater.benchmarks.finetuning import (
    FineTuning,
    Pictures,
    _Task,
    add_words,
    custom_diffusion,
    denoising_loss,
    textual_inversion,
)

WORDS = {"<one>": "cat", "<two>": "dog"}


def pictures(captions: list[str], seed: int) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    return Pictures(torch.randn(len(captions), 4, 8, 8, generator=generator), tuple(captions))


@pytest.fixture(scope="module")
def base() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture(scope="module")
def exemplars() -> Pictures:
    return pictures(["a <one>", "a <one>", "a <one>", "the <two>"], seed=1)


@pytest.fixture(scope="module")
def prior() -> Pictures:
    return pictures(["a red fish", "the blue house", "a drawing"], seed=2)


@pytest.fixture(scope="module")
def inverted(base: Model, exemplars: Pictures) -> Model:
    tuning = FineTuning(steps=40, batch=8, token_rate=0.1)
    return textual_inversion(base, exemplars, WORDS, tuning)


@pytest.fixture(scope="module")
def tuned(base: Model, exemplars: Pictures, prior: Pictures) -> Model:
    tuning = FineTuning(steps=40, batch=8, token_rate=0.05, weight_rate=0.01)
    return custom_diffusion(base, exemplars, prior, WORDS, tuning)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def test_textual_inversion_changes_the_new_embeddings_alone(base: Model, inverted: Model) -> None:
    assert inverted.fingerprint["denoiser"] == base.fingerprint["denoiser"]
    assert inverted.fingerprint["vae"] == base.fingerprint["vae"]
    assert inverted.fingerprint["text_encoder"] != base.fingerprint["text_encoder"]
    assert inverted.fingerprint["tokenizer"] != base.fingerprint["tokenizer"]
    only_embeddings_grew(base, inverted)


def test_custom_diffusion_changes_keys_values_and_the_new_embeddings(
    base: Model, tuned: Model
) -> None:
    only_embeddings_grew(base, tuned)
    before, after = state(base.denoiser), state(tuned.denoiser)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    meant = {name for name in before if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert changed == meant
    assert len(meant) == 4 * 2  # four cross-attention layers in this UNet
    assert tuned.fingerprint["denoiser"] != base.fingerprint["denoiser"]


def only_embeddings_grew(base: Model, taught: Model) -> None:
    before = state(base.family.text_encoders["text_encoder"])
    after = state(taught.family.text_encoders["text_encoder"])
    table = next(name for name in before if name.endswith("token_embedding.weight"))
    for name, tensor in before.items():
        known = after[name][: len(tensor)] if name == table else after[name]
        assert torch.equal(tensor, known), name
    assert len(after[table]) == len(before[table]) + len(WORDS)
    vocabulary = taught.family.tokenizers["tokenizer"].get_vocab()
    for word, beginning in WORDS.items():
        assert not torch.equal(after[table][vocabulary[word]], before[table][vocabulary[beginning]])


def test_the_model_that_is_taught_stays_as_it_was(base: Model, inverted: Model) -> None:
    fresh = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    assert base.fingerprint == fresh.fingerprint
    assert not any(p.requires_grad for p in inverted.denoiser.parameters())
    assert "<one>" not in base.family.tokenizers["tokenizer"].get_vocab()


def test_the_loss_on_the_exemplars_falls(
    base: Model, inverted: Model, tuned: Model, exemplars: Pictures
) -> None:
    untaught = textual_inversion(base, exemplars, WORDS, FineTuning(steps=1, token_rate=0.0))
    before = denoising_loss(untaught, exemplars)
    after = denoising_loss(inverted, exemplars)
    assert after < before
    assert denoising_loss(tuned, exemplars) < after


def test_prior_pictures_keep_what_was_known(
    base: Model, exemplars: Pictures, prior: Pictures
) -> None:
    def forgotten(weight: float) -> float:
        tuning = FineTuning(steps=20, batch=8, weight_rate=0.01, prior_weight=weight)
        return denoising_loss(custom_diffusion(base, exemplars, prior, WORDS, tuning), prior)

    assert forgotten(1.0) < forgotten(0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_error_of_what_the_model_puts_out(prediction: str) -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(prediction_type=prediction), device="cpu")
    shown = pictures(["a red cat", "the dog"], seed=3)
    # The same by hand: each level of the grid, each picture alone, its target from the definition.
    total = 0.0
    for i, caption in enumerate(shown.captions):
        for level in ddim_grid(model, 10):
            x_0 = shown.x_0[i].double()
            eps = seeded_noise(0, f"{level}/{i}", (4, 8, 8)).double()
            power = float(model.schedule.scheduler.alphas_cumprod[level])
            a, s = power**0.5, (1 - power) ** 0.5
            wanted = {"epsilon": eps, "v_prediction": a * eps - s * x_0, "sample": x_0}[prediction]
            tokens = model.family.pipeline.tokenizer(
                caption, padding="max_length", max_length=8, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                states = model.family.pipeline.text_encoder(tokens)[0]
                x_t = (a * x_0 + s * eps).float()[None]
                output = model.denoiser(x_t, torch.tensor([level]), states).sample[0].double()
            total += float((output - wanted).square().mean()) / 20
    assert denoising_loss(model, shown) == pytest.approx(total, rel=1e-5)


def test_subjects_are_drawn_alike_however_many_exemplars_they_have(base: Model) -> None:
    pipeline = tiny.stable_diffusion()
    vector = torch.zeros(16)
    add_words(pipeline, {"<one>": vector, "<two>": vector})
    model = Model.from_pipeline(pipeline, device="cpu")
    shown = pictures(["a <one>"] * 9 + ["the <two>"], seed=4)
    task = _Task(model, shown, None, FineTuning())
    assert float(task.chance[9]) == pytest.approx(float(task.chance[:9].sum()))


def test_a_saved_model_is_loaded_with_the_same_fingerprint(tuned: Model, tmp_path: Path) -> None:
    tuned.family.pipeline.save_pretrained(tmp_path / "taught")
    loaded = Model.from_pretrained(tmp_path / "taught", device="cpu")
    assert loaded.fingerprint == tuned.fingerprint
    mine, theirs = (m.encode_prompts(["a <one> in the house"]) for m in (tuned, loaded))
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(mine.tensors, theirs.tensors)


def test_training_repeats_to_the_bit(base: Model, exemplars: Pictures, prior: Pictures) -> None:
    def once(seed: int) -> dict[str, str]:
        tuning = FineTuning(steps=3, batch=4, seed=seed)
        return custom_diffusion(base, exemplars, prior, WORDS, tuning).fingerprint

    assert once(0) == once(0)
    assert once(0)["denoiser"] != once(1)["denoiser"]


def test_what_cannot_be_taught_is_refused(base: Model, exemplars: Pictures) -> None:
    tuning = FineTuning(steps=1)
    with pytest.raises(ModelError, match="knows the word 'cat' already"):
        textual_inversion(base, exemplars, {"cat": "dog"}, tuning)
    with pytest.raises(ModelError, match="cannot begin as 'zebra'"):
        textual_inversion(base, exemplars, {"<one>": "zebra"}, tuning)
    with pytest.raises(ModelError, match="cannot begin as 'red cat'"):
        textual_inversion(base, exemplars, {"<one>": "red cat"}, tuning)
    with pytest.raises(ModelError, match="'a cat' of an exemplar names no new word"):
        textual_inversion(base, pictures(["a cat"], 0), WORDS, tuning)
    with pytest.raises(ModelError, match="'a <two>' of a prior picture names a new word"):
        custom_diffusion(base, exemplars, pictures(["a <two>"], 0), WORDS, tuning)
    with pytest.raises(ModelError, match="0 pictures with 0 captions"):
        textual_inversion(base, Pictures(torch.zeros(0, 4, 8, 8), ()), WORDS, tuning)
    sdxl = Model.from_pipeline(tiny.stable_diffusion_xl(), device="cpu")
    with pytest.raises(ModelError, match="one tokenizer and one text encoder"):
        textual_inversion(sdxl, exemplars, WORDS, tuning)
    with pytest.raises(ModelError, match="steps is 0"):
        FineTuning(steps=0)
    with pytest.raises(ModelError, match="those of the model"):
        add_words(tiny.stable_diffusion(), {"<one>": torch.zeros(3)})
    half = Model.from_pipeline(tiny.stable_diffusion(), device="cpu", dtype="bfloat16")
    with pytest.raises(ModelError, match="needs float32"):
        textual_inversion(half, exemplars, WORDS, tuning)
