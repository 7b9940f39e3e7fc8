"""From the stream that leaves the last block to one number an item: what an objective asks for, and no more.

An item is a sequence, whose value is a sum over tokens, or a question, for an objective that reads choices.

An objective's parameters say what it reads:

    hidden, dense_hidden               the stream itself; the head is skipped
    log_normalizer, target_logits      from chunks of the vocabulary
    dense_mean_logit, dense_entropy    the same, with the dense model's probabilities
    logits, dense_logits, targets      whole rows of logits, a few at a time
    log_likelihoods, tokens,           of the choices of questions, from chunks of the vocabulary
    bytes, gold
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shallower.corpus.answers import Answers
from shallower.engine.head import LOWEST, ROW_CHUNK_BYTES_ELSEWHERE, Head
from shallower.engine.method_code import is_ours
from shallower.engine.states import DenseRows
from shallower.engine.trace import Trace, stacked
from shallower.registry import Method
from shallower.registry import objective as objectives

STREAM = frozenset({"hidden", "dense_hidden"})
OF_DENSE = frozenset({"dense_mean_logit", "dense_entropy"})
REDUCED = OF_DENSE | {"log_normalizer", "target_logits"}
# Logits of whole rows on a processor, where a comparison holds some ten tensors of this size, in each thread
COMPARED_CHUNK_BYTES = 8 << 20
COMPARED_TENSORS = 10  # which elsewhere share the memory that was given
ROWS_TOGETHER = 512  # as many as make the products of the head run at full speed; a batch of text may have half of it
CHOICES = frozenset({"log_likelihoods", "tokens", "bytes", "gold"})


def needs_dense(objective: Method) -> bool:
    """Whether the objective compares with the dense model."""
    return any(name.startswith("dense_") for name in objective.parameters)


def temperature_of(objective: Method, options: Mapping[str, Any]) -> float:
    """What logits are divided by before they are summed up: the objective's option `temperature`, 1 without one."""
    asked = objective.option("temperature", options)
    return 1.0 if asked is None else float(asked)


def along_with(objective: Method, options: Mapping[str, Any]) -> tuple[Method, ...]:
    """Our own objectives without options whose numbers are at hand when this one is measured: they cost nothing more.
    Nobody asked for those of other packages here, and one that fails would take this one with it.
    """
    asked = set(objective.parameters)
    if not asked or not asked <= REDUCED or temperature_of(objective, options) != 1.0:
        return ()
    at_hand = asked | {"log_normalizer", "target_logits"}
    others = (other for other in objectives if is_ours(other) and other.name != objective.name)
    return tuple(other for other in others if not other.options and at_hand.issuperset(other.parameters))


def reads_choices(objective: Method) -> bool:
    """Whether the objective judges answers to questions, one value a question, rather than text."""
    return bool(CHOICES & set(objective.parameters))


class Scorer:
    """One objective on one batch. Lives as long as the batch is visited: holds what all its candidates share."""

    def __init__(
        self,
        objective: Method,
        options: Mapping[str, Any],
        head: Head | None,
        copies: Callable[[int], Trace],
        dense: Tensor | None,
        memory: int,
        besides: Sequence[Method] = (),
        *,
        kept: DenseRows | None = None,
        keep: Callable[[DenseRows], None] = lambda rows: None,
    ) -> None:
        """copies: the trace of so many copies of the batch. dense: the stream leaving the dense model's last block,
        None when the objective does not compare with it. besides: objectives that come along with this one.

        memory: bytes that the dense model's logits may take, and on an accelerator the rows at work; beyond it they are
        computed anew for each candidate. keep is given what was made of them, and kept is what an earlier visit of the
        batch has given it.
        """
        self.objective = objective
        self.besides = tuple(besides)
        self.options = dict(options)
        self.head = head
        self.copies = copies
        self.trace = trace = copies(1)
        self.answers = trace.batch.answers if reads_choices(objective) else None
        self.asked = frozenset(objective.parameters if self.answers is None else ("log_normalizer", "target_logits"))
        self.asked |= {name for other in self.besides for name in other.parameters}
        self.scored = scored_positions(trace, self.answers)
        ids = trace.batch.input_ids.to(trace.entry.device)
        self.targets = ids[:, 1:][self.scored]
        self.vocabulary: int = trace.anatomy.model.get_input_embeddings().num_embeddings
        if head is not None and head.has_chunks:
            self.vocabulary = head.words
        self.reduces = head is not None and head.has_chunks and self.asked <= REDUCED
        self._memory = memory
        self.dense_hidden = dense
        self._fits = 4 * len(self.targets) * self.vocabulary <= memory
        self._dense_rows: Callable[[slice], Tensor] | None = None
        self._dense_head_rows: Tensor | None = None
        self._kept = kept
        self._keep = keep

    @property
    def together(self) -> int:
        """How many candidates are best scored at once: few rows use the head's weights badly."""
        whole_rows = not self.reduces or (self.asked & OF_DENSE and not self._fits)
        if whole_rows or not len(self.targets):
            return 1
        # beside the streams of so many stand the trace of as many copies, them as one batch, and what the head is given
        return max(1, min(ROWS_TOGETHER // len(self.targets), self._memory // (4 * self.trace.entry.nbytes)))

    def __call__(self, hiddens: Sequence[Tensor]) -> list[Tensor]:
        """The objective of candidates, summed over the tokens of each sequence, or of each question: float64 [1 +
        besides, items], the objective itself first.

        hiddens: for each candidate the stream leaving the last block [sequences, length, hidden].
        """
        found = []
        rows = 1 + len(self.besides)
        nothing = [torch.empty(rows, 0, device=self.targets.device)] * len(hiddens)  # documents of one token
        for flat in self._at_tokens(hiddens) if len(self.targets) else nothing:
            values = torch.zeros(rows, *self.scored.shape, dtype=torch.float32, device=self.scored.device)
            values[:, self.scored] = flat.to(values.device)
            sums = values.double().sum(2).cpu()
            found.append(sums if self.answers is None else self._of_questions(sums[0], self.answers)[None])
        return found

    def _of_questions(self, log_likelihoods: Tensor, answers: Answers) -> Tensor:
        supply = {
            "log_likelihoods": answers.table(log_likelihoods, -torch.inf),
            "tokens": answers.table(self.scored.double().sum(1).cpu(), 1),
            "bytes": answers.table(answers.bytes.double(), 1),
            "gold": answers.table(answers.gold.double(), 0).argmax(1),
        }
        given = {name: supply[name] for name in self.objective.parameters}
        result: Tensor = self.objective.function(**given, **self.options)
        return result

    def _at_tokens(self, hiddens: Sequence[Tensor]) -> Sequence[Tensor]:
        """The objectives at every position that is scored: float32 [1 + besides, positions] each. Of choices, the
        log-likelihood.
        """
        if self.reduces:
            return self._by_vocabulary(hiddens)
        if self.asked <= STREAM:
            dense = None if self.dense_hidden is None else self._stream_rows(self.dense_hidden)
            return [self._values(hidden=self._stream_rows(hidden), dense_hidden=dense) for hidden in hiddens]
        return [self._by_rows(hidden) for hidden in hiddens]

    def _values(self, **supply: Tensor | None) -> Tensor:
        """The objectives of some rows: float32 [1 + besides, rows]."""
        if self.answers is not None:
            target_logits, log_normalizer = supply["target_logits"], supply["log_normalizer"]
            assert target_logits is not None
            assert log_normalizer is not None
            return (target_logits - log_normalizer)[None]
        each = ((self.objective, self.options), *((other, {}) for other in self.besides))
        return torch.stack(
            [method.function(**{name: supply[name] for name in method.parameters}, **own) for method, own in each]
        )

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden[:, :-1][self.scored.to(hidden.device)]

    def _stream_rows(self, hidden: Tensor) -> Tensor:
        """float32 [rows, hidden], on one device whichever block was the last that ran."""
        return self._rows(hidden).float().to(self.targets.device)

    def _head_rows(self, *hiddens: Tensor) -> Tensor:
        """What the head is given at the scored positions of one or several candidates: [candidates * rows, hidden]."""
        assert self.head is not None
        if len(hiddens) == 1:
            return self._rows(self.trace.head_input(hiddens[0], self.head.output))
        together = self.copies(len(hiddens)).head_input(stacked(hiddens), self.head.output)
        return torch.cat([self._rows(part) for part in together.chunk(len(hiddens))])

    def _by_vocabulary(self, hiddens: Sequence[Tensor]) -> Sequence[Tensor]:
        """Only sums over the vocabulary are needed: go through it in chunks, all rows at once."""
        assert self.head is not None
        temperature = temperature_of(self.objective, self.options)
        rows = self._head_rows(*hiddens)
        targets = self.targets.repeat(len(hiddens)).to(rows.device)
        if not self.asked & OF_DENSE:
            reduced = self.head.reduce(rows, targets, None, temperature, memory=self._memory)
            values = self._values(log_normalizer=reduced.log_normalizer, target_logits=reduced.target_logits)
            return values.chunk(len(hiddens), dim=1)
        parts = []
        size = len(rows) if self._fits else self._chunk()  # where not all fits, there is one candidate: see `together`
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            probabilities, entropy = self._dense_distribution(part, temperature)
            reduced = self.head.reduce(rows[part], targets[part], probabilities, temperature, memory=self._memory)
            parts.append(
                self._values(
                    log_normalizer=reduced.log_normalizer,
                    target_logits=reduced.target_logits,
                    dense_mean_logit=reduced.mean_logit,
                    dense_entropy=entropy.repeat(len(reduced.log_normalizer) // len(entropy)),
                )
            )
        return torch.cat(parts, dim=1).chunk(len(hiddens), dim=1)

    def _dense_distribution(self, part: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities [rows, vocabulary] of the dense model at some rows, and their entropy [rows]; float32.

        Kept for all rows where they fit, so that `part` is then all of them.
        """
        if self._kept is not None:
            probabilities, entropy = self._kept
            return probabilities, entropy
        assert self.head is not None
        assert self.dense_hidden is not None
        if self._dense_head_rows is None:
            self._dense_head_rows = self._head_rows(self.dense_hidden)
        rows = self._dense_head_rows[part]
        probabilities = torch.empty(len(rows), self.vocabulary, dtype=torch.float32, device=rows.device)
        entropy = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), self._chunk()):
            few = slice(start, start + self._chunk())
            probabilities[few] = _softmax(self.head.logits(rows[few]) / temperature)
            entropy[few] = torch.special.entr(probabilities[few]).sum(-1)
        if self._fits:
            self._kept = probabilities, entropy
            self._keep(self._kept)
        return probabilities, entropy

    def _by_rows(self, hidden: Tensor) -> Tensor:
        """Whole distributions are compared: go through the rows in chunks."""
        rows_of = self._logit_rows(hidden)
        dense_rows_of = None
        if needs_dense(self.objective):
            assert self.dense_hidden is not None
            dense_rows_of = self._dense_logit_rows(self.dense_hidden)
        flat = torch.empty(1 + len(self.besides), len(self.targets), dtype=torch.float32, device=hidden.device)
        temperature = temperature_of(self.objective, self.options)
        size = self._chunk()
        for start in range(0, len(self.targets), size):
            part = slice(start, min(start + size, len(self.targets)))
            logits = rows_of(part)
            targets = self.targets[part].to(logits.device)
            dense_logits = None if dense_rows_of is None else dense_rows_of(part)
            supply: dict[str, Tensor | None] = {"logits": logits, "targets": targets, "dense_logits": dense_logits}
            if self.asked & STREAM:
                supply["hidden"] = self._stream_rows(hidden)[part].to(logits.device)
                supply["dense_hidden"] = (
                    None if self.dense_hidden is None else self._stream_rows(self.dense_hidden)[part].to(logits.device)
                )
            if self.asked & REDUCED:  # a head that does more than a linear map has no chunks of the vocabulary
                scaled = (logits / temperature).clamp_min(LOWEST)
                supply["log_normalizer"] = torch.logsumexp(scaled, dim=-1)
                supply["target_logits"] = scaled.gather(-1, targets[:, None]).squeeze(-1)
                if dense_logits is not None:
                    probabilities = _softmax(dense_logits / temperature)
                    supply["dense_mean_logit"] = (probabilities * scaled).sum(-1)
                    supply["dense_entropy"] = torch.special.entr(probabilities).sum(-1)
            flat[:, part] = self._values(**supply)
        return flat

    def _chunk(self) -> int:
        """Rows of logits at a time, in each of several tensors."""
        limit = COMPARED_CHUNK_BYTES
        if self.targets.device.type != "cpu":
            limit = min(ROW_CHUNK_BYTES_ELSEWHERE, self._memory // COMPARED_TENSORS)
        return max(16, limit // (4 * self.vocabulary))

    def _dense_logit_rows(self, dense: Tensor) -> Callable[[slice], Tensor]:
        if self._kept is None:
            rows_of = self._dense_rows or self._logit_rows(dense)
            if not self._fits:
                if self.head is not None:  # else these are the logits themselves
                    self._dense_rows = rows_of
                return rows_of
            size = self._chunk()
            first = rows_of(slice(0, size))
            whole = first.new_empty(len(self.targets), first.shape[-1])
            whole[:size] = first
            for start in range(size, len(whole), size):
                whole[start : start + size] = rows_of(slice(start, start + size))
            self._kept = (whole,)
            self._keep(self._kept)
        (kept,) = self._kept
        return lambda part: kept[part]

    def _logit_rows(self, hidden: Tensor) -> Callable[[slice], Tensor]:
        if self.head is None:
            logits = self._rows(self.trace.logits(hidden))
            return lambda part: logits[part].float()
        head, inputs = self.head, self._head_rows(hidden)
        return lambda part: head.logits(inputs[part])


def scored_positions(trace: Trace, answers: Answers | None = None) -> Tensor:
    """Where a next token exists and is real, and is part of a choice if there are `answers`: bool [sequences, length -
    1].
    """
    real = trace.batch.with_next
    return (real if answers is None else real & answers.choice[:, 1:]).to(trace.entry.device)


def _softmax(logits: Tensor) -> Tensor:
    """Probabilities that sum to 1. torch's own on a processor, whose exponentials are quick ones, are off by some 1e-5
    of that, and what `kl` sums over them by that times the mean logit.
    """
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities.div_(probabilities.sum(-1, keepdim=True))
