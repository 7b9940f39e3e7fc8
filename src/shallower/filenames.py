"""What the files are called that are written into a checkpoint's folder and an evaluation's. Torch-free."""

from __future__ import annotations

PLAN, REPORT, RECOVERY, PAGE, CARD = "plan.json", "report.json", "recovery.json", "report.html", "README.md"
"""In a checkpoint, besides the model. Of what shallower adds to that, `--force` deletes these (surgery/contents.py)."""

EVALUATION, ITEMS, CURVE_PNG, CURVE_SVG = "evaluation.json", "items", "curve.png", "curve.svg"
"""Of an evaluation: everything, a folder with what each item was answered, and the curve of a plan's prefixes."""
