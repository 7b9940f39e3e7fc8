"""Runs the model with units removed: trace, prefix tree, loss head, memo. Holds no forward code of any family."""

from shallower.engine.ablator import Ablator, Spent
from shallower.engine.gradients import WeightStatistic, needs_backward, reads_weights, weight_scores
from shallower.engine.race import Racing
from shallower.engine.scoring import along_with, reads_choices
from shallower.engine.stream import StreamStatistic, reads_stream, stream_scores
from shallower.engine.trace import Trace, prove, trace

__all__ = [
    "Ablator",
    "Racing",
    "Spent",
    "StreamStatistic",
    "Trace",
    "WeightStatistic",
    "along_with",
    "needs_backward",
    "prove",
    "reads_choices",
    "reads_stream",
    "reads_weights",
    "stream_scores",
    "trace",
    "weight_scores",
]
