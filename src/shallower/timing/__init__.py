"""How fast a model is and what it holds in memory."""

from shallower.timing.memory import devices_of, memory_source, peak_above
from shallower.timing.speed import Speed, Spread, compare_speed, measure_speed, require_counts, require_fits

__all__ = [
    "Speed",
    "Spread",
    "compare_speed",
    "devices_of",
    "measure_speed",
    "memory_source",
    "peak_above",
    "require_counts",
    "require_fits",
]
