"""The dense model as a teacher: run each time, or asked once for each token and kept on disk."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shallower import progress
from shallower.anatomy.dissect import Anatomy, unpack
from shallower.checkpoint.determinants import determinants
from shallower.engine.head import Head, find_head
from shallower.errors import ModelError, OutputError, UserError
from shallower.training.feed import Portion
from shallower.training.head_loss import Guide
from shallower.training.state import write_one_of_many

FEWEST_WORDS = 8  # fewer say too little of a distribution to learn from
MOST_WORDS = 256
BYTES_A_WORD = 6  # a float16 log-probability and an int32 word
ROWS = 128  # of logits at a time


class Teacher:
    """Runs the dense model on portions of text."""

    unwritten = 0

    def __init__(self, anatomy: Anatomy, compute: torch.dtype, shared: int = 0) -> None:
        """compute: number format of products. shared: first blocks whose result the student is given."""
        self.anatomy = anatomy
        self.compute = compute
        self.shared = shared
        self.head = find_head(anatomy)
        if self.head is not None and self.head.has_chunks:
            self.head = replace(self.head, output=_in_format(self.head.output, compute))

    def place(self, device: torch.device) -> None:
        self.anatomy.model.to(device)

    def guide(self, portion: Portion) -> Guide:
        """What the dense model says at the positions before scored tokens."""
        model = self.anatomy.model
        streams: list[Tensor] = []
        last = self.anatomy.blocks[self.shared - 1].module
        handle = last.register_forward_hook(lambda module, args, output: streams.append(unpack(output)))
        try:
            with torch.no_grad(), torch.autocast(model.device.type, self.compute, enabled=half(self.compute)):
                rows = head_input(model, self.head, portion)
        finally:
            handle.remove()
        if self.head is None:
            return Guide(rows, Head(nn.Identity()), stream=streams[0] if self.shared else None)
        return Guide(rows.to(self.compute), self.head, stream=streams[0] if self.shared else None)


def half(compute: torch.dtype) -> bool:
    """Whether products are computed in another format than float32, so that autocast has something to do."""
    return compute != torch.float32


def _in_format(output: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An output embedding in `dtype`; itself where it is that already."""
    assert isinstance(output, nn.Linear)
    if output.weight.dtype == dtype:
        return output
    copied = nn.Linear(output.in_features, output.out_features, output.bias is not None, device="meta")
    copied.weight = nn.Parameter(output.weight.detach().to(dtype), requires_grad=False)
    if output.bias is not None:
        copied.bias = nn.Parameter(output.bias.detach().to(dtype), requires_grad=False)
    return copied


class CachedTeacher:
    """A teacher whose most probable tokens are kept in a folder, one safetensors file for each sequence of the text."""

    def __init__(self, teacher: Teacher, folder: Path, words: int, temperature: float, unwritten: int) -> None:
        """unwritten: bytes that the folder does not hold yet."""
        self.teacher = teacher
        self.unwritten = unwritten
        self.folder = folder
        self.words = words
        self.temperature = temperature
        self.kept = 0.0  # probability of the words that are kept, summed over `tokens`
        self.tokens = 0

    def place(self, device: torch.device) -> None:
        self.teacher.place(device)

    def guide(self, portion: Portion) -> Guide:
        """The same, restricted to the most probable tokens."""
        paths = [self.folder / f"{row:08}.safetensors" for row in portion.rows]
        if not all(path.is_file() for path in paths):
            self._ask(portion, paths)
        device = self.teacher.anatomy.model.device
        found = [load_file(path) for path in paths]
        logs, words = (torch.cat([tensors[name] for tensors in found]).to(device) for name in ("logs", "words"))
        return Guide(log_probabilities=logs, words=words)

    def _ask(self, portion: Portion, paths: list[Path]) -> None:
        guide = self.teacher.guide(portion)
        assert guide.rows is not None
        assert guide.head is not None
        parts = []
        with torch.no_grad():
            for rows in torch.split(guide.rows, ROWS):
                logs = torch.log_softmax(guide.head.logits(rows) / self.temperature, dim=-1)
                parts.append(logs.topk(self.words, dim=-1))
                self.kept += float(parts[-1].values.exp().sum())
        self.tokens += len(guide.rows)
        counts = portion.scored[:, 1:].sum(1).tolist()
        logs = torch.cat([part.values for part in parts]).half()
        words = torch.cat([part.indices for part in parts]).int()
        start = 0
        for path, count in zip(paths, counts, strict=True):
            write_one_of_many(path, {"logs": logs[start : start + count], "words": words[start : start + count]})
            start += count

    def close(self) -> None:
        """Say what part of the probability the cache holds."""
        if self.tokens:
            share = self.kept / self.tokens
            progress.note(f"the teacher's cache holds {self.words} words a token, {share:.1%} of the probability")


def words_kept(budget: int, tokens: int, vocabulary: int) -> int:
    """How many words a token, 256 at most, `budget` bytes hold for `tokens` tokens. Raises UserError when that is fewer
    than 8.
    """
    words = min(MOST_WORDS, vocabulary, budget // (tokens * BYTES_A_WORD))
    if words < min(FEWEST_WORDS, vocabulary):
        least = FEWEST_WORDS * tokens * BYTES_A_WORD
        raise UserError(
            f"teacher_cache of {budget / 1e6:.1f} MB holds {words} words for each of {tokens:,} tokens, and less than "
            f"{FEWEST_WORDS} say too little: give {least / 1e6:.1f} MB or more, or leave it out."
        )
    return words


def open_cache(
    teacher: Teacher, place: Path, digest: str, budget: int, tokens: int, temperature: float
) -> CachedTeacher:
    """As many words a token as `budget` bytes hold for `tokens` tokens, 256 at most; in a folder of `place` that is for
    this teacher, the text with that `digest`, and so many words.

    Raises UserError when that is fewer than 8, OutputError when the disk has no such room.
    """
    vocabulary = teacher.anatomy.model.get_input_embeddings().weight.shape[0]
    words = words_kept(budget, tokens, vocabulary)
    model = teacher.anatomy.model
    what = f"{' '.join(determinants(model))} {digest} {temperature} {words}"
    folder = place / f"teacher-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder} for the teacher's cache: {error.strerror}.") from None
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free, needed = shutil.disk_usage(folder).free, max(0, words * tokens * BYTES_A_WORD - there)
    if free < needed:
        raise OutputError(
            f"the teacher's cache needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {folder}: lower "
            "teacher_cache, or choose another folder."
        )
    return CachedTeacher(teacher, folder, words, temperature, needed)


def require_same_words(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ModelError unless both models have the same vocabulary."""
    sizes = []
    for model in (teacher, student):
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        sizes.append(int(embedding.weight.shape[0]))
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the teacher has a vocabulary of {sizes[0]:,} words and the student one of {sizes[1]:,}, so one cannot "
            "learn the other's probabilities: distil from the model that was pruned, or leave distillation out."
        )


def head_input(model: nn.Module, head: Head | None, portion: Portion) -> Tensor:
    """The output embedding's input at the positions before scored tokens, [rows, hidden].

    head: None where the model does more after it than a Head can; then its logits, [rows, vocabulary].
    """
    device = next(model.parameters()).device
    given: dict[str, Any] = {"input_ids": portion.input_ids.to(device), "use_cache": False}
    if not bool(portion.attention_mask.all()):
        given["attention_mask"] = portion.attention_mask.to(device)
    before = portion.scored[:, 1:].to(device)
    if head is None:
        logits: Tensor = model(**given).logits
        return logits[:, :-1][before]
    output = model.get_output_embeddings()  # type: ignore[operator]
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, :1],)  # the model goes on with one token: nobody reads its logits

    handle = output.register_forward_pre_hook(keep)
    try:
        model(**given)
    finally:
        handle.remove()
    return seen[0][:, :-1][before]
