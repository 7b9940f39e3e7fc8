"""Continued pretraining of all weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import find_blocks, run_probe
from shallower.registry import AtLeast, recovery
from shallower.training.heal import block_of, finish, heal, own_parameters
from shallower.training.recipe import Recipe, Task, Trained, trainable


def _trained(student: PreTrainedModel, options: Mapping[str, Any]) -> Trained:
    place, ends = block_of(student), _ends(student)
    held = {name for name, parameter in student.named_parameters() if id(parameter) in ends}

    def trained(name: str) -> bool:
        if name in held:
            return bool(options["embeddings"])
        index = place(name)
        return index is None or index >= int(options["first"])

    return trained


def _ends(student: PreTrainedModel) -> set[int]:
    """Identities of the parameters that make the stream of words, or words of the stream: of all that runs before the
    blocks, such as a norm of embeddings (BLOOM), and matrices behind them (OPT's map to narrower embeddings).
    """
    blocks = find_blocks(student)[1]
    inside = set(blocks.modules())
    outside = [module for module in student.modules() if module not in inside]
    ran: list[nn.Module] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in (*outside, blocks[0])
    ]
    run_probe(student, handles)
    before = ran[: ran.index(blocks[0])]
    own = [parameter for module in before for parameter in module.parameters(recurse=False)]
    own += [parameter for module in outside for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
    head = student.get_output_embeddings()
    return {id(parameter) for parameter in (*own, *(() if head is None else head.parameters()))}


@recovery("full", source="arXiv:2402.02834", trained=True)
@trainable(Recipe(), trained=_trained)
def full(
    student: PreTrainedModel, task: Task, *, first: Annotated[int, AtLeast(0)] = 0, embeddings: bool = False
) -> PreTrainedModel:
    """Continued pretraining of the blocks' weights and the final norm, with AdamW.

    first: number of the student's first block that is trained; those before stay as they are, and cost less.
    embeddings: train input and output embeddings, too, with what stands between them and the blocks.
    """
    formats = own_parameters(student, _trained(student, {"first": first, "embeddings": embeddings}))
    return finish(heal(student, task), formats)
