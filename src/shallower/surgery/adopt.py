"""Carry a repair from the model that it was computed on to the same cut in the precision that is stored."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


def adopt(stored: PreTrainedModel, repaired: PreTrainedModel, untouched: Iterable[nn.Parameter]) -> None:
    """Give `stored`, in place, every tensor of `repaired` that is not one of the `untouched`, in its own type.

    stored: the cut model without the repair. untouched: what parameters `repaired` had before the repair; a
    recovery gives what it changes another storage. Config fields that a repair sets (biases, tied embeddings) follow.
    """
    before = {parameter.data_ptr() for parameter in untouched}
    kind = {"dtype": stored.dtype, "device": stored.device}
    for name, parameter in repaired.named_parameters(remove_duplicate=False):
        if parameter.data_ptr() in before:
            continue
        place, _, own = name.rpartition(".")
        values = parameter.detach().to(**kind, copy=True)
        setattr(stored.get_submodule(place), own, nn.Parameter(values, requires_grad=parameter.requires_grad))
    text, wanted = stored.config.get_text_config(decoder=True), repaired.config.get_text_config(decoder=True)
    for name, value in vars(wanted).items():
        if isinstance(value, bool) and vars(text).get(name) != value:
            setattr(text, name, value)
    if stored.config.tie_word_embeddings and not repaired.config.tie_word_embeddings:
        stored.config.tie_word_embeddings = False
    stored.all_tied_weights_keys = dict(repaired.all_tied_weights_keys)
