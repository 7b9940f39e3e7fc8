"""The calibration set of an objective that answers questions: a sequence for each choice of each question.

Its sequences are ordinary masked ones, so it serves wherever text does. What is added says which tokens are the choice,
which sequences are one question, and which is right. Questions are put in an order decided by `seed` alone, as
documents are.
"""

from __future__ import annotations

import hashlib
import math
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from shallower import progress
from shallower.corpus.answers import Answers
from shallower.corpus.bos import resolve_bos
from shallower.corpus.build import pad_id, require_vocabulary
from shallower.corpus.calibration import (
    Batch,
    CalibrationSet,
    SourceRecord,
    is_saved,
    padded,
    shared_prefix,
    tokens_digest,
)
from shallower.corpus.questions import EXAMPLE, Question, read_questions
from shallower.corpus.sources import name_digest
from shallower.corpus.specification import Part, check_options, in_part, parse_specification, written_out
from shallower.defaults import LENGTH, SEQUENCES
from shallower.errors import CorpusError
from shallower.registry import Option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class ChoiceSet(CalibrationSet):
    """A sequence for each choice. `answers` says what is scored and what belongs together.

    Raises CorpusError when `answers` does not fit the ids, a question has fewer than two choices or not one that is
    right, or a choice has no token to score.
    """

    answers: Answers = field(kw_only=True)

    format: ClassVar[str] = "shallower.choices/1"

    def __post_init__(self) -> None:
        super().__post_init__()
        answers, rows = self.answers, self.sequences
        shapes = [tensor.shape for tensor in (answers.choice, answers.question, answers.gold, answers.bytes)]
        if shapes != [self.input_ids.shape, (rows,), (rows,), (rows,)]:
            raise CorpusError(f"the answers have the shapes {shapes}, which are not those of {rows} sequences.")
        steps = answers.question.diff()
        if int(answers.question[0]) != 0 or not bool(((steps == 0) | (steps == 1)).all()):
            raise CorpusError("the choices of a question must follow each other, and questions be counted from 0.")
        right = torch.zeros(answers.questions, dtype=torch.int64).index_add_(0, answers.question, answers.gold.long())
        if not bool((right == 1).all()) or not bool((torch.bincount(answers.question) >= 2).all()):
            raise CorpusError("every question needs at least two choices, of which one is right.")
        scored = answers.choice if self.attention_mask is None else answers.choice & self.attention_mask.bool()
        if not bool(scored[:, 1:].any(1).all()) or not bool((answers.bytes > 0).all()):
            raise CorpusError("every choice needs a token that has one before it.")

    @property
    def questions(self) -> int:
        return self.answers.questions

    @cached_property
    def _bounds(self) -> list[int]:
        """Where each question begins, and the end."""
        return [0, *torch.bincount(self.answers.question).cumsum(0).tolist()]

    def batches(self, size: int) -> Iterator[Batch]:
        """Questions in order, as many as have `size` choices together, but at least one. Padding that a batch has no
        use for is cut off.
        """
        if size < 1:
            raise ValueError(f"batch size {size} is not positive")
        first = 0
        for start, stop in zip(self._bounds, [*self._bounds[1:], None], strict=True):
            if first < start and (stop is None or stop - first > size):
                yield self._batch(first, start)
                first = start

    def _batch(self, start: int, stop: int) -> Batch:
        mask = None if self.attention_mask is None else self.attention_mask[start:stop]
        length = self.length if mask is None else int(mask.sum(1).max())
        answers = self.answers.rows(torch.arange(start, stop), length)
        if mask is not None:
            mask = None if bool(mask[:, :length].all()) else mask[:, :length]
        return Batch(self.input_ids[start:stop, :length], mask, answers)

    def subset(self, indices: Sequence[int]) -> ChoiceSet:
        """The named questions, in the order given."""
        bounds = self._bounds
        parts = [torch.arange(bounds[index], bounds[index + 1]) for index in indices]
        rows = torch.cat(parts)
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        question = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
        answers = replace(self.answers.rows(rows, self.length), question=question)
        return ChoiceSet(self.spec, self.input_ids[rows], mask, self.sources, answers=answers)

    def _contents(self) -> dict[str, Tensor | None]:
        return super()._contents() | {f"answers.{name}": tensor for name, tensor in vars(self.answers).items()}

    @classmethod
    def _made(cls, spec: str, tensors: Mapping[str, Tensor], sources: tuple[SourceRecord, ...]) -> ChoiceSet:
        found = {name: tensors.get(f"answers.{name}") for name in Answers.__dataclass_fields__}
        if any(tensor is None for tensor in found.values()):
            raise CorpusError(f"the saved choices of {spec} lack {', '.join(found)}; build them again.")
        answers = Answers(**typing.cast(dict[str, Tensor], found))
        return cls(spec, tensors["input_ids"], tensors.get("attention_mask"), sources, answers=answers)


@dataclass(frozen=True)
class ChoiceOptions:
    """What may stand after the `?` of a specification of questions."""

    questions: int = SEQUENCES
    length: int = LENGTH
    seed: int = 0
    part: Part = "all"

    def __post_init__(self) -> None:
        check_options(self, _OPTIONS, {"questions": (1, math.inf), "length": (2, math.inf), "seed": (0, math.inf)})


_OPTIONS: Mapping[str, Option] = {
    name: Option(name, kind, getattr(ChoiceOptions, name))
    for name, kind in typing.get_type_hints(ChoiceOptions).items()
}


def build_choices(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    part: Part = "all",
) -> ChoiceSet:
    """Build the set of questions that `spec` describes, or load it when `spec` is a folder written by ChoiceSet.save.

    Args:
        spec: A .jsonl file (see `shallower.corpus.questions`) and options after `?`, which win over the arguments.
        tokenizer: The model's tokenizer. A BOS comes first if it adds one itself.
        questions: How many questions.
        length: Tokens of a question with its longest choice at most; longer ones are left out, and a note says so.
        seed: Decides which questions come first.
        part: `held-out` is a tenth of the questions, by a hash of their text, `train` the rest, `all` both.

    Raises:
        CorpusError: The file is missing or empty, a row is no question, too few fit, or an option is out of range.
        UnknownName: An option after `?` does not exist.
    """
    parsed = parse_specification(spec, _OPTIONS)
    path = Path(os.path.expanduser(parsed.source))
    if is_saved(path):
        if parsed.options:
            raise CorpusError(
                f"{path} is a finished set of questions, so {', '.join(parsed.options)} cannot be changed: leave "
                "options out."
            )
        loaded = ChoiceSet.load(path)
        require_vocabulary(loaded, path, tokenizer)
        return loaded
    given: dict[str, Any] = {name: _OPTIONS[name].parse(text) for name, text in parsed.options.items()}
    options = replace(ChoiceOptions(questions, length, seed, part), **given)
    if path.suffix != ".jsonl" or not os.path.isfile(path):
        what = "not a .jsonl file" if os.path.exists(path) else "no file"
        raise CorpusError(f"{parsed.source!r} is {what}: questions are read from one, with rows such as {EXAMPLE}.")
    ordered, total = _ordered(path, options)
    made = _Rows(tokenizer)
    used = skipped = 0
    for line, question in ordered:
        encoded = made.encode(question, f"{path}, line {line}")
        if max(len(ids) for ids, _ in encoded) > options.length:
            skipped += 1
            continue
        made.add(question, encoded)
        used += 1
        if used == options.questions:
            break
    _require_enough(used, skipped, parsed.source, options)
    if skipped:
        progress.note(
            f"{skipped} of {used + skipped} questions of {path.name} are longer than {options.length} tokens and were "
            "left out; a greater length (--length) takes them in."
        )
    return made.finish(written_out(parsed.source, options), (SourceRecord(path.name, f"sha256:{total}", used),))


def _ordered(path: Path, options: ChoiceOptions) -> tuple[list[tuple[int, Question]], str]:
    """The part's questions with their lines, by the hash of seed and place, and the hash of all questions."""
    total = hashlib.sha256()
    found = []
    for number, question in read_questions(path):
        total.update(repr((question.prompts, question.gold)).encode())
        if in_part(question.text, options.part):
            key = name_digest(f"{options.seed} {path.name}:{number}")
            found.append((key, number, question))
    found.sort(key=lambda item: item[:2])
    return [(number, question) for _, number, question in found], total.hexdigest()


def _require_enough(used: int, skipped: int, source: str, options: ChoiceOptions) -> None:
    if used == options.questions:
        return
    what = f"the {options.part} part of {source}" if options.part != "all" else source
    longer = f" ({skipped} others are longer than length={options.length} tokens)" if skipped else ""
    fewer = f"questions={used} (--sequences {used}), " if used else ""
    way = "a greater length" if skipped else "another file"
    raise CorpusError(
        f"{what} holds {used} questions{longer}, but questions={options.questions} was asked for: use {fewer}{way}."
    )


class _Rows:
    """Sequences in the making."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        bos = resolve_bos(tokenizer, "auto")[1]
        self.first = [] if bos is None else [bos]
        self.ids: list[list[int]] = []
        self.begins: list[int] = []
        self.question: list[int] = []
        self.gold: list[bool] = []
        self.bytes: list[int] = []

    def encode(self, question: Question, where: str) -> list[tuple[list[int], int]]:
        """For each choice its ids, and where the choice begins.

        Context and choice are tokenised as one text, as the model would meet them, and the choice begins where the ids
        stop being those of the context alone: a token that straddles the boundary is scored.
        """
        contexts = [context for context, _ in question.prompts]
        wholes = [context + choice for context, choice in question.prompts]
        # verbose=False: what is longer than the model's context is judged by `length`
        encoded = self.tokenizer([*contexts, *wholes], add_special_tokens=False, verbose=False)["input_ids"]
        found = []
        for alone, whole in zip(encoded[: len(contexts)], encoded[len(contexts) :], strict=True):
            ids = [*self.first, *whole]
            begin = max(len(self.first) + shared_prefix(alone, whole), 1)  # nothing predicts the very first token
            if begin >= len(ids):
                raise CorpusError(f"{where}: the tokenizer makes no token of a choice; write one that has letters.")
            found.append((ids, begin))
        return found

    def add(self, question: Question, encoded: list[tuple[list[int], int]]) -> None:
        number = self.question[-1] + 1 if self.question else 0
        for place, ((ids, begin), (_, choice)) in enumerate(zip(encoded, question.prompts, strict=True)):
            self.ids.append(ids)
            self.begins.append(begin)
            self.question.append(number)
            self.gold.append(place == question.gold)
            self.bytes.append(len(choice.strip().encode()))

    def finish(self, spec: str, sources: tuple[SourceRecord, ...]) -> ChoiceSet:
        ids, mask = padded(self.ids, pad_id(self.tokenizer))
        answers = Answers(
            mask.bool() & (torch.arange(ids.shape[1])[None, :] >= torch.tensor(self.begins)[:, None]),
            torch.tensor(self.question),
            torch.tensor(self.gold),
            torch.tensor(self.bytes),
        )
        tokens = tokens_digest(self.tokenizer, ids)
        return ChoiceSet(spec, ids, mask, sources, tokens, answers=answers)
