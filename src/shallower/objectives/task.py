"""How well the pruned model answers multiple-choice questions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shallower.registry import objective


@objective("task")
def task(
    log_likelihoods: Tensor,
    tokens: Tensor,
    bytes: Tensor,
    gold: Tensor,
    *,
    of: Literal["margin", "accuracy"] = "margin",
    normalise: Literal["none", "tokens", "bytes"] = "none",
) -> Tensor:
    """How far the best wrong choice is ahead of the right one, or how often it is; needs questions for calibration.

    of: `margin` is the difference of log-likelihoods, in nats, which moves with every removal; `accuracy` is 0 for a
    right answer and 1 for a wrong one, so that its mean is 1 - accuracy: it needs many questions to tell models apart.
    normalise: divide the log-likelihood of a choice by its tokens or bytes. By default it is not, so that a margin is
    the logarithm of the odds against the right choice; a per-byte one cannot weigh ` no` against ` yes`. Choices of
    unequal length favour the short one, but do so in all of the candidates that are compared.

    log_likelihoods: float64 [questions, choices], -inf where a question has fewer choices than another. tokens, bytes:
    float64 of the same shape, of each choice. gold: int64 [questions]. Returns float64 [questions].
    """
    scores = log_likelihoods / {"none": torch.ones_like(tokens), "tokens": tokens, "bytes": bytes}[normalise]
    right = gold[:, None]
    margin = scores.scatter(1, right, -torch.inf).amax(1) - scores.gather(1, right).squeeze(1)
    if of == "margin":
        return margin
    wrong = (scores.argmax(1) != gold).to(scores.dtype)  # the first of equals, as lm-eval decides
    return wrong.where(~margin.isnan(), torch.nan)  # else a model that overflows could be right
