# Copyright 2026 the shallower authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0
"""A language model in which some blocks lack their attention or their MLP: the stock class of transformers with these
sublayers left out, as `config.block_configs` says. Blocks without attention hold no KV cache.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM as StockModel
from transformers import LlamaModel as StockBase

from .configuration_shallow import ShallowConfig


class Absent(nn.Module):
    """Stands where a sublayer was, and adds nothing to the residual stream. Keeps no KV cache.

    arguments: names of what the sublayer's forward took. arity: None where it returned a tensor, else the length of the
    tuple whose first entry is the tensor. adds_residual: the sublayer added the stream itself (Bloom).

    With `map`, it adds (x - mean) @ down @ up + bias, where x is the stream and any part may be missing: a small repair
    of what the sublayer did. `map` is {"mean": bool, "bias": bool, "rank": int or None}, `width` that of the stream.
    """

    unit: Any = None  # what was here in the original model, where that is known

    def __init__(
        self,
        arguments: tuple[str, ...],
        arity: int | None,
        adds_residual: bool,
        map: dict[str, Any] | None = None,
        width: int = 0,
    ) -> None:
        super().__init__()
        self.arguments, self.arity, self.adds_residual = arguments, arity, adds_residual
        parts, rank = map or {}, (map or {}).get("rank")
        self.mean = nn.Parameter(torch.zeros(width)) if parts.get("mean") else None
        self.bias = nn.Parameter(torch.zeros(width)) if parts.get("bias") else None
        self.down = nn.Parameter(torch.zeros(width, rank)) if rank else None
        self.up = nn.Parameter(torch.zeros(rank, width)) if rank else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        x: Tensor = given[self.arguments[0]]
        update = torch.zeros_like(x)
        if self.down is not None and self.up is not None:
            update = (x if self.mean is None else x - self.mean) @ self.down @ self.up
        if self.bias is not None:
            update = update + self.bias
        if self.adds_residual:
            update = update + given["residual"]
        return update if self.arity is None else (update, *[None] * (self.arity - 1))


# The modules of each half of a block with the arity of what they return, and those that only serve it, in Llama, whose
# entries say no more than whether a half is missing. The entries of other families name them.
MODULES: dict[str, dict[str, int | None]] = {"attention": {"self_attn": 2}, "ffn": {"mlp": None}}
SERVING = {"attention": ["input_layernorm"], "ffn": ["post_attention_layernorm"]}


def leave_out(model: Any, config: Any) -> None:
    """Take the missing halves out of the blocks, and number the attentions that are left by their place in a cache."""
    slot = 0
    at = config.packaged.get("blocks_at", "model.layers")
    if model.base_model is model:  # without a head
        at = at.removeprefix(f"{model.base_model_prefix}.")
    blocks = model.get_submodule(at)
    for place, (block, entry) in enumerate(zip(blocks, config.block_configs, strict=True)):
        for half in ("attention", "ffn"):
            names = entry[half].get("modules", MODULES[half])
            if entry[half]["no_op"]:
                for name, arity in names.items():
                    arguments = tuple(inspect.signature(type(block.get_submodule(name)).forward).parameters)[1:]
                    block._modules[name] = Absent(
                        arguments, arity, "residual" in arguments, entry[half].get("map"), config.hidden_size
                    )
                for name in entry[half].get("serving", SERVING[half]):
                    block._modules[name] = nn.Identity()
            elif half == "attention":
                for name in names:
                    number(block.get_submodule(name), place, slot)
                slot += 1


def number(attention: nn.Module, place: int, slot: int) -> None:
    """Let an attention that was built for block `place` use layer `slot` of the cache."""
    for module in attention.modules():
        for name in ("layer_idx", "layer_id"):
            if vars(module).get(name) == place:
                setattr(module, name, slot)


class LeavesOut(nn.Module):
    """What makes a stock model one with missing sublayers."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        leave_out(self, config)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Modules are stock ones: of other code transformers leaves buffers empty that are computed and not stored."""
        return False


class ShallowForCausalLM(LeavesOut, StockModel):  # type: ignore[misc]
    """The stock model with missing sublayers."""

    config_class = ShallowConfig


class ShallowModel(LeavesOut, StockBase):  # type: ignore[misc]
    """The same without its head, as AutoModel loads it."""

    config_class = ShallowConfig
