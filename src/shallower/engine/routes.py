"""Candidates as the engine sees them: one character a block, so that what two candidates share is a common prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from shallower.anatomy.dissect import Anatomy
from shallower.units import Kind, Unit

Route = str
ACTIONS: dict[str, tuple[Kind, ...]] = {".": (), "a": ("attn",), "m": ("mlp",), "b": ("attn", "mlp")}
"""What a block runs without, by its character."""
PASSED_OVER = "x"
"""The character of a block that is removed."""


def route_of(anatomy: Anatomy, removed: Collection[Unit]) -> Route:
    """What each block does when `removed` is gone. Candidates with the same route are the same model.

    Raises BudgetError when the model has no such unit.
    """
    gone: dict[int, set[Kind]] = defaultdict(set)
    anatomy.require(removed)
    for unit in removed:
        gone[unit.index].add(unit.kind)
    names = {frozenset(kinds): letter for letter, kinds in ACTIONS.items()}
    return "".join(
        PASSED_OVER if "block" in gone[block.index] else names[frozenset(gone[block.index])] for block in anatomy.blocks
    )
