"""What a model lost: perplexity of text it has not seen."""

from shallower.evaluation.perplexity import Perplexity, context_limit, perplexity
from shallower.evaluation.text import read_evaluation_text

__all__ = ["Perplexity", "context_limit", "perplexity", "read_evaluation_text"]
