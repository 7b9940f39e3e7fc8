# Copyright 2026 the shallower authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0
"""The config of a language model in which some blocks lack their attention or their MLP.

`block_configs` has one entry a block: `block_configs[3].attention.no_op` is true where block 3 has no attention,
`block_configs[3].ffn.no_op` where it has no MLP. Everything else is the stock config.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig as StockConfig


class Entry(dict[str, Any]):
    """A dict whose keys are attributes, too: vLLM reads `config.block_configs[3].attention.no_op`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def entries(value: Any) -> Any:
    """`value` with every dict in it made an Entry."""
    if isinstance(value, dict):
        return Entry({key: entries(item) for key, item in value.items()})
    return [entries(item) for item in value] if isinstance(value, (list, tuple)) else value


class LacksSublayers:
    """What makes a stock config one with missing sublayers.

    block_configs: for each block `{"attention": {"no_op": ...}, "ffn": {"no_op": ...}}`.
    packaged: where the blocks are, and which stock class is meant.
    """

    attribute_map: Mapping[str, str]
    num_hidden_layers: int
    layer_types: Sequence[str]

    def __init__(
        self, block_configs: Sequence[Mapping[str, Any]] = (), packaged: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.block_configs = entries(block_configs)
        self.packaged = dict(packaged or {})

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The config itself; for the decoder's part, which is what KV caches are made from, one without the blocks
        that have no attention: so a cache holds as many layers as there are attentions.
        """
        blocks = vars(self).get("block_configs") or ()
        kept = [place for place, block in enumerate(blocks) if not block["attention"]["no_op"]]
        if not decoder or encoder or len(kept) == len(blocks):
            return self
        types = getattr(self, "layer_types", None)
        cached = copy.copy(self)
        cached.block_configs = [blocks[place] for place in kept]
        cached.num_hidden_layers = len(kept)
        if types is not None:
            kinds = [types[place] for place in kept]
            name = self.attribute_map.get("layer_types", "layer_types")
            if isinstance(getattr(type(self), name, None), property):  # made of the block's place (Jamba)
                cached.__class__ = type(type(self).__name__, (type(self),), {name: kinds})
            else:
                cached.layer_types = kinds
        return cached


class ShallowConfig(LacksSublayers, StockConfig):  # type: ignore[misc]
    """The stock config with missing sublayers."""

    model_type = "nemotron-nas"
    __init__ = LacksSublayers.__init__
