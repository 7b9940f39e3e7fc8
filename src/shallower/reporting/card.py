"""Sections of a model card: what a cut cost, and what recoveries gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shallower.plan import options_in_words
from shallower.reporting.data import RecoveryMadeBy, RecoveryStage, ReportData
from shallower.reporting.wording import measured_how, recovery_rows, size, speed_rows


def pruned_card(data: ReportData) -> str:
    """Before and after, as a Markdown table, and what recoveries gained, if there were any."""
    rows = [("blocks", f"{data.dense.blocks}", f"{data.pruned.blocks}")]
    rows.append(("parameters", f"{data.dense.parameters:,}", f"{data.pruned.parameters:,}"))
    rows.append((f"KV cache per token, {data.dtype}", size(data.dense.kv_bytes), size(data.pruned.kv_bytes)))
    for name, value in data.dense.perplexity.items():
        tokens = data.dense.perplexity_tokens[name]
        rows.append((f"perplexity, {name} ({tokens:,} tokens)", f"{value:.2f}", f"{data.pruned.perplexity[name]:.2f}"))
    for name, value in data.dense.tasks.items():
        rows.append((name, f"{value:.3f}", f"{data.pruned.tasks[name]:.3f}"))
    rows += [
        (f"{row.label.lower()}, tokens/s", row.dense, f"{row.pruned}: {row.difference}")
        for row in speed_rows(data)
        if row.difference
    ]
    lines = ["## Before and after", "", "| | dense | pruned |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if data.speed_setting:
        lines += ["", f"Speed: {data.speed_setting}."]
    if data.recovery and data.recovery_made_by is not None:
        lines += ["", recovery_card(data.recovery, data.dense.perplexity, data.recovery_made_by)]
    return "\n".join(lines)


def recovery_card(stages: Sequence[RecoveryStage], dense: Mapping[str, float], made: RecoveryMadeBy) -> str:
    """The stages as a Markdown table, and what they were made with."""
    head, rows = recovery_rows(stages, dense)
    lines = ["## Recovery", "", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.append("")
    for stage in stages[1:]:
        options = options_in_words(stage.options)
        lines.append(f"- `{stage.method}`" + (f": {options}" if options else ""))
    texts = {"Repaired": made.calibration, "Trained": made.training}
    lines += [f"- {done} on {text.title}, {text.tokens:,} tokens" for done, text in texts.items() if text is not None]
    measured = [f"- Measured: {how}"] if stages[0].perplexity and (how := measured_how(made)) else []
    return "\n".join([*lines, f"- Seed {made.seed}", *measured])
