"""`shallower search`: which units should go? Writes the plan, cuts nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy.streamed import is_streamed
from shallower.anatomy.weigh import parameters, size
from shallower.budget import parse_protect
from shallower.corpus import CalibrationSet
from shallower.defaults import LENGTH, SEQUENCES
from shallower.engine import Ablator, Racing, Spent
from shallower.errors import BudgetError, ModelError, UserError
from shallower.plan import Gone, MadeBy, PruningPlan
from shallower.registry import Configured
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Scores, ScoreSheet
from shallower.searches import Losses
from shallower.surgery import cut, is_spread, leftovers, require_together, require_whole
from shallower.units import Unit, listed, plain, sublayers_of
from shallower.verbs.advise import advise, require_target
from shallower.verbs.calibrate import calibrate, note_default
from shallower.verbs.measuring import make_ablator
from shallower.verbs.ranking import how_ranked, rank, ranked, scores_to_rank_by
from shallower.verbs.repaired import RepairedLosses, SplitText, judging_text
from shallower.verbs.request import Request, resolve, takes_all
from shallower.verbs.score import require_finite
from shallower.verbs.search_methods import Chosen, require_possible
from shallower.verbs.subject import ModelLike, Subject, open_subject, require_streamable, units_of, will_stream
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
    sequences: int = SEQUENCES,
    length: int = LENGTH,
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
    metric: for searches that rank (default: their own). scores: measured before, to rank by instead; where they
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
    exact = exact and ablator is None  # which knows whether it runs races
    chosen = require_possible(
        remove,
        search,
        objective,
        metric,
        settings,
        units=units,
        ordinary=ordinary,
        protect=protect,
        exact=exact,
        repair=repair,
        workers=workers,
    )
    require_target(calibration, target)
    stream = will_stream(model, stream_blocks)
    if stream:
        require_streamable(repair=repair, ordinary=ordinary, workers=workers, exact=exact)
    scores = scores_to_rank_by(chosen.stages, chosen.metric, remove, scores, units=units, stream=stream)
    subject = open_subject(
        model,
        tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        stream_blocks=stream_blocks,
    )
    require_whole(subject.model)  # else no plan for it could be applied
    if repair or ordinary:
        require_together(subject.model)  # candidates are cut
    request = resolve(subject, remove, search, units=units, ordinary=ordinary, protect=protect)
    ranking: Scores | None = None
    if request.budget is None:
        _cut_named(subject, request.units)
    elif scores is not None:
        ranking = ranked(subject, chosen.stages, metric, scores, chosen.of_metric, units)
        require_covered(chosen.stages, ranking, request.units)
    read, of_text = _text(
        subject,
        calibration,
        target,
        chosen,
        lambda: units_of(subject, units, parse_protect(protect, len(subject.anatomy.blocks))),
        memory=memory,
        workers=workers,
        shape={"sequences": sequences, "length": length, "seed": seed},
    )
    found = _found(
        subject,
        request,
        chosen,
        read,
        ranking,
        units=units,
        ordinary=ordinary,
        settings=settings,
        exact=exact,
        seed=seed,
        memory=memory,
        workers=workers,
        ablator=ablator,
    )
    asked = {"remove": str(remove), "units": units, "ordinary": ordinary, "protect": protect}
    return PruningPlan(
        subject.identity,
        tuple(sorted(found.order)),
        tuple(zip(found.order, found.losses[1:], strict=True)),
        found.losses[0],
        _made_by(subject, request, chosen, read, of_text, found, asked, seed),
        {"tokens": found.spent.tokens, "exhaustive": found.spent.exhaustive, "recalled": found.spent.recalled},
        _gone(subject, found.order),
    )


@dataclass(frozen=True)
class _Found:
    """The units to remove, one after another, with the objective of the dense model and after each removal. ranking:
    the scores that were read. racing: how candidates raced, None where they did not.
    """

    order: Sequence[Unit]
    losses: Sequence[float]
    ranking: Scores | None
    spent: Spent
    racing: Racing | None


def _found(
    subject: Subject,
    request: Request,
    chosen: Chosen,
    read: CalibrationSet | SplitText,
    ranking: Scores | None,
    *,
    units: str,
    ordinary: bool,
    settings: Mapping[str, str] | None,
    exact: bool,
    seed: int,
    memory: int | None,
    workers: int | str | None,
    ablator: Ablator | None,
) -> _Found:
    """Search, or take the units that were named, and measure what is left after each removal. ranking: scores that were
    measured before.
    """
    text = read.judged if isinstance(read, SplitText) else read
    with _ablator(ablator, subject, text, chosen, exact, memory, workers) as measuring:
        before = measuring.account()
        judge = _judge(subject, read, chosen.repairs, measuring, memory)
        given = ranking
        if request.budget is None:
            order = list(request.units)
        else:
            if ranking is None:
                ranking = rank(
                    subject,
                    chosen.stages,
                    text,
                    metric=chosen.metric,
                    units="sublayer" if ordinary else units,
                    objective=chosen.objective,
                    settings=settings,
                    seed=seed,
                    memory=memory,
                    workers=workers,
                    ablator=measuring,  # what a metric measured need not be measured again, and is counted
                    only=sublayers_of(request.units) if ordinary else request.units,
                )
            require_finite(judge.losses)
            if chosen.repairs:
                measuring.close()  # what it keeps in memory would stand beside what repairs keep
            order = _order(subject, request, chosen, judge.losses, ranking, seed, ordinary=ordinary)
        losses = _measured(judge, order)
        if request.budget is not None:
            _require_finite(losses[-1], order, chosen.objective)
        spent = _spent(measuring, before, judge)
        progress.note(_cost(spent, None if given else ranking, repaired=bool(chosen.repairs)))
    return _Found(order, losses, ranking, spent, measuring.racing)


def _made_by(
    subject: Subject,
    request: Request,
    chosen: Chosen,
    read: CalibrationSet | SplitText,
    of_text: Mapping[str, str],
    found: _Found,
    asked: Mapping[str, Any],
    seed: int,
) -> MadeBy:
    """What makes the same plan again. of_text: as `_text` tells it. asked: which units may go, and how many, as it was
    said.
    """
    whole, text = (read.whole, read.judged) if isinstance(read, SplitText) else (read, read)
    options = {
        **chosen.options,
        **asked,
        "dtype": subject.dtype,
        "device": subject.model.device.type,  # a race looks at its batches, whose size depends on it
        **_of_races(found.racing, found.spent, chosen.repair),
        **how_ranked(found.ranking, text, chosen.objective, {**chosen.of_objective, "dtype": subject.dtype}, seed),
        **({"judging_sequences": text.sequences} if isinstance(read, SplitText) else {}),
        **of_text,
    }
    return MadeBy(
        None if request.budget is None else chosen.search,
        chosen.objective,
        None if found.ranking is None else found.ranking.metric,
        options,
        seed,
        whole.identity,
        __version__,
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
    removable: Callable[[], Sequence[Unit]],
    *,
    memory: int | None,
    workers: int | str | None,
    shape: Mapping[str, Any],
) -> tuple[CalibrationSet | SplitText, Mapping[str, str]]:
    """What candidates are measured on; behind a repair, what they are repaired and judged on. And of a text that was
    chosen for a target how that was done, as `made_by.options` of the plan tells it.
    """
    if isinstance(calibration, SplitText):
        if not chosen.repairs:
            raise UserError("a text in two parts is for a search with a repair: name one, or give the text as a whole.")
        return calibration, {}
    note_default(calibration)
    told: Mapping[str, str] = {}
    if target is not None:
        advice = advise(
            subject,
            str(calibration),
            target,
            removable(),
            objective=chosen.objective,
            options=chosen.of_objective,
            memory=memory,
            workers=workers,
            **shape,
        )
        told = advice.options
        if not chosen.repairs:
            return advice.text, told
        calibration = advice.candidates[0].source
    if chosen.repairs:
        return judging_text(subject, calibration, **shape), told
    return calibrate(subject, calibration, objective=chosen.objective, **shape), told


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
    chosen: Chosen,
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
    trail = run_search(chosen.stages, request.units, request.budget, losses, ranking, seed)
    found = plain(trail[-1])
    if takes_all(subject, trail[-1]):
        raise BudgetError(
            f"search {chosen.search!r} removes {request.budget} only with all {len(subject.anatomy.blocks)} blocks, "
            "and something must stay: remove less, or choose smaller --units."
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


def _require_finite(last: float, order: Sequence[Unit], objective: str) -> None:
    """Raise ModelError when the model without the chosen units overflows: nothing was compared."""
    if not math.isfinite(last):
        raise ModelError(
            f"without {listed(order, ', ')}, the best that was found, the model gives no finite "
            f"{objective}: remove less, --protect blocks such as first:2, or try --dtype float32."
        )


def _cost(spent: Spent, measured: Scores | None, *, repaired: bool) -> str:
    """measured: the scores that were measured to rank by; only those that ask an objective are in what was spent."""
    times = "passes of repairs and of those who judge" if repaired else "candidate sets"
    sentence = f"The search read {spent.tokens:,} tokens (calibration tokens times {times})"
    if measured is not None and measured.made_by.calibration is not None and measured.made_by.objective is None:
        sentence += f", besides what {measured.metric} read"
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
    chosen: Chosen,
    exact: bool,
    memory: int | None,
    workers: int | str | None,
) -> Iterator[Ablator]:
    """The one that is given, checked, or one for the time of the `with`."""
    if given is not None:
        given.require_measures(subject.model, text, chosen.objective, chosen.of_objective)
        yield given
        return
    # each look of a race would bring all blocks once more
    racing = None if exact or is_streamed(subject.model) else Racing()
    own = make_ablator(
        subject, text, chosen.objective, chosen.of_objective, racing=racing, memory=memory, workers=workers
    )
    with closing(own):
        yield own
