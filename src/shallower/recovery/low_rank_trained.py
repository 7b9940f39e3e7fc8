"""A low-rank map and a bias at each cut, trained."""

from __future__ import annotations

import dataclasses
from typing import Literal

from transformers import PreTrainedModel

from shallower.registry import recovery
from shallower.training.heal import finish, heal, own_parameters
from shallower.training.loop import train
from shallower.training.patch import UnitObjective, attach, gaps
from shallower.training.recipe import Recipe, Task, trainable


@recovery("low-rank-trained", source="arXiv:2407.16286", trained=True)
@trainable(Recipe(lr=1e-3, weight_decay=0.0))
def low_rank_trained(
    student: PreTrainedModel, task: Task, *, rank: int = 8, by: Literal["mse", "kl", "nll"] = "kl"
) -> PreTrainedModel:
    """At each cut a map x + x A B + b of the stream, of low rank, trained while the rest stays as it is.

    rank: of the map; 0 for the bias alone. by: what it learns from. mse: what the missing units did in the dense model;
    kl: the dense model's probabilities (distill=1); nll: the text. The maps add parameters that a stock checkpoint has
    no place for: it is saved packaged.
    """
    own_parameters(student)
    places = gaps(task.anatomy, task.removed)
    patches = attach(student, places, rank, task.seed)
    if by == "mse":
        student = train(UnitObjective(task.anatomy, places, patches), student, task, None).student
    else:
        share = 1.0 if by == "kl" else 0.0
        student = heal(student, dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, distill=share)))
    return finish(student, {})
