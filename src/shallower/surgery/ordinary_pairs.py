"""Which sublayers can go in pairs, so that what is left is an ordinary model: `pair.3` is `mlp.3` with `attn.4`.

An ordinary model is attention, MLP, attention, MLP, …. What can go from it and leave one is made of whole blocks and
pairs, two neighbouring sublayers each, and every such set is made of them in one way only.
"""

from __future__ import annotations

from collections.abc import Sequence

from shallower import progress
from shallower.anatomy.dissect import Anatomy
from shallower.anatomy.weigh import UnitWeight, Weights, size
from shallower.errors import ModelError
from shallower.surgery.cut import cut, leftovers
from shallower.surgery.pairing import mlp_side
from shallower.units import Unit, plain


def exact_pairs(anatomy: Anatomy) -> tuple[Unit, ...]:
    """The pairs that this model can go without and be ordinary, in depth order; seen by cutting them.

    All or none: none where blocks are not sequential (parallel residuals), where norms on the stream belong to no half,
    or where an attention and the next MLP cannot share a block. A config that can only describe some sets of blocks
    may still refuse a set.
    """
    whole = [block.attn is not None and block.mlp is not None for block in anatomy.blocks]
    pairs = [Unit(index, "pair") for index in range(len(whole) - 1) if whole[index] and whole[index + 1]]
    with progress.task("looking for sublayers that pair up"):
        # every second pair at once: each attention meets the MLP that it would meet alone
        groups = [group for group in (pairs[::2], pairs[1::2]) if group]
        return tuple(pairs) if all(_leaves_ordinary(anatomy, group) for group in groups) else ()


def weigh_pairs(anatomy: Anatomy, weights: Weights, pairs: Sequence[Unit]) -> dict[Unit, UnitWeight]:
    """What each pair weighs, with the norms that go with its halves: as much as the model gets smaller."""
    if not pairs:
        return {}
    sides = mlp_side(anatomy)
    found = {}
    for pair in pairs:
        mlp, attn = (weights.units[part] for part in pair.sublayers)
        first, second = (anatomy.blocks[index].module for index in (pair.index, pair.index + 1))
        modules = [child for name, child in first.named_children() if name in sides[pair.index]]
        modules += [child for name, child in second.named_children() if name not in sides[pair.index + 1]]
        found[pair] = UnitWeight(
            *size(modules),
            flops=mlp.flops + attn.flops,
            kv_bytes=attn.kv_bytes,
            blocks=1.0,
        )
    return found


def _leaves_ordinary(anatomy: Anatomy, pairs: Sequence[Unit]) -> bool:
    try:
        return not leftovers(cut(anatomy, plain(pairs)))
    except ModelError:
        return False
