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
class LossSums:
    """Sums over rows: `total`, through which gradients flow, and what it is made of (float32 scalars)."""

    total: Tensor
    nll: Tensor
    kl: Tensor


def head_losses(
    rows: Tensor, targets: Tensor, head: Head, guide: Guide | None, distill: float, temperature: float
) -> LossSums:
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
    return LossSums(*sums)


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
        size = max(1, min(len(rows), _chunk_bytes(rows) // (4 * vocabulary)))
        buffers = rows.new_empty(2 if guide is None else 4, size, vocabulary, dtype=torch.float32)
        product = rows.new_empty(size, vocabulary)
        to_rows = torch.empty_like(rows)
        to_weight = _gradient(weight, ctx.needs_input_grad[1])
        to_bias = _gradient(bias, ctx.needs_input_grad[2])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            chunk = rows[part]
            raw, held = product[: len(chunk)], buffers[:, : len(chunk)]
            if matrix is None:
                raw.copy_(chunk)
            else:
                torch.mm(chunk, matrix.t(), out=raw)
            if bias is not None:
                raw += bias.to(raw.dtype)
            raw.copy_(_chunk(raw, targets[part], head, _part(guide, part), distill, temperature, sums, held))
            if matrix is None:
                to_rows[part] = raw
                continue
            torch.mm(raw, matrix, out=to_rows[part])
            if to_weight is not None:
                to_weight += torch.mm(raw.t(), chunk)
            if to_bias is not None:
                to_bias += raw.sum(0, dtype=torch.float32)
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
    raw: Tensor,
    targets: Tensor,
    head: Head,
    guide: Guide | None,
    distill: float,
    temperature: float,
    sums: Tensor,
    buffers: Tensor,
) -> Tensor:
    """Add the losses of a few rows to `sums` (total, nll, kl); the total's gradient by the logits `raw`, float32.

    buffers: float32 [2, or 4 with a guide, rows, vocabulary], written over. All is computed in them, as memory that is
    new from the system takes longer than what is computed in it.
    """
    logs, probabilities = buffers[0], buffers[1]
    slope = _finish(raw, head, logs)
    _log_softmax(logs, probabilities)
    at = torch.arange(len(targets), device=targets.device)
    nll = -logs[at, targets].sum()
    sums[1] += nll
    sums[0] += (1 - distill) * nll
    difference: Tensor | None = None
    if guide is not None and distill:
        tempered = probabilities
        if temperature != 1:
            tempered = torch.empty_like(probabilities)
            _log_softmax(logs.div_(temperature), tempered)
        kl, difference = _divergence(logs, tempered, guide, temperature, buffers[2:])
        sums[2] += kl
        sums[0] += distill * temperature**2 * kl
    gradient = probabilities
    gradient[at, targets] -= 1
    if difference is not None:
        gradient.mul_(1 - distill).add_(difference, alpha=distill * temperature)
    return gradient if slope is None else gradient.mul_(slope)


def _finish(raw: Tensor, head: Head, logits: Tensor) -> Tensor | None:
    """Write the logits that the model gives to `logits`, float32. Returns their derivative by `raw` unless it is 1."""
    logits.copy_(raw)
    if head.softcap is None:
        if head.scale == 1.0:
            return None
        logits.mul_(head.scale)
        return torch.full_like(logits[:, :1], head.scale)
    bent = torch.tanh(logits * head.scale / head.softcap)
    torch.mul(bent, head.softcap, out=logits)
    slope: Tensor = (1 - bent.square()) * head.scale
    return slope


def _log_softmax(logits: Tensor, probabilities: Tensor) -> None:
    """Turn logits into log-probabilities, in place, and write what these are of."""
    logits.sub_(logits.amax(-1, keepdim=True))
    torch.exp(logits, out=probabilities)
    total = probabilities.sum(-1, keepdim=True)
    probabilities.div_(total)
    logits.sub_(total.log_())


def _divergence(
    logs: Tensor, probabilities: Tensor, guide: Guide, temperature: float, buffers: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(dense ‖ student) summed over rows, and its gradient by the student's logits / temperature, in a buffer.

    logs, probabilities: the student's at that temperature, float32 [rows, vocabulary]. buffers: two more of these.
    """
    dense, aim = buffers[0], buffers[1]
    if guide.rows is not None:
        assert guide.head is not None
        guide.head.logits(guide.rows, out=dense)
        if temperature != 1:
            dense /= temperature
        _log_softmax(dense, aim)
        kl: Tensor = dense.sub_(logs).mul_(aim).sum()
        return kl, torch.sub(probabilities, aim, out=aim)
    assert guide.log_probabilities is not None
    assert guide.words is not None
    words, known = guide.words.long(), guide.log_probabilities.float()
    mine = logs.gather(1, words)
    top = known.exp()
    rest = (1 - top.sum(1, keepdim=True)).clamp_min(1e-6)
    left = (1 - mine.exp().sum(1, keepdim=True)).clamp_min(1e-6)
    kl = (top * (known - mine)).sum() + (rest * (rest.log() - left.log())).sum()
    # For a word outside of the known ones d(-rest · log left) = p · (1 - rest / left); a known one has p - q
    torch.mul(probabilities, 1 - rest / left, out=aim)
    return kl, aim.scatter_(1, words, probabilities.gather(1, words) - top)


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
