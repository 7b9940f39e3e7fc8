"""What a search must keep so that the recoveries that come after it can be done."""

from __future__ import annotations

from collections.abc import Sequence

from shallower import progress
from shallower.anatomy import Anatomy
from shallower.anatomy.writers import Halves, Writer, find_writers
from shallower.errors import ModelError
from shallower.registry import Configured
from shallower.units import Kind, Unit, listed, plain
from shallower.verbs.recovery_steps import that_fold


def keep_repairable(dense: Anatomy, units: Sequence[Unit], steps: Sequence[Configured], protect: str) -> str:
    """`protect` with the blocks of those of the `units` without which one of the recoveries could not repair the model,
    as nothing that it could be folded into writes to the stream in front of them. Said in a note.

    Where each unit alone leaves a matrix in front of it, so does a set of them: the one in front of its first. But for
    the two halves of a first block that run side by side, each of which alone leaves the other one.

    Raises ModelError when that is all of them.
    """
    folding = that_fold(steps)
    if not folding:
        return protect
    halves = find_writers(dense)
    kept = [unit for unit in units if _writer_in_front(dense, plain((unit,))[0], halves) is None]
    first = [unit for unit in units if unit.index == 0]
    beside = not halves[0].sequential and {unit.kind for unit in first} == {"attn", "mlp"}
    if beside:
        kept = [*first, *(unit for unit in kept if unit.index)]
    if not kept:
        return protect
    reason = (
        f"{folding[0].name} needs a matrix in front of each cut whose output is the stream's change, and in front of "
        f"{listed(plain(kept))} {'together ' if beside else ''}there is none (but the embedding, a norm, or several "
        "experts)"
    )
    blocks = sorted({unit.index for unit in kept})
    if all(unit.index in blocks for unit in units):
        raise ModelError(f"{reason}; nothing else may go: use emulated-update or low-rank, which need none.")
    added = "first:1" if blocks == [0] else listed(Unit(index, "block") for index in blocks)
    progress.note(f"{reason}: the search keeps {'it' if len(kept) == 1 else 'them'}, as --protect {added} does.")
    return f"{protect},{added}" if protect else added


def _writer_in_front(dense: Anatomy, unit: Unit, halves: Sequence[Halves]) -> Writer | None:
    """The matrix that writes to the stream last where `unit` alone is missing. halves: of the dense model's blocks, as
    `stations` sees them.
    """
    block, own = dense.blocks[unit.index], halves[unit.index]
    if unit.kind == "mlp" and own.sequential:
        return own.attn
    other: Kind = "attn" if unit.kind == "mlp" else "mlp"
    if unit.kind != "block" and not own.sequential and block.sublayer(other) is not None:
        return own.writer(other)
    if unit.index == 0:
        return None
    return halves[unit.index - 1].writer("attn" if dense.blocks[unit.index - 1].mlp is None else "mlp")
