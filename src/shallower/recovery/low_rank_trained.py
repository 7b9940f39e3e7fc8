"""A low-rank map and a bias at each cut, trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from transformers import PreTrainedModel

from shallower.anatomy.dissect import dissect
from shallower.anatomy.writers import find_writers
from shallower.errors import UserError
from shallower.registry import AtLeast, recovery
from shallower.surgery.plain import is_plain
from shallower.surgery.stations import cuts
from shallower.training.heal import finish, heal, own_parameters
from shallower.training.loop import settled, train
from shallower.training.maps_at_cuts import UnitObjective, attach_maps
from shallower.training.recipe import Recipe, Task, trainable


def _unread(options: Mapping[str, Any]) -> dict[str, str]:
    names = {"kl": (), "nll": ("temperature", "teacher_cache")}
    rest = ("hidden", "temperature", "teacher_cache", "recompute", "attention", "compile")
    return dict.fromkeys(names.get(options["by"], rest), f"with by={options['by']}")


def _one_map(student: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, int]:
    """Of how many there will be, more is not known without the cuts."""
    return {"": (2 * options["rank"] + 1) * student.config.get_text_config().hidden_size}


@recovery(
    "low-rank-trained", source="arXiv:2407.16286", trained=True, maps=True, whole={"by": "mse"}, plain={"by": "mse"}
)
@trainable(Recipe(lr=1e-3, weight_decay=0.0), without=("distill",), unread=_unread, added=_one_map)
def low_rank_trained(
    student: PreTrainedModel,
    task: Task,
    *,
    rank: Annotated[int, AtLeast(0)] = 8,
    by: Literal["mse", "kl", "nll"] = "kl",
) -> PreTrainedModel:
    """At each cut a map x + x A B + b of the stream, of low rank, trained while the rest stays as it is.

    rank: of the map; 0 for the bias alone. by: what it learns from. mse: what the missing units did in the dense model,
    for a student that nothing was repaired of; kl: the dense model's probabilities; nll: the text. The maps add
    parameters that a stock checkpoint has no place for: it is saved packaged.
    """
    if by == "mse" and not is_plain(student, task.anatomy, task.removed):
        raise UserError(
            "by=mse teaches all that the missing units did, and this model was repaired before: use by=kl, or let "
            "low-rank-trained come first."
        )
    own_parameters(student)
    places = cuts(dissect(student), task.anatomy, task.removed, find_writers(task.anatomy))
    patches = attach_maps(student, places, rank, task.seed)
    if by == "mse":
        task = settled(task, student)
        student = train(UnitObjective(task.anatomy, places, patches), student, task, None)
    else:
        share = 1.0 if by == "kl" else 0.0
        student = heal(student, dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, distill=share)))
    return finish(student, {})
