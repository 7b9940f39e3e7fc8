"""What each unit weighs: parameters, bytes, FLOPs per token, KV-cache bytes per token. Measured on a few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shallower.anatomy.dissect import PROBE_TOKENS, Anatomy, probe_ids
from shallower.anatomy.patch import Patch
from shallower.decoding import with_cache
from shallower.packaged import LeavesOut
from shallower.units import Unit

CHUNK = 64  # tokens, of transformers' gated delta rules


@dataclass(frozen=True)
class UnitWeight:
    """parameters: count. bytes: as stored now. flops: floating-point operations a token, at a context of a few tokens
    (64 where the model has linear attention). kv_bytes: bytes that one token adds to the cache. blocks: 1 for a block,
    ½ for a sublayer.
    """

    parameters: int
    bytes: int
    flops: int
    kv_bytes: int
    blocks: float = 0.0


@dataclass(frozen=True)
class Weights:
    """Weight of every unit, of all blocks together, and of the whole model. What blocks share (Zamba's transformer)
    weighs in each of them, and so in their sum, of which a budget takes its share; in the model it weighs once.
    """

    units: dict[Unit, UnitWeight]
    blocks: UnitWeight
    model: UnitWeight

    def of(self, units: Iterable[Unit]) -> UnitWeight:
        """Sum over `units`."""
        return _sum(self.units[unit] for unit in units)


def _sum(weights: Iterable[UnitWeight]) -> UnitWeight:
    total = UnitWeight(0, 0, 0, 0)
    for weight in weights:
        total = UnitWeight(*(getattr(total, name) + getattr(weight, name) for name in UnitWeight.__dataclass_fields__))
    return total


def weigh(anatomy: Anatomy) -> Weights:
    """Weigh every unit of a model. Runs one forward of a few tokens; experts count as often as a token visits them."""
    flops, kv_bytes = _observe(anatomy)
    units: dict[Unit, UnitWeight] = {}
    for unit in anatomy.units:
        block = anatomy.blocks[unit.index]
        modules = block.modules_of(unit.kind)
        holds_cache = unit.kind in ("block", "attn")
        units[unit] = UnitWeight(
            *size(modules),
            flops=sum(flops[module] for module in modules),
            kv_bytes=kv_bytes[unit.index] if holds_cache else 0,
            blocks=1.0 if unit.kind == "block" else 0.5,
        )
    blocks = _sum(units[unit] for unit in anatomy.of_kind("block"))
    whole = UnitWeight(*size((anatomy.model,)), flops[anatomy.model], blocks.kv_bytes, float(len(anatomy.blocks)))
    return Weights(units, blocks, whole)


def size(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Parameters of some modules, each counted once, and the bytes they take as they are stored; with the means of maps
    at cuts, which a checkpoint holds among them.
    """
    parts = {part for module in modules for part in module.modules()}
    parameters: set[Tensor] = {parameter for part in parts for parameter in part.parameters(recurse=False)}
    parameters |= {part.mean for part in parts if isinstance(part, Patch) and part.rank}
    return sum(map(_numbers, parameters)), sum(p.numel() * p.element_size() for p in parameters)


def parameters(anatomy: Anatomy, units: Iterable[Unit]) -> int:
    """Parameters of `units`, summed over these."""
    return sum(size(anatomy.blocks[unit.index].modules_of(unit.kind))[0] for unit in units)


def _numbers(parameter: Tensor) -> int:
    """How many numbers a parameter holds: bitsandbytes packs two of four bits in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def _observe(anatomy: Anatomy) -> tuple[dict[nn.Module, int], list[int]]:
    """FLOPs a token of each part, and bytes a token of each block's cache."""
    parts: list[nn.Module] = [anatomy.model]
    for block in anatomy.blocks:
        parts += [module for kind in ("block", "attn", "mlp") for module in block.modules_of(kind)]
    ids = _probe(anatomy)
    counter = FlopCounterMode(display=False, custom_mapping=_products())
    before: dict[nn.Module, int] = {}
    flops = dict.fromkeys(parts, 0)

    def enter(module: nn.Module, args: object) -> None:
        before[module] = counter.get_total_flops()

    def leave(module: nn.Module, args: object, output: object) -> None:
        flops[module] += counter.get_total_flops() - before[module]

    handles = [
        handle
        for part in parts
        for handle in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))
    ]
    try:
        with torch.no_grad(), _frozen(anatomy.model), counter:
            _, cache = with_cache(anatomy.model, ids)
    finally:
        for handle in handles:
            handle.remove()
    layers = getattr(cache, "layers", [])
    stored = [0] * len(anatomy.blocks)
    for layer, index in zip(layers, _with_cache(anatomy), strict=False):
        stored[index] = _cached_bytes(layer)
    return {part: count // ids.numel() for part, count in flops.items()}, stored


def _probe(anatomy: Anatomy) -> Tensor:
    """int64 [1, tokens]. Gated delta rules pad what they read to whole chunks, so there it is one chunk."""
    types = getattr(anatomy.model.config.get_text_config(), "layer_types", None) or ()
    return probe_ids(anatomy.model, CHUNK // PROBE_TOKENS if "linear_attention" in types else 1).view(1, -1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient: the counter fails on one that is an argument of a module (DBRX's experts)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _with_cache(anatomy: Anatomy) -> list[int]:
    """The blocks that have a layer in the cache, in order."""
    if not isinstance(anatomy.model, LeavesOut):
        return list(range(len(anatomy.blocks)))
    entries = anatomy.model.config.block_configs
    return [index for index, entry in enumerate(entries) if not entry.attention.no_op]


def _products() -> dict[object, object]:
    """How to count what the counter does not know: the one product over all experts, that with packed weights, and
    fused attention on a processor (it knows those of other devices).
    """

    def grouped(rows: tuple[int, ...], matrices: tuple[int, ...], *_: object, **__: object) -> int:
        return 2 * rows[-2] * rows[-1] * matrices[-1]

    def packed(rows: tuple[int, ...], _: object, matrix: Sequence[int], *__: object, **___: object) -> int:
        return 2 * math.prod(rows) * matrix[0]

    def attention(
        queries: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], *_: object, **__: object
    ) -> int:
        return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])

    known: list[tuple[object, str, Callable[..., int]]] = [
        (torch.ops.aten, "_grouped_mm", grouped),
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", attention),
    ]
    known += [(torch.ops.bitsandbytes, name, packed) for name in ("gemv_4bit", "gemm_4bit")]
    return {getattr(place, name): count for place, name, count in known if hasattr(place, name)}


def _cached_bytes(layer: object) -> int:
    """Bytes that one more token takes (within the window, for sliding attention); fixed states of linear attention do
    not count.
    """
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or not keys.numel():
        return 0
    stored = [keys, *(getattr(layer, name, None) for name in ("values", "indexer_keys"))]
    return sum(tensor.nbytes for tensor in stored if isinstance(tensor, Tensor)) // keys.shape[-2]
