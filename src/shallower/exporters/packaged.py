"""Blocks without the removed sublayers, and the code that leaves them out: two short files in the folder.

Models of Llama's shape get the layout of DeciLM (`nemotron-nas`), which vLLM runs with a class of its own; others get
the same with the names of their modules in it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from shallower.anatomy import Anatomy
from shallower.errors import ModelError
from shallower.forms import FORMS
from shallower.packaged import code, has_maps, headless, load_files
from shallower.surgery.save import Export
from shallower.units import Unit

DECI = "DeciLMForCausalLM"


def packaged(anatomy: Anatomy | None, units: Collection[Unit], model: PreTrainedModel) -> Export:
    """The model as it is in memory, with its code.

    Raises ModelError when its stock class is not one that transformers exports.
    """
    stock = next(base for base in type(model).__mro__[1:] if base.__name__ == model.config.packaged["stock_class"])
    if getattr(transformers, stock.__name__, None) is not stock:
        raise ModelError(
            f"{stock.__name__} is not a class of transformers itself, so that no code in the folder could build on it: "
            "save it padded (--stock), or remove whole blocks."
        )
    why_not = not_deci(model, stock)
    fields: dict[str, Any] = {}
    if why_not is None:
        class_name, model_type = DECI, "nemotron-nas"
        fields["block_configs"] = deci_blocks(model)
        if stock is Qwen2ForCausalLM:
            fields["qkv_bias"] = True
        notes = [
            "The layout is that of DeciLM (`nemotron-nas`), which vLLM runs with its own class; it asks for "
            "`--trust-remote-code` to read the config."
        ]
        if model.config.block_configs[0].attention.no_op:
            notes = ["vLLM cannot run it, though the layout is DeciLM's, because the first block has no attention."]
    else:
        class_name, model_type = "ShallowForCausalLM", type(model).config_class.model_type
        notes = [_in_vllm(model, why_not)]
    modules = {
        "AutoConfig": "configuration_shallow.ShallowConfig",
        "AutoModelForCausalLM": f"modeling_shallow.{class_name}",
    }
    if (base := headless(model)) is not None:
        modules["AutoModel"] = "modeling_shallow.ShallowModel"
    fields |= {"architectures": [class_name], "model_type": model_type, "auto_map": modules}
    files = code(stock, base, model_type=model_type, class_name=class_name)

    def load(folder: Path, like: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
        loaded, info = load_files(folder, class_name).from_pretrained(
            folder,
            dtype=like.dtype,
            attn_implementation=like.config._attn_implementation,
            output_loading_info=True,
            local_files_only=True,
        )
        return loaded, info

    return Export(FORMS["packaged"], model, files, fields, load, tuple(notes))


def _in_vllm(model: PreTrainedModel, why_not: str) -> str:
    """What vLLM does with a layout of ours, which it only knows through the code in the folder (AutoModel)."""
    missing = None
    if any(entry.attention.no_op for entry in model.config.block_configs):
        missing = "an attention in every block"
    elif headless(model) is None or not model._supports_attention_backend:
        missing = "a class without a head, and attention that transformers lets others replace"
    if missing is not None:
        return (
            f"vLLM cannot run it: DeciLM's layout cannot say it, as {why_not}, and what vLLM makes of other classes "
            f"needs {missing}."
        )
    return (
        f"vLLM has no class for it, as {why_not}, but can run it as other classes of transformers "
        "(`--trust-remote-code`)."
    )


def not_deci(model: PreTrainedModel, stock: type[PreTrainedModel]) -> str | None:
    """Why DeciLM's layout cannot say what `model` is; None where it can."""
    config = model.config
    if stock not in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM):
        return f"{config.model_type.removeprefix('shallow_')} is not of Llama's shape"
    if getattr(config, "sliding_window", None) is not None and (
        stock is MistralForCausalLM or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    ):
        return "some of its attention slides over a window, which DeciLM's cannot"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, and DeciLM's is silu"
    if has_maps(config):
        return "a map stands where a sublayer was removed"
    if config.packaged["blocks_at"] != "model.layers":
        return "its blocks are in another place"
    return None


def deci_blocks(model: PreTrainedModel) -> list[dict[str, Any]]:
    """`block_configs` with the keys that DeciLM's readers know, and no others."""
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    blocks = []
    for entry in config.block_configs:
        attention = {"no_op": entry.attention.no_op, "replace_with_linear": False}
        attention["n_heads_in_group"] = None if entry.attention.no_op else group
        ffn = {"no_op": entry.ffn.no_op, "replace_with_linear": False}
        ffn["intermediate_size"] = None if entry.ffn.no_op else config.intermediate_size
        multiple = None if entry.ffn.no_op else ffn_mult(config.intermediate_size, config.hidden_size)
        if entry.ffn.no_op or multiple is not None:
            ffn["ffn_mult"] = multiple
        blocks.append({"attention": attention, "ffn": ffn})
    return blocks


def ffn_mult(intermediate: int, hidden: int) -> float | None:
    """The factor that DeciLM's readers turn into `intermediate`: ⅔ of it times `hidden`, rounded up to 256.

    vLLM prefers it to `intermediate_size` where it is there, SGLang knows nothing else. None where none gives the size.
    """
    factor = 1.5 * intermediate / hidden
    return factor if -(-int(2 * factor * hidden / 3) // 256) * 256 == intermediate else None
