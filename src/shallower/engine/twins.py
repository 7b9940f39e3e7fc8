"""What a repair is fitted on: the cut and the dense model side by side.

`Twins` runs both through the same text and stops at a station: a place in the cut model behind which units are missing.
There it gives the stream of the cut (and so far repaired) model, what its last map was fed with, and the stream of the
dense model behind the missing units. Nothing is kept of it but sums in float64 (`moments`). The one thing that may be
held, within a memory budget, is each batch's stream at the depth reached, so that the next station need not start from
the embedding; without it the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shallower import progress
from shallower.anatomy.dissect import Anatomy
from shallower.anatomy.patch import held, lifted
from shallower.anatomy.writers import Halves, Writer
from shallower.checkpoint.fingerprint import stored
from shallower.corpus.calibration import Batch, CalibrationSet
from shallower.engine.trace import Trace, trace
from shallower.engine.workers import usual_memory
from shallower.errors import ModelError
from shallower.units import Kind, Unit

TOKENS_A_BATCH = 2048
Aim = Literal["dense", "cut"]
MASSIVE = 10.0  # times the median length of a sequence's tokens in the dense model, from which a token is a sink
SINK_WEIGHT = 30.0  # of a sink's relative error; measured in benchmarks/results/recovery.md


@dataclass(frozen=True)
class Point:
    """A place in the stream: where it enters block `index` (the number of blocks: leaves the last).

    without: go through that block too, without these sublayers; without its MLP, to the point between its halves.
    """

    index: int
    without: tuple[Kind, ...] = ()


@dataclass(frozen=True)
class Station:
    """A place of the cut model, right after a sublayer that it kept.

    here: the place. before: the same place in the dense model. after: where the dense model has gone when the cut model
    runs its next sublayer. missing: the units between the two, in order; none where nothing was cut. writes: block and
    sublayer that wrote to the stream last; None where it is still the embedding. beside: missing units cannot be run
    apart from what is left of their block, which reads the stream that they read.
    """

    here: Point
    before: Point
    after: Point
    missing: tuple[Unit, ...]
    writes: tuple[int, Kind] | None
    beside: bool = False

    def writer(self, halves: Sequence[Halves]) -> Writer | None:
        """The map that writes to the stream right before. halves: of the cut model's blocks."""
        if self.writes is None:
            return None
        place, kind = self.writes
        return halves[place].writer(kind)


@dataclass(frozen=True, eq=False)
class Reading:
    """One batch at a station; real tokens only.

    stream: the cut model's, float32 [tokens, hidden]. target: the dense model's behind the missing units. start: where
    the missing units' update of the target begins: the dense model's stream ahead of them, or, where the target is made
    from the cut model's stream, that; None where not asked for. inputs: what the writer was fed with, float32 [tokens,
    inputs]; None where not asked for. sequence: int64 [tokens], which sequence of the batch a token is of.
    """

    stream: Tensor
    target: Tensor
    start: Tensor | None
    inputs: Tensor | None
    sequence: Tensor


class Streams:
    """The dense model's streams on one text, kept from one cut model to the next: at depths a fixed number of blocks
    apart, as many as there is memory for.
    """

    def __init__(self, dense: Anatomy, calibration: CalibrationSet, memory: int) -> None:
        """memory: bytes that they may take."""
        room = memory // _bytes(dense, calibration)
        self._apart = -(-len(dense.blocks) // room) if room else 0
        self._kept: dict[tuple[int, int], Tensor] = {}

    def keep(self, number: int, depth: int, stream: Tensor) -> None:
        """Keep a batch's stream that enters block `depth`, where that is one of the depths."""
        if self._apart and depth % self._apart == 0:
            self._kept[number, depth] = stream

    def deepest(self, number: int, depth: int) -> tuple[int, Tensor] | None:
        """The deepest kept stream of a batch down to `depth`, with its own depth."""
        for index in range(depth, 0, -1):
            if (number, index) in self._kept:
                return index, self._kept[number, index]
        return None


def _bytes(dense: Anatomy, calibration: CalibrationSet) -> int:
    """What the stream of a text takes at one depth."""
    hidden = dense.model.config.get_text_config(decoder=True).hidden_size
    return int(calibration.input_ids.numel() * hidden * dense.model.dtype.itemsize)


def _alike(student: Anatomy, dense: Anatomy) -> int:
    """How many blocks, from the first on, both models have in common, tensor for tensor: weights that a repair changes
    are replaced, never written to.
    """
    for depth, (one, other) in enumerate(zip(student.blocks, dense.blocks, strict=False)):
        ours, theirs = stored(one.module), stored(other.module)
        if ours.keys() != theirs.keys() or any(tensor is not theirs[name] for name, tensor in ours.items()):
            return depth
    return min(len(student.blocks), len(dense.blocks))


class Twins:
    """A cut and a dense model that read the same text. Ask for stations in the order of depth.

    Between two questions the cut model may change at or behind the station that was asked for last.
    """

    def __init__(
        self,
        student: Anatomy,
        dense: Anatomy,
        calibration: CalibrationSet,
        *,
        memory: int | None = None,
        streams: Streams | None = None,
    ) -> None:
        """memory: bytes that streams may take; by default a quarter of what is free. streams: of the dense model on
        this text, besides: where they are kept from one student to the next. What they hold is not run again, neither
        in the dense model nor in the blocks that the student has in common with it.
        """
        self.student, self.dense = student, dense
        self.batches = list(calibration.batches(max(1, TOKENS_A_BATCH // calibration.length)))
        needed = 2 * _bytes(dense, calibration)
        allowed = usual_memory(dense.model) if memory is None else memory
        self._holds = needed <= allowed
        self._streams = streams
        self._shared = 0
        self._held: dict[tuple[int, bool], tuple[int, Tensor]] = {}
        self.tokens = 0
        """Tokens that went through one of the two models' blocks, counted once a block."""

    def forget(self) -> None:
        """Begin at the embedding again: the cut model changed in front of where it stands."""
        self._held = {key: held for key, held in self._held.items() if not key[1]}

    def read(
        self,
        station: Station,
        writer: Writer | None = None,
        *,
        aim: Aim = "dense",
        start: bool = False,
        label: str = "",
    ) -> Iterator[Reading]:
        """Every batch at `station`.

        writer: whose inputs are wanted. aim: what `target` is: the dense model's own stream, or what the missing units
        make of the cut model's. start: whether the readings have it.

        Raises ModelError when the missing units cannot be run on the cut model's stream.
        """
        self._shared = 0 if self._streams is None else _alike(self.student, self.dense)
        with progress.task(label or "reading both models", len(self.batches)) as step:
            for number, batch in enumerate(self.batches):
                with torch.no_grad():
                    yield self._reading(number, batch, station, writer, aim, start)
                step()

    def _reading(
        self, number: int, batch: Batch, station: Station, writer: Writer | None, aim: Aim, start: bool
    ) -> Reading:
        seen: list[Tensor] = []
        student, dense = trace(self.student, batch), trace(self.dense, batch)
        shared = self._shared if torch.equal(student.entry, dense.entry) else 0
        # The block in front of the station is run again next time: by then its writer may have changed.
        ahead = station.here.index - (0 if station.here.without else 1)
        self._stream(number, student, True, Point(max(ahead, 0)), shared)
        handle = None
        if writer is not None:
            handle = writer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            shared = shared if writer is None else min(shared, max(ahead, 0))  # the writer is to be seen at work
            stream = self._stream(number, student, True, station.here, shared, hold=False)
        finally:
            if handle is not None:
                handle.remove()
        first = held(self.student.blocks[0].module, "entry") if station.here == Point(0) else None
        if first is not None:  # of an earlier repair: it stands in block 0, and the next patch goes behind it
            stream = first(stream)
        began, depths = None, len(self.dense.blocks)
        if aim == "dense" or not station.missing:
            if start:
                began = self._stream(number, dense, False, station.before, depths)
            target = self._stream(number, dense, False, station.after, depths)
        else:
            began = stream
            target = self._pass_through(dense, station, stream)
        mask = batch.attention_mask
        real = torch.ones_like(batch.input_ids) if mask is None else mask
        chosen = real.bool().to(stream.device)
        sequence = torch.arange(len(real), device=stream.device)[:, None].expand_as(chosen)[chosen]
        shape = chosen.shape
        inputs = seen[-1].reshape(*shape, -1)[chosen].float() if seen else None
        began = began[chosen].float() if start and began is not None else None
        return Reading(stream[chosen].float(), target[chosen].float(), began, inputs, sequence)

    def _stream(
        self, number: int, replay: Trace, of_student: bool, point: Point, shared: int, *, hold: bool = True
    ) -> Tensor:
        """The stream of a batch at a point, from where it was held or from the embedding. shared: blocks that are the
        dense model's.
        """
        index, hidden = self._held.get((number, of_student), (0, replay.entry))
        if index > point.index:
            index, hidden = 0, replay.entry
        kept = None if self._streams is None else self._streams.deepest(number, min(point.index, shared))
        if kept is not None and kept[0] > index:
            index, hidden = kept
        while index < point.index:
            hidden = replay.run(index, hidden)
            self.tokens += hidden.shape[0] * hidden.shape[1]
            index += 1
            if self._streams is not None and index <= shared:
                self._streams.keep(number, index, hidden)
        if self._holds and hold:
            self._held[number, of_student] = index, hidden
        if point.without:
            self.tokens += hidden.shape[0] * hidden.shape[1]
            with lifted(replay.anatomy.blocks[index].module, "exit"):  # it stands behind this point
                return replay.run(index, hidden, point.without)
        return hidden

    def _pass_through(self, dense: Trace, station: Station, stream: Tensor) -> Tensor:
        others: dict[Kind, tuple[Kind, ...]] = {"block": (), "attn": ("mlp",), "mlp": ("attn",)}
        for unit in station.missing:
            if station.beside and unit.kind != "block":
                raise ModelError(
                    f"{unit} cannot be run apart from what is left of its block, so its update cannot be measured in "
                    "the cut model: measure in the dense model."
                )
            stream = dense.run(unit.index, stream, others[unit.kind])
            self.tokens += stream.shape[0] * stream.shape[1]
        return stream


def token_weights(reading: Reading, sinks: float, relative: bool) -> Tensor:
    """How much each token counts: float32 [tokens].

    sinks: 0 for tokens whose stream, in one of the two models, is more than `sinks` times as long as the median of
    their sequence (first tokens with massive activations, arXiv:2402.17762); 0 keeps all. relative: else 1 over the
    target's squared length, since the norms behind it see directions; a token of median length counts about 1, and a
    sink's relative error `SINK_WEIGHT` times that of others: sinks are few, and what is missing may be what makes them,
    without which attention behind the cut has nowhere to rest.
    """
    streams, targets = reading.stream.norm(dim=-1), reading.target.norm(dim=-1)
    weights = torch.ones_like(targets)
    for row in range(int(reading.sequence.max()) + 1):
        members = reading.sequence == row
        for length in (streams[members], targets[members]) if sinks else ():
            weights[members] *= (length <= sinks * length.median()).to(weights.dtype)
        if relative:
            length = targets[members]
            median = length.median()
            weights[members] *= (median / length.clamp_min(1e-6 * float(median) + 1e-30)).square()
            weights[members] *= torch.where(length > MASSIVE * median, SINK_WEIGHT, 1.0)
    return weights
