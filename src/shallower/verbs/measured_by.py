"""What an evaluation says of how it was made: which models, on what texts and tasks, and in which versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from shallower.plan import PruningPlan
from shallower.verbs.questions import Questions
from shallower.verbs.subject import Subject
from shallower.version import __version__


def measured_model(subject: Subject, label: str | None = None) -> dict[str, Any]:
    """A model as it was measured, under a label or its own name."""
    identity = subject.identity
    device = subject.model.device.type
    return {"model": label or identity.name, **asdict(identity), "dtype": subject.dtype, "device": device}


def measured_by(
    models: Sequence[Mapping[str, Any]],
    asked: Questions,
    window: int,
    stride: int | None,
    max_windows: int | None,
    plan: PruningPlan | None = None,
) -> dict[str, Any]:
    """Everything needed to measure the same again. models: of `measured_model`. plan: whose prefixes were measured."""
    texts = [{"text": name, "digest": _digest(content)} for name, content in asked.contents.items()]
    packages = ["torch", "transformers", *(["lm_eval"] if asked.tasks is not None else [])]
    return {
        "models": list(models),
        "order": None if plan is None else [str(unit) for unit, _ in plan.order],
        "texts": texts,
        "windows": {"window": window, "stride": stride, "most": max_windows} if texts else None,
        "tasks": None if asked.tasks is None else asdict(asked.settings),
        "versions": {"shallower": __version__, **{name: version(name) for name in packages}},
    }


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"
