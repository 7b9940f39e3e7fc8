"""The part after the blocks: the output embedding, never holding the logits of all tokens and all the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, probe_ids
from shallower.checkpoint.determinants import is_bare
from shallower.engine.trace import reach

# Words of the vocabulary at a time: few stay in a core's cache, an accelerator wants larger products. The number does
# not depend on the rows, so that neither do the results.
WORDS = 512
WORDS_ELSEWHERE = 8192
# Float32 logits held at once where likelihoods and trainings need whole rows. Memory beyond 32 MB would come fresh from
# the system each time, which takes as long as the product itself (docs/decisions.md has the measurements).
ROW_CHUNK_BYTES = 24 << 20
ROW_CHUNK_BYTES_ELSEWHERE = 256 << 20
# Three buffers of a chunk of words, for as many rows at a time as this holds. On a processor all rows go at once: there
# are few, and fewer words.
BUFFER_BYTES_ELSEWHERE = 128 << 20
FEWEST_ROWS = 16  # however little memory there is
LARGE_LOGIT = 1e3  # beyond it the difference of a logit and its log_softmax has lost digits
LOWEST = torch.finfo(torch.float32).min  # for a logit of minus infinity, whose product with a probability of 0 is NaN


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left of the logits, float32 [rows] each.

    log_normalizer: logarithm of the softmax's denominator. target_logits: the logit of each row's target. mean_logit:
    the logits' mean under given probabilities, None where none were given.
    """

    log_normalizer: Tensor
    target_logits: Tensor
    mean_logit: Tensor | None


@dataclass(frozen=True, eq=False)
class Head:
    """`logits = finish(output embedding(x))`, proven equal to the model's own on a few tokens.

    output: the output embedding. scale and softcap: what the model does to the logits after it.
    """

    output: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [rows, vocabulary] for the output embedding's input [rows, hidden]; in `out` where it is given."""
        found = self._finish(self.output(rows))
        out = torch.empty_like(found, dtype=torch.float32) if out is None else out
        return out.copy_(found).clamp_min_(LOWEST)

    @property
    def has_chunks(self) -> bool:
        """Whether `reduce` can be used: the output embedding is a plain linear map whose weights are at hand."""
        return type(self.output) is nn.Linear and not self.output.weight.is_meta

    @property
    def words(self) -> int:
        """Rows of the output embedding, where it has chunks."""
        assert type(self.output) is nn.Linear
        return int(self.output.weight.shape[0])

    def reduce(
        self,
        rows: Tensor,
        targets: Tensor,
        probabilities: Tensor | None = None,
        temperature: float = 1.0,
        *,
        memory: int = BUFFER_BYTES_ELSEWHERE,
    ) -> Reduced:
        """Normalizer, target logit and mean logit of logits / temperature, from chunks of the vocabulary.

        rows: the output embedding's input [rows, hidden], of one or several candidates. targets: int64 [rows].
        probabilities: float32 [rows of one candidate, vocabulary]. memory: bytes for buffers on an accelerator.
        """
        most = self._rows_at_once(rows, memory)
        if most >= len(rows):
            return self._reduce(rows, targets, probabilities, temperature)
        each = 1 if probabilities is None else len(probabilities)
        pieces = [
            self._reduce(
                rows[part], targets[part], None if probabilities is None else probabilities[of_one], temperature
            )
            for part, of_one in _pieces(len(rows), each, most)
        ]
        means = [piece.mean_logit for piece in pieces if piece.mean_logit is not None]
        return Reduced(
            torch.cat([piece.log_normalizer for piece in pieces]),
            torch.cat([piece.target_logits for piece in pieces]),
            torch.cat(means) if means else None,
        )

    def _chunk(self, device: torch.device) -> int:
        """Words at a time."""
        return min(self.words, WORDS if device.type == "cpu" else WORDS_ELSEWHERE)

    def _rows_at_once(self, rows: Tensor, memory: int) -> int:
        """All rows on a processor, which takes few words at a time; else those whose buffers fit their share."""
        if rows.device.type == "cpu":
            return len(rows)
        bytes_a_row = self._chunk(rows.device) * (rows.element_size() + 2 * torch.float32.itemsize)
        return max(FEWEST_ROWS, min(memory, BUFFER_BYTES_ELSEWHERE) // bytes_a_row)

    def _reduce(self, rows: Tensor, targets: Tensor, probabilities: Tensor | None, temperature: float) -> Reduced:
        """`reduce`, in buffers for all rows."""
        assert type(self.output) is nn.Linear
        count, vocabulary = len(rows), self.words
        size = self._chunk(rows.device)
        product = torch.empty(count, size, dtype=rows.dtype, device=rows.device)
        logits = torch.empty(count, size, dtype=torch.float32, device=rows.device)
        scratch = torch.empty_like(logits)
        chosen = torch.full((count,), torch.nan, dtype=torch.float32, device=rows.device)
        mean = None if probabilities is None else torch.zeros_like(chosen)
        starts = range(0, vocabulary, size)
        first, its_log = torch.empty(2, len(starts), count, dtype=torch.float32, device=rows.device)
        for number, (start, inside) in enumerate(zip(starts, _of_chunks(targets, starts), strict=True)):
            words = slice(start, min(start + size, vocabulary))
            if words.stop - start < size:
                product, logits, scratch = (
                    buffer.view(-1)[: count * (words.stop - start)].view(count, words.stop - start)
                    for buffer in (product, logits, scratch)
                )
            self._of_words(rows, words, temperature, product, logits)
            if mean is not None:
                logits.clamp_(min=LOWEST)  # last: a temperature below 1 makes what is that low infinite again
            if len(inside):
                chosen[inside] = logits[inside, targets[inside] - start]
            torch.log_softmax(logits, dim=-1, out=scratch)  # the fastest kernel with a normalizer
            first[number], its_log[number] = logits[:, 0], scratch[:, 0]
            if mean is not None and probabilities is not None:
                mean += _mean(logits, probabilities[:, words], scratch)
        normalizers = first - its_log
        del product, logits, scratch
        for number in (~(first.abs() < LARGE_LOGIT).all(dim=1)).nonzero().flatten().tolist():
            words = slice(starts[number], min(starts[number] + size, vocabulary))
            product = torch.empty(count, words.stop - words.start, dtype=rows.dtype, device=rows.device)
            logits = self._of_words(
                rows, words, temperature, product, product.new_empty(product.shape, dtype=torch.float32)
            )
            normalizers[number] = torch.logsumexp(logits, dim=-1)
        return Reduced(torch.logsumexp(normalizers, dim=0), chosen, mean)

    def _of_words(self, rows: Tensor, words: slice, temperature: float, product: Tensor, logits: Tensor) -> Tensor:
        """Logits / temperature of some words, in `logits`; `product` is room for what the weights give."""
        assert type(self.output) is nn.Linear
        torch.mm(rows, self.output.weight[words].t(), out=product)
        if self.output.bias is not None:
            product += self.output.bias[words]
        logits.copy_(self._finish(product))
        if temperature != 1.0:
            logits /= temperature
        return logits

    def _finish(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _pieces(count: int, each: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Divide `count` rows, `each` of which are of one candidate, into pieces of at most `most`: whole candidates where
    one fits, else parts of one. With each piece comes which rows of a candidate those are.
    """
    if most >= each:
        step = most // each * each
        yield from ((slice(start, start + step), slice(0, each)) for start in range(0, count, step))
        return
    for first in range(0, count, each):
        for start in range(0, each, most):
            stop = min(start + most, each)
            yield slice(first + start, first + stop), slice(start, stop)


def _of_chunks(targets: Tensor, starts: range) -> list[Tensor]:
    """For each chunk of `starts.step` words the places of the targets in it. Targets beyond them all are in none."""
    order = targets.argsort()
    ends = torch.searchsorted(targets[order], torch.tensor([*starts[1:], starts.stop], device=targets.device))
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return [*torch.split(order, [*counts, len(order) - sum(counts)])[:-1]]


def _mean(logits: Tensor, probabilities: Tensor, scratch: Tensor) -> Tensor:
    """Sum over the vocabulary of logits [candidates * rows, chunk] times probabilities [rows, chunk]."""
    shape = (-1, *probabilities.shape)
    return torch.mul(logits.view(shape), probabilities, out=scratch.view(shape)).sum(-1).flatten()


def find_head(anatomy: Anatomy) -> Head | None:
    """The head of a model, or None when it does more than scale or soft-cap the output embedding's result, or something
    hooks on to that, which products with its weights would pass by.
    """
    output = anatomy.model.get_output_embeddings()
    if output is None or not is_bare(output):
        return None
    raw: list[Tensor] = []
    handle = output.register_forward_hook(lambda module, args, result: raw.append(result.detach().clone()))
    try:
        with torch.no_grad():
            ids = probe_ids(anatomy.model, 2)
            final = anatomy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    final = final.to(raw[0].device)  # accelerate brings what a model of several devices returns back to the first
    softcap = getattr(anatomy.model.config.get_text_config(), "final_logit_softcapping", None)
    scale = float((final.double() * raw[0].double()).sum() / raw[0].double().square().sum().clamp_min(1e-300))
    capped = () if softcap is None else (Head(output, softcap=softcap),)  # first: small logits look uncapped
    heads: tuple[Head, ...] = (*capped, Head(output), Head(output, scale=scale))
    for head in heads:
        finished = Head(nn.Identity(), head.scale, head.softcap).logits(raw[0])
        if torch.allclose(finished, final.float(), rtol=1e-5 if final.dtype == torch.float32 else 1e-2, atol=1e-6):
            return head
    return None


def forward_to_head(anatomy: Anatomy, forward: Callable[[], object]) -> None:
    """Run `forward` but stop before the output embedding, whose cost nobody asked for."""
    output = anatomy.model.get_output_embeddings()
    if output is None:
        forward()
    else:
        reach(output, forward)
