"""Next-token loss and divergence from the dense model, with their gradients, a few rows of logits at a time.

Float32 logits of all tokens and all the vocabulary would be gigabytes. The gradient of both losses with respect to the
logits is known in closed form, so each chunk of rows gives its part of the gradient right away and is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shallower.engine.head import ROW_CHUNK_BYTES, ROW_CHUNK_BYTES_ELSEWHERE, Head


@dataclass(frozen=True, eq=False)
class Guide:
    """What the dense model says of some tokens, in one of two forms.

    rows: its output embedding's input [rows, hidden], with `head`. Or log_probabilities, float [rows, k], of the k
    most probable `words`, int [rows, k], at the temperature asked for; the rest of the vocabulary is then one word.
    stream: what leaves the blocks that student and teacher share, [sequences, length, hidden], where they share any.
    """

    rows: Tensor | None = None
    head: Head | None = None
    log_probabilities: Tensor | None = None
    words: Tensor | None = None
    stream: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums over rows: `total`, through which gradients flow, and what it is made of (float32 scalars)."""

    total: Tensor
    nll: Tensor
    kl: Tensor


def head_losses(
    rows: Tensor, targets: Tensor, head: Head, guide: Guide | None, distill: float, temperature: float
) -> Losses:
    """(1 - distill) · next-token loss + distill · temperature² · KL(dense ‖ student), summed over rows.

    rows: the output embedding's input [rows, hidden]. targets: int64 [rows]. guide: None when distill is 0.
    """
    given: list[Tensor | None] = [rows, None, None]
    if head.has_chunks:
        assert isinstance(head.output, nn.Linear)
        given[1:] = [head.output.weight, head.output.bias]
    elif not isinstance(head.output, nn.Identity):
        raise TypeError(f"a head of type {type(head.output).__name__} must be run before, and its logits given as rows")
    sums = _HeadLosses.apply(*given, targets, head, guide, distill, temperature)  # type: ignore[no-untyped-call]
    return Losses(*sums)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        guide: Guide | None,
        distill: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = rows.new_zeros(3, dtype=torch.float32)
        matrix = None if weight is None else weight.to(rows.dtype)
        vocabulary = rows.shape[1] if matrix is None else len(matrix)
        size = max(1, _chunk_bytes(rows) // (4 * vocabulary))
        to_rows = torch.empty_like(rows)
        to_weight = _gradient(weight, ctx.needs_input_grad[1])
        to_bias = _gradient(bias, ctx.needs_input_grad[2])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            chunk = rows[part]
            raw = chunk if matrix is None else torch.mm(chunk, matrix.t())
            if bias is not None:
                raw = raw + bias.to(raw.dtype)
            gradient = _chunk(raw, targets[part], head, _part(guide, part), distill, temperature, sums)
            gradient = gradient.to(rows.dtype)
            if matrix is None:
                to_rows[part] = gradient
                continue
            torch.mm(gradient, matrix, out=to_rows[part])
            if to_weight is not None:
                to_weight += torch.mm(gradient.t(), chunk)
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=torch.float32)
        ctx.save_for_backward(to_rows, to_weight, to_bias)
        ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        total, nll, kl = sums.unbind()
        ctx.mark_non_differentiable(nll, kl)
        return total, nll, kl

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        to_rows, to_weight, to_bias = ctx.saved_tensors
        scale = outer[0]
        return (
            to_rows * scale.to(to_rows.dtype),
            None if to_weight is None else (to_weight * scale).to(ctx.dtypes[0]),
            None if to_bias is None else (to_bias * scale).to(ctx.dtypes[1]),
            *[None] * 5,
        )


def _chunk(
    raw: Tensor, targets: Tensor, head: Head, guide: Guide | None, distill: float, temperature: float, sums: Tensor
) -> Tensor:
    """Add the losses of a few rows to `sums` (total, nll, kl); the total's gradient by the logits `raw`, float32."""
    logits, slope = _finished(raw, head)
    at = torch.arange(len(targets), device=targets.device)
    logs = torch.log_softmax(logits, dim=-1)
    nll = -logs[at, targets].sum()
    sums[1] += nll
    sums[0] += (1 - distill) * nll
    gradient = None
    if distill < 1:
        gradient = logs.exp() if distill else logs.exp_()
        gradient[at, targets] -= 1
        gradient *= 1 - distill
    if guide is not None and distill:
        if temperature != 1:
            logs = torch.log_softmax(logits / temperature, dim=-1)
        kl, difference = _divergence(logs, guide, temperature)
        sums[2] += kl
        sums[0] += distill * temperature**2 * kl
        difference *= distill * temperature
        gradient = difference if gradient is None else gradient.add_(difference)
    assert gradient is not None
    return gradient if slope is None else gradient * slope


def _finished(raw: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """The logits that the model gives in float32, and their derivative by `raw` unless that is 1."""
    logits = raw.float()
    if head.softcap is None:
        if head.scale == 1.0:
            return logits, None
        return logits * head.scale, torch.full_like(logits[:, :1], head.scale)
    bent = torch.tanh(logits * head.scale / head.softcap)
    return bent * head.softcap, (1 - bent.square()) * head.scale


def _divergence(logs: Tensor, guide: Guide, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(dense ‖ student) summed over rows, and its gradient by the student's logits / temperature.

    logs: the student's log-probabilities at that temperature, float32 [rows, vocabulary]; they are overwritten.
    """
    if guide.rows is not None:
        assert guide.head is not None
        dense = torch.log_softmax(guide.head.logits(guide.rows) / temperature, dim=-1)
        probabilities = dense.exp()
        kl = torch.sum(probabilities * dense.sub_(logs))
        return kl, logs.exp_().sub_(probabilities)
    assert guide.log_probabilities is not None
    assert guide.words is not None
    words, known = guide.words.long(), guide.log_probabilities.float()
    mine = logs.gather(1, words)
    top = known.exp()
    rest = (1 - top.sum(1, keepdim=True)).clamp_min(1e-6)
    left = (1 - mine.exp().sum(1, keepdim=True)).clamp_min(1e-6)
    kl = (top * (known - mine)).sum() + (rest * (rest.log() - left.log())).sum()
    # For a word outside of the known ones d(-rest · log left) = p · (1 - rest / left); a known one has p - q
    p = logs.exp_()
    inside = p.gather(1, words)
    p *= 1 - rest / left
    return kl, p.scatter_(1, words, inside - top)


def _part(guide: Guide | None, part: slice) -> Guide | None:
    if guide is None:
        return None
    tensors = (guide.rows, guide.log_probabilities, guide.words)
    rows, logs, words = (None if tensor is None else tensor[part] for tensor in tensors)
    return Guide(rows, guide.head, logs, words)


def _gradient(parameter: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.zeros_like(parameter, dtype=torch.float32) if wanted and parameter is not None else None


def _chunk_bytes(rows: Tensor) -> int:
    return ROW_CHUNK_BYTES if rows.device.type == "cpu" else ROW_CHUNK_BYTES_ELSEWHERE
