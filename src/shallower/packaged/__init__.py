"""Models whose blocks may lack attention or MLP: the two files that a packaged checkpoint carries, and the same code
joined to any stock class, for use without remote code.
"""

from __future__ import annotations

import importlib
import re
import secrets
import sys
import types
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from shallower.errors import ModelError
from shallower.packaged.configuration_shallow import LacksSublayers, entries
from shallower.packaged.modeling_shallow import Absent, LeavesOut

__all__ = [
    "FORMAT",
    "Absent",
    "LeavesOut",
    "code",
    "entries",
    "has_maps",
    "headless",
    "is_packaged",
    "load_files",
    "shallow_class",
    "stock_class",
    "stock_type",
]

FORMAT = "shallower.packaged/1"
_FILES = ("configuration_shallow", "modeling_shallow")
_classes: dict[Any, Any] = {}


def shallow_class(stock: type[PreTrainedModel]) -> Any:
    """The class of models that are `stock` but for missing sublayers; its `config_class` holds `block_configs`."""
    if stock in _classes:
        return _classes[stock]
    config: Any = stock.config_class
    family = config.model_type
    its_config = type(
        f"Shallow{config.__name__}",
        (LacksSublayers, config),
        {"__module__": __name__, "__init__": LacksSublayers.__init__, "model_type": f"shallow_{family}"},
    )
    parents: Any = (LeavesOut, stock)
    _classes[stock] = type(f"Shallow{stock.__name__}", parents, {"__module__": __name__, "config_class": its_config})
    return _classes[stock]


def is_packaged(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is of a packaged checkpoint."""
    return "packaged" in config and "block_configs" in config


def stock_type(config: PretrainedConfig) -> str:
    """The `model_type` of a config; of a packaged model's, that of the stock config that it builds on."""
    if not isinstance(config, LacksSublayers):
        return str(config.model_type)
    return str(super(LacksSublayers, config).model_type)  # type: ignore[misc]


def stock_class(config: dict[str, Any], name: str) -> type[PreTrainedModel]:
    """The stock class that a packaged checkpoint builds on.

    config: the parsed config.json. name: of the checkpoint, for messages.

    Raises ModelError for a format or class that is not known here.
    """
    packaged = config["packaged"]
    if not isinstance(packaged, dict) or packaged.get("format") != FORMAT:
        seen = packaged.get("format") if isinstance(packaged, dict) else packaged
        raise ModelError(
            f"{name} is packaged as {seen!r}, and this version of shallower reads {FORMAT!r}: update shallower, or "
            "load it with transformers and trust_remote_code=True if you trust the code in the folder."
        )
    found = getattr(transformers, str(packaged.get("stock_class")), None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ModelError(
            f"{name} builds on {packaged.get('stock_class')!r}, which this version of transformers does not have; "
            "update it with `pip install -U transformers`."
        )
    return found


def has_maps(config: PretrainedConfig) -> bool:
    """Whether small maps stand where sublayers were removed."""
    return any(entry[half].get("map") for entry in config.block_configs for half in ("attention", "ffn"))


def headless(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """The stock class of a packaged model without its head; None where it is no part of its own, holds not the blocks,
    or is not one that transformers exports.
    """
    base = model.base_model
    inside = model.config.packaged["blocks_at"].startswith(f"{model.base_model_prefix}.")
    exported = getattr(transformers, type(base).__name__, None) is type(base)
    return type(base) if base is not model and inside and exported else None


def code(
    stock: type[PreTrainedModel], base: type[PreTrainedModel] | None, *, model_type: str, class_name: str
) -> dict[str, str]:
    """The two files that let transformers load a packaged checkpoint of `stock` without shallower, by file name.

    base: the stock class without its head, None where there is none.
    """
    config: Any = stock.config_class
    changes = {
        r"LlamaConfig as StockConfig": f"{config.__name__} as StockConfig",
        r"LlamaForCausalLM as StockModel": f"{stock.__name__} as StockModel",
        r'model_type = "nemotron-nas"': f'model_type = "{model_type}"',
        r"\bShallowForCausalLM\b": class_name,
    }
    if base is not None:
        changes[r"LlamaModel as StockBase"] = f"{base.__name__} as StockBase"
    else:
        changes |= {
            r"from transformers import LlamaModel as StockBase\n": "",
            r"\n\n\nclass ShallowModel\((?s:.*)": "\n",
        }
    texts = {}
    for file in _FILES:
        text = Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
        for pattern, replacement in changes.items():
            text = re.sub(pattern, replacement, text)
        texts[f"{file}.py"] = text
    return texts


def load_files(folder: Path, class_name: str) -> type[PreTrainedModel]:
    """The model class in the files that were just written to `folder`. Runs them: never for a folder from elsewhere."""
    package = f"{__name__}.written_{secrets.token_hex(4)}"
    home = types.ModuleType(package)
    home.__path__ = [str(folder)]
    sys.modules[package] = home
    try:
        found: type[PreTrainedModel] = getattr(importlib.import_module(f"{package}.{_FILES[1]}"), class_name)
    finally:
        for name in (package, *(f"{package}.{file}" for file in _FILES)):
            sys.modules.pop(name, None)
    return found
