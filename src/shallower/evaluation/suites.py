"""Sets of tasks that papers report, and one that a processor does in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shallower.errors import UnknownName


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval. shots: examples before each question, where the suite says so. limit: items of each task.

    generation: whether the models also continue fixed prompts.
    """

    tasks: tuple[str, ...]
    source: str
    shots: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    generation: bool = False


QUICK_ITEMS = 200

SUITES: Mapping[str, Suite] = {
    "commonsense": Suite(
        ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), "arXiv:2402.02834"
    ),
    "knowledge": Suite(("mmlu", "boolq"), "arXiv:2403.17887", {"mmlu": 5}),
    "reasoning": Suite(("gsm8k", "arc_challenge"), ""),
    "quick": Suite(("arc_easy", "boolq", "hellaswag", "piqa", "winogrande"), "", limit=QUICK_ITEMS, generation=True),
}


def suite(name: str) -> Suite:
    """Raises UnknownName for one that does not exist."""
    if name not in SUITES:
        raise UnknownName("suite", name, SUITES)
    return SUITES[name]
