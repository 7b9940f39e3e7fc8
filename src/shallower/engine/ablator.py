"""One question, asked in batches: how good is the model without these units?

Candidates are arranged as a prefix tree over depth and walked depth-first, so the stream entering block l is computed
once for all candidates that agree below l: leave-one-out over N blocks costs N (N + 1) / 2 block passes, not N².
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallower import progress
from shallower.anatomy.dissect import Anatomy
from shallower.corpus.calibration import CalibrationSet
from shallower.engine.head import find_head, token_values
from shallower.engine.memo import Memo, context_key
from shallower.engine.race import Racing, survivors
from shallower.engine.trace import Trace, prove, trace
from shallower.errors import BudgetError
from shallower.registry import objective as objectives
from shallower.units import Kind, Unit

Route = str  # one character a block: what the block does for a candidate
ACTIONS: dict[str, tuple[Kind, ...]] = {".": (), "a": ("attn",), "m": ("mlp",), "b": ("attn", "mlp")}
PASSED_OVER = "x"

TOKENS_A_BATCH = {"cpu": 512}  # enough rows for matrix products at full speed, few enough for races to end early
TOKENS_A_BATCH_ELSEWHERE = 8192
TRACE_BYTES = 1 << 30  # traces kept between calls; beyond this they are taken anew, which costs little


@dataclass
class Spent:
    """What evaluation has cost so far.

    tokens: calibration tokens × candidates measured. block_tokens: tokens run through one block. recalled: measurements
    of one candidate on one batch that the memo knew. exhaustive: tokens that races would have cost without dropping
    anyone.
    """

    tokens: int = 0
    block_tokens: int = 0
    recalled: int = 0
    exhaustive: int = 0


class Ablator:
    """Evaluates sets of removed units on a calibration set.

    Lives as long as a search: keeps the traces of the calibration batches and every result, and shares results through
    `memo`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        calibration: CalibrationSet,
        objective: str = "nll",
        options: Mapping[str, Any] | None = None,
        *,
        racing: Racing | None = None,
        memo: Memo | None = None,
        fingerprint: str = "",
    ) -> None:
        """Prepare to measure `objective`. racing: None evaluates exactly. `memo` needs the model's `fingerprint`.

        Raises UnknownName for an unknown objective and ModelError when replay does not reproduce the model.
        """
        self.anatomy = anatomy
        self.calibration = calibration
        self.objective = objectives.get(objective)
        self.options = dict(options or {})
        self.racing = racing
        self.spent = Spent()
        tokens = TOKENS_A_BATCH.get(anatomy.model.device.type, TOKENS_A_BATCH_ELSEWHERE)
        sequences = max(1, tokens // calibration.length)
        self._batches = list(calibration.batches(sequences))
        prove(anatomy, self._batches[0])
        self._head = find_head(anatomy)
        self._traces: dict[int, Trace] = {}
        self._memo = memo
        self._context = context_key(
            {
                "fingerprint": fingerprint,
                "calibration": calibration.digest,
                "sequences_a_batch": sequences,
                "objective": [objective, sorted(self.options.items())],
                "dtype": str(anatomy.model.dtype),
                "device": anatomy.model.device.type,
            }
        )
        self._measured: dict[tuple[Route, int], NDArray[np.float64]] = memo.read(self._context) if memo else {}

    @property
    def dense(self) -> float:
        """The objective of the dense model."""
        return self.losses([frozenset()])[0]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Scored tokens of each calibration sequence, int64 [sequences]: those that have a real next token."""
        mask = self.calibration.attention_mask
        if mask is None:
            return np.full(self.calibration.sequences, self.calibration.length - 1, dtype=np.int64)
        return mask[:, 1:].sum(1).numpy().astype(np.int64)

    def losses(self, candidates: Sequence[Collection[Unit]], keep: int | None = None) -> list[float]:
        """The objective, a mean over tokens, of the model without each candidate's units. Lower is better.

        keep: only the `keep` best matter. With racing on, candidates that are clearly not among them are dropped after
        a part of the text and come back as infinity; the others are then comparable among themselves, measured on the
        same tokens.
        """
        if keep is not None and self.racing is not None and len(candidates) > keep:
            return self._race([self.route(candidate) for candidate in candidates], keep, self.racing)
        tokens = int(self.counts.sum())
        return [_finite(float(sums.sum()) / tokens) for sums in self.sums(candidates)]

    def sums(self, candidates: Sequence[Collection[Unit]]) -> list[NDArray[np.float64]]:
        """For each candidate the objective summed over the tokens of each sequence, float64 [sequences].

        Raises BudgetError when a candidate names a unit that the model does not have.
        """
        routes = [self.route(candidate) for candidate in candidates]
        distinct = list(dict.fromkeys(routes))
        self._measure(distinct)
        joined = {route: self._joined(route, len(self._batches)) for route in distinct}
        return [joined[route] for route in routes]

    def route(self, candidate: Collection[Unit]) -> Route:
        """What each block does for a candidate. Candidates with the same route are the same model."""
        removed: dict[int, set[Kind]] = defaultdict(set)
        for unit in candidate:
            if unit.index >= len(self.anatomy.blocks) or (
                unit.kind != "block" and self.anatomy.blocks[unit.index].part(unit.kind) is None
            ):
                raise BudgetError(
                    f"{unit} does not exist: this {self.anatomy.family} model has blocks 0 to "
                    f"{len(self.anatomy.blocks) - 1}."
                )
            removed[unit.index].add(unit.kind)
        names = {frozenset(kinds): letter for letter, kinds in ACTIONS.items()}
        route = []
        for block in self.anatomy.blocks:
            kinds = removed[block.index]
            route.append(PASSED_OVER if "block" in kinds else names[frozenset(kinds)])
        return "".join(route)

    def _race(self, routes: list[Route], keep: int, racing: Racing) -> list[float]:
        """Losses of the survivors on what was measured, infinity for the rest."""
        running = list(dict.fromkeys(routes))
        self.spent.exhaustive += len(running) * self.calibration.input_ids.numel()
        measured = 0
        with (
            progress.task(f"racing {len(running)} candidates", len(running) * len(self._batches)) as step,
            torch.no_grad(),
        ):
            for number in range(len(self._batches)):
                if len(running) <= keep:
                    break
                self._measure_batch(number, running, step)
                measured = number + 1
                sums = np.stack([self._joined(route, measured) for route in running])
                alive = survivors(sums, self.counts[: sums.shape[1]], keep, racing)
                step(int((~alive).sum()) * (len(self._batches) - measured))
                running = [route for route, stays in zip(running, alive, strict=True) if stays]
        losses = {}
        for route in running:
            sums = self._joined(route, measured)
            losses[route] = _finite(float(sums.sum() / self.counts[: len(sums)].sum()))
        return [losses.get(route, math.inf) for route in routes]

    def _joined(self, route: Route, batches: int) -> NDArray[np.float64]:
        return np.concatenate([self._measured[route, number] for number in range(batches)])

    def _measure(self, routes: list[Route]) -> None:
        """Fill in whatever is not yet known of `routes`, batch by batch; what was measured is kept even when
        interrupted.
        """
        description = "measuring the model" if len(routes) == 1 else f"measuring {len(routes)} candidates"
        missing = {
            number: wanted
            for number in range(len(self._batches))
            if (wanted := [route for route in routes if (route, number) not in self._measured])
        }
        total = sum(map(len, missing.values()))
        self.spent.recalled += len(routes) * len(self._batches) - total
        if not missing:
            return
        with progress.task(description, total) as step, torch.no_grad():
            for number, wanted in missing.items():
                self._measure_batch(number, wanted, step)

    def _measure_batch(self, number: int, routes: list[Route], step: progress.Step) -> None:
        """Measure those of `routes` that are not yet known on one batch."""
        known = [route for route in routes if (route, number) in self._measured]
        step(len(known))
        self.spent.recalled += len(known)
        routes = [route for route in routes if (route, number) not in self._measured]
        if not routes:
            return
        replay = self._trace(number)
        dense = None
        if {"dense_logits", "dense_hidden"} & set(self.objective.parameters):
            [(_, dense)] = self._walk(replay, 0, replay.entry, [self.route(())])
        found: list[tuple[Route, int, NDArray[np.float64]]] = []
        for route, hidden in self._walk(replay, 0, replay.entry, routes):
            values = token_values(self.objective, self.options, self._head, replay, hidden, dense)
            found.append((route, number, values.double().sum(1).cpu().numpy()))
            self.spent.tokens += replay.batch.input_ids.numel()
            step()
        if self._memo is not None:
            self._memo.write(self._context, found)
        self._measured.update({(route, number): sums for route, number, sums in found})

    def _trace(self, number: int) -> Trace:
        if number not in self._traces:
            captured = trace(self.anatomy, self._batches[number])
            if (number + 1) * captured.entry.nbytes > TRACE_BYTES:
                return captured
            self._traces[number] = captured
        return self._traces[number]

    def _walk(self, replay: Trace, depth: int, hidden: Tensor, routes: list[Route]) -> Iterator[tuple[Route, Tensor]]:
        """Depth-first over the prefix tree of `routes`, which agree below `depth`, where the stream is `hidden`."""
        while depth < len(self.anatomy.blocks):
            branches: dict[str, list[Route]] = defaultdict(list)
            for route in routes:
                branches[route[depth]].append(route)
            if len(branches) > 1:
                for action, members in branches.items():
                    yield from self._walk(replay, depth + 1, self._apply(replay, depth, hidden, action), members)
                return
            hidden = self._apply(replay, depth, hidden, next(iter(branches)))
            depth += 1
        for route in routes:
            yield route, hidden

    def _apply(self, replay: Trace, index: int, hidden: Tensor, action: str) -> Tensor:
        if action == PASSED_OVER:
            return hidden
        self.spent.block_tokens += hidden.shape[0] * hidden.shape[1]
        return replay.run(index, hidden, ACTIONS[action])


def _finite(loss: float) -> float:
    """An overflow is as bad as can be; as NaN, which compares as neither better nor worse, it could win a search."""
    return loss if math.isfinite(loss) else math.inf
