"""`headwater bench speed`: the engine against the published loop, on random models of real size.

Everything is measured in one run on one machine, from latents: img/s, peak memory, and each
recipe against its floor = forward-equivalents x the measured forward time of the same model in the
same mode. A backward pass to the activations counts as one forward.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwater.attribution import Engine, Execution, Model, ModelError, Recipe, choose_batch
from headwater.attribution.capture import Capture
from headwater.attribution.model import usable_device
from headwater.attribution.trajectory import guided_output
from headwater.benchmarks import published_loop, sizes

GIB = 2**30
CAPTION = "a photo of the red house"
RECIPES = {
    "default": Recipe(dtype="bfloat16"),
    "published": Recipe(method="dps", dtype="bfloat16"),
}
PLAIN = Execution(deterministic=False)
MODES = {
    "plain": PLAIN,
    "deterministic": Execution(),
    "low memory": replace(PLAIN, checkpointing=True),
    "compiled": replace(PLAIN, compile=True),
}


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    model: str
    recipe: str
    mode: str
    batch: int
    seconds: float  # for the batch
    memory: float  # peak, GiB, the model's weights included
    forward: float  # seconds of one forward of the batch in the same mode; 0 if not measured
    equivalents: float  # forwards that the recipe amounts to

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.batch / self.seconds

    @property
    def of_floor(self) -> float | None:
        """Share of the floor's speed that is reached."""
        return self.forward * self.equivalents / self.seconds if self.forward else None


def run(out: Path | None, names: tuple[str, ...], device: str, say: Callable[[str], None]) -> None:
    """Measure, say a line at a time, and write `out`.md (tables) and `out`.jsonl (records).

    Raises:
        ModelError: a name that `sizes.PIPELINES` does not have, or an unusable device.
    """
    for name in names:
        if name not in sizes.PIPELINES:
            raise ModelError(
                f"no model of real size is called {name!r}; choose of {', '.join(sizes.PIPELINES)}"
            )
    if out is not None:  # not after hours
        out.parent.mkdir(parents=True, exist_ok=True)
    bench = _Bench(usable_device(device), say)
    for done, name in enumerate(names, start=1):
        bench.model(name)
        text = bench.report(f"headwater bench speed --models {','.join(names[:done])}")
        if out is not None:  # after each: a later one may fail
            out.with_name(f"{out.name}.md").write_text(text)
            lines = [json.dumps(asdict(m) | {"rate": m.rate}) for m in bench.measured]
            out.with_name(f"{out.name}.jsonl").write_text("\n".join(lines) + "\n")
    say(text)


def equivalents(recipe: Recipe) -> float:
    """Forward passes that a recipe amounts to: backward passes count as one each."""
    if recipe.method == "dps":  # guided inversion, then a forward and two backward passes
        return 2 * recipe.steps + 3 * recipe.timesteps
    return 2 * recipe.timesteps


class _Bench:
    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what the clock and the memory are asked of
        self.say = say
        self.measured: list[Measured] = []
        self.forwards: dict[tuple[str, str, int], float] = {}
        self.notes: list[str] = []

    def model(self, name: str) -> None:
        """All lines of one model."""
        pipeline = sizes.build(name, self.device, torch.bfloat16)
        model = Model.from_pipeline(pipeline, device=str(self.device), dtype="bfloat16")
        largest = {"sd-1.4": 64, "flux": 4}.get(name, 16)  # beyond, minutes buy no percent
        best = choose_batch(Engine(model, RECIPES["default"], PLAIN), largest).batch_size
        if name == "sd-1.4":
            for batch in (4, 16):
                self._reference(model, batch)
            wanted = [(16, "plain"), (16, "low memory"), (best, "plain"), (best, "compiled")]
            for batch, mode in [*wanted, (best, "deterministic")]:
                for recipe in ("published", "default"):
                    if mode in MODES:
                        self._engine(name, model, recipe, mode, batch)
            self._parts(model, best)
            self._pictures(model, 16)
            self._agreement(pipeline)
        else:
            self._engine(name, model, "default", "plain", best)
            self._engine(name, model, "default", "low memory", best)
        del model, pipeline
        gc.collect()
        self._free()

    def _engine(self, name: str, model: Model, recipe: str, mode: str, batch: int) -> None:
        engine = Engine(model, RECIPES[recipe], MODES[mode])
        x_0 = torch.randn(batch, *model.sample_shape, device=self.device)
        captions, keys = [CAPTION] * batch, [str(i) for i in range(batch)]
        # Compile, choose kernels and fill caches on a short path; then time the whole recipe.
        grid, timesteps = engine.grid, engine.timesteps
        engine.grid, engine.timesteps = timesteps[:2], timesteps[:1]
        engine.rows(x_0, captions, keys)
        engine.grid, engine.timesteps = grid, timesteps
        often = 3 if (name, recipe) == ("sd-1.4", "default") else 1
        seconds, memory = min(
            self._timed(lambda: engine.rows(x_0, captions, keys)) for _ in range(often)
        )
        alone = self._forward(name, engine, mode, x_0, captions)
        self._add(
            Measured(
                name,
                recipe,
                mode if engine.execution == MODES[mode] else "compiled, refused",
                batch,
                seconds,
                memory,
                alone,
                equivalents(engine.recipe),
            )
        )

    def _forward(
        self, name: str, engine: Engine, mode: str, x_0: Tensor, captions: list[str]
    ) -> float:
        """Seconds of one forward pass of a batch: half of a guided one, as the inversion makes."""
        key = (name, mode, len(x_0))
        if key not in self.forwards:
            model = engine.model
            states, null = engine.states(captions)
            t = torch.full((len(x_0),), engine.timesteps[0], device=self.device)

            @torch.no_grad()
            def forward() -> Tensor:
                return guided_output(model, x_0, t, states, null, 7.5)

            forward()
            halves = 1 if null is None or "guidance" in null.tensors else 2
            self.forwards[key] = min(self._timed(forward)[0] for _ in range(5)) / halves
        return self.forwards[key]

    def _reference(self, model: Model, batch: int) -> None:
        unet = model.denoiser.half()
        x_0 = torch.randn(batch, *model.sample_shape, device=self.device).half()
        states = [model.encode_prompts([prompt] * batch) for prompt in (CAPTION, "")]
        text, null = (s.tensors["encoder_hidden_states"].half() for s in states if s is not None)
        engine = Engine(model, RECIPES["published"], PLAIN)
        kept = _kept(model)
        coordinates = torch.arange(2**15, device=self.device) * (engine.selection.size // 2**15)

        def loop(steps: int = 10) -> Tensor:
            grid = engine.grid if steps == 10 else engine.timesteps[:steps]
            timesteps = engine.timesteps[:steps]
            points = published_loop.guided_inversion(unet, kept, x_0, text, null, grid, timesteps)
            return published_loop.features(unet, kept, x_0, text, points, timesteps, coordinates)

        loop(1)
        seconds, memory = self._timed(loop)
        self._add(
            Measured("sd-1.4", "published loop", "vmap, fp16", batch, seconds, memory, 0, 130)
        )
        model.denoiser.to(torch.bfloat16)
        self._free()

    def _parts(self, model: Model, batch: int) -> None:
        """Where one point's time goes, by leaving stages out."""
        engine = Engine(model, RECIPES["default"], PLAIN)
        x_0 = torch.randn(batch, *model.sample_shape, device=self.device)
        keys = [str(i) for i in range(batch)]
        states, null = engine.states([CAPTION] * batch)
        point = next(iter(engine.noised(x_0, states, null, keys)))

        class Nothing:
            dim = engine.projector.dim

            def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Any) -> None:
                pass

        @torch.no_grad()
        def forward() -> None:
            model.noise(point.x_t, point.t, point.states)

        def pulled(projector: Any, take: bool) -> None:
            with (
                torch.enable_grad(),
                Capture(engine.selection, projector, batch, self.device) as capture,
            ):
                e = model.noise(point.x_t, point.t, point.states)
                if take:
                    capture.pull(e, e.detach())
                else:
                    torch.autograd.grad(e, capture.anchor, e.detach(), allow_unused=True)

        stages: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "+ backward to the activations": lambda: pulled(Nothing(), False),
            "+ per-sample gradients": lambda: pulled(Nothing(), True),
            "+ projection and norms": lambda: pulled(engine.projector, True),
            "one point, whole": lambda: engine.method_gradient(point),
            "rows / points (text, noise, sums)": lambda: engine.rows(x_0, [CAPTION] * batch, keys),
        }
        before = 0.0
        for stage, work in stages.items():
            work()
            seconds = min(self._timed(work)[0] for _ in range(3))
            if stage.startswith("rows"):
                seconds /= len(engine.timesteps)
            each, more = seconds / batch * 1e3, (seconds - before) / batch * 1e3
            self.notes.append(f"| {stage} | {each:.3f} | {more:+.3f} |")
            before = seconds

    def _pictures(self, model: Model, batch: int) -> None:
        """What stands before the latents: the image codec and the text encoder."""
        height, width = model.image_size
        pixels = torch.rand(batch, 3, height, width) * 2 - 1
        prompts = [f"a photo of the {word} {i}" for i, word in enumerate(sizes.WORDS)][:batch]
        for label, work in (
            ("image codec", lambda: model.encode_images(pixels)),
            ("text encoder", lambda: model.encode_prompts(prompts)),
        ):
            work()
            seconds = self._timed(work)[0]
            self.notes.append(f"| {label} (once per image) | {seconds / batch * 1e3:.3f} | |")

    def _agreement(self, pipeline: Any) -> None:
        """Features of engine and reference in float32, on the same timesteps and coordinates."""
        pipeline.unet.float()
        model = Model.from_pipeline(pipeline, device=str(self.device), dtype="float32")
        recipe = Recipe(method="dps", projection="identity", timesteps=3)
        engine = Engine(model, recipe, PLAIN)
        x_0 = torch.randn(2, *model.sample_shape, device=self.device)
        captions = [CAPTION, "a painting of the cat"]
        states, null = engine.states(captions)
        assert states is not None
        assert null is not None
        text, empty = (s.tensors["encoder_hidden_states"] for s in (states, null))
        kept = _kept(model)
        size = engine.selection.size
        whole = torch.arange(0, size, max(1, size // 2**15), device=self.device)
        torch.backends.cudnn.allow_tf32 = False
        points = published_loop.guided_inversion(
            model.denoiser, kept, x_0, text, empty, engine.grid, engine.timesteps
        )
        theirs = published_loop.features(
            model.denoiser, kept, x_0, text, points, engine.timesteps, whole
        )
        ours = engine.rows(x_0, captions, ["a", "b"]).features[:, whole]
        cosine = torch.cosine_similarity(ours, theirs)
        self.notes.append(
            f"\nFeatures against the published loop's in float32, 2 images, {len(whole):,} "
            f"coordinates: cosine {float(cosine.min()):.6f} (the smaller)."
        )

    def _timed(self, work: Callable[[], Any]) -> tuple[float, float]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
        return time.perf_counter() - start, memory

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, line: Measured) -> None:
        self.measured.append(line)
        self.say(_row(line))

    def report(self, command: str) -> str:
        """Markdown: the table, the ratios, where a point's time goes."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor()
        reference = {m.batch: m for m in self.measured if m.recipe == "published loop"}
        lines = [
            f"`{command}`, {date.today()}, {name}, torch {torch.__version__}\n",
            "| model | recipe | mode | batch | img/s | GiB | forward ms | forwards | of floor |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_row, self.measured),
        ]
        if reference:
            lines += [
                "",
                "| recipe | mode | batch | speed / loop at 4 | / loop at 16 | memory / loop's |",
            ]
            lines += ["|---|---|---|---|---|---|"]
            for m in self.measured:
                if m.model == "sd-1.4" and m.recipe in RECIPES:
                    small, large = (m.rate / reference[b].rate for b in (4, 16))
                    lines.append(
                        f"| {m.recipe} | {m.mode} | {m.batch} | {small:.1f} | {large:.1f} "
                        f"| {m.memory / (reference[16].memory or 1):.0%} |"
                    )
        if self.notes:
            lines += [
                "",
                "| stage of the default recipe, SD-1.4, plain | ms/img | more |",
                "|---|---|---|",
            ]
            lines += self.notes
        return "\n".join(lines) + "\n"


def _kept(model: Model) -> Tensor:
    """Alpha-bar of every training timestep."""
    table: Any = model.schedule.scheduler.alphas_cumprod
    return torch.as_tensor(table, device=model.device)


def _row(m: Measured) -> str:
    floor = "" if m.of_floor is None else f"{m.of_floor:.0%}"
    return (
        f"| {m.model} | {m.recipe} | {m.mode} | {m.batch} | {m.rate:.2f} | {m.memory:.1f} "
        f"| {m.forward / m.batch * 1e3:.2f} | {m.equivalents:.0f} | {floor} |"
    )
