"""Compare models by what they compute: in one pass, and token by token with the KV cache."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shallower import progress
from shallower.checkpoint.stock import evaluating, quiet
from shallower.decoding import with_cache
from shallower.errors import VerificationError, out_of_memory

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_DECODED = 4
_ATTENTION_ANYWHERE = {"eager", "sdpa"}
"""Implementations that run on a processor, too."""


def full_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of one pass without a cache: float32 [sequences, tokens, vocabulary], on the CPU. Dropout is off.

    ids: int64 [sequences, tokens], here and below.
    """
    with torch.no_grad(), evaluating(model):
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def cached_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same logits in the same form, the last few tokens one at a time with the cache."""
    ids = ids.to(model.device)
    start = max(ids.shape[1] - _DECODED, 1)
    with torch.no_grad(), evaluating(model):
        output, cache = with_cache(model, ids[:, :start])
        logits = [output.logits]
        for position in range(start, ids.shape[1]):
            output, cache = with_cache(model, ids[:, position : position + 1], cache, past=position)
            logits.append(output.logits)
    return torch.cat(logits, dim=1).float().cpu()


def decoding_noise(model: PreTrainedModel, ids: Tensor) -> float:
    """How much decoding one by one differs from one pass, by rounding alone (and experts that it changes)."""
    return difference(cached_logits(model, ids), full_logits(model, ids))


def difference(first: Tensor, second: Tensor) -> float:
    """The largest absolute difference of two tensors; infinite where one of them is not a number or where their shapes
    differ.
    """
    if first.shape != second.shape:
        return float("inf")
    largest = float((first - second).abs().max())
    return largest if largest == largest else float("inf")


def tolerance(model: PreTrainedModel, logits: Tensor) -> float:
    """How far logits of the same model may differ: relative to the largest logit, by the type it computes in."""
    return _TOLERANCE.get(model.dtype, 5e-2) * max(float(logits.abs().max()), 1e-3)


Loader = Callable[[Path, PreTrainedModel], tuple[PreTrainedModel, Mapping[str, Any]]]
"""Loads a folder in the type and attention implementation of a model in memory; the second value says which weights
were missing or left over.
"""


def load_stock(folder: Path, like: PreTrainedModel) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a folder as any user of transformers does; a model of code that came with it as its class, whose code was
    trusted when it was opened.

    Raises VerificationError when another class comes of it than that of `like`.
    """
    loader: Any = type(like) if type(like).is_remote_code() else AutoModelForCausalLM
    loaded, info = loader.from_pretrained(
        folder,
        local_files_only=True,
        dtype=like.dtype,
        attn_implementation=like.config._attn_implementation,
        output_loading_info=True,
    )
    if type(loaded) is not type(like):
        raise VerificationError(f"the checkpoint loads as {type(loaded).__name__}, not as {type(like).__name__}.")
    return loaded, info


def verify_saved(
    folder: str | os.PathLike[str], model: PreTrainedModel, ids: Tensor, *, load: Loader = load_stock
) -> float:
    """Load a checkpoint again and compare it with the model that was saved, which is beside it in memory: where the
    model's device has no room for both, what was loaded runs on the processor.

    Args:
        folder: The checkpoint.
        model: The model in memory.
        ids: int64 [sequences, tokens], at least two tokens; the last few are also decoded one by one.
        load: Loads it; stock transformers by default.

    Returns:
        The largest absolute difference of logits in one pass.

    Raises:
        VerificationError: Weights are missing or left over, or logits differ more than rounding explains.
    """
    with quiet():
        try:
            loaded, info = load(Path(folder), model)
        except VerificationError:
            raise
        except Exception as error:  # whatever cannot be loaded is a failed verification
            if out_of_memory(error):
                raise
            raise VerificationError(f"the checkpoint that was written does not load again: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info.get(kind):
            names = ", ".join(sorted(map(str, keys))[:3])
            raise VerificationError(f"the checkpoint that was written has {kind.replace('_', ' ')}: {names}.")
    wanted = full_logits(model, ids)
    allowed = tolerance(model, wanted)
    found, decoded = _logits_beside(loaded, model.device, ids)
    elsewhere = loaded.device != model.device  # one pass rounds otherwise there, as decoding does anywhere
    whole = difference(wanted, found)
    stepwise = difference(decoded, wanted)
    for how, value in (("", whole), (" when decoding", stepwise)):
        if value > allowed and not ((how or elsewhere) and value <= 2 * decoding_noise(model, ids)):
            raise VerificationError(
                f"the checkpoint that was written is not the model in memory: its logits differ by up to "
                f"{value:.3g}{how}, {allowed:.3g} is allowed."
            )
    return whole


def _logits_beside(loaded: PreTrainedModel, device: torch.device, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one pass and of decoding, on `device`, or on the processor where memory there does not suffice."""
    try:
        loaded.to(device)
        return full_logits(loaded, ids), cached_logits(loaded, ids)
    except Exception as error:
        if device.type == "cpu" or not out_of_memory(error):
            raise
    # Only now, as an exception that is handled holds what its frames hold. A part may have been moved already.
    loaded.to("cpu")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    progress.note(f"{device} has no room for the checkpoint beside the model, so it is compared on the processor.")
    if loaded.config._attn_implementation not in _ATTENTION_ANYWHERE:
        loaded.set_attn_implementation("eager")
    return full_logits(loaded, ids), cached_logits(loaded, ids)
