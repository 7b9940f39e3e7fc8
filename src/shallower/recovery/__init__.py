"""Repair a cut model. One recovery a file: a function, registered under the file's name.

In closed form it asks for `repair`, a `Repair`: the cut model with its dense teacher, the units that are gone,
calibration text and a seed. It changes `repair.student.model` in place and returns nothing.

With the trait `trained=True` it is written as `method(student, task, *, options)` and decorated with
`@trainable(Recipe())` (`shallower.training.recipe`) below `@recovery(…)`, by which it is given a `Task` and takes the
options of the recipe, too: see `full.py`. Without that it asks for what a `Task` is made of, changes the student in
place and returns it:

    student      a PreTrainedModel already cut, in memory
    anatomy      of the dense model
    removed      frozenset of units
    calibration  a CalibrationSet
    held_out     a function from a model to its perplexity on text that nothing is fitted on, or None
    folder       where it may keep what it resumes from, or None
    seed

Further traits (where one holds options, {} is for any):

    maps         True where it puts maps at cuts that only a packaged checkpoint has a place for, or "constant" for
                 constants that become maps where the family has no bias for them
    inputs       of one that fits maps: a function (repair, all options) that says how many inputs the widest of them
                 has, so that too short a text is refused before anything is fitted
    folds        options with which it needs a matrix in front of each cut (`require_writers`), so that a search keeps
                 what could not be repaired
    plain        options with which it needs the plain cut, so that no recovery can come before it
    whole        of one that is trained: options with which it needs all weights in every process
    unread       a function (all options) that names those that nothing reads with the values of the others, and why;
                 what is trained has it from its recipe
    packages     those that it needs, by the extra of this package that brings them

The dense model, with which the cut one shares tensors until they are replaced, stays as it was. Several run one after
another, each on what the one before left.

What can live in a stock checkpoint is folded into it (`surgery.fold`); the rest becomes a `Patch` at the cut,
which a packaged checkpoint holds in the place of something missing (`surgery.mapping`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from shallower.anatomy.dissect import Anatomy
from shallower.anatomy.patch import Patch
from shallower.anatomy.writers import Halves, Writer, find_writers
from shallower.corpus.calibration import CalibrationSet
from shallower.engine.moments import Moments, require_tokens
from shallower.engine.twins import Aim, Reading, Station, Streams, Twins, token_weights
from shallower.errors import CorpusError, ModelError
from shallower.surgery.fold import fold_constant
from shallower.surgery.patch import attach_at, patches
from shallower.surgery.stations import cuts, stations
from shallower.units import Unit


@dataclass(eq=False)
class Repair:
    """What a recovery is given.

    student: anatomy of the cut model, which is changed. dense: of the model that it was cut from, which is not.
    removed: what is missing, by its place in the dense model. memory: bytes that may be used besides the models, None
    for a quarter of what is free. streams: the dense model's on this text, where other cut models read them, too.
    """

    student: Anatomy
    dense: Anatomy
    removed: frozenset[Unit]
    calibration: CalibrationSet
    seed: int = 0
    memory: int | None = None
    streams: Streams | None = None
    notes: list[str] = field(default_factory=list)
    """What was found on the way, a sentence each, for the person who asked."""
    tokens: int = 0
    """Calibration tokens read, counted once a pass."""

    @cached_property
    def halves(self) -> tuple[Halves, ...]:
        """How the student's blocks write to the stream."""
        return find_writers(self.student)

    @cached_property
    def _halves_of_dense(self) -> tuple[Halves, ...]:
        return find_writers(self.dense)

    @cached_property
    def stations(self) -> tuple[Station, ...]:
        """Every place behind a kept sublayer, in order of depth.

        Raises PlanError when the student is not the dense model without the removed units.
        """
        return stations(self.student, self.dense, self.removed, self._halves_of_dense)

    @cached_property
    def cuts(self) -> tuple[Station, ...]:
        """The places where units are missing. Raises PlanError as `stations` does."""
        return cuts(self.student, self.dense, self.removed, self._halves_of_dense)

    def twins(self) -> Twins:
        """Both models on the calibration text; for a run through stations in order of depth."""
        return Twins(self.student, self.dense, self.calibration, memory=self.memory, streams=self.streams)

    def writer(self, station: Station) -> Writer | None:
        """The map that writes to the stream right before a station."""
        return station.writer(self.halves)

    def require_writer(self, station: Station) -> Writer:
        """Raise ModelError where nothing writes to the stream that a repair could be folded into."""
        writer = self.writer(station)
        if writer is None:
            self.require_no_maps()
            first = station.missing[0] if station.missing else "the block"
            raise ModelError(
                f"{self.student.family} has no matrix in front of {first} whose output is the stream's change (it is "
                "the embedding, a norm, or several experts): use emulated-update or low-rank, which need none"
                + (", or keep the first block (--protect first:1)." if station.writes is None else ".")
            )
        return writer

    def require_writers(self) -> None:
        """Raise ModelError, before anything is changed, unless a repair could be folded in front of each cut."""
        for station in self.cuts:
            self.require_writer(station)

    def require_no_maps(self) -> None:
        """Raise ModelError where an earlier recovery put maps at cuts."""
        if any(patches(self.student.model)):
            raise ModelError(
                "maps of an earlier recovery stand at the cuts, and behind a map nothing can be folded: run this one "
                "first, as in --with refit,low-rank."
            )

    def samples(
        self,
        twins: Twins,
        station: Station,
        writer: Writer | None,
        *,
        sinks: float,
        relative: bool,
        aim: Aim,
        label: str,
        start: bool = False,
    ) -> Iterator[tuple[Reading, Tensor]]:
        """Batches at a station with the weight of each token.

        Raises CorpusError after the last one when no token counts.
        """
        counted = 0
        for reading in twins.read(station, writer, aim=aim, start=start, label=label):
            weights = token_weights(reading, sinks, relative)
            counted += int((weights > 0).sum())
            self.tokens += len(weights)
            yield reading, weights
        if not counted:
            raise CorpusError(f"no token of the calibration text is left with sinks={sinks}: use a larger value, or 0.")

    def moments(self, inputs: int, *, least: str) -> Moments:
        """Empty sums, for a fit with so many inputs. least: what is fitted, for the error.

        Raises CorpusError when the text has fewer tokens than `inputs`.
        """
        require_tokens(self.calibration.tokens, inputs, least=least)
        return Moments()

    def add_constant(self, station: Station, constant: Tensor) -> None:
        """Add `constant` [hidden] to the stream at a station: in a bias where the family has one, else as a patch."""
        writer = self.writer(station)
        if writer is not None:
            try:
                fold_constant(self.student, writer, constant)
                return
            except ModelError as error:
                self.notes.append(f"{error} It stands at the cut as a patch.")
        hidden = len(constant)
        self.add_patch(station, constant.new_zeros(hidden, 0), constant.new_zeros(0, hidden), None, constant)

    def add_patch(self, station: Station, down: Tensor, up: Tensor, mean: Tensor | None, bias: Tensor) -> None:
        """Let the stream x at a station become x + (x − mean) down up + bias.

        down: [hidden, rank]. up: [rank, hidden]. mean, bias: [hidden].

        Raises ModelError when the family has no such place.
        """
        model = self.student.model
        kind = {"device": model.device, "dtype": model.dtype}
        mean = torch.zeros_like(bias) if mean is None else mean
        patch = Patch(*(tensor.to(**kind) for tensor in (down, up, mean, bias)))
        patch.requires_grad_(next(model.parameters()).requires_grad)
        attach_at(self.student, station.here, patch, self.halves)


def hidden_size(repair: Repair, options: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Width of the stream: the inputs of a map of it."""
    return int(repair.dense.model.config.get_text_config(decoder=True).hidden_size)
