"""Continued pretraining of all weights."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import find_blocks
from shallower.errors import UserError
from shallower.registry import recovery
from shallower.training.heal import block_of, finish, heal, own_parameters
from shallower.training.recipe import Recipe, Task, trainable


@recovery("full", source="arXiv:2402.02834", trained=True)
@trainable(Recipe())
def full(student: PreTrainedModel, task: Task, *, first: int = 0, embeddings: bool = False) -> PreTrainedModel:
    """Continued pretraining of the blocks' weights and the final norm, with AdamW.

    first: number of the student's first block that is trained; those before stay as they are, and cost less.
    embeddings: train input and output embeddings, too.
    """
    place = block_of(student)
    blocks = find_blocks(student)[1]
    if first >= len(blocks):
        raise UserError(f"first={first}, but the cut model's blocks are 0 to {len(blocks) - 1}: give one of these.")
    inside = set(blocks.modules())  # where embeddings are experts
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
