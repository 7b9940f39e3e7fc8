"""`shallower search`: which units should go? Writes the plan, cuts nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy.streamed import is_streamed
from shallower.anatomy.weigh import parameters, size
from shallower.budget import Amount, parse_protect, parse_remove
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, Racing, Spent, needs_backward
from shallower.errors import BudgetError, ModelError, UserError
from shallower.plan import Gone, MadeBy, PruningPlan
from shallower.registry import Configured
from shallower.registry import metric as metrics
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Scores, ScoreSheet
from shallower.searches import Losses
from shallower.surgery import cut, is_spread, leftovers, require_together, require_whole
from shallower.units import Unit, listed, plain, sublayers_of
from shallower.verbs.advise import advise, is_auto
from shallower.verbs.ranking import metric_of, rank, ranked, read_scores
from shallower.verbs.repaired import RepairedLosses, SplitText, judging_text
from shallower.verbs.request import Request, resolve, takes_all
from shallower.verbs.score import require_finite, require_no_gradients
from shallower.verbs.search_methods import Chosen, chosen_methods, require_possible
from shallower.verbs.subject import (
    ModelLike,
    Subject,
    calibrate,
    make_ablator,
    note_default,
    open_subject,
    require_streamable,
    units_of,
)
from shallower.verbs.trail import removal_order, require_covered, run_search
from shallower.version import __version__


def search(
    model: ModelLike,
    remove: str | int,
    *,
    search: str = "greedy",
    objective: str = "nll",
    metric: str | None = None,
    scores: Scores | ScoreSheet | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    units: str = "block",
    ordinary: bool = False,
    protect: str = "",
    calibration: str | Path | CalibrationSet | SplitText | None = None,
    target: str | Path | None = None,
    sequences: int = 32,
    length: int = 128,
    settings: Mapping[str, str] | None = None,
    exact: bool = False,
    repair: str = "",
    seed: int = 0,
    memory: int | str | None = None,
    workers: int | str | None = None,
    ablator: Ablator | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    stream_blocks: bool = False,
) -> PruningPlan:
    """Choose the units to remove, and measure the objective after each removal.

    remove: a number of units (`6`), a share of the parameters in blocks (`20%`), of another quantity (`33%:kv_bytes`),
    several of these, or the units themselves (`block.13-18`), for which nothing is searched. protect: blocks that stay,
    such as `first:4,last:2`.
    ordinary: only plans whose sublayers pair up, so that what is left is an ordinary model: whole blocks, and an MLP
    with the attention after it. Each counts as one unit; a plan lists the sublayers of a pair one after the other.
    metric: for searches that rank (default: their paper's). scores: measured before, to rank by instead; where they
    are by several metrics, `metric` names the one.
    settings: options of the search, the metric, the objective and the repair as text. search: one, or several that
    improve on each other (`greedy,swap`), of which all but the first start from what was found before them
    (`annealing`, `evolutionary`, `swap`). exact: drop a candidate only when the rest of the text could not help it.
    Otherwise they race, and those are dropped that are clearly worse after a part of it: what a race chooses may be
    worse than the best by more than 0.2 % of the loss with a probability of 5 %, which is each race's own;
    `made_by.options` of the plan says how many races dropped any (`races`), and both numbers (`error_a_race`,
    `tie_of_a_race`). repair: judge every candidate
    after these recoveries (`linear-fold`), by its loss on as much text as is asked for; they are fitted on other text,
    of at least 128 sequences of 256 tokens. Of a ready-made set, and one whose specification says how many sequences it
    has, a quarter judges.
    target: with calibration `auto`, the text or questions that the smaller model is for; see `advise`.
    memory: bytes that the engine may keep besides the model (`4GB`; default: a quarter of what is free). workers: how
    many Ray workers measure, or the address of a Ray cluster (default: threads of this process). stream_blocks: of a
    model that is given by name or path, leave the blocks on the processor, and bring each to the device only while it
    runs: for models that are larger than the device. Candidates do not race then, and the plan is applied without it.
    ablator: one of this model, calibration and objective that earlier searches used; it keeps its streams and workers,
    and stays open. It knows whether races are run, so `exact`, `memory` and `workers` are not looked at. With a repair
    its calibration is the part that judges, and it lets its streams and workers go.

    Raises UnknownName, BudgetError, ModelError or CorpusError, each for what its name says, and UserError for an
    ablator of something else.
    """
    memory, workers = parse_memory(memory), parse_workers(workers)
    require_possible(
        remove,
        search,
        objective,
        metric,
        settings,
        units=units,
        ordinary=ordinary,
        protect=protect,
        exact=exact and ablator is None,
        repair=repair,
        workers=workers,
    )
    _require_target(calibration, target)
    chosen = chosen_methods(search, objective, repair, settings or {}, metric)
    stages = chosen.stages
    if stream_blocks:
        require_streamable(repair=repair, ordinary=ordinary, workers=workers, exact=exact and ablator is None)
    scores = _scores_to_rank_by(stages, metric, remove, scores, units=units, stream_blocks=stream_blocks)
    subject = open_subject(
        model,
        tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        stream_blocks=stream_blocks,
    )
    if is_streamed(subject.model):
        require_streamable(repair=repair, ordinary=ordinary, workers=workers, exact=exact and ablator is None)
    require_whole(subject.model)  # else no plan for it could be applied
    if repair or ordinary:
        require_together(subject.model)  # candidates are cut
    request = resolve(subject, remove, search, units=units, ordinary=ordinary, protect=protect)
    ranking: Scores | None = None
    if request.budget is None:
        _cut_named(subject, request.units)
    elif scores is not None:
        ranking = ranked(subject, stages, metric, scores, chosen.of_metric, units)
        require_covered(stages, ranking, request.units)
    read = _text(
        subject,
        calibration,
        target,
        chosen,
        objective,
        lambda: units_of(subject, units, parse_protect(protect, len(subject.anatomy.blocks))),
        memory=memory,
        workers=workers,
        shape={"sequences": sequences, "length": length, "seed": seed},
    )
    whole, text = (read.whole, read.judged) if isinstance(read, SplitText) else (read, read)
    with _ablator(ablator, subject, text, objective, chosen.of_objective, exact, memory, workers) as measuring:
        before = measuring.account()
        judge = _judge(subject, read, chosen.repairs, measuring, memory)
        if request.budget is None:
            order = list(request.units)
        else:
            if ranking is None:
                ranking = rank(
                    subject,
                    stages,
                    text,
                    metric=metric,
                    units="sublayer" if ordinary else units,
                    objective=objective,
                    settings=settings,
                    seed=seed,
                    memory=memory,
                    workers=workers,
                    ablator=measuring,  # what a metric measured need not be measured again, and is counted
                    only=sublayers_of(request.units) if ordinary else request.units,
                )
            require_finite(judge.losses)
            if repair:
                measuring.close()  # what it keeps in memory would stand beside what repairs keep
            order = _order(subject, request, search, stages, judge.losses, ranking, seed, ordinary=ordinary)
        measured = _measured(judge, order)
        if request.budget is not None:
            _require_finite(measured[-1], order, objective)
        spent = _spent(measuring, before, judge)
        progress.note(_cost(spent, repaired=bool(repair)))
    options = {
        **chosen.options,
        "remove": str(remove),
        "units": units,
        "ordinary": ordinary,
        "protect": protect,
        "dtype": subject.dtype,
        "device": subject.model.device.type,  # a race looks at its batches, whose size depends on it
        **_of_races(measuring.racing, spent, repair),
        **_of_scores(ranking, text, objective, {**chosen.of_objective, "dtype": subject.dtype}, seed),
        **({"judging_sequences": text.sequences} if isinstance(read, SplitText) else {}),
    }
    name, ranked_by = (None if request.budget is None else search), (None if ranking is None else ranking.metric)
    made_by = MadeBy(name, objective, ranked_by, options, seed, whole.identity, __version__)
    return PruningPlan(
        subject.identity,
        tuple(sorted(order)),
        tuple(zip(order, measured[1:], strict=True)),
        measured[0],
        made_by,
        {"tokens": spent.tokens, "exhaustive": spent.exhaustive, "recalled": spent.recalled},
        _gone(subject, order),
    )


def _gone(subject: Subject, removed: Sequence[Unit]) -> Gone:
    """Only parameters, which are counted without the forward pass that `subject.weights` takes."""
    blocks = subject.anatomy.of_kind("block")
    of_model, _ = size((subject.model,))
    return Gone(parameters(subject.anatomy, removed), of_model, parameters(subject.anatomy, blocks))


def _text(
    subject: Subject,
    calibration: str | Path | CalibrationSet | SplitText | None,
    target: str | Path | None,
    chosen: Chosen,
    objective: str,
    removable: Callable[[], Sequence[Unit]],
    *,
    memory: int | None,
    workers: int | str | None,
    shape: Mapping[str, Any],
) -> CalibrationSet | SplitText:
    """What candidates are measured on; behind a repair, what they are repaired and judged on."""
    if isinstance(calibration, SplitText):
        if not chosen.repairs:
            raise UserError("a text in two parts is for a search with a repair: name one, or give the text as a whole.")
        return calibration
    note_default(calibration)
    if target is not None:
        advice = advise(
            subject,
            str(calibration),
            target,
            removable(),
            objective=objective,
            options=chosen.of_objective,
            memory=memory,
            workers=workers,
            **shape,
        )
        if not chosen.repairs:
            return advice.text
        calibration = advice.candidates[0].source
    if chosen.repairs:
        return judging_text(subject, calibration, **shape)
    return calibrate(subject, calibration, objective=objective, **shape)


def _judge(
    subject: Subject,
    read: CalibrationSet | SplitText,
    repairs: Sequence[Configured],
    measuring: Ablator,
    memory: int | None,
) -> Ablator | RepairedLosses:
    """Who tells what a candidate costs: `measuring`, or behind a repair one who repairs it first."""
    if not isinstance(read, SplitText):
        return measuring
    judge = RepairedLosses(subject, read, repairs, memory=memory, memo=measuring.memo)
    progress.note(
        f"A candidate is repaired on {read.fitted.tokens:,} tokens, read once a fit, and judged on "
        f"{read.judged.tokens:,} others."
    )
    return judge


def _measured(judge: Ablator | RepairedLosses, order: Sequence[Unit]) -> list[float]:
    """What the dense model loses, and the model after each removal.

    Raises ModelError when what is left in the end cannot be cut or repaired.
    """
    losses = judge.losses([frozenset(order[:count]) for count in range(len(order) + 1)])
    if isinstance(judge, RepairedLosses):
        judge.require_possible(order)
    return losses


def _spent(measuring: Ablator, before: Spent, judge: Ablator | RepairedLosses) -> Spent:
    """What was spent since `before`, with what repairs and their judge read."""
    spent = measuring.spent.since(before)
    if isinstance(judge, RepairedLosses):
        spent.tokens += judge.spent.tokens
        spent.exhaustive += judge.spent.tokens  # it runs no races
        spent.recalled += judge.spent.recalled
    return spent


def _order(
    subject: Subject,
    request: Request,
    search: str,
    stages: Sequence[Configured],
    losses: Losses,
    ranking: Scores | None,
    seed: int,
    *,
    ordinary: bool,
) -> list[Unit]:
    """The units that the searches choose, each before those that are chosen after it.

    Raises BudgetError when nothing would stay, and ModelError when what would stay cannot be built.
    """
    assert request.budget is not None
    trail = run_search(stages, request.units, request.budget, losses, ranking, seed)
    found = plain(trail[-1])
    if takes_all(subject, trail[-1]):
        raise BudgetError(
            f"search {search!r} removes {request.budget} only with all {len(subject.anatomy.blocks)} blocks, and "
            "something must stay: remove less, or choose smaller --units."
        )
    smaller = _cut_found(subject, found)
    if ordinary:
        assert smaller is not None
        _require_ordinary(subject, found, smaller)
    return removal_order(trail, losses)


def _of_races(racing: Racing | None, spent: Spent, repair: str) -> dict[str, Any]:
    """How candidates were compared, as `made_by.options` of the plan tells it."""
    told: dict[str, Any] = {"exact": bool(repair) or racing is None}
    if repair:
        told["repair"] = repair
    if spent.races and racing is not None:
        told |= {"races": spent.races, "error_a_race": racing.error, "tie_of_a_race": racing.tie}
    return told


def _require_target(calibration: object, target: object) -> None:
    """Raise UserError unless a target is given exactly where a calibration text is to be chosen for it."""
    if is_auto(calibration) and target is None:
        raise UserError("--calibration auto chooses text for what the model will read: name that with --for TEXT.")
    if target is not None and not is_auto(calibration):
        raise UserError(
            f"--for {target} is for --calibration auto, which chooses by it; here the text is "
            f"{calibration or 'the default'}."
        )


def _of_scores(
    ranking: Scores | None, text: CalibrationSet, objective: str, judging: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What the scores that ranked were made with, as `made_by.options` of the plan tells it: options that are not the
    metric's defaults, and where another command had measured them otherwise, its text, seed, objective and options.

    judging: options of the objective and number format that this search would have measured them with.
    """
    if ranking is None:
        return {}
    made, own = ranking.made_by, dict[str, Any]()
    method = next((each for each in metrics if each.name == ranking.metric), None)
    if method is not None:  # else it is of a package that is not installed here
        own = {name: option.default for name, option in method.options.items()}
        own["positions"] = method.traits.get("positions", "all")
    asked = judging if made.objective is not None else {"dtype": judging["dtype"]}
    judged, wanted = ({key: each[key] for key in each if key not in own} for each in (made.options, asked))
    told = {name: made.options[name] for name in made.options if name in own and made.options[name] != own[name]}
    read = None if made.calibration is None else made.calibration.digest
    measured = (judged, made.seed, read or text.digest, made.objective or objective)
    if measured != (wanted, seed, text.digest, objective):
        words = ["no text" if made.calibration is None else f"{made.calibration.title} ({made.calibration.digest})"]
        words += [f"seed {made.seed}", *([] if made.objective is None else [made.objective])]
        words += [f"{name}={value}" for name, value in judged.items() if wanted.get(name) != value]
        told["scores"] = ", ".join(words)
    return told


def _scores_to_rank_by(
    stages: Sequence[Configured],
    metric: str | None,
    remove: str | int,
    scores: Scores | ScoreSheet | str | Path | None,
    *,
    units: str,
    stream_blocks: bool,
) -> Scores | None:
    """The scores that were given, read, and checked as far as that goes without a model.

    Raises UserError as `read_scores`, and where a search with streamed blocks would measure a metric that takes
    gradients.
    """
    if scores is not None:
        return read_scores(stages, scores, metric, units)
    method = metric_of(stages, metric) if stream_blocks else None
    if method is not None and isinstance(parse_remove(str(remove))[0], Amount):
        require_no_gradients([method.name] if needs_backward(method) else [])
    return None


def _require_finite(last: float, order: Sequence[Unit], objective: str) -> None:
    """Raise ModelError when the model without the chosen units overflows: nothing was compared."""
    if not math.isfinite(last):
        raise ModelError(
            f"without {listed(order, ', ')}, the best that was found, the model gives no finite "
            f"{objective}: remove less, --protect blocks such as first:2, or try --dtype float32."
        )


def _cost(spent: Spent, *, repaired: bool) -> str:
    times = "passes of repairs and of those who judge" if repaired else "candidate sets"
    sentence = f"The search read {spent.tokens:,} tokens (calibration tokens times {times})"
    if spent.recalled:
        sentence += f"; {spent.recalled:,} measurements were remembered from before"
    if spent.exhaustive > spent.tokens:
        sentence += f"; if it had dropped no candidate early, it would have read {spent.exhaustive:,}"
    return sentence + "."


def _cut(subject: Subject, chosen: Sequence[Unit]) -> PreTrainedModel | None:
    """The model without `chosen`, so that nobody keeps a plan that cannot be applied; None where it is spread, which
    can be measured so, and is cut on another day.
    """
    return None if is_spread(subject.model) else cut(subject.anatomy, chosen)


def _cut_named(subject: Subject, named: Sequence[Unit]) -> None:
    """Raise ModelError where surgery refuses the units that were named, before they are measured."""
    try:
        _cut(subject, named)
    except ModelError as error:
        raise ModelError(
            f"without {listed(named, ', ')}, which --remove names, no model can be made: {error} Name other units."
        ) from error


def _cut_found(subject: Subject, chosen: Sequence[Unit]) -> PreTrainedModel | None:
    """As `_cut`, of what was found. Raises ModelError where surgery refuses that."""
    try:
        return _cut(subject, chosen)
    except ModelError as error:
        raise ModelError(
            f"the best that was found, without {listed(chosen, ', ')}, cannot be cut: {error} Remove "
            "less, --protect blocks, or choose other --units; what was measured is remembered."
        ) from error


def _require_ordinary(subject: Subject, chosen: Sequence[Unit], smaller: PreTrainedModel) -> None:
    """Raise ModelError when the family's config cannot describe `smaller`, what is left, though sublayers pair up."""
    if over := leftovers(smaller):
        raise ModelError(
            f"without {listed(chosen, ', ')} a config of this {subject.anatomy.family} model cannot "
            f"describe what is left as ordinary blocks ({listed(over, ', ')} would be missing); use --units "
            "block."
        )


@contextmanager
def _ablator(
    given: Ablator | None,
    subject: Subject,
    text: CalibrationSet,
    objective: str,
    options: Mapping[str, Any],
    exact: bool,
    memory: int | None,
    workers: int | str | None,
) -> Iterator[Ablator]:
    """The one that is given, checked, or one for the time of the `with`."""
    if given is None:
        # each look of a race would bring all blocks once more
        racing = None if exact or is_streamed(subject.model) else Racing()
        with closing(
            make_ablator(subject, text, objective, options, racing=racing, memory=memory, workers=workers)
        ) as own:
            yield own
        return
    given.require_measures(subject.model, text, objective, options)
    yield given
