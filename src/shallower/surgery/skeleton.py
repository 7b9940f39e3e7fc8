"""Prove that a rewritten config describes the blocks that are kept.

The model class is built from the new config without memory for weights, and every block of that skeleton is compared
with the block that will stand in its place: classes, parameter shapes, and every plain attribute (windows, scales,
kinds of attention). So a per-block field that was cut wrongly, or a constant that depends on a block's place, is found
for any family, also where the few tokens of a run would not show it.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from shallower.errors import ModelError

_INDEX = re.compile(r"idx|index|layer_id|layer_num|block_id")
_NOT_COMPARED = {"training", "gradient_checkpointing"}


def skeleton(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of `model`'s class made from `config`, with parameters on the meta device."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return type(model)(copy.deepcopy(config))


def skeleton_blocks(model: PreTrainedModel, config: PretrainedConfig, path: str) -> nn.ModuleList:
    """The blocks at `path` of such a skeleton."""
    blocks = skeleton(model, config).get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def index_attributes(blocks: nn.ModuleList) -> frozenset[str]:
    """Names of the attributes that hold the index of the block they are in, everywhere they occur."""
    held: dict[str, bool] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            for name, value in vars(module).items():
                if type(value) is int and _INDEX.search(name):
                    held[name] = held.get(name, True) and value == index
    return frozenset(name for name, always in held.items() if always)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that came from the config: numbers, strings, and tuples or lists of them."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in _NOT_COMPARED and _is_plain(value):
            yield name, value


def require_same(built: nn.Module, taken: nn.Module, what: str, indices: frozenset[str], skip: tuple[str, ...]) -> None:
    """Compare a skeleton's block with the block taken from the dense model.

    Args:
        built: The block that the new config describes.
        taken: The block that will stand there.
        what: Names the block in the error.
        indices: Attributes that may differ, since they are renumbered.
        skip: Children that are not compared, since something else will stand there. Patches of a recovery are not
            compared either.

    Raises:
        ModelError: They differ.
    """
    taken_modules = dict(taken.named_modules())
    built_modules = dict(built.named_modules())
    for path in sorted(taken_modules.keys() | built_modules.keys()):
        parts = path.split(".")
        if parts[0] in skip or any(part.endswith("_patch") for part in parts):
            continue
        if path not in taken_modules or path not in built_modules:
            raise ModelError(f"{_cannot(what)}: only one of the two has {path!r}.")
        is_, would_be = taken_modules[path], built_modules[path]
        if not isinstance(is_, type(would_be)):
            kinds = f"{type(is_).__name__} would become {type(would_be).__name__}"
            raise ModelError(f"{_cannot(what)}: {path or 'the block'}, a {kinds}.")
        if type(is_) is type(would_be):
            _require_same_shapes(would_be, is_, f"{_cannot(what)}: {path}".rstrip(": "))
        attributes = dict(plain_attributes(is_))
        for name, value in plain_attributes(would_be):
            if name in attributes and name not in indices and not _close(attributes[name], value):
                where = f"{path}.{name}".lstrip(".")
                raise ModelError(f"{_cannot(what)}: {where} is {attributes[name]!r} and would become {value!r}.")


def require_place_free_buffers(blocks: nn.ModuleList, indices: frozenset[str]) -> None:
    """Raise ModelError when blocks that are configured alike differ in tensors that a checkpoint does not hold.

    Such a tensor is made from the place of its block, and would be made anew for another place.
    """
    seen: dict[object, torch.Tensor] = {}
    for block in blocks:
        modules = dict(block.named_modules())
        for path, module in modules.items():
            for name in module._non_persistent_buffers_set:
                tensor = module._buffers.get(name)
                if tensor is None or tensor.is_meta:
                    continue
                first = seen.setdefault((path, name, _settings(modules, path, indices)), tensor)
                if first is not tensor and not torch.equal(first, tensor):
                    raise ModelError(
                        f"{type(block).__name__} computes {path}.{name} from the place of the block, so that no "
                        "checkpoint can hold a block that moved."
                    )


def buffers_of_other_places(model: PreTrainedModel) -> tuple[str, ...]:
    """Tensors of the checkpoint that the class makes from the place of a block, and that are those of another place in
    this model: the last parts of their names.

    What was trained, such as a bias by which experts are chosen, begins alike in all blocks and is not among them.
    """
    stored = model.state_dict().keys()
    held = {name: tensor for name, tensor in model.named_buffers() if name in stored}
    if not held:
        return ()
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    first: dict[str, torch.Tensor] = {}
    by_place = set()
    for name in held.keys() & made.keys():
        same = re.sub(r"\d+", "N", name)
        if not _same_numbers(first.setdefault(same, made[name]), made[name]):
            by_place.add(same)
    wrong = [name for name in held.keys() & made.keys() if not _same_numbers(held[name], made[name])]
    return tuple(sorted({name.rpartition(".")[2] for name in wrong if re.sub(r"\d+", "N", name) in by_place}))


def _same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same, as far as half precision shows."""
    return one.shape == other.shape and torch.allclose(one.detach().cpu().float(), other.cpu().float(), rtol=0.01)


def _settings(modules: dict[str, nn.Module], path: str, indices: frozenset[str]) -> str:
    """What a module and those around it were configured with."""
    names = path.split(".") if path else []
    around = [modules[".".join(names[:depth])] for depth in range(len(names) + 1)]
    return repr([sorted((k, repr(v)) for k, v in plain_attributes(m) if k not in indices) for m in around])


def _require_same_shapes(built: nn.Module, taken: nn.Module, what: str) -> None:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(built, kind).items():
            own = getattr(taken, kind).get(name)
            if (own is None) != (tensor is None) or (tensor is not None and own.shape != tensor.shape):
                shapes = [None if t is None else tuple(t.shape) for t in (own, tensor)]
                raise ModelError(f"{what}.{name} has shape {shapes[0]} and would have {shapes[1]}.")


def _cannot(what: str) -> str:
    return f"the family's config cannot describe {what} in its new place"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _close(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-12) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)
