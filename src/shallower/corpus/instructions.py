"""Conversations in the model's chat template; only their last answers are learned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from shallower import progress
from shallower.corpus.build import pad_id
from shallower.corpus.calibration import CalibrationSet, SourceRecord, padded, shared_prefix, tokens_digest
from shallower.corpus.formats import conversation, templated
from shallower.corpus.sources import json_records
from shallower.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = '{"instruction": "…", "input": "…", "output": "…"}'
CONVERSATIONS = "instructions=true"  # in the description of a set, which is no specification of a calibration text


@dataclass(frozen=True, eq=False)
class InstructionSet(CalibrationSet):
    """One conversation a sequence. scored: bool [sequences, length], True for the tokens of the answer. unanswered: how
    many rows of the file were left out, as no answer follows a question in them.

    Raises CorpusError when `scored` does not fit the ids, or a sequence has nothing to score.
    """

    scored: Tensor = field(kw_only=True)
    unanswered: int = field(default=0, kw_only=True)

    format: ClassVar[str] = "shallower.instructions/1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scored.shape != self.input_ids.shape or self.scored.dtype != torch.bool:
            raise CorpusError(
                f"what is scored is {self.scored.dtype} of shape {list(self.scored.shape)}; it must be bool "
                f"{list(self.input_ids.shape)}, as the ids."
            )
        if not bool(self.scored[:, 1:].any(1).all()):
            raise CorpusError("every conversation needs an answer of at least one token that has one before it.")

    def subset(self, indices: Sequence[int]) -> InstructionSet:
        """The named conversations, in the order given."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        plain = super().subset(indices)
        return InstructionSet(
            plain.spec, plain.input_ids, plain.attention_mask, plain.sources, scored=self.scored[rows]
        )

    def _contents(self) -> dict[str, Tensor | None]:
        return super()._contents() | {"scored": self.scored}

    @classmethod
    def _made(cls, spec: str, tensors: Mapping[str, Tensor], sources: tuple[SourceRecord, ...]) -> InstructionSet:
        if "scored" not in tensors:
            raise CorpusError(f"the saved instructions of {spec} lack scored; build them again.")
        return cls(spec, tensors["input_ids"], tensors.get("attention_mask"), sources, scored=tensors["scored"])


def build_instructions(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, length: int = 512, sequences: int | None = None
) -> InstructionSet:
    """Conversations from a .jsonl file of `instruction`, `input` (may be empty or missing) and `output`, of `question`
    and `answer`, or of `messages` with `role` and `content`, of which the last is the assistant's.

    Rows whose answer is empty or null, and chats that do not end with the assistant's, are left out.

    length: longest conversation in tokens; a longer one is left out, as half an answer teaches to stop anywhere.
    sequences: only the first so many of those that fit. In file order: training shuffles. The source's record says how
    many rows were read for the conversations that are in the set.

    Raises CorpusError when the file is not such rows, the tokenizer has no chat template, or nothing is answered and
    short enough.
    """
    if not tokenizer.chat_template:
        raise CorpusError(
            "instructions need a chat template, and this model's tokenizer has none: train on plain text."
        )
    path = Path(path)
    found: list[tuple[list[int], int]] = []
    total = hashlib.sha256()
    read = unanswered = 0
    with progress.task("reading instructions", sequences) as step:
        for number, record in json_records(path):
            total.update(repr(sorted(record.items())).encode())
            read += 1
            where = f"{path}, line {number}"
            turns = _turns(record, where)
            if not _is_answered(turns):
                unanswered += 1
                continue
            ids, begin = _encode(tokenizer, turns, where)
            if len(ids) <= length and begin < len(ids):
                found.append((ids, begin))
                step()
            if len(found) == sequences:
                break
    if not found:
        if unanswered == read:
            raise CorpusError(
                f"none of the {read} conversations of {path} has a question with its answer: write rows such as "
                f"{EXAMPLE}, or messages that end with the assistant's."
            )
        raise CorpusError(
            f"none of the {read - unanswered} answered conversations of {path} fits length={length}: set a larger one "
            "(--length)."
        )
    rows, mask = padded([ids for ids, _ in found], pad_id(tokenizer))
    begins = torch.tensor([begin for _, begin in found])
    scored = mask.bool() & (torch.arange(rows.shape[1])[None, :] >= begins[:, None])
    source = SourceRecord(path.name, f"sha256:{total.hexdigest()}", len(found), read)
    described = f"{path.name}?{CONVERSATIONS}&length={length}"
    tokens = tokens_digest(tokenizer, rows)
    return InstructionSet(described, rows, mask, (source,), tokens, scored=scored, unanswered=unanswered)


def _turns(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """Raise CorpusError for a row that is no conversation."""
    turns = conversation(record)
    if not turns:
        raise CorpusError(
            f"{where} holds no question with its answer, but {', '.join(sorted(record)) or 'nothing'}: write rows such "
            f"as {EXAMPLE}, or messages that end with the assistant's."
        )
    return turns


def _is_answered(turns: Sequence[Mapping[str, str]]) -> bool:
    return len(turns) > 1 and turns[-1]["role"] == "assistant" and bool(turns[-1]["content"].strip())


def _encode(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str) -> tuple[list[int], int]:
    """Ids of the conversation, and where the answer begins."""
    whole, prompt = templated(tokenizer, turns, where), templated(tokenizer, turns[:-1], where, asks=True)
    if not whole.startswith(prompt):
        raise CorpusError(
            f"{where}: the chat template writes an answered question in another way than a question that waits for its "
            "answer, so what the model would learn cannot be told apart: train on plain text."
        )
    ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    alone = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, shared_prefix(alone, ids)
