"""How far the pruned model's next-token distribution is from the dense one's."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from shallower.registry import Above, objective


@objective("kl", source="arXiv:2410.14649", floor=0.0)
def kl(
    log_normalizer: Tensor,
    dense_mean_logit: Tensor,
    dense_entropy: Tensor,
    *,
    temperature: Annotated[float, Above(0)] = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence from the dense to the pruned model's next-token distribution.

    With dense probabilities p and pruned logits z it is log Σ exp z - Σ p z - entropy of p, so sums over the vocabulary
    suffice. All are float32 [tokens], of logits that were divided by `temperature`. Returns float32 [tokens], in nats.
    """
    return log_normalizer - dense_mean_logit - dense_entropy
