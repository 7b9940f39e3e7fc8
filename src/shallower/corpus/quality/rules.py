"""Quality by Gopher's rules."""

from __future__ import annotations

from collections.abc import Mapping

from shallower.corpus.quality import Signals
from shallower.registry import quality

# For each signal what scores 0, 1, 1 and 0 again, with straight lines between. The ones are the rules' limits.
_LIMITS: Mapping[str, tuple[float, float, float, float]] = {
    "words": (0, 50, 100_000, 1_000_000),
    "mean_word": (1, 3, 10, 20),
    "symbols": (-1, 0, 0.1, 0.5),
    "alphabetic": (0.4, 0.8, 1, 2),
    "duplicate_lines": (-1, 0, 0.2, 0.6),
    "repeated_runs": (-1, 0, 0.2, 0.6),
    "stop_words": (0, 0.06, 1, 2),
}


@quality("rules", source="arXiv:2112.11446")
def rules(text: str, signals: Signals) -> float:
    """How well the worst of seven signals keeps Gopher's limits for English prose: 1 within, less the further out.

    Code, verse, tables and other languages than English score low.
    """
    return min(_ramp(getattr(signals, name), *limits) for name, limits in _LIMITS.items())


def _ramp(value: float, zero: float, one: float, still_one: float, zero_again: float) -> float:
    rising = (value - zero) / (one - zero)
    falling = (zero_again - value) / (zero_again - still_one)
    return max(0.0, min(1.0, rising, falling))
