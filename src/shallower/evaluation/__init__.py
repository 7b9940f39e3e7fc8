"""What a model has lost: perplexity of text that it has not seen, tasks of lm-eval, what it writes, and the
comparison of several models by these.
"""

from shallower.evaluation.perplexity import Perplexity, context_limit, perplexity
from shallower.evaluation.text import read_evaluation_text

__all__ = ["Perplexity", "context_limit", "perplexity", "read_evaluation_text"]
