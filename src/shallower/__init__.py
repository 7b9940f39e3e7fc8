"""shallower: find the blocks and sublayers a language model can do without, cut them out, and prove what it cost.

    import shallower
    pruned = shallower.prune("HuggingFaceTB/SmolLM2-135M", "20%", calibration="text.jsonl", out="smaller")

Most verbs of the command line are functions here, on a path or on a model in memory. Importing this package imports no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shallower.errors import ShallowerError, UserError
from shallower.plan import PruningPlan
from shallower.registry import metric, objective
from shallower.scores import Scores, ScoreSheet
from shallower.units import Span, Unit
from shallower.version import __version__

if TYPE_CHECKING:
    from shallower.anatomy import dissect
    from shallower.checkpoint.load import load
    from shallower.corpus import CalibrationSet, build_calibration
    from shallower.engine import Ablator
    from shallower.exporters import save
    from shallower.surgery.cut import cut
    from shallower.verbs.bench import bench
    from shallower.verbs.demo import demo
    from shallower.verbs.evaluate import evaluate
    from shallower.verbs.inspect import inspect
    from shallower.verbs.prune import prune
    from shallower.verbs.ratio_curve import ratio_curve
    from shallower.verbs.recover import recover
    from shallower.verbs.report import report
    from shallower.verbs.score import score, score_many
    from shallower.verbs.search import search
    from shallower.verbs.study import study
    from shallower.verbs.subject import open_subject

_LAZY = {
    "Ablator": "engine",
    "CalibrationSet": "corpus",
    "bench": "verbs.bench",
    "build_calibration": "corpus",
    "cut": "surgery",
    "demo": "verbs.demo",
    "dissect": "anatomy",
    "evaluate": "verbs.evaluate",
    "inspect": "verbs.inspect",
    "load": "checkpoint.load",
    "open_subject": "verbs.subject",
    "prune": "verbs.prune",
    "ratio_curve": "verbs.ratio_curve",
    "recover": "verbs.recover",
    "report": "verbs.report",
    "save": "exporters",
    "score": "verbs.score",
    "score_many": "verbs.score",
    "search": "verbs.search",
    "study": "verbs.study",
}

__all__ = [
    "Ablator",
    "CalibrationSet",
    "PruningPlan",
    "ScoreSheet",
    "Scores",
    "ShallowerError",
    "Span",
    "Unit",
    "UserError",
    "__version__",
    "bench",
    "build_calibration",
    "cut",
    "demo",
    "dissect",
    "evaluate",
    "inspect",
    "load",
    "metric",
    "objective",
    "open_subject",
    "prune",
    "ratio_curve",
    "recover",
    "report",
    "save",
    "score",
    "score_many",
    "search",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"shallower.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'shallower' has no attribute {name!r}")
