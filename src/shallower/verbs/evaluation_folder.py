"""The folder that an evaluation is written to: evaluation.json, and a file of items for each model and task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from shallower import files
from shallower.errors import OutputError
from shallower.evaluation.comparison import Comparison
from shallower.filenames import CURVE_PNG, CURVE_SVG, EVALUATION, ITEMS
from shallower.files import expanded, replacing_folder
from shallower.reporting.wording import distinct_names
from shallower.strict_json import spelled


def require_free(out: str | Path, *, force: bool) -> None:
    """Raise OutputError unless the folder can be made, or `force` may replace it: an evaluation and nothing else, or
    empty.
    """
    target = expanded(out)
    what = f"an evaluation (no {EVALUATION} in it)"
    files.require_free(
        target, f"--out {target}", force=force, replaceable=_may_be_replaced, what=what, known=_is_written
    )


def write_comparison(
    comparison: Comparison, out: str | Path, *, force: bool, more: Mapping[str, str | bytes] | None = None
) -> None:
    """Write evaluation.json, items/MODEL/TASK.jsonl and `more` files, whole or not at all."""
    target = expanded(out).absolute()
    require_free(target, force=force)
    try:
        with replacing_folder(target) as made:
            text = json.dumps(spelled(comparison.to_json()), indent=1, ensure_ascii=False, allow_nan=False)
            (made / EVALUATION).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
            for name, content in (more or {}).items():
                (made / name).write_bytes(content.encode() if isinstance(content, str) else content)
            for each, name in zip(comparison.evaluations, _folders(comparison), strict=True):
                folder = made / ITEMS / name
                for result in each.tasks:
                    if result.samples:
                        folder.mkdir(parents=True, exist_ok=True)
                        lines = (
                            json.dumps(spelled(sample), ensure_ascii=False, allow_nan=False, default=str)
                            for sample in result.samples
                        )
                        (folder / f"{result.task}.jsonl").write_text(
                            "\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace"
                        )
    except OSError as error:
        raise OutputError(f"--out {target} cannot be written: {error.strerror or error}.") from None


def _may_be_replaced(folder: Path) -> bool:
    return (folder / EVALUATION).is_file()


def _is_written(path: PurePath) -> bool:
    """Whether a file, by its path in the folder, is one that an evaluation writes."""
    if path.parts[0] == ITEMS:
        return len(path.parts) == 3 and path.suffix == ".jsonl"
    return path.as_posix() in (EVALUATION, CURVE_PNG, CURVE_SVG)


def _folders(comparison: Comparison) -> list[str]:
    """A folder's name for each model: distinct names may differ in nothing but what a folder's cannot hold."""
    names = [re.sub(r"[^\w.-]+", "_", each.model) for each in comparison.evaluations]
    return distinct_names(names, [""] * len(names))
