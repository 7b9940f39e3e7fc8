"""Let a sublayer add nothing to the residual stream though it is still there: by zeros in its output projection."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from shallower.anatomy.dissect import Anatomy, run_probe
from shallower.units import Unit


def output_projections(anatomy: Anatomy, units: Collection[Unit]) -> dict[Unit, tuple[str, ...]]:
    """For each sublayer the path, in its block, of the module with weights that it calls last on a few tokens."""
    last: dict[Unit, tuple[str, ...]] = {}
    handles = []

    def watch(unit: Unit, path: str, module: nn.Module) -> None:
        def remember(*_: object) -> None:
            last[unit] = (path,)

        handles.append(module.register_forward_hook(remember))

    for unit in units:
        block = anatomy.blocks[unit.index]
        sublayer = block.sublayer(unit.kind)
        for name in () if sublayer is None else sublayer.names:
            for path, module in block.module.get_submodule(name).named_modules(prefix=name):
                if module._parameters:
                    watch(unit, path, module)
    run_probe(anatomy.model, handles)
    return {unit: last.get(unit, ()) for unit in units}


def silence(block: nn.Module, paths: Iterable[str]) -> None:
    """Put zeros in place of all weights at `paths` of a block; tensors that it shares with others stay as they are."""
    for path in paths:
        for module in block.get_submodule(path).modules():
            for name, parameter in module.named_parameters(recurse=False):
                zeros = torch.zeros_like(parameter)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)


def adds_nothing(anatomy: Anatomy, unit: Unit) -> bool:
    """Whether a whole matrix of the sublayer is zero, as its output projection is in a padded checkpoint."""
    modules = anatomy.blocks[unit.index].modules_of(unit.kind)
    return any(not bool(weight.any()) for module in modules for weight in module.parameters() if weight.dim() >= 2)
