"""Which tokens of some sequences are answers to choose from, and which sequences belong to one question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Answers:
    """One row a choice; the choices of a question follow each other.

    choice: bool [rows, length], the tokens that are the choice; the others are what precedes it, and padding.
    question: int64 [rows], counted from 0. gold: bool [rows], the right choice. bytes: int64 [rows], of the choice's
    text.
    """

    choice: Tensor
    question: Tensor
    gold: Tensor
    bytes: Tensor

    @property
    def questions(self) -> int:
        return int(self.question[-1]) + 1

    def rows(self, rows: Tensor, length: int) -> Answers:
        """The named rows, which are whole questions, and their first `length` tokens; questions count from 0 again."""
        question = torch.unique_consecutive(self.question[rows], return_inverse=True)[1]
        return Answers(self.choice[rows, :length], question, self.gold[rows], self.bytes[rows])

    def table(self, values: Tensor, missing: float) -> Tensor:
        """Values of rows [rows] as [questions, choices]; a question with fewer choices than another is filled up."""
        choices = torch.bincount(self.question)
        place = torch.arange(len(values)) - (choices.cumsum(0) - choices)[self.question]
        filled = values.new_full((len(choices), int(choices.max())), missing)
        filled[self.question, place] = values
        return filled
