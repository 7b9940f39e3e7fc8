"""Which sequences each step reads. Step and seed decide, so that a resumed training reads on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from shallower.corpus.calibration import CalibrationSet
from shallower.corpus.instructions import InstructionSet
from shallower.errors import CorpusError, UserError

SEEDS = 1 << 63  # generators take no larger ones


@dataclass(frozen=True, eq=False)
class Portion:
    """Sequences that go through the model together.

    rows: their numbers in the set. input_ids, attention_mask: int64 [sequences, length], 1 for real tokens. scored:
    bool [sequences, length], the tokens whose prediction counts; the first of a sequence never does.
    """

    rows: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor


class Feed:
    """The text in shuffled order, another one each epoch, in steps of equal size.

    Raises CorpusError when the text is too short for one step, UserError when the processes cannot share a step.
    """

    def __init__(self, text: CalibrationSet, batch: int, at_once: int, seed: int, processes: int = 1) -> None:
        self.text = text
        self.seed = seed
        self.sequences = max(1, batch // text.length)
        self.together = max(1, at_once // text.length)
        real = torch.ones_like(text.input_ids) if text.attention_mask is None else text.attention_mask
        self._real = real
        self._scored = real.bool() & (text.scored if isinstance(text, InstructionSet) else True)
        self._scored[:, 0] = False
        # a sequence of one token says nothing of what comes next, and a step of such alone has no mean loss
        self._learned: tuple[int, ...] = tuple(self._scored.any(1).nonzero().flatten().tolist())
        if not self._learned:
            raise CorpusError("no sequence of the text has two tokens, so there is nothing to learn: give longer text.")
        self.steps = len(self._learned) // self.sequences
        if not self.steps:
            raise CorpusError(
                f"the text has {len(self._learned)} sequences of {text.length} tokens, too few for one step of "
                f"batch={batch} tokens: give more text, or set batch={len(self._learned) * text.length} or less."
            )
        if self.sequences % processes:
            raise UserError(
                f"a step of batch={batch} tokens has {self.sequences} sequences of {text.length}, which {processes} "
                f"processes cannot share: set batch={text.length * processes * -(-self.sequences // processes)}."
            )

    def step(self, number: int) -> tuple[int, ...]:
        """The sequences of a step, counted from 0; what does not fill a step at an epoch's end waits for the next."""
        epoch, at = divmod(number, self.steps)
        order = _order(len(self._learned), self.seed, epoch)[at * self.sequences : (at + 1) * self.sequences]
        return tuple(self._learned[index] for index in order)

    def portions(self, rows: tuple[int, ...]) -> Iterator[Portion]:
        """Rows a few at a time, without the padding that none of them needs."""
        for start in range(0, len(rows), self.together):
            yield self.portion(rows[start : start + self.together])

    def portion(self, rows: tuple[int, ...]) -> Portion:
        index = torch.tensor(rows)
        real = self._real[index]
        length = int(real.sum(1).max())
        return Portion(rows, self.text.input_ids[index, :length], real[:, :length], self._scored[index, :length])

    def scored(self, rows: tuple[int, ...]) -> int:
        """Tokens of these rows whose prediction counts."""
        return int(self._scored[torch.tensor(rows)].sum())

    def real(self, rows: tuple[int, ...]) -> int:
        """Tokens of these rows that are not padding."""
        return int(self._real[torch.tensor(rows)].sum())

    def total(self, epochs: float) -> int:
        return max(1, math.ceil(self.steps * epochs))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(((seed << 20) + epoch) % SEEDS)
    return tuple(torch.randperm(count, generator=generator).tolist())
