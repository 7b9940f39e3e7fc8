"""Adapters on weights of four bits, as QLoRA trains them. The dense model is in memory beside them all the same."""

from __future__ import annotations

from typing import Annotated

from transformers import PreTrainedModel

from shallower.registry import Above, AtLeast, recovery
from shallower.training.adapters import (
    Maps,
    adapt,
    adapter_parameters,
    merge,
    projections,
    quantise,
    require_quantisable,
)
from shallower.training.heal import finish, heal, own_parameters
from shallower.training.recipe import Recipe, Task, trainable


@recovery(
    "qlora",
    source="arXiv:2305.14314, arXiv:2403.17887",
    trained=True,
    whole={},
    packages={"heal": ("peft", "bitsandbytes")},
)
@trainable(Recipe(weight_decay=0.0), ready=require_quantisable, added=adapter_parameters)
def qlora(
    student: PreTrainedModel,
    task: Task,
    *,
    rank: Annotated[int, Above(0)] = 8,
    alpha: float = 16.0,
    dropout: Annotated[float, AtLeast(0, below=1)] = 0.05,
    first: Annotated[int, AtLeast(0)] = 0,
    maps: Maps = "all",
) -> PreTrainedModel:
    """Low-rank adapters trained on weights of four bits (NF4), then merged into what these stand for.

    It takes 0.56 bytes a weight more memory than lora: these are a copy, and the dense model stays beside it in full.

    rank, alpha, dropout: of the adapters. first: number of the student's first block that gets them; those before keep
    their precision. maps: which linear maps get them: all, or those of the attention (`attn`) or the MLP sublayers
    (`mlp`), as in arXiv:2403.17887.
    """
    own_parameters(student)
    names = projections(student, first, maps)
    plain = quantise(student, names)
    adapt(student, names, rank=rank, alpha=alpha, dropout=dropout, seed=task.seed)
    student = heal(student, task)
    merge(student, plain)
    return finish(student, {})
