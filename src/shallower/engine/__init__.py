"""Runs the model with units removed: trace, prefix tree, loss head, memo. Holds no forward code of any family."""

from shallower.engine.ablator import Ablator, Spent
from shallower.engine.race import Racing
from shallower.engine.scoring import reads_choices
from shallower.engine.stream import StreamStatistic, stream_scores
from shallower.engine.trace import Trace, prove, trace

__all__ = ["Ablator", "Racing", "Spent", "StreamStatistic", "Trace", "prove", "reads_choices", "stream_scores", "trace"]
