"""Every method that the benchmarks compare, as a setting of the one engine.

A method is how rows are made (`headwater ingest`), how the concept becomes a query and what rows
are ranked by (`headwater query`). What is alike in all of them, as the parameters, the noise levels
and the projection, is a recipe that `configurations` is given: only cotangent, trajectory, scaling,
preconditioner and row weight differ between methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headwater.attribution import Recipe
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.study import Configuration


@dataclass(frozen=True)
class Definition:
    """One row of the table of methods."""

    method: str  # of `Recipe`
    scaling: str  # of `Recipe`
    query: str
    source: str
    why: str  # it is defined so
    similarity: str = "ip"
    preconditioning: str = "query"


# Those that share their rows stand together.
METHODS_TABLE: dict[str, Definition] = {
    "trak": Definition(
        method="dsm",
        scaling="none",
        query="image",
        source="Park et al. 2023 (2303.14186), Georgiev et al. 2023 (2312.06205)",
        why="influence on the denoising loss, whose gradients are summed over fixed noise levels",
    ),
    "relative-if": Definition(
        method="dsm",
        scaling="none",
        query="image",
        similarity="relative",
        source="Barshan et al. 2020 (2003.11630)",
        why="TRAK's score for a step in weights of unit length: over |K^-1 g|",
    ),
    "renorm-if": Definition(
        method="dsm",
        scaling="none",
        query="image",
        similarity="cosine",
        source="Hammoudeh and Lowd 2022 (2201.10055)",
        why="TRAK's score for a gradient of unit length: over |g|",
    ),
    "tracin": Definition(
        method="dsm",
        scaling="none",
        query="image",
        preconditioning="none",
        source="Pruthi et al. 2020 (2002.08484), Xie et al. 2024 (2401.09031)",
        why="one step of gradient descent has no curvature; at the last checkpoint alone",
    ),
    "journey-trak": Definition(
        method="dsm",
        scaling="none",
        query="journey",
        source="Georgiev et al. 2023 (2312.06205)",
        why="TRAK's rows, asked about each step on the way to the picture instead of the picture",
    ),
    "retrac": Definition(
        method="dsm",
        scaling="timestep",
        query="image",
        preconditioning="none",
        source="Xie et al. 2024 (2401.09031)",
        why="TracIn with unit gradients, as their length tells of the noise level only",
    ),
    "d-trak": Definition(
        method="dtrak",
        scaling="none",
        query="image",
        source="Zheng et al. 2024 (2311.00500)",
        why="the mean square of the output in the place of the loss",
    ),
    "das": Definition(
        method="das-mean",
        scaling="timestep",
        query="image",
        source="Lin et al. 2025 (2410.18639), as released",
        why="change of the output's mean, times the residuals that the image leaves",
    ),
    "das-l1": Definition(
        method="das",
        scaling="none",
        query="image",
        source="Concept-TRAK's baseline (2507.06547)",
        why="DAS as Concept-TRAK runs it: l1 norm of the output, raw sum, times the training loss",
    ),
    "concept-trak": Definition(
        method="dps",
        scaling="timestep",
        query="slider",
        source="Park et al. 2025 (2507.06547)",
        why="DPS loss on guided inversions, against the concept's slider reward",
    ),
    "headwater": Definition(
        method="dtrak",
        scaling="timestep",
        query="contrast",
        similarity="standard",
        source="ours",
        why="what the concept's words change in the picture's own row, over how far the scores of "
        "the training image's scatter over questions like the corpus",
    ),
    "headwater-ip": Definition(
        method="dtrak",
        scaling="timestep",
        query="contrast",
        source="ours",
        why="the inner product alone, as of every other method",
    ),
    "headwater-relative": Definition(
        method="dtrak",
        scaling="timestep",
        query="contrast",
        similarity="relative",
        source="ours",
        why="the same over |K^-1 g|: a row that is long to every question ranks high for none",
    ),
    "headwater-effect": Definition(
        method="dtrak",
        scaling="timestep",
        query="effect",
        similarity="relative",
        source="ours",
        why="and with the prompt's rest and without it, on average: the concept's main effect",
    ),
    "headwater-contexts": Definition(
        method="dtrak",
        scaling="timestep",
        query="contexts",
        similarity="standard",
        source="ours",
        why="or averaged over several contexts: what concept and company make of each other fades",
    ),
    "headwater-company": Definition(
        method="dtrak",
        scaling="timestep",
        query="company",
        similarity="standard",
        source="ours",
        why="and contexts are captions of the corpus, so nobody words them",
    ),
    "headwater-image": Definition(
        method="probe",
        scaling="timestep",
        query="image",
        source="ours",
        why="how alike two images' whole Jacobians are, by a random direction of the output",
    ),
    "headwater-probe": Definition(
        method="probe",
        scaling="timestep",
        query="contrast",
        source="ours",
        why="what the concept's words change in such a row",
    ),
    "headwater-mixed": Definition(
        method="mixed",
        scaling="timestep",
        query="contrast",
        similarity="standard",
        source="ours",
        why="the default, of rows of the output's norm and of such a direction at once",
    ),
}


def configurations(base: Recipe | None = None) -> dict[str, Configuration]:
    """Every method by its name.

    `base` holds what is alike in all of them; its method, trajectory and scaling are replaced.
    """
    base = base or Recipe()
    return {
        name: Configuration(
            name,
            replace(base, method=row.method, scaling=row.scaling, trajectory="auto"),
            query=row.query,
            similarity=row.similarity,
            preconditioning=row.preconditioning,
            source=row.source,
        )
        for name, row in METHODS_TABLE.items()
    }


def chosen(names: Sequence[str] = (), base: Recipe | None = None) -> list[Configuration]:
    """The configurations of these names, in the order of the table; all of them for none.

    Raises:
        BenchmarkError: a name that is none.
    """
    known = configurations(base)
    for name in names:
        if name not in known:
            raise BenchmarkError(f"method {name!r} is unknown; choose from {', '.join(known)}")
    return [known[name] for name in known if name in names or not names]
