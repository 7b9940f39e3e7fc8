"""How fast a model is and what it holds in memory."""

from shallower.bench.speed import Speed, Spread, compare_speed, measure_speed

__all__ = ["Speed", "Spread", "compare_speed", "measure_speed"]
