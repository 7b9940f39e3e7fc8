"""All that decides what a model computes, as digests: results that are kept belong to it, not to a name or a place."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shallower.checkpoint.fingerprint import checksum
from shallower.checkpoint.own_code import FRAMEWORKS, KNOWN, own_code, package_of

NOT_OF_THE_MODEL = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "auto_map", "architectures"}
    | {"dtype", "torch_dtype", "transformers_version"}
)
"""Entries of a config, at any depth, that two copies of one model may differ in."""
_IMPLEMENTATIONS = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)
_MKLDNN: Any = torch.backends.mkldnn  # whose types lack `matmul`
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# read once, as a file may be edited after it was imported
_sources: WeakKeyDictionary[type, dict[str, bytes]] = WeakKeyDictionary()
_codes: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()  # when a class was first seen


def determinants(model: PreTrainedModel) -> list[str]:
    """Digests of the weights to the last bit, of the config and of the code that runs the model, its number format and
    kind of device, and the `rounding` of this process. The same in every process that rounds alike and for every place
    it is loaded from; never the same again for a model that is not `determined`.

    Raises ModelError when weights are not in memory (meta device).
    """
    weights = checksum(model)  # as a fingerprint takes models for one that differ in single weights
    once = [] if determined(model) else [uuid.uuid4().hex]
    where = [str(model.dtype), model.device.type, str(rounding())]
    return [weights, beside_weights(model), *code_of_model(model), *where, *once]


def rounding() -> str | tuple[str, str]:
    """How exact products of float32 are in this process."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each kind of device, as torch has it since 2.9
        return torch.backends.cuda.matmul.fp32_precision, _MKLDNN.matmul.fp32_precision


def round_as(wanted: str | tuple[str, str]) -> None:
    """Compute products of float32 as exactly as the process that `rounding` is of."""
    if isinstance(wanted, str):
        torch.set_float32_matmul_precision(wanted)
    else:
        torch.backends.cuda.matmul.fp32_precision, _MKLDNN.matmul.fp32_precision = wanted


def determined(model: PreTrainedModel) -> bool:
    """Whether digests tell all that the model computes. Hooks, forwards that were put over a class's or an instance's
    own, another package's attention, classes without a file or with one that was loaded again since, adapters of peft
    (which of them are on, and how much they count) and autocast change it, too, and nothing tells them from others of
    their kind.
    """
    own = _own_kinds(model)
    return is_untouched(model) and all(
        package_of(kind.__module__) != "peft" and _code_of(kind) is not None for kind in own
    )


def is_untouched(model: PreTrainedModel) -> bool:
    """Whether a model computes what its classes say: without foreign hooks, other forwards, attention that is not
    transformers' own, or autocast.
    """
    attached = (called for module in model.modules() for called in _attached_to(module))
    return is_portable(model) and all(map(_is_known, attached))


def is_portable(model: PreTrainedModel) -> bool:
    """Whether a copy in another process computes the same. Hooks and forwards of a module go with it; autocast, hooks
    on all modules, another forward of a class and another package's attention hold in the process that set them.
    """
    return not torch.is_autocast_enabled(model.device.type) and all(map(_is_known, _attached_here(model)))


def _attached_here(model: PreTrainedModel) -> Iterator[Callable[..., Any]]:
    """Whatever runs in or around the modules of a model in this process alone."""
    for hooks in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks):
        yield from hooks.values()
    yield from (kind.forward for kind in {type(module) for module in model.modules()} - _own_kinds(model))
    for name in {name for names in _implementations(model.config) for name in names}:
        yield from (held[name] for held in _IMPLEMENTATIONS if name in held)


def _attached_to(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in _HOOKS:
        yield from getattr(module, name).values()
    given = vars(module).get("forward")
    if (spread := vars(module).get("_hf_hook")) is not None:  # accelerate's, which keeps the forward it replaced
        yield from (type(hook).pre_forward for hook in (spread, *getattr(spread, "hooks", ())))
        given = vars(module).get("_old_forward")
    if given is not None:
        yield given


def is_bare(module: nn.Module) -> bool:
    """Whether a module, its children aside, does what its class does: nothing foreign hooks on to it."""
    return all(map(_is_known, _attached_to(module)))


def _is_known(called: Callable[..., Any]) -> bool:
    """By where it was written, and whatever it wraps, too: what wraps another says of itself that it is the other."""
    function = getattr(called, "__func__", called)
    home = function.__globals__.get("__name__", "") if inspect.isfunction(function) else type(function).__module__
    wrapped = getattr(function, "__wrapped__", None)
    return package_of(home) in FRAMEWORKS and (wrapped is None or _is_known(wrapped))


def _own_kinds(model: PreTrainedModel) -> set[type]:
    """Classes of a model's modules, and what they inherit from, that the user wrote or another package has."""
    inherited = {kind for module in model.modules() for kind in type(module).__mro__}
    return {kind for kind in inherited if package_of(kind.__module__) not in KNOWN}


def _code_of(kind: type) -> str | None:
    """Digest of the files that a class is written in, as they were when it was first seen. None for one without, and
    where one of them was loaded again since: the class may run parts of the old and of the new one.
    """
    code = own_code(kind.__module__)
    return code if _codes.setdefault(kind, code) == code else None


def beside_weights(model: PreTrainedModel) -> str:
    """Digest of what a model computes with besides its weights and buffers (see `checksum`): its config, but for names,
    places, number formats and versions, and how attention and experts are computed. The same in every process and for
    every place it is loaded from.
    """
    told = [_plain(model.config.to_dict()), list(_implementations(model.config))]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _implementations(config: PretrainedConfig) -> Iterator[tuple[str | None, str | None]]:
    """Names of how attention and experts are computed, of a config and those in it: it does not write them down."""
    yield config._attn_implementation, config._experts_implementation
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _implementations(part)


def code_of_model(model: PreTrainedModel) -> list[str]:
    """What runs the model: the version of transformers, and a digest of each file of code that came with a model, and
    one for each class of its modules that is neither torch's nor transformers', of its file and what that imports.

    A model computes otherwise under another version or once its own code is edited, with the same config and weights.
    The files are read when their classes are first seen here: call this as soon as a model is loaded.
    """
    kinds = {type(module) for module in model.modules()}
    files: dict[str, bytes] = {}
    for kind in filter(_is_remote, kinds):
        files |= _remote_files(kind)
    own = {f"{kind.__module__}.{kind.__qualname__}": _code_of(kind) for kind in _own_kinds(model)}
    return [
        transformers.__version__,
        *(hashlib.sha256(source).hexdigest() for source in sorted(files.values())),
        *(f"{name} {code}" for name, code in sorted(own.items())),
    ]


def _remote_files(kind: type) -> dict[str, bytes]:
    """All that was imported of a checkpoint's package, by path, as helpers define no module."""
    if kind not in _sources:
        package = f"{kind.__module__.rpartition('.')[0]}."
        files = {
            getattr(module, "__file__", None) for name, module in [*sys.modules.items()] if name.startswith(package)
        }
        paths = (Path(file) for file in files if file)
        # tokenizers may not be imported yet
        _sources[kind] = {str(path): path.read_bytes() for path in paths if not path.name.startswith("tokenization")}
    return _sources[kind]


def _is_remote(kind: type) -> bool:
    return package_of(kind.__module__) == "transformers_modules"


def _plain(value: Any) -> Any:
    """What JSON can say of a value of a config."""
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items() if key not in NOT_OF_THE_MODEL}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__qualname__  # not where it is in memory
