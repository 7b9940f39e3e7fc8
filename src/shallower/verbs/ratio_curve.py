"""`shallower eval --plan`: what each further removal of one plan costs, in perplexity and in tasks, without writing a
checkpoint.

The prefixes of a plan agree below their first difference, and there the engine runs all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy.weigh import size
from shallower.defaults import TASK_SEED, WINDOW
from shallower.engine.likelihood import Asked, Likelihoods
from shallower.errors import ModelError, PlanError
from shallower.evaluation.comparison import Comparison, Evaluation
from shallower.evaluation.perplexity import Perplexity, require_stride
from shallower.evaluation.tasks import TaskResult, TaskSettings, run_tasks
from shallower.plan import PruningPlan
from shallower.reporting.curves import curve_files
from shallower.resources import parse_memory
from shallower.surgery import cut
from shallower.units import Unit
from shallower.verbs.contamination import contamination
from shallower.verbs.evaluation_folder import require_free, write_comparison
from shallower.verbs.measured_by import measured_by, measured_model
from shallower.verbs.questions import Questions, open_answered, read_questions, require_templates
from shallower.verbs.repaired import left_unrepaired
from shallower.verbs.subject import ModelLike, Subject, open_subject, require_computable
from shallower.verbs.texts import require_measurable, tokens_read, windows_cut, windows_of


def ratio_curve(
    model: ModelLike,
    plan: PruningPlan | str | Path,
    at: Sequence[int] = (),
    texts: str | Path | Sequence[str | Path] = (),
    *,
    tasks: str | Sequence[str] = (),
    suites: str | Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int = WINDOW,
    stride: int | None = None,
    max_windows: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    truncate: bool = False,
    task_data: str | Path | None = None,
    task_seed: int = TASK_SEED,
    calibration: str | Path | None = None,
    memory: int | str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Comparison:
    """Evaluate the dense model and the first units of a plan, as many as each number in `at` says (default: each number
    that leaves a plan, so that no pair of one made with `ordinary` is parted).

    The rest is as for `evaluate`, but no prompts are continued. memory: what the engine may use besides the model. out:
    a folder with evaluation.json, the items, and the picture of accuracy and perplexity against what was removed, as
    SVG and PNG.

    Raises PlanError for a plan of another model or with fewer units, and as `evaluate` does.
    """
    given = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    counts = sorted({0, *(at or _shorter(given))})
    if counts[0] < 0 or counts[-1] > len(given.order):
        raise PlanError(f"--at {','.join(map(str, at))}: the plan removes {len(given.order)} units, one after another.")
    if out is not None:
        require_free(out, force=force)
    room = parse_memory(memory)
    require_computable([model], device, dtype)
    if chat and (tasks or suites):
        require_templates([model], tokenizer, trust_remote_code=trust_remote_code)
    require_stride(window, stride)
    asked = read_questions(
        texts,
        tasks,
        suites,
        settings=TaskSettings(limit, shots, task_seed, chat, None, truncate),
        task_data=task_data,
    )
    subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    given.require_for(subject.identity)
    tokens = tokens_read(subject, window, stride, max_windows)
    notes = (*asked.notes, *contamination(subject, given, calibration, asked, tokens, cut=False))
    notes += tuple(windows_cut(subject, asked.contents, window, stride))
    notes += left_unrepaired(
        given,
        "its prefixes are",
        "Evaluate checkpoints for repaired models: `shallower prune --recover {}` makes them.",
    )
    if asked.generation:
        notes += ("the suite's continued prompts are left out for prefixes of a plan: evaluate checkpoints for them.",)
    if asked.tasks is not None:
        require_measurable(subject, asked.contents, window, stride, max_windows)
    removed = [frozenset(unit for unit, _ in given.order[:count]) for count in counts]
    labels = ["dense", *(f"{count} removed" for count in counts[1:])]
    likelihoods = Likelihoods(subject.anatomy, removed, memory=room)
    results = _tasks(subject, likelihoods, asked, labels)  # before texts, as `evaluate` does
    perplexities = _perplexities(subject, likelihoods, asked, window, stride, max_windows)
    evaluations = [
        Evaluation(label, *_size(subject, gone), measured, tuple(found), None, len(gone))
        for label, gone, measured, found in zip(labels, removed, perplexities, results, strict=True)
    ]
    made_by = measured_by([measured_model(subject, labels[0])], asked, window, stride, max_windows, given)
    comparison = Comparison(tuple(evaluations), made_by=made_by)
    comparison = replace(comparison, notes=(*notes, *comparison.prompts_cut(), *comparison.overflows()))
    if out is not None:
        kinds = {unit.kind: len(subject.anatomy.of_kind(unit.kind)) for unit in removed[-1]}
        curve = curve_files(comparison.evaluations, subject.identity.name, kinds)
        write_comparison(comparison, out, force=force, more=curve)
    return comparison


def _shorter(plan: PruningPlan) -> list[int]:
    """How many first removals are plans of their own, all of them included."""
    found = []
    for count in range(1, len(plan.order) + 1):
        with suppress(PlanError):
            found.append(len(plan.at(count).order))
    return found


def _size(subject: Subject, gone: frozenset[Unit]) -> tuple[int, int]:
    """Blocks and parameters of the checkpoint that `prune` writes without `gone`: sublayers may pair up to whole blocks
    again, and norms that served only them go, too.
    """
    blocks = len(subject.anatomy.blocks) - sum(unit.kind == "block" for unit in gone)
    parameters = subject.weights.model.parameters - subject.weights.of(gone).parameters
    if all(unit.kind == "block" for unit in gone):
        return blocks, parameters
    try:
        smaller = cut(subject.anatomy, gone)
    except ModelError:  # there is no such checkpoint, and what is skipped is all that is known
        return blocks, parameters
    blocks = smaller.config.get_text_config().num_hidden_layers
    return blocks, size((smaller,))[0]


def _perplexities(
    subject: Subject, likelihoods: Likelihoods, asked: Questions, window: int, stride: int | None, windows: int | None
) -> list[dict[str, Perplexity]]:
    """Perplexity of each candidate, by name of the text."""
    candidates = len(likelihoods.routes)
    found: list[dict[str, Perplexity]] = [{} for _ in range(candidates)]
    for name, content in asked.contents.items():
        text = windows_of(subject, content, window, stride, windows)
        questions = [Asked(tuple(ids), tuple(targets)) for ids, targets in text.asked]
        sums = [[0.0] * len(questions) for _ in range(candidates)]
        with progress.task(f"perplexity on {name}", total=likelihoods.batches(questions) * candidates) as step:
            for part in likelihoods.of(questions, step):
                for place, answers in part.items():
                    for candidate, (value, _) in enumerate(answers):
                        sums[candidate][place] = -value
        for candidate in range(candidates):
            found[candidate][name] = text.summed_up(sums[candidate])
    return found


def _tasks(
    subject: Subject, likelihoods: Likelihoods, asked: Questions, labels: Sequence[str]
) -> list[list[TaskResult]]:
    """Results of each candidate. The first to be asked has all of them answer."""
    if asked.tasks is None:
        return [[] for _ in labels]
    from shallower.evaluation.panel import make_panel

    units = [frozenset(gone) for gone in likelihoods.candidates]

    def model(number: int) -> PreTrainedModel:
        return cut(subject.anatomy, units[number]) if units[number] else subject.model

    with open_answered() as answered:
        panel = make_panel(
            likelihoods,
            subject.tokenizer,
            model,
            labels,
            answered=answered,
            truncate=asked.settings.truncate,
        )
        return [run_tasks(member, asked.tasks, asked.settings) for member in panel]
