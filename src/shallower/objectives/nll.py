"""Mean negative log-likelihood of the next token; perplexity is its exponential."""

from __future__ import annotations

from torch import Tensor

from shallower.registry import objective


@objective("nll", source="arXiv:2402.02834", published=("perplexity", "cross-entropy"), floor=0.0)
def nll(target_logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """Negative log-likelihood of the next token.

    target_logits: float32 [tokens], the logit of the token that came. log_normalizer: float32 [tokens], the logarithm
    of the summed exponentials of all logits. Returns float32 [tokens], in nats.
    """
    return log_normalizer - target_logits
