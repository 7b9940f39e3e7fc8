"""From the stream that leaves the last block to one number a token, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, probe_ids
from shallower.engine.trace import Trace, reach
from shallower.registry import Method

# Float32 logits held at once. Memory beyond 32 MB comes fresh from the system with every chunk, and filling it page by
# page
# takes as long as the product itself (measured: 1,300 µs a token in 64 MB chunks, 550 in 4 MB chunks of the
# vocabulary).
CHUNK_BYTES = 24 << 20
FUSED_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class Head:
    """`logits = finish(output embedding(x))`, proven equal to the model's own on a few tokens.

    output: the output embedding. scale and softcap: what the model does to the logits after it.
    """

    output: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [rows, vocabulary] for the output embedding's input [rows, hidden]."""
        return self._finish(self.output(rows))

    def normalizer_and_targets(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the softmax's denominator and the logit of `targets` (int64 [rows]): two float32 [rows].

        Goes through the vocabulary in chunks, so that logits are never held for all of it.
        """
        if type(self.output) is not nn.Linear:
            logits = self.logits(rows)
            return torch.logsumexp(logits, dim=-1), logits.gather(-1, targets[:, None]).squeeze(-1)
        weight, bias = self.output.weight, self.output.bias
        size = max(1, FUSED_CHUNK_BYTES // (4 * len(rows)))
        normalizers = []
        chosen = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            product = nn.functional.linear(rows, weight[part], None if bias is None else bias[part])
            logits = self._finish(product)
            normalizers.append(torch.logsumexp(logits, dim=-1))
            inside = ((targets >= start) & (targets < start + size)).nonzero().squeeze(-1)
            chosen[inside] = logits[inside, targets[inside] - start]
        return torch.logsumexp(torch.stack(normalizers), dim=0), chosen

    def _finish(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.float()


def find_head(anatomy: Anatomy) -> Head | None:
    """The head of a model, or None when it does more than scale or soft-cap the output embedding's result."""
    output = anatomy.model.get_output_embeddings()
    if output is None:
        return None
    raw: list[Tensor] = []
    handle = output.register_forward_hook(lambda module, args, result: raw.append(result.detach().clone()))
    try:
        with torch.no_grad():
            ids = probe_ids(anatomy.model, 2)
            final = anatomy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    softcap = getattr(anatomy.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    scale = float((final.double() * raw[0].double()).sum() / raw[0].double().square().sum().clamp_min(1e-300))
    for head in (Head(output), Head(output, scale=scale), Head(output, softcap=softcap)):
        finished = Head(nn.Identity(), head.scale, head.softcap).logits(raw[0])
        if torch.allclose(finished, final.float(), rtol=1e-5 if final.dtype == torch.float32 else 1e-2, atol=1e-6):
            return head
    return None


def token_values(
    objective: Method, options: dict[str, object], head: Head | None, trace: Trace, hidden: Tensor, dense: Tensor | None
) -> Tensor:
    """The objective at every position that has a real next token; zero elsewhere.

    hidden, dense: the stream leaving the last block of the candidate and of the dense model [sequences, length,
    hidden]; `dense` may be None when the objective does not ask for it. Returns float32 [sequences, length - 1].
    """
    ids = trace.batch.input_ids.to(hidden.device)
    scored = scored_positions(trace)
    values = torch.zeros(scored.shape, dtype=torch.float32, device=hidden.device)
    asked = set(objective.parameters)
    targets = ids[:, 1:][scored]

    if not asked & {"logits", "dense_logits", "log_normalizer"}:
        values[scored] = objective.function(
            **{
                name: tensor[:, :-1][scored].float()
                for name, tensor in (("hidden", hidden), ("dense_hidden", dense))
                if name in asked and tensor is not None
            },
            **options,
        )
        return values

    if head is not None and "log_normalizer" in asked:
        rows = trace.head_input(hidden, head.output)[:, :-1][scored]
        given = dict(zip(("log_normalizer", "target_logits"), head.normalizer_and_targets(rows, targets), strict=True))
        values[scored] = objective.function(**given, **options)
        return values

    rows_of = _logit_rows(head, trace, hidden, scored)
    dense_rows_of = None
    if "dense_logits" in asked:
        assert dense is not None
        dense_rows_of = _logit_rows(head, trace, dense, scored)
    flat = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    vocabulary = trace.anatomy.model.get_input_embeddings().num_embeddings
    size = max(16, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, len(targets), size):
        part = slice(start, min(start + size, len(targets)))
        logits = rows_of(part)
        supply = {"logits": logits, "targets": targets[part]}
        if "log_normalizer" in asked:
            supply["log_normalizer"] = torch.logsumexp(logits, dim=-1)
            supply["target_logits"] = logits.gather(-1, targets[part, None]).squeeze(-1)
        if dense_rows_of is not None:
            supply["dense_logits"] = dense_rows_of(part)
        flat[part] = objective.function(**{name: supply[name] for name in objective.parameters}, **options)
    values[scored] = flat
    return values


def scored_positions(trace: Trace) -> Tensor:
    """Where a next token exists and is real: bool [sequences, length - 1]."""
    ids, mask = trace.batch.input_ids, trace.batch.attention_mask
    device = trace.entry.device
    if mask is None:
        return torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool, device=device)
    return (mask[:, 1:] * mask[:, :-1]).bool().to(device)


def _logit_rows(head: Head | None, trace: Trace, hidden: Tensor, scored: Tensor) -> Callable[[slice], Tensor]:
    if head is None:
        logits = trace.logits(hidden)[:, :-1][scored]
        return lambda rows: logits[rows].float()
    inputs = trace.head_input(hidden, head.output)[:, :-1][scored]
    return lambda rows: head.logits(inputs[rows])


def forward_to_head(anatomy: Anatomy, forward: Callable[[], object]) -> None:
    """Run `forward` but stop before the output embedding, whose cost nobody asked for."""
    output = anatomy.model.get_output_embeddings()
    if output is None:
        forward()
    else:
        reach(output, forward)
