"""Continued pretraining of all weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import find_blocks
from shallower.errors import UserError
from shallower.registry import recovery
from shallower.training.heal import block_of, finish, heal, own_parameters
from shallower.training.recipe import Recipe, Task, trainable


def _ready(student: PreTrainedModel, options: Mapping[str, Any]) -> None:
    blocks = len(find_blocks(student)[1])
    if options["first"] >= blocks:
        raise UserError(f"first={options['first']}, but the model has only {blocks} blocks: give a smaller number.")


@recovery("full", source="arXiv:2402.02834", trained=True)
@trainable(Recipe(), ready=_ready)
def full(student: PreTrainedModel, task: Task, *, first: int = 0, embeddings: bool = False) -> PreTrainedModel:
    """Continued pretraining of the blocks' weights and the final norm, with AdamW.

    first: number of the student's first block that is trained; those before stay as they are, and cost less.
    embeddings: train input and output embeddings, too.
    """
    place = block_of(student)
    inside = set(find_blocks(student)[1].modules())  # where embeddings are experts
    ends = [module for module in student.modules() if isinstance(module, nn.Embedding) and module not in inside]
    ends.append(student.get_output_embeddings())
    held = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    fixed = {name for name, parameter in student.named_parameters() if id(parameter) in held}

    def trained(name: str) -> bool:
        if name in fixed:
            return embeddings
        index = place(name)
        return index is None or index >= first

    formats = own_parameters(student, trained)
    return finish(heal(student, task), formats)
