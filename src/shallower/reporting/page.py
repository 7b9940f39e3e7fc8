"""One self-contained HTML page: what was removed, what it cost, how to load the result, and what made it.

The same data give the same bytes, so there is no date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from shallower.forms import FORMS
from shallower.plan import PruningPlan, options_in_words
from shallower.reporting.data import RecoveryData, RecoveryStage, ReportData
from shallower.reporting.figures import importance, influence_bars, loss_curve, span_heatmap, training_curve
from shallower.reporting.markup import glued, html_figure, html_page, html_section, html_table
from shallower.reporting.wording import (
    by_kind,
    comparison,
    duration,
    headline,
    measured_how,
    number,
    plural,
    recovery_headline,
    recovery_rows,
    score,
)
from shallower.scores import Scores
from shallower.units import Unit, listed


def render(data: ReportData) -> str:
    """The page as a string. Text from outside (names of models, texts, methods, notes) is escaped."""
    sections = (
        html_section("comparison", "Before and after", _comparison(data)),
        html_section("removed", "What was removed", _removed(data.plan)),
        html_section("recovery", "Recovery", _recovery(data)),
        html_section("load", "How to load it", _loading(data.form, data.folder, data.tokenizer)),
        html_section("figures", "Figures", _figures(data)),
        html_section("provenance", "How it was made", _provenance(data)),
        html_section("notes", "Notes", _notes(data.notes)),
    )
    return html_page(f"{data.base_model}, made shallower", headline(data), sections, _warning(data.notes))


def render_recovery(plan: PruningPlan, data: RecoveryData, folder: str) -> str:
    """The page of what `recover` wrote to `folder`, as a string."""
    loading = "" if data.form is None else _loading(data.form, folder, data.tokenizer)
    sections = (
        html_section("recovery", "Recovery", _stages(data.recovery, data.dense)),
        html_section("before", "What had been repaired before", "".join(_stages(s, {}) for s in data.stages_before)),
        html_section("removed", "What was removed", _removed(plan)),
        html_section("load", "How to load it", loading),
        html_section("provenance", "How it was made", _recovered_by(plan, data)),
        html_section("notes", "Notes", _notes(data.notes)),
    )
    title = f"{data.made_by.teacher.name}, made shallower"
    return html_page(title, recovery_headline(plan, data), sections, _warning(data.notes))


def _warning(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<p class="quiet">With {plural(len(notes), "note")} to <a href="#notes">read first</a>.</p>\n'


def _comparison(data: ReportData) -> str:
    rows = [(row.label, row.dense, row.pruned, row.difference) for row in comparison(data)]
    table = html_table(("", "Dense", "Pruned", "Difference"), rows, "Dense and pruned model side by side")
    told = ["k is a thousand, M a million, B a billion; KiB, MiB and GiB are powers of 1024 bytes."]
    if data.dense.perplexity or data.pruned.perplexity:
        told.append("Lower perplexity is better.")
    if data.speed_setting:
        told.append(f"Speed: {data.speed_setting}.")
    return f'{table}<p class="quiet">{glued(" ".join(told))}</p>\n'


def _removed(plan: PruningPlan) -> str:
    removed, blocks = plan.removed, plan.model.blocks
    sublayers = any(unit.kind != "block" for unit in removed)
    cells = "".join(_cell(index, removed, sublayers) for index in range(blocks))
    rows = [(amount, listed(units, ", ")) for amount, units in by_kind(removed).items()]
    told = f"Blocks are counted from 0, so the last of the dense model's {blocks} is block {blocks - 1}."
    table = html_table(("", "Units"), rows, "Removed units", style="facts")
    return f'<ol class="map" aria-label="Blocks of the dense model">{cells}</ol>\n{table}<p class="quiet">{told}</p>\n'


def _cell(index: int, removed: frozenset[Unit], sublayers: bool) -> str:
    gone = Unit(index, "block") in removed
    said = '<span class="unseen"> removed</span>' if gone else ""
    number = f'<span class="index">{index}</span>{said}'
    if not sublayers:
        return f'<li class="gone">{number}</li>' if gone else f"<li>{number}</li>"
    parts = ""
    for kind in ("attn", "mlp"):
        cut = not gone and any(unit.index == index and unit.kind == kind for unit in removed)
        said = '<span class="unseen"> removed</span>' if cut else ""
        parts += f'<small class="part{" gone" if cut else ""}">{kind}{said}</small>'
    return f'<li class="gone">{number}{parts}</li>' if gone else f"<li>{number}{parts}</li>"


def _recovery(data: ReportData) -> str:
    return _stages(data.recovery, data.dense.perplexity) if data.recovery else ""


def _stages(stages: Sequence[RecoveryStage], dense: Mapping[str, float]) -> str:
    head, rows = recovery_rows(stages, dense)
    body = html_table(head, rows, "Recovery, step by step")
    if any(stage.perplexity for stage in stages):
        first = "the cut one" if stages[0].method == "cut" else "the one that was there"
        whose = f"the dense model, of {first}" if dense else first
        told = f"Perplexity on held-out text of {whose}, and behind each recovery. Lower is better."
        body += f'<p class="quiet">{told}</p>\n'
    return body + "".join(map(_training, stages))


def _training(stage: RecoveryStage) -> str:
    held_out = any("held_out" in row for row in stage.curve)
    told = "Perplexity on text that nothing was trained on." if held_out else "The loss of the step before."
    head = ("Step", "Tokens", "Minutes", "Loss", *(["Held-out perplexity"] if held_out else []))
    rows = [
        (
            f"{row['step']:,}",
            f"{row['tokens']:,}",
            f"{row['minutes']:.1f}",
            *(number(row.get(key)) for key in (("loss", "held_out") if held_out else ("loss",))),
        )
        for row in stage.curve
    ]
    table = html_table(head, rows, f"While {stage.method} trained")
    return html_figure(training_curve(stage), f"While {stage.method} trained", told, table)


def _loading(name: str, folder: str, tokenizer: bool) -> str:
    form = FORMS[name]
    code = form.loading(folder, tokenizer=tokenizer)
    return f'<pre><code>{escape(code)}</code></pre>\n<p class="quiet">{glued(form.meaning, code=True)}</p>\n'


def _figures(data: ReportData) -> str:
    removed = data.plan.removed
    parts = []
    for scores in data.influence:
        told = "The higher, the more a unit matters to the model. " if scores.metric != "loss" else _LOSS_METRIC
        if any(row.error for row in scores.rows):
            drawn = "orders of removal" if scores.metric == "shapley" else "calibration sequences"
            told += f"Whiskers: standard error over {drawn}. "
        told += f"{_calibration(scores)}."
        title = importance(scores)
        parts.append(html_figure(influence_bars(scores, removed), title, told, _influence_table(scores, removed)))
    if data.spans is not None:
        told = (
            "Each cell is a span of neighbouring blocks: its colour says how far the residual stream moves from the "
            "span's start to its end, compared with the other spans of that length; dark ones change it least. On the "
            f"right, the score of the best span of each length. {_calibration(data.spans)}."
        )
        title = f"Distance across every span of blocks ({data.spans.metric})"
        parts.append(html_figure(span_heatmap(data.spans, removed), title, told))
    told = "The objective on the calibration text, in the order of removal."
    if repair := data.plan.made_by.repair:
        told = (
            f"The loss after {repair}, on the part of the calibration text that this was not fitted on, in the order "
            "of removal: not that of the model as it was cut."
        )
    parts.append(html_figure(loss_curve(data.plan), _after(data), told, _order_table(data)))
    return "".join(parts)


_SHORTEST = 0.05  # seconds of a stage that is told: less is one that had nothing to do
_LOSS_METRIC = "The rise of the objective when this unit alone is left out; below 0, the model is better without it. "


def _influence_table(scores: Scores, removed: frozenset[Unit]) -> str:
    rows = [
        (
            str(row.of),
            score(row.value),
            score(row.error),
            "removed" if row.of in removed or Unit(row.of.index, "block") in removed else "",
        )
        for row in scores.rows
        if isinstance(row.of, Unit)
    ]
    return html_table(("Unit", scores.metric, "Standard error", ""), rows, f"Scores by {scores.metric}")


def _order_table(data: ReportData) -> str:
    rows = [] if data.plan.dense is None else [("dense", score(data.plan.dense))]
    rows += [(str(unit), score(loss)) for unit, loss in data.plan.order]
    return html_table(("Removed", data.plan.made_by.measure), rows, _after(data))


def _after(data: ReportData) -> str:
    repair = data.plan.made_by.repair
    return "Objective after each removal" + (f" and {repair}" if repair else "")


def _calibration(scores: Scores) -> str:
    text = scores.made_by.calibration
    return "From the weights alone" if text is None else f"Measured on {text.tokens:,} tokens of {text.title}"


def _provenance(data: ReportData) -> str:
    plan, made = data.plan, data.plan.made_by
    rows = [("Dense model", plan.model.name + (f", revision {plan.model.revision}" if plan.model.revision else ""))]
    rows.append(("Fingerprint of its weights", plan.model.fingerprint))
    rows += [
        (label, value)
        for label, value in (("Search", made.search), ("Objective", made.objective), ("Metric", made.metric))
        if value is not None
    ]
    if made.options:
        rows.append(("Options", options_in_words(made.options)))
    rows.append(("Seed", str(made.seed)))
    if made.calibration is not None:
        rows.append(("Calibration text", f"{made.calibration.title}, {made.calibration.tokens:,} tokens"))
        rows.append(("Digest of its token ids", made.calibration.digest))
    if data.dense.perplexity and (measured := measured_how(data)):
        rows.append(("Measured", measured))
    rows.append(("shallower", made.version))
    if data.seconds:
        ran = {stage: duration(seconds) for stage, seconds in data.seconds.items() if seconds >= _SHORTEST}
        stages = ", ".join(f"{stage} {took}" for stage, took in ran.items())
        rows.append(("Time", ": ".join(filter(None, [duration(sum(data.seconds.values())), stages]))))
    if data.machine:
        rows.append(("Machine", data.machine))
    return html_table((), rows, "What made this model", style="facts")


def _recovered_by(plan: PruningPlan, data: RecoveryData) -> str:
    made = data.made_by
    rows = [("Dense model", made.teacher.name), ("Fingerprint of its weights", made.teacher.fingerprint)]
    if plan.made_by.search is not None:
        rows.append(("Search of what to remove", plan.made_by.search))
    rows += [
        (f"Options of {stage.method}", options_in_words(stage.options)) for stage in data.recovery if stage.options
    ]
    for label, text in (("Repaired on", made.calibration), ("Trained on", made.training)):
        if text is not None:
            rows += [(label, f"{text.title}, {text.tokens:,} tokens"), ("Digest of its token ids", text.digest)]
    rows.append(("Seed", str(made.seed)))
    if data.recovery[0].perplexity and (measured := measured_how(made)):
        rows.append(("Measured", measured))
    rows.append(("shallower", made.version))
    return html_table((), rows, "What made this model", style="facts")


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{glued(note, code=True)}</li>\n" for note in notes)
    return f'<ul class="notes">\n{items}</ul>\n' if items else ""
