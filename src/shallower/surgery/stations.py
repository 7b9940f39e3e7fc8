"""Where a cut model has to be repaired: behind which of its sublayers the dense model did more than it does."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shallower.anatomy.dissect import Anatomy
from shallower.anatomy.writers import Halves
from shallower.engine.twins import Point, Station
from shallower.errors import PlanError
from shallower.surgery.pairing import Layer, layouts
from shallower.units import Kind, Unit


def layers_of(student: Anatomy, dense: Anatomy, removed: Collection[Unit]) -> list[Layer]:
    """Which dense blocks the cut model's blocks were made of.

    Raises PlanError when `student` is not `dense` without `removed`.
    """
    for layers in layouts(dense, removed):
        if len(layers) == len(student.blocks) and all(
            (block.attn is not None) == (layer.attn is not None and dense.blocks[layer.attn].attn is not None)
            and (block.mlp is not None) == (layer.mlp is not None and dense.blocks[layer.mlp].mlp is not None)
            for block, layer in zip(student.blocks, layers, strict=True)
        ):
            return layers
    raise PlanError(
        f"the model has {len(student.blocks)} blocks, which is not what is left of the {len(dense.blocks)} of its "
        f"teacher without the {len(removed)} units of the plan: name the plan that made it, and the model it was made "
        "from. (A checkpoint with maps in it, as low-rank leaves, can be trained further, but not repaired again.)"
    )


def stations(
    student: Anatomy, dense: Anatomy, removed: Collection[Unit], halves: Sequence[Halves]
) -> tuple[Station, ...]:
    """Every place of `student` behind a kept sublayer, in order of depth, and first the embedding.

    halves: of the dense model's blocks. Where a block's halves run side by side, or cannot be told apart, the whole
    block is one step.

    Raises PlanError when `student` is not `dense` without `removed`.
    """
    steps: list[_Step] = [(Point(0), Point(0), Point(0), -1, None, ())]
    steps += [
        step
        for place, layer in enumerate(layers_of(student, dense, removed))
        for step in _steps(place, layer, dense, halves)
    ]
    ends = [entering for _, _, entering, _, _, _ in steps[1:]] + [Point(len(dense.blocks))]
    keys = [key for _, _, _, key, _, _ in steps[1:]] + [2 * len(dense.blocks)]
    gone = _as_run(removed, halves)
    found = []
    for (here, before, _, key, writes, leftover), after, next_key in zip(steps, ends, keys, strict=True):
        missing = [unit for unit in gone if key < _key(unit) < _start(next_key, after)]
        found.append(Station(here, before, after, (*leftover, *missing), writes, beside=bool(leftover)))
    return tuple(found)


def cuts(student: Anatomy, dense: Anatomy, removed: Collection[Unit], halves: Sequence[Halves]) -> tuple[Station, ...]:
    """Those of the `stations` where units are missing."""
    return tuple(station for station in stations(student, dense, removed, halves) if station.missing)


# here, before, where the dense model starts it, its place among 2 N sublayers, what writes, units missing inside
_Step = tuple[Point, Point, Point, int, tuple[int, Kind] | None, tuple[Unit, ...]]


def _steps(place: int, layer: Layer, dense: Anatomy, halves: Sequence[Halves]) -> list[_Step]:
    """The kept sublayers of one block of the cut model."""
    here = Point(place + 1)
    attn, mlp, home = layer.attn, layer.mlp, layer.home
    block = dense.blocks[home]
    if not halves[home].sequential:
        if attn is None and mlp is None:
            return []
        gone = tuple(unit.kind for unit in layer.leftover if block.sublayer(unit.kind) is not None)
        kind: Kind = "mlp" if mlp is not None and block.mlp is not None else "attn"
        before = Point(home, gone) if gone else Point(home + 1)
        leftover = tuple(unit for unit in layer.leftover if unit.kind in gone)
        return [(here, before, Point(home), 2 * home + 1, (place, kind), leftover)]
    steps: list[_Step] = []
    if attn is not None:
        middle = Point(place, ("mlp",)) if mlp is not None else here
        steps.append((middle, Point(attn, ("mlp",)), Point(attn), 2 * attn, (place, "attn"), ()))
    if mlp is not None:
        steps.append((here, Point(mlp + 1), Point(mlp, ("mlp",)), 2 * mlp + 1, (place, "mlp"), ()))
    return steps


def _as_run(removed: Collection[Unit], halves: Sequence[Halves]) -> list[Unit]:
    """The units in order of depth; in place of two halves that run side by side, on one stream, their block."""
    units = set(removed)
    for index, half in enumerate(halves):
        block = Unit(index, "block")
        if not half.sequential and units.issuperset(block.sublayers):
            units = units.difference(block.sublayers) | {block}
    return sorted(units)


def _key(unit: Unit) -> int:
    """Place of a unit's first sublayer among the sublayers of all blocks."""
    return 2 * unit.index + (unit.kind == "mlp")


def _start(key: int, entering: Point) -> int:
    """Place of the first sublayer of the step whose key (its last sublayer) is given."""
    return key if entering.without or key % 2 == 0 else key - 1
