"""The table of methods: every row is reachable by the options that the README gives, and runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from headwater import Asking
from headwater.attribution import METHODS, Engine, Model, Recipe
from headwater.benchmarks.further import COMPANY, in_company
from headwater.benchmarks.methods import METHODS_TABLE, configurations
from headwater.benchmarks.study import Corpus, Question, Study, answer
from headwater.queries.concept import usual_similarity

README = (Path(__file__).parent.parent / "README.md").read_text()
SMALL = Recipe(dim=64, timesteps=2, steps=4)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tiny.saved(tiny.stable_diffusion(), tmp_path_factory.mktemp("methods"))
    model = Model.from_pretrained(folder, device="cpu")
    x_0 = torch.randn(8, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    captions = ("a cat drawing", "a dog drawing") * 4
    truth = np.arange(8) % 2 == 0
    company = (("a cat in red style", "a drawing in red style"), ("the cat by a dog", "by a dog"))
    question = Question("object", "a cat drawing", "a drawing", "p", truth, "a cat", company)
    corpus = Corpus(x_0, captions, tuple(f"k{i}" for i in range(8)))
    asked = in_company([question], corpus)
    return Study("tiny", model, corpus, asked, seeds=2, batch=8, steps=4)


@pytest.mark.parametrize("name", METHODS_TABLE)
def test_the_readme_gives_the_options_of_every_method(name: str) -> None:
    row = METHODS_TABLE[name]
    more = {
        "effect": "--alone TEXT",
        "contexts": "--context PAIR",
        "company": f"--alone TEXT --company {COMPANY}",
    }.get(row.query)
    if more is not None:  # a contrast that is told more of the concept
        if row.similarity != usual_similarity("contrast", row.preconditioning):
            more += f" --similarity {row.similarity}"
        assert f"| {name} | the defaults | `{more}` |" in README
        return
    ingest = {"method": row.method, "scaling": row.scaling}
    query = {
        "method": row.query,
        "similarity": row.similarity,
        "preconditioning": row.preconditioning,
    }
    unasked = asdict(Asking(row.query)) | {"method": "contrast"}
    unasked["similarity"] = usual_similarity(row.query, row.preconditioning)
    words = [
        " ".join(f"--{key} {value}" for key, value in options.items() if value != usual[key])
        for options, usual in ((ingest, asdict(Recipe())), (query, unasked))
    ]
    options = " | ".join(f"`{part}`" if part else "the defaults" for part in words)
    assert f"| {name} | {options} |" in README
    how = {"similarity": row.similarity, "preconditioning": row.preconditioning}
    asking = Asking(row.query, damping=3.0, **how)
    assert asking.metric.similarity == row.similarity


def test_what_is_alike_in_all_methods_is_given_once() -> None:
    base = Recipe(dim=7, timesteps=3, dtype="float32", method="cfg", scaling="none", seed=4)
    found = configurations(base)
    assert list(found) == list(METHODS_TABLE)
    for name, configuration in found.items():
        recipe = configuration.recipe
        assert configuration.name == name
        assert (recipe.dim, recipe.timesteps, recipe.dtype, recipe.seed) == (7, 3, "float32", 4)
        assert recipe.method in METHODS
    assert found["headwater"].recipe == Recipe(dim=7, timesteps=3, dtype="float32", seed=4)


def test_every_method_answers_and_none_like_another(study: Study) -> None:
    scores = {}
    for name, configuration in configurations(SMALL).items():
        found = answer(study, configuration).scores(damping=1.0)
        assert found.shape == (8, 1)
        assert found.isfinite().all()
        scores[name] = found[:, 0] / found.norm()
    names = list(scores)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.allclose(scores[one], scores[other], atol=1e-3), (one, other)


def test_a_study_looks_at_its_paths_where_rows_are(study: Study) -> None:
    engine = Engine(study.model, replace(SMALL, levels="0.5-1"))
    path = study.path(engine, [0, 1])
    assert [int(point.t[0]) for point in path] == engine.timesteps
    assert engine.timesteps != Engine(study.model, SMALL).timesteps
