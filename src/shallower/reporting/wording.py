"""Numbers and removals in words, the same on the page, in the terminal and in a model card. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shallower.plan import PruningPlan
from shallower.reporting.data import RecoveryData, RecoveryMadeBy, RecoveryStage, ReportData
from shallower.units import Kind, Unit

KIND_NAMES: Mapping[Kind, str] = {"block": "block", "attn": "attention sublayer", "mlp": "MLP sublayer"}

Formatter = Callable[[Any], str]  # how a number is written

_TEXTS_IN_HEADLINE = 2


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the before/after table."""

    label: str
    dense: str
    pruned: str
    difference: str


def headline(data: ReportData) -> str:
    """What was removed, what it cost and what it gained, in one sentence."""
    effects = [_perplexities(data)]
    for row in reversed(speed_rows(data)):
        if row.difference:
            effects.append(f"{row.label.lower()} {row.difference}")
            break
    told = ", ".join(filter(None, effects))
    methods = [stage.method for stage in data.recovery[1:]]  # the first is what there was
    repaired = f", repaired by {_listed(methods)}" if methods else ""
    return f"{_removed(data)}{repaired}" + (f": {told}." if told else ".")


def recovery_headline(plan: PruningPlan, data: RecoveryData) -> str:
    """What was removed, by what it was repaired, and what that gained, in one sentence."""
    methods = [stage.method for stages in (*data.stages_before, data.recovery) for stage in stages[1:]]
    first, last = data.recovery[0].perplexity, data.recovery[-1].perplexity
    gains = [
        f"perplexity on {name} {number(first[name])} → {number(last[name])}"
        + (f" (dense {number(data.dense[name])})" if name in data.dense else "")
        for name in list(last)[:_TEXTS_IN_HEADLINE]
        if name in first
    ]
    gone = _listed([*by_kind(plan.remove)]) or "nothing"
    told = f"Removed {gone} of a model of {plural(plan.model.blocks, 'block')}"
    told += f", repaired by {_listed(methods)}" if methods else ""
    return told + (f": {', '.join(gains)}." if gains else ".")


def comparison(data: ReportData) -> tuple[ComparisonRow, ...]:
    """The before/after table. What neither model was measured for has no row."""
    dense, pruned = data.dense, data.pruned
    rows = [ComparisonRow("Blocks", str(dense.blocks), str(pruned.blocks), _less(dense.blocks, pruned.blocks, str))]
    for kind in ("attn", "mlp"):
        cut = sum(unit.kind == kind for unit in data.plan.remove)
        if cut:
            name = KIND_NAMES[kind]
            rows.append(ComparisonRow(f"{name[0].upper()}{name[1:]}s removed", "0", str(cut), ""))
    counted = f" in {data.dtype}" if data.dtype else ""
    rows += [
        ComparisonRow(label, form(before), form(after), _less(before, after, form))
        for label, form, before, after in (
            ("Parameters", count, dense.parameters, pruned.parameters),
            (f"Weights{counted}", size, dense.bytes, pruned.bytes),
            ("FLOPs per token", count, dense.flops, pruned.flops),
            (f"KV cache per token{counted}", size, dense.kv_bytes, pruned.kv_bytes),
        )
    ]
    for name in dict.fromkeys([*dense.perplexity, *pruned.perplexity]):
        before, after = dense.perplexity.get(name), pruned.perplexity.get(name)
        tokens = {f"{side.perplexity_tokens[name]:,}" for side in (dense, pruned) if name in side.perplexity_tokens}
        label = f"Perplexity on {name}" + (f" ({' or '.join(sorted(tokens))} tokens)" if tokens else "")
        rows.append(ComparisonRow(label, number(before), number(after), _more(before, after)))
    rows += [replace(row, label=f"{row.label}, tokens/s") for row in speed_rows(data)]
    for name in dict.fromkeys([*dense.tasks, *pruned.tasks]):
        before, after = dense.tasks.get(name), pruned.tasks.get(name)
        change = "" if before is None or after is None else signed(after - before, "{:.3f}".format)
        shown = ["–" if value is None else f"{value:.3f}" for value in (before, after)]
        rows.append(ComparisonRow(name, shown[0], shown[1], change))
    return tuple(rows)


def speed_rows(data: ReportData) -> list[ComparisonRow]:
    """Prefill and decoding, where they were timed: tokens a second, and how many times faster, or slower."""
    rows = []
    dense, pruned = data.dense, data.pruned
    for label, before, after, ranges in (
        (
            "Prefill",
            dense.prefill_tokens_per_s,
            pruned.prefill_tokens_per_s,
            (dense.prefill_range, pruned.prefill_range),
        ),
        ("Decoding", dense.decode_tokens_per_s, pruned.decode_tokens_per_s, (dense.decode_range, pruned.decode_range)),
    ):
        if before is not None or after is not None:
            change = _speed_change(before, after, *ranges) if before and after else ""
            rows.append(ComparisonRow(label, number(before), number(after), change))
    return rows


def recovery_rows(
    stages: Sequence[RecoveryStage], dense: Mapping[str, float]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the recovery table: perplexities of the dense model and behind each stage, and what the stage
    cost.
    """
    texts = list(dict.fromkeys(name for stage in stages for name in stage.perplexity))
    head = ("", *(f"Perplexity on {name}" for name in texts), "Parameters added", "Tokens read", "Time")
    rows = [("dense", *(number(dense.get(name)) for name in texts), "", "", "")] if dense else []
    for place, stage in enumerate(stages):
        cost = ("", "", "")
        if place:  # the first is what there was
            cost = (f"{stage.parameters:,}", f"{stage.tokens:,}", duration(stage.seconds))
        rows.append((stage.method, *(number(stage.perplexity.get(name)) for name in texts), *cost))
    return head, rows


def measured_how(made: RecoveryMadeBy | ReportData) -> str:
    """In what, on what and on how much of each text perplexity was measured; empty where early versions made it."""
    if made.dtype is None or made.device is None or made.window is None:
        return ""
    first = "all windows" if made.windows is None else f"the first {made.windows} windows"
    first = "the first window" if made.windows == 1 else first
    return f"{made.dtype} on {made.device}, {first} of {made.window:,} tokens of each text"


def distinct_names(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """Short names; where two are the same, with as much of the path before them as tells them apart."""
    labels = list(names)
    paths = [Path(full) for full in given]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        labels = [
            label if labels.count(label) == 1 else str(Path(*path.parts[-depth:]))
            for label, path in zip(labels, paths, strict=True)
        ]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: place + 1].count(label)})"
        for place, label in enumerate(labels)
    ]


def by_kind(units: Collection[Unit]) -> dict[str, list[Unit]]:
    """The units of each kind, by how many they are in words: `2 attention sublayers`. No kind that has none."""
    found = {kind: [unit for unit in units if unit.kind == kind] for kind in KIND_NAMES}
    return {plural(len(own), KIND_NAMES[kind]): own for kind, own in found.items() if own}


def plural(amount: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def count(amount: float) -> str:
    """A count in thousands, millions (M) or billions (B), four digits or so."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(amount) >= scale:
            scaled = amount / (1e3 if unit == "k" else scale)
            return f"{scaled:.2f} {unit}" if abs(scaled) < 10 else f"{scaled:.1f} {unit}"
    return f"{amount:,.0f}"


def size(amount: float) -> str:
    """Bytes in binary units: B, KiB, MiB, GiB, TiB."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(amount) >= 1 << power:
            scaled = amount / (1 << power)
            return f"{scaled:.2f} {unit}" if abs(scaled) < 10 else f"{scaled:.1f} {unit}"
    return f"{amount:,.0f} B"


def number(value: float | None) -> str:
    """Three or four digits; `–` for what is missing."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def score(value: float | None) -> str:
    """Four significant digits: scores of one model can lie close together, and far from 1."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.3e}".replace("-", "−")
    return f"{value:#.4g}".rstrip(".").replace("-", "−")


def percent(part: float, whole: float, *, digits: int = 1) -> str:
    """A share, with one decimal or as many as are asked for."""
    return f"{100 * part / whole if whole else 0:.{digits}f} %"


def signed(value: float, form: Formatter = number) -> str:
    """With + or a true minus sign."""
    return ("+" if value >= 0 else "−") + form(abs(value))


def relative_change(before: float, after: float) -> str:
    """How much more or less there is, in percent of what there was."""
    return signed(after - before, lambda part: percent(part, before))


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _removed(data: ReportData) -> str:
    dense, pruned = data.dense, data.pruned
    gone = dense.blocks - pruned.blocks
    shares = f"{percent(gone, dense.blocks)} of blocks, " if gone else ""
    shares += f"{percent(dense.parameters - pruned.parameters, dense.parameters)} of parameters"
    if all(unit.kind == "block" for unit in data.plan.remove):
        return f"Removed {gone} of {plural(dense.blocks, 'block')} ({shares})"
    of = f"{gone} of {plural(dense.blocks, 'block')}: " if gone else ""
    return f"Removed {_listed([*by_kind(data.plan.remove)])} ({of}{shares})"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _perplexities(data: ReportData) -> str:
    pairs = {
        name: (before, data.pruned.perplexity[name])
        for name, before in data.dense.perplexity.items()
        if name in data.pruned.perplexity
    }
    if len(pairs) <= _TEXTS_IN_HEADLINE:
        listed = [f"{name} {number(before)} → {number(after)}" for name, (before, after) in pairs.items()]
        return "perplexity on " + " and on ".join(listed) if listed else ""
    ratios = sorted(after / before for before, after in pairs.values())
    return f"perplexity on {len(pairs)} texts {ratios[0]:.2f}× to {ratios[-1]:.2f}× that of the dense model"


def _less(before: float, after: float, form: Formatter = count) -> str:
    if before == after:
        return "unchanged"
    difference = signed(after - before, form)
    return f"{difference} ({relative_change(before, after)})" if before else difference


def _more(before: float | None, after: float | None) -> str:
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return ""
    return f"{signed(after - before)} ({after / before:.2f}×)"


def _speed_change(
    before: float, after: float, range_before: Sequence[float] | None, range_after: Sequence[float] | None
) -> str:
    """ranges: of the runs; None where an early version did not keep them."""
    ratio = after / before
    if f"{ratio:.2f}" == "1.00":
        return "unchanged"
    change = f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"
    if range_before and range_after and range_before[0] <= range_after[1] and range_after[0] <= range_before[1]:
        return f"{change} (within the spread)"
    return change
