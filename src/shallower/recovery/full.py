"""Continued pretraining of all weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import find_blocks
from shallower.registry import AtLeast, recovery
from shallower.training.heal import block_of, finish, heal, own_parameters
from shallower.training.recipe import Recipe, Task, Trained, trainable


def _trained(student: PreTrainedModel, options: Mapping[str, Any]) -> Trained:
    place = block_of(student)
    inside = set(find_blocks(student)[1].modules())  # where embeddings are experts
    ends = [module for module in student.modules() if isinstance(module, nn.Embedding) and module not in inside]
    ends.append(student.get_output_embeddings())
    held = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    fixed = {name for name, parameter in student.named_parameters() if id(parameter) in held}

    def trained(name: str) -> bool:
        if name in fixed:
            return bool(options["embeddings"])
        index = place(name)
        return index is None or index >= int(options["first"])

    return trained


@recovery("full", source="arXiv:2402.02834", trained=True)
@trainable(Recipe(), trained=_trained)
def full(
    student: PreTrainedModel, task: Task, *, first: Annotated[int, AtLeast(0)] = 0, embeddings: bool = False
) -> PreTrainedModel:
    """Continued pretraining of the blocks' weights and the final norm, with AdamW.

    first: number of the student's first block that is trained; those before stay as they are, and cost less.
    embeddings: train input and output embeddings, too.
    """
    formats = own_parameters(student, _trained(student, {"first": first, "embeddings": embeddings}))
    return finish(heal(student, task), formats)
