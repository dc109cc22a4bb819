"""Query gradients: a concept, asked in one of five ways, becomes a vector beside the rows.

Signs follow objectives.py: a row with a positive inner product taught the concept. Raising a
reward moves e against grad R, so the loss that falls is -R, its cotangent is + s_t grad R, and the
slider is the special case R = log p(c | x_t) - log p(c- | x_t), for which
s_t grad R = -(e(c) - e(c-)).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .engine import Engine
from .errors import ModelError
from .model import Model
from .objectives import Cotangent, Point, denoising
from .trajectory import renoised

SPACES = ("x_t", "image")


@dataclass(frozen=True)
class Reward:
    """Any differentiable score of a picture: what it rewards is the concept.

    `function` maps a batch [B, C, H, W] to one value per sample [B] (or to their sum). It sees
    x_t itself, or with `of="image"` the predicted image in about [-1, 1].
    """

    function: Callable[[Tensor], Tensor]
    of: str = "image"

    def __post_init__(self) -> None:
        """Refuse a space that does not exist."""
        if self.of not in SPACES:
            raise ModelError(f"reward of {self.of!r} is unknown; choose {' or '.join(SPACES)}")


def image_rows(engine: Engine, x_0: Tensor, prompts: Sequence[str], keys: Sequence[str]) -> Tensor:
    """Whole-image attribution: the training row that each sample x_0 [S, ...] would have."""
    return engine.rows(x_0, prompts, keys).features


def contrast_rows(
    engine: Engine,
    x_0: Tensor,
    prompts: Sequence[str],
    contrasts: Sequence[str],
    keys: Sequence[str],
    further: Sequence[tuple[Sequence[str], Sequence[str]]] = (),
) -> Tensor:
    """What each prompt changes in its picture's row against its contrast, at the same x_t.

    J(c)^T v(c) - J(c-)^T v(c-), each scaled as the recipe says: [S, dim]. What the picture shows
    whatever the text says cancels; what remains is how the text's concept is drawn.

    With `further` pairs (prompts, contrasts), [S] texts on each side, that say the same concept in
    other company, the mean over all pairs of what each changes: the concept's main effect (Fisher
    1935). What concept and company make of each other averages out, which one contrast counts as
    the concept's. The concept without company is the pair of it and the empty prompt.

    Texts that stand in several pairs are heard once; those that cancel, not at all.
    """
    pairs = [(prompts, contrasts), *further]
    counts: Counter[tuple[str, ...]] = Counter()
    for having, lacking in pairs:
        counts[tuple(having)] += 1
        counts[tuple(lacking)] -= 1
    own = counts.pop(tuple(prompts))  # the points hear it already
    heard = [(engine.model.encode_prompts(texts), n) for texts, n in counts.items() if n]
    rows = torch.zeros(len(x_0), engine.projector.dim, device=engine.model.device)
    for point in engine.points(x_0, prompts, keys):
        if own:
            rows += own * engine.method_gradient(point)[0]
        for states, n in heard:
            rows += n * engine.method_gradient(replace(point, states=states))[0]
    return rows / len(pairs)


def journey_rows(
    engine: Engine, points: Iterable[Point], keys: Sequence[str], guidance: float
) -> Tensor:
    """Journey-TRAK (2312.06205): the denoising loss on the way to a picture, [S, dim].

    At each point of a path that was walked with this guidance, the sample that the model then
    expected at its end is noised afresh to the same level, and e - eps is pulled back.

    Args:
        engine: whose recipe scales the gradients.
        points: of the generation path, from its clean end.
        keys: one per sample [S]; names its fresh noise.
        guidance: of the path.
    """
    points = list(points)
    noise = engine.noise([f"journey/{key}" for key in keys], points[0].x_t.shape[1:])
    fresh = (
        renoised(engine.model, point, noise[:, index], guidance)
        for index, point in enumerate(points)
    )
    return _path_rows(engine, fresh, denoising, through_input=False)


def slider_rows(engine: Engine, points: Iterable[Point], contrasts: Sequence[str]) -> Tensor:
    """Concept-TRAK's concept reward: cotangent -(e(c) - e(c-)), summed over points, [S, dim]."""
    lacking = engine.model.encode_prompts(contrasts)

    def cotangent(model: Model, point: Point, e: Tensor) -> Tensor:
        with torch.no_grad():
            return model.noise(point.x_t, point.t, lacking) - e.detach()

    return _path_rows(engine, points, cotangent, through_input=False)


def reward_rows(engine: Engine, points: Iterable[Point], reward: Reward) -> Tensor:
    """A general reward, cotangent s_t grad_{x_t} R, summed over the points: [S, dim]."""

    def cotangent(model: Model, point: Point, e: Tensor) -> Tensor:
        seen = point.x_t
        if reward.of == "image":
            seen = model.decode(model.predicted(point.x_t, point.t, e))
        value = reward.function(seen)
        if not isinstance(value, Tensor) or value.grad_fn is None:
            raise ModelError(
                "the reward is not differentiable in its argument; return a tensor computed "
                "from it with torch operations"
            )
        (gradient,) = torch.autograd.grad(value.sum(), point.x_t, retain_graph=True)
        _, s = model.coefficients(point.t)
        return s * gradient

    return _path_rows(engine, points, cotangent, through_input=True)


def _path_rows(
    engine: Engine, points: Iterable[Point], cotangent: Cotangent, through_input: bool
) -> Tensor:
    return torch.stack([engine.gradient(p, cotangent, through_input)[0] for p in points]).sum(0)
