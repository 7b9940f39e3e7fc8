"""Carry a repair from the model that it was computed on to the same cut in the precision that is stored."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import dissect
from shallower.surgery.config import stored_text
from shallower.surgery.patch import patches, repeat_patches


def adopt(stored: PreTrainedModel, repaired: PreTrainedModel, before: Iterable[nn.Parameter]) -> None:
    """Give `stored`, in place, every tensor of `repaired` that it did not have `before`, in the type of the one it has
    there: some families keep a few in float32 (ERNIE's routers).

    stored: the cut model without the repair. before: the parameters that `repaired` had before the repair; a
    recovery gives what it changes another storage. Config fields that a repair sets (biases, tied embeddings) follow,
    and so do maps at cuts.
    """
    maps = {id(part) for _, patch in patches(repaired) for part in patch.parameters()}
    if maps:
        repeat_patches(dissect(repaired), dissect(stored))
    untouched = {parameter.data_ptr() for parameter in before}
    had = {name: (one.device, one.dtype) for name, one in stored.named_parameters(remove_duplicate=False)}
    usual = (stored.device, stored.dtype)
    made: dict[int, nn.Parameter] = {}  # what is tied stays so
    for name, parameter in repaired.named_parameters(remove_duplicate=False):
        if parameter.data_ptr() in untouched or id(parameter) in maps:
            continue
        place, _, own = name.rpartition(".")
        if id(parameter) not in made:
            values = parameter.detach().to(*had.get(name, usual), copy=True)
            made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        setattr(stored.get_submodule(place), own, made[id(parameter)])
    restate(stored, repaired)


def restate(model: PreTrainedModel, repaired: PreTrainedModel) -> None:
    """Let the config of `model` say what a repair made `repaired`'s say: which biases there are, what is tied."""
    text, wanted = stored_text(model.config), stored_text(repaired.config)
    for name, value in vars(wanted).items():
        if isinstance(value, bool) and vars(text).get(name) != value:
            setattr(text, name, value)
    if model.config.tie_word_embeddings and not repaired.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = dict(repaired.all_tied_weights_keys)
