"""Run a model with its cache as `generate` does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel


def with_cache(
    model: PreTrainedModel, ids: Tensor, cache: Any = None, *, past: int = 0, **options: Any
) -> tuple[Any, Any]:
    """The output of one pass over the tokens behind those in `cache`, and the cache with them.

    Models are given positions, which some do not count on from what is in the cache (Bamba), and the cache, which
    some do not return (RecurrentGemma).

    ids: int64 [sequences, tokens], on the model's device. cache: of the pass before; it is changed in place.
    past: tokens in it. options: for the model's forward.
    """
    accepted = _accepted(type(model).forward)
    name = "cache_params" if "cache_params" in accepted else "past_key_values"  # states without keys (Mamba)
    if cache is None and isinstance(model, GenerationMixin) and model._supports_default_dynamic_cache():
        cache = DynamicCache(config=model.config)
    if cache is not None:
        options[name] = cache
    if "position_ids" in accepted:
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        options["position_ids"] = positions.repeat(ids.shape[0], 1)
    output = model(input_ids=ids, use_cache=True, **options)
    return output, output.get(name, cache)


@remembered
def _accepted(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of what a forward takes; looked up once, as decoding is timed."""
    return frozenset(inspect.signature(forward).parameters)
