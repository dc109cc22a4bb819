"""Many models trained at once are, each, the model trained alone; and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from headwater.attribution import Model, generation_path
from headwater.attribution.conditions import Conditions
from headwater.benchmarks import retraining, stacked
from headwater.benchmarks.retraining import Job, Lessons, Training, train

TRAINING = Training(widths=(16, 32), steps=8, batch=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def base() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture(scope="module")
def lessons(base: Model) -> Lessons:
    x_0 = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    colours = ["red", "blue"]
    said = [[f"a {colours[i % 2]} cat", f"a {colours[i % 2]} drawing", ""] for i in range(10)]
    return retraining.lessons_of(base, x_0, said, (0.6, 0.3, 0.1))


def unets(base: Model, count: int, widths: tuple[int, ...] = (8, 16)) -> list[Any]:
    """Small UNets whose weights differ everywhere, biases and norms too."""
    made = [retraining.small_unet(base, widths, 8, seed) for seed in range(count)]
    for seed, unet in enumerate(made):
        generator = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for weight in unet.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return made


def inputs(base: Model, lessons: Lessons, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(count, *base.sample_shape, generator=generator)
    t = torch.randint(0, 1000, (count,), generator=generator)
    return x_t, t, lessons.states[torch.arange(count) % len(lessons.states)]


@pytest.mark.parametrize("gathered", [False, True])
def test_a_stack_gives_each_models_output_and_gradient(
    base: Model, lessons: Lessons, gathered: bool
) -> None:
    plain = unets(base, 3)
    whole = stacked.stack(plain)
    for module in whole.modules():
        if isinstance(module, stacked.Convolution):
            module.gathered = gathered
    x_t, t, states = inputs(base, lessons, 15)  # sample b of model m at b * 3 + m
    weight = torch.randn(15, *base.sample_shape, generator=torch.Generator().manual_seed(8))
    out = whole(x_t, t, encoder_hidden_states=states).sample
    (out * weight).sum().backward()
    for m, unet in enumerate(plain):
        alone = unet(x_t[m::3], t[m::3], encoder_hidden_states=states[m::3]).sample
        torch.testing.assert_close(out[m::3], alone, rtol=1e-4, atol=1e-5)
        (alone * weight[m::3]).sum().backward()
        for name, parameter in unet.named_parameters():
            gradient = whole.get_parameter(name).grad
            assert gradient is not None
            assert parameter.grad is not None
            torch.testing.assert_close(gradient[m], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_stack_computes_in_bfloat16_too(base: Model, lessons: Lessons, gathered: bool) -> None:
    plain = unets(base, 2)
    whole = stacked.stack(plain)
    for module in whole.modules():
        if isinstance(module, stacked.Convolution):
            module.gathered = gathered
    x_t, t, states = inputs(base, lessons, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = whole(x_t, t, encoder_hidden_states=states).sample
    for m, unet in enumerate(plain):
        with torch.no_grad():
            alone = unet(x_t[m::2], t[m::2], encoder_hidden_states=states[m::2]).sample
        assert 0 < (out[m::2] - alone).norm() < 0.05 * alone.norm()


def test_models_are_taken_chosen_and_joined_by_place(base: Model) -> None:
    plain = unets(base, 3)
    whole = stacked.stack(plain)
    for m in range(3):
        back = stacked.taken(whole, m, plain[0]).state_dict()
        assert all(torch.equal(back[name], value) for name, value in plain[m].state_dict().items())
    swapped = stacked.concatenated([stacked.chosen(whole, [2]), stacked.chosen(whole, [0, 1])])
    expected = stacked.stack([plain[2], plain[0], plain[1]]).state_dict()
    found = swapped.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Dropout(0.1)), "0 drops out"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "plain convolutions"),
        (nn.Sequential(nn.Embedding(3, 4)), "Embedding, cannot be stacked"),
    ],
)
def test_what_cannot_be_stacked_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stacked.stack([module, module])


def alone(base: Model, lessons: Lessons, job: Job, training: Training) -> Any:
    """The model of one job by a plain loop over steps and pictures, with an ordinary UNet."""
    unet = retraining.small_unet(base, training.widths, 8, job.seed)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=training.weight_decay)
    generator = torch.Generator().manual_seed(job.seed)
    a, s = base.schedule.coefficients(torch.arange(1000))
    for number in range(training.steps):
        eps = torch.empty(training.batch, *lessons.x_0.shape[1:]).normal_(generator=generator)
        chance = torch.empty(2, training.batch).uniform_(generator=generator)
        t = torch.empty(training.batch, dtype=torch.int64).random_(0, 1000, generator=generator)
        loss = torch.zeros(())
        for i in range(training.batch):
            row = int(job.members[int(chance[0, i] * len(job.members))])
            variant = sum(float(chance[1, i]) >= bound for bound in (0.6, 0.9))
            heard = lessons.states[lessons.sentences[row, variant]]
            x_t = a[t[i]] * lessons.x_0[row] + s[t[i]] * eps[i]
            e = unet(x_t[None], t[i], encoder_hidden_states=heard[None])
            loss = loss + (e.sample[0] - eps[i]).square().mean() / training.batch
        for group in optimizer.param_groups:
            group["lr"] = retraining._rate(number, training)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet


@pytest.mark.parametrize("at_once", [3, 2])
def test_each_model_of_a_batched_training_is_the_one_trained_alone(
    base: Model, lessons: Lessons, at_once: int
) -> None:
    jobs = [
        Job(torch.tensor([0, 1, 2, 3, 4]), seed=5),
        Job(torch.tensor([9, 7, 5]), seed=5),
        Job(torch.arange(10), seed=6),
    ]
    said: list[str] = []
    whole = train(base, lessons, jobs, TRAINING, at_once=at_once, say=said.append)
    assert len(said) == -(-3 // at_once)
    first = retraining.small_unet(base, TRAINING.widths, 8, 5)
    for m, job in enumerate(jobs):
        expected = alone(base, lessons, job, TRAINING).state_dict()
        found = stacked.taken(whole, m, first).state_dict()
        for name, begun in first.state_dict().items():
            moved = (expected[name] - begun).norm()
            assert moved > 0.01
            assert (found[name] - expected[name]).norm() < 2e-3 * moved


def test_a_stack_is_sampled_as_its_models_are(base: Model, lessons: Lessons) -> None:
    plain = unets(base, 2)
    noise = torch.randn(3, *base.sample_shape, generator=torch.Generator().manual_seed(3))
    heard = lessons.states[[1, 2, 3]]
    grid = [1, 251, 501, 751]

    def drawn(denoiser: nn.Module, copies: int) -> Tensor:
        states = Conditions({"encoder_hidden_states": heard.repeat_interleave(copies, 0)})
        null = base.encode_prompts([""] * 3 * copies)
        model = retraining.with_denoiser(base, denoiser)
        x_T = noise.repeat_interleave(copies, 0)
        x_0, _ = generation_path(model, x_T, states, null, grid=grid, timesteps=[], guidance=5.0)
        return x_0

    together = drawn(stacked.stack(plain), 2)
    for m, unet in enumerate(plain):
        torch.testing.assert_close(together[m::2], drawn(unet, 1), rtol=1e-3, atol=1e-4)


def test_a_trained_model_is_a_standard_pipeline(
    base: Model, lessons: Lessons, tmp_path: Any
) -> None:
    jobs = [Job(torch.arange(10), seed=1), Job(torch.arange(5), seed=2)]
    whole = train(base, lessons, jobs, TRAINING, at_once=2, say=lambda _: None)
    unet = stacked.taken(whole, 1, retraining.small_unet(base, TRAINING.widths, 8, 0))
    retraining.pipeline_of(base, unet).save_pretrained(tmp_path / "model")
    loaded = Model.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert loaded.fingerprint["vae"] == base.fingerprint["vae"]
    assert loaded.fingerprint["denoiser"] != base.fingerprint["denoiser"]
    x_t, t, _ = inputs(base, lessons, 2)
    states = base.encode_prompts(["a red cat", "a blue cat"])
    torch.testing.assert_close(
        loaded.noise(x_t, t, states),
        retraining.with_denoiser(base, unet).noise(x_t, t, states),
    )


@pytest.mark.parametrize(
    ("job", "training", "message"),
    [
        (Job(torch.tensor([], dtype=torch.int64), 0), TRAINING, "subset of model 0 is empty"),
        (Job(torch.arange(3), 0), Training((8, 16), 20, 4, 1e6), "lower the learning rate"),
    ],
)
def test_a_training_that_fails_says_so(
    base: Model, lessons: Lessons, job: Job, training: Training, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(base, lessons, [job], training, at_once=1, say=lambda _: None)


@pytest.mark.parametrize("make", [tiny.pixel_diffusion, lambda: tiny.KINDS["sd-v"][0]()])
def test_a_base_that_lends_nothing_is_refused(
    make: Callable[[], Any],
) -> None:
    other = Model.from_pipeline(make(), device="cpu")
    with pytest.raises(ValueError, match="Stable Diffusion pipeline that predicts epsilon"):
        retraining.lessons_of(other, torch.zeros(1, 3, 8, 8), [[""]], (1.0,))


def test_training_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="train nothing"):
        Training(steps=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_recorded_step_on_a_gpu_trains_what_a_cpu_trains() -> None:
    """In bfloat16 and from a GPU's own draws: so by what was learnt, of constant pictures."""
    found = {}
    for device in ("cpu", "cuda"):
        base = Model.from_pipeline(tiny.stable_diffusion(), device=device, dtype="float32")
        x_0 = torch.ones(6, 4, 8, 8, device=device)
        lessons = retraining.lessons_of(base, x_0, [["a red cat"]] * 6, (1.0,))
        training = Training(widths=(16, 32), steps=120, batch=8, learning_rate=5e-3)
        jobs = [Job(torch.arange(6), seed=seed) for seed in range(3)]
        said: list[str] = []
        whole = train(base, lessons, jobs, training, at_once=3, say=said.append)
        assert not any("no CUDA graph" in line for line in said)
        model = retraining.with_denoiser(base, whole)
        t = torch.full((3,), 600, device=device)
        eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9)).to(device)
        a, s = base.coefficients(t)
        e = model.noise(a + s * eps, t, base.encode_prompts(["a red cat"] * 3))
        found[device] = (e - eps).square().flatten(1).mean(1).cpu()
    assert found["cpu"].max() < 0.3
    assert found["cuda"].max() < 0.3
