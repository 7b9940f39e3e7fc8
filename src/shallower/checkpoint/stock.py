"""Calls into transformers, kept quiet and honest: no noise of its own, no weight made up, modes put back."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from shallower.errors import ModelError, ModelTooLarge, UserError, first_line, out_of_memory

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the log and the progress bars of transformers and the Hub client, and restore both."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    _show_bars(False)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        _show_bars(bars)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside the `with`; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def copied(model: PreTrainedModel, shared: dict[int, Any]) -> PreTrainedModel:
    """A copy of the module tree. shared: what is not copied, or replaced by something else, by its id.

    Raises ModelError when something in a module cannot be copied, as of what hooks hold or keep.
    """
    try:
        return copy.deepcopy(model, shared)
    except (TypeError, RuntimeError, copy.Error, pickle.PicklingError) as error:
        if out_of_memory(error):
            raise
        hooks = hooks_on(model)
        found = f"{hooks}: remove them (handle.remove()), and" if hooks else "remove"
        raise ModelError(
            f"the modules of {type(model).__name__} cannot be copied, which measuring and cutting need "
            f"({first_line(error).rstrip('.')}); {found} what was attached to modules, or load the model anew."
        ) from error


def hooks_on(model: PreTrainedModel) -> str:
    """Where hooks are, in words; empty where there are none."""
    hooked = [name or "the model" for name, module in model.named_modules() if _has_hooks(module)]
    names = ", ".join(hooked[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
    return f"there are hooks on {names}" if hooked else ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def load_config(
    folder: Path, name: str, *, trust_remote_code: bool, model_class: type[PreTrainedModel] | None = None
) -> PretrainedConfig:
    """The config as transformers understands it, or as `model_class` does.

    Raises ModelError when it does not.
    """
    with quiet(), refusing(name, "the config of"):
        if model_class is not None:
            return model_class.config_class.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_weights(
    folder: Path,
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode with every weight from the checkpoint.

    model_class: what to load it as; by default what its config says.

    Raises ModelError when weights are missing, left over or of other shapes than the config says.
    """
    with quiet(), refusing(name, "the weights of"):
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code} if model_class is None else {}
        model, info = (model_class or AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    require_complete(info, name)
    parts = (config, config.get_text_config(decoder=True))
    if any(hasattr(part, "quantization_config") for part in parts) and not is_quantized(model):
        _forget_quantization(model, dtype)
    return model.eval()


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool) -> Tokenizer | None:
    """The tokenizer, or None when the folder holds no file of one.

    Raises ModelError when its files cannot be read.
    """
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        return None
    with quiet(), refusing(name, "the tokenizer of"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def require_complete(info: Mapping[str, Any], name: str) -> None:
    """Raise ModelError unless every parameter came from the checkpoint and every tensor of the checkpoint was used.

    info: what `from_pretrained(..., output_loading_info=True)` returned beside the model.
    """
    faults = []
    for key, what in (
        ("missing_keys", "of the model's weights are not in the checkpoint"),
        ("unexpected_keys", "of the checkpoint's weights are not in the model"),
        ("mismatched_keys", "weights have another shape than the config says"),
        ("error_msgs", "errors"),
    ):
        if found := sorted(map(str, info.get(key) or ())):
            faults.append(f"{len(found)} {what} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})")
    if faults:
        raise ModelError(
            f"{name} was not loaded completely: {'; '.join(faults)}. Its config and weights do not belong together, or "
            "this version of transformers reads the family differently; download it again or change the version."
        )


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether weights are in memory in the form of a quantizer, and not as plain numbers."""
    return getattr(model, "hf_quantizer", None) is not None


@contextlib.contextmanager
def refusing(name: str, part: str) -> Iterator[None]:
    """Turn whatever a loader raises into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the code of two hundred families: nothing narrower is known of what it raises
        text = str(error)
        if out_of_memory(error):
            raise ModelTooLarge(
                f"{part} {name} do not fit into memory; choose another --device, a smaller --dtype, or in score and "
                "search --stream-blocks."
            ) from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"{name} needs code that comes with it; read that code, and pass --trust-remote-code if you trust it."
            ) from error
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            raise ModelError(
                f"{name} has a model type that this version of transformers does not know; "
                "update it with `pip install -U transformers`, or check 'model_type' in config.json."
            ) from error
        if "GGUF model with architecture" in text:
            raise ModelError(
                f"{name} is of an architecture that this version of transformers cannot read from GGUF "
                f"({first_line(error).rstrip('.')}); use the model's safetensors checkpoint."
            ) from error
        if "ignore_mismatched_sizes" in text:
            raise ModelError(
                f"{name} was not loaded completely: weights have another shape than config.json says; "
                "they are of different checkpoints. Download it again."
            ) from error
        raise ModelError(f"{part} {name} cannot be loaded: {first_line(error)}") from error


def _forget_quantization(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Finish what transformers begins when it dequantizes a checkpoint: a model as if it never had been quantized."""
    # Among the conversions that loaded it are the quantizer's, and saving runs them backwards. Without any, the
    # family's own are looked up.
    model._weight_conversions = None
    for parameter in model.parameters():
        # Quantizers make bfloat16 of it, whatever was asked for. Some families keep a few weights in float32.
        if parameter.dtype not in (dtype, torch.float32):
            parameter.data = parameter.data.to(dtype)


def _show_bars(show: bool) -> None:
    with warnings.catch_warnings():
        # The Hub client warns when an environment variable overrules the call, which is what the user wants.
        warnings.simplefilter("ignore")
        if show:
            logging.enable_progress_bar()
        else:
            logging.disable_progress_bar()
