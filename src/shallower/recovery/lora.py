"""Low-rank adapters on all linear maps, merged at the end."""

from __future__ import annotations

from typing import Annotated

from transformers import PreTrainedModel

from shallower.registry import Above, AtLeast, recovery
from shallower.training.adapters import Maps, adapt, adapter_parameters, merge, projections, require_adaptable
from shallower.training.heal import finish, heal, own_parameters
from shallower.training.recipe import Recipe, Task, trainable


@recovery("lora", source="arXiv:2402.02834", trained=True, packages={"heal": ("peft",)})
@trainable(Recipe(weight_decay=0.0), ready=require_adaptable, added=adapter_parameters)
def lora(
    student: PreTrainedModel,
    task: Task,
    *,
    rank: Annotated[int, Above(0)] = 8,
    alpha: float = 16.0,
    dropout: Annotated[float, AtLeast(0, below=1)] = 0.05,
    first: Annotated[int, AtLeast(0)] = 0,
    maps: Maps = "all",
) -> PreTrainedModel:
    """Low-rank adapters (LoRA) on the linear maps of the blocks, trained and merged: no new parameters.

    Routers, and experts that are one tensor, get none.

    rank, alpha, dropout: of the adapters. first: number of the student's first block that gets them.
    maps: which ones get them: all, or those of the attention (`attn`) or the MLP sublayers (`mlp`).
    """
    own_parameters(student)
    adapt(student, projections(student, first, maps), rank=rank, alpha=alpha, dropout=dropout, seed=task.seed)
    student = heal(student, task)
    merge(student)
    return finish(student, {})
