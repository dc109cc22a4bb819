"""Rows and queries of a study in pieces, by noise level and by part of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headwater.attribution import Engine
from headwater.benchmarks.study import Corpus, Question, Study


def row_pieces(engine: Engine, corpus: Corpus, batch: int) -> tuple[Tensor, Tensor]:
    """Rows by noise level and part, [N, T, P, dim], and the training loss of every image [N].

    `engine` is `parted`; summed over levels and parts these are the engine's own rows.
    """
    found, losses = [], []
    for start in range(0, len(corpus), batch):
        part = slice(start, start + batch)
        x_0 = corpus.x_0[part].to(engine.model.device)
        levels, loss = [], []
        for point in engine.points(x_0, corpus.captions[part], corpus.keys[part]):
            gradient, _, e = engine.row_gradient(point)
            levels.append(gradient)
            loss.append((e - point.eps).square().flatten(1).mean(1))
        found.append(torch.stack(levels, 1))
        losses.append(torch.stack(loss).mean(0))
    pieces = torch.cat(found)
    return pieces.view(*pieces.shape[:2], 2, -1), torch.cat(losses)


def query_pieces(study: Study, engine: Engine, asked: Sequence[Question]) -> Tensor:
    """Contrasts by noise level and part, [Q, S, T, P, dim], about the study's pictures."""
    first = {picture: i * study.seeds for i, (picture, _) in enumerate(study.asked)}
    every = [
        (question, first[question.picture] + s) for question in asked for s in range(study.seeds)
    ]
    found = []
    for start in range(0, len(every), study.batch):
        some = every[start : start + study.batch]
        places = [place for _, place in some]
        lacking, _ = engine.states([question.contrast for question, _ in some])
        prompts, keys = [question.prompt for question, _ in some], [study.keys[i] for i in places]
        levels = [
            engine.method_gradient(point)[0]
            - engine.method_gradient(replace(point, states=lacking))[0]
            for point in engine.points(study.pictures[places], prompts, keys)
        ]
        found.append(torch.stack(levels, 1))
    pieces = torch.cat(found)
    return pieces.view(len(asked), study.seeds, pieces.shape[1], 2, -1)


def informative(asked: Tensor) -> Tensor:
    """How much each noise level tells questions apart, [T], of queries [Q, S, T, dim].

    The mean cosine between pictures of one question less that between questions: no label needed.
    """
    questions, seeds = asked.shape[:2]
    unit = torch.nn.functional.normalize(asked, dim=3)
    each = unit.sum(1)  # [Q, T, dim]
    within = each.square().sum((0, 2))
    across = each.sum(0).square().sum(1) - within
    same = (within - questions * seeds) / (questions * seeds * (seeds - 1))
    return same - across / (questions * (questions - 1) * seeds**2)
