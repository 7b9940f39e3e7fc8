"""`shallower search`: which units should go? Writes the plan, cuts nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy import Block
from shallower.budget import Amount, Budget, Limit, make_limit, most, parse_protect, parse_remove, require_run
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, Racing, Spent, reads_stream
from shallower.errors import BudgetError, ModelError, UserError
from shallower.plan import MadeBy, PruningPlan
from shallower.registry import Method, share_options
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.registry import search as searches
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Scores, ScoreSheet
from shallower.surgery import cut, leftovers
from shallower.units import Unit, plain, sublayers_of
from shallower.verbs.advise import advise, is_auto
from shallower.verbs.ranking import Stage, metric_of, rank, ranked, refuse_ranking, that_rank
from shallower.verbs.recoveries import Stages, named_recoveries
from shallower.verbs.repaired import Parts, RepairedLosses, judging_text, require_closed
from shallower.verbs.subject import Subject, calibrate, make_ablator, open_subject, units_of
from shallower.verbs.trail import removal_order, run_search
from shallower.version import __version__

PAIRING = ("sublayer", "all")
"""Values of --units among which sublayers can pair up."""

Judge = Ablator | RepairedLosses


def search(
    model: str | Path | PreTrainedModel | Subject,
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
    calibration: str | Path | CalibrationSet | Parts | None = None,
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
    (`annealing`, `evolutionary`, `swap`). exact: measure every candidate on all of the text. Otherwise they race, and
    those are dropped that are clearly worse after a part of it: what a race chooses may be worse than the best by more
    than 0.2 % of the loss with a probability of 5 %, which is each race's own; `made_by.options` of the plan says how
    many races dropped any (`races`), and both numbers (`error_a_race`, `tie_of_a_race`). repair: judge every candidate
    after these recoveries (`linear-fold`), by its loss on as much text as is asked for; they are fitted on other text,
    of at least 128 sequences of 256 tokens. Of a ready-made set, and one whose specification says how many sequences it
    has, a quarter judges.
    target: with calibration `auto`, the text or questions that the smaller model is for; see `advise`.
    memory: bytes that the engine may keep besides the model (`4GB`; default: a quarter of what is free). workers: how
    many Ray workers measure, or the address of a Ray cluster (default: threads of this process).
    ablator: one of this model, calibration and objective that earlier searches used; it keeps its streams and workers,
    and stays open. It knows whether races are run, so `exact`, `memory` and `workers` are not looked at. With a repair
    its calibration is the part that judges, and it lets its streams and workers go.

    Raises UnknownName, BudgetError, ModelError or CorpusError, each for what its name says, and UserError for an
    ablator of something else.
    """
    memory, workers = parse_memory(memory), parse_workers(workers)
    require_possible(
        remove, search, objective, metric, settings, units=units, ordinary=ordinary, repair=repair, workers=workers
    )
    require_target(calibration, target)
    chosen = _chosen(search, objective, repair, settings or {}, metric)
    stages, repairs = chosen.stages, chosen.repairs
    subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    request = resolve(subject, remove, search, units=units, ordinary=ordinary, protect=protect)
    shape: dict[str, Any] = {"sequences": sequences, "length": length, "seed": seed}
    read: CalibrationSet | Parts | None = calibration if isinstance(calibration, Parts) else None
    if target is not None:
        removable = units_of(subject, units, parse_protect(protect, len(subject.anatomy.blocks)))
        advice = advise(
            subject,
            str(calibration),
            target,
            removable,
            objective=objective,
            options=chosen.of_objective,
            memory=memory,
            workers=workers,
            **shape,
        )
        calibration, read = advice.candidates[0].source, None if repair else advice.text
    if isinstance(calibration, Parts) and not repair:
        raise UserError("a text in two parts is for a search with a repair: name one, or give the text as a whole.")
    if read is None:
        assert not isinstance(calibration, Parts)
        if repair:
            read = judging_text(subject, calibration, **shape)
        else:
            read = calibrate(subject, calibration, objective=objective, **shape)
    whole, text = (read.whole, read.judged) if isinstance(read, Parts) else (read, read)
    name, ranked_by = None, None
    with _ablator(ablator, subject, text, objective, chosen.of_objective, exact, memory, workers) as measuring:
        before = copy(measuring.spent)
        judge: Judge = measuring
        if repair:
            assert isinstance(read, Parts)
            judge = RepairedLosses(subject, read, repairs, memory=memory, memo=measuring.memo)
            progress.note(
                f"A candidate is repaired on {read.fitted.tokens:,} tokens, read once a fit, and judged on "
                f"{text.tokens:,} others."
            )
        if request.budget is None:
            order = list(request.units)
        else:
            name = search
            if scores is None:
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
                )
            else:
                ranking = ranked(subject, stages, metric, scores, chosen.of_metric)
            if repair:
                measuring.close()  # what it keeps in memory would stand beside what repairs keep
            ranked_by = ranking.metric if ranking else None
            trail = run_search(stages, request.units, request.budget, judge.losses, ranking, seed)
            if ordinary:
                _require_ordinary(subject, plain(trail[-1]))
            if _takes_all(subject, trail[-1]):
                raise BudgetError(
                    f"search {search!r} removes {request.budget} only with all {len(subject.anatomy.blocks)} blocks, "
                    "and something must stay: remove less, or choose smaller --units."
                )
            _require_cuttable(subject, plain(trail[-1]))
            order = removal_order(trail, judge.losses)
        measured = judge.losses([frozenset(order[:count]) for count in range(len(order) + 1)])
        if isinstance(judge, RepairedLosses):
            judge.require_possible(order)
        if request.budget is not None:
            _require_finite(measured, order, objective)
        spent = measuring.spent.since(before)
        if isinstance(judge, RepairedLosses):
            spent.tokens += judge.spent.tokens
            spent.recalled += judge.spent.recalled
        progress.note(_cost(spent, repaired=bool(repair)))
    options: dict[str, object] = {key: value for _, given in (*stages, *repairs) for key, value in given.items()}
    options |= {
        **chosen.of_metric,
        **chosen.of_objective,
        "remove": str(remove),
        "units": units,
        "ordinary": ordinary,
        "protect": protect,
        "exact": bool(repair) or measuring.racing is None,
        "dtype": subject.dtype,
    }
    if repair:
        options["repair"] = repair
    if spent.races and measuring.racing is not None:
        options |= {
            "races": spent.races,
            "error_a_race": measuring.racing.error,
            "tie_of_a_race": measuring.racing.tie,
        }
    made_by = MadeBy(name, objective, ranked_by, options, seed, whole.identity, __version__)
    return PruningPlan(
        subject.identity,
        tuple(sorted(order)),
        tuple(zip(order, measured[1:], strict=True)),
        measured[0],
        made_by,
        {"tokens": spent.tokens, "exhaustive": spent.exhaustive, "recalled": spent.recalled},
    )


def require_target(calibration: object, target: object) -> None:
    """Raise UserError unless a target is given exactly where a calibration text is to be chosen for it."""
    if is_auto(calibration) and target is None:
        raise UserError("--calibration auto chooses text for what the model will read: name that with --for TEXT.")
    if target is not None and not is_auto(calibration):
        raise UserError(
            f"--for {target} is for --calibration auto, which chooses by it; here the text is "
            f"{calibration or 'the default'}."
        )


def require_possible(
    remove: str | int,
    search: str = "greedy",
    objective: str = "nll",
    metric: str | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    units: str = "block",
    ordinary: bool = False,
    repair: str = "",
    workers: object = None,
) -> None:
    """Refuse what is wrong with any model, before one is loaded.

    Raises UnknownName for an unknown method or option, BudgetError when `remove` cannot be read, and UserError when
    `ordinary` would restrict nothing, or `repair` change nothing, or nothing that can be done.
    """
    stages = _chosen(search, objective, repair, settings or {}, metric).stages
    if metric is not None:
        readers = that_rank(stages)
        if not readers:
            refuse_ranking(stages)
        if any("spans" in method.parameters for method in readers) and not reads_stream(metrics.get(metric)):
            raise UserError(
                f"search {readers[0].name!r} ranks spans, of which metric {metric!r} has no scores; use a metric of "
                "the stream, such as angular or cosine."
            )
    asked = parse_remove(str(remove))
    if repair and (objective != "nll" or workers is not None):
        raise UserError(
            "--repair judges the repaired model by its loss in this process: drop --objective and --workers."
        )
    if repair and isinstance(asked[0], Amount) and not any("losses" in method.parameters for method, _ in stages):
        judging = ", ".join(method.name for method in searches if "losses" in method.parameters)
        raise UserError(
            f"search {search!r} judges no candidates, so --repair {repair} would not change what it chooses: use one "
            f"that does ({judging}), alone or afterwards ({search},swap), or drop --repair."
        )
    if ordinary and isinstance(asked[0], Unit):
        raise UserError(f"--ordinary restricts a search, but --remove {remove} names the units; drop one of the two.")
    if ordinary and units not in PAIRING:
        raise UserError(
            f"--ordinary needs --units {' or '.join(PAIRING)}, not {units}: whole blocks are ordinary anyway, and no "
            "plan of attention or MLP alone is."
        )


@dataclass(frozen=True)
class Request:
    """What `--remove` means for one model. budget: None when the user named the `units`; else they are what may go."""

    units: tuple[Unit, ...]
    budget: Budget | None


def resolve(
    subject: Subject,
    remove: str | int,
    search: str = "greedy",
    *,
    units: str = "block",
    ordinary: bool = False,
    protect: str = "",
) -> Request:
    """Refuse what is wrong with this model, before anything is measured.

    Raises BudgetError for units that it has not, that are protected, or an amount that it cannot give, and ModelError
    for `ordinary` with a family whose sublayers do not pair up.
    """
    asked = parse_remove(str(remove))
    protected = parse_protect(protect, len(subject.anatomy.blocks))
    named = _explicit(subject, asked, protected)
    if named is not None:
        return Request(tuple(named), None)
    methods = _methods(search)
    if any(method.traits.get("keeps_last_block") for method in methods):
        protected |= {len(subject.anatomy.blocks) - 1}
    removable = _removable(subject, units, protected, methods, ordinary)
    budget = budget_for(subject, [item for item in asked if isinstance(item, Amount)], removable)
    if any("spans" in method.parameters for method in methods):
        require_run(removable, budget)
    return Request(removable, budget)


def _methods(names: str) -> list[Method]:
    """The searches of `greedy,swap`; one that improves on a set is preceded by one that makes it.

    Raises UnknownName for one that does not exist, and UserError for one that would not look at what the search before
    it found.
    """
    methods = [searches.get(name.strip()) for name in names.split(",")]
    for earlier, later in itertools.pairwise(methods):
        if "start" not in later.parameters:
            improving = ", ".join(sorted(method.name for method in searches if "start" in method.parameters))
            raise UserError(
                f"--search {names} throws away what {earlier.name} finds, as {later.name} starts anew: after the first "
                f"only searches that improve on a set can stand ({improving}); drop {earlier.name} or {later.name}."
            )
    before = methods[0].traits.get("starts")
    if before:
        methods.insert(0, searches.get(before))
    return methods


def search_stages(
    names: str, objective: str, settings: Mapping[str, str], metric: str | None = None
) -> tuple[list[Stage], dict[str, Any]]:
    """The searches with their options, and the options of the objective. settings: also those of the metric.

    Raises UnknownName for a method, or an option that none of them has.
    """
    chosen = _chosen(names, objective, "", settings, metric)
    return chosen.stages, chosen.of_objective


def settable(names: str, objective: str, metric: str | None = None) -> set[str]:
    """The options that the searches, the objective and the metric that ranks have."""
    stages = search_stages(names, objective, {}, metric)[0]
    ranking = metric_of(stages, metric)
    methods = [objectives.get(objective), *(method for method, _ in stages), *([] if ranking is None else [ranking])]
    return {option for method in methods for option in method.options}


@dataclass(frozen=True)
class _Chosen:
    """The methods of a search: searches, recoveries that candidates are judged behind, objective and, for a search that
    ranks, metric, with the options of each.
    """

    stages: list[Stage]
    repairs: Stages
    of_objective: dict[str, Any]
    of_metric: dict[str, Any]


def _chosen(names: str, objective: str, repair: str, settings: Mapping[str, str], metric: str | None) -> _Chosen:
    """Look the methods up, and share the settings among them.

    Raises as `search_stages`, and UserError for a recovery that is trained.
    """
    methods, repairs = _methods(names), named_recoveries(repair) if repair else []
    require_closed(repairs)
    ranking = metric_of([(method, {}) for method in methods], metric)
    named = {"search": names, "metric": ranking and ranking.name, "objective": objective, "repair": repair}
    *others, last = [f"{kind} {name!r}" for kind, name in named.items() if name]
    asked = [*methods, *repairs, objectives.get(objective), *([] if ranking is None else [ranking])]
    shared = share_options(f"{', '.join(others)} or {last}", asked, settings)
    own, rest = shared[: len(methods)], shared[len(methods) :]
    return _Chosen(
        list(zip(methods, own, strict=True)),
        list(zip(repairs, rest[: len(repairs)], strict=True)),
        rest[len(repairs)],
        {} if ranking is None else rest[-1],
    )


def _require_finite(measured: Sequence[float], order: Sequence[Unit], objective: str) -> None:
    """Raise ModelError when the model without the chosen units, or the dense one, overflows: nothing was compared."""
    if not math.isfinite(measured[0]):
        raise ModelError(
            f"the model itself gives no finite {objective} on this text, so nothing can be compared with it: try "
            "--dtype float32, or another calibration text."
        )
    if not math.isfinite(measured[-1]):
        raise ModelError(
            f"without {', '.join(map(str, sorted(order)))}, the best that was found, the model gives no finite "
            f"{objective}: remove less, --protect blocks such as first:2, or try --dtype float32."
        )


def _cost(spent: Spent, *, repaired: bool) -> str:
    times = "passes of repairs and of those who judge" if repaired else "candidate sets"
    sentence = f"The search read {spent.tokens:,} tokens (calibration tokens times {times})"
    if spent.recalled:
        sentence += f"; {spent.recalled:,} measurements were remembered from before"
    if spent.races and spent.exhaustive:
        sentence += f"; its races would have read {spent.exhaustive:,} if no candidate had been dropped early"
    return sentence + "."


def budget_for(subject: Subject, amounts: Sequence[Amount], units: Sequence[Unit]) -> Budget:
    """The budget that `--remove` asks for, over the units that may go."""
    return Budget(tuple(_limit(subject, amount, units) for amount in amounts))


def _limit(subject: Subject, amount: Amount, units: Sequence[Unit]) -> Limit:
    if amount.quantity == "units":
        kinds = {unit.kind for unit in units}
        everything = subject.anatomy.of_kind(*({"block"} if "block" in kinds and amount.share else kinds - {"pair"}))
        return make_limit(amount, dict.fromkeys(units, 1.0), most(dict.fromkeys(everything, 1.0)))
    weights = subject.weights
    known = {**weights.units, **subject.pairs} if any(unit.kind == "pair" for unit in units) else weights.units
    cost = {unit: float(getattr(known[unit], amount.quantity)) for unit in units}
    return make_limit(amount, cost, float(getattr(weights.blocks, amount.quantity)))


def _explicit(
    subject: Subject, asked: tuple[Amount, ...] | tuple[Unit, ...], protected: frozenset[int]
) -> list[Unit] | None:
    """The units that the user named, checked; None when amounts were given."""
    units = [item for item in asked if isinstance(item, Unit)]
    if not units:
        return None
    blocks = len(subject.anatomy.blocks)
    subject.anatomy.require(units)
    for unit in units:
        if unit.index in protected:
            raise BudgetError(f"{unit} is both to be removed and protected.")
    if _takes_all(subject, units):
        raise BudgetError(f"--remove names all {blocks} blocks, whole or by their sublayers; something must stay.")
    return units


def _takes_all(subject: Subject, units: Iterable[Unit]) -> bool:
    """Whether nothing of any block would stay."""
    gone = sublayers_of(units)
    return all(_is_empty(block, gone) for block in subject.anatomy.blocks)


def _is_empty(block: Block, gone: frozenset[Unit]) -> bool:
    """Whether no matrix of a block stays; one may have only one half (Mamba)."""
    halves = gone.intersection(Unit(block.index, "block").sublayers)
    taken = {id(one) for half in halves for module in block.modules_of(half.kind) for one in module.parameters()}
    matrices = [parameter for parameter in block.module.parameters() if parameter.dim() >= 2]
    return len(halves) == 2 or (bool(halves) and all(id(matrix) in taken for matrix in matrices))


def _removable(
    subject: Subject, units: str, protected: frozenset[int], methods: Sequence[Method], ordinary: bool
) -> tuple[Unit, ...]:
    removable = _whole(subject, protected) if ordinary else units_of(subject, units, protected)
    for method in methods:
        kinds = method.traits.get("kinds")
        if kinds is not None and any(unit.kind not in kinds for unit in removable):
            raise UserError(f"search {method.name!r} works on --units {' or '.join(kinds)}, not on {units}.")
    return removable


def _whole(subject: Subject, protected: frozenset[int]) -> tuple[Unit, ...]:
    """Blocks and pairs: what can go one after another and always leave an ordinary model.

    Raises ModelError when the family's sublayers do not pair up.
    """
    blocks = units_of(subject, "block", protected)
    pairs = [pair for pair in subject.pairs if not {pair.index, pair.index + 1} & protected]
    if not subject.pairs:
        raise ModelError(
            f"sublayers of this {subject.anatomy.family} model do not pair up to ordinary blocks (an MLP and the "
            "attention after it cannot go together exactly): drop --ordinary, and use --units block for an ordinary "
            "checkpoint."
        )
    return tuple(sorted([*blocks, *pairs]))


def _require_cuttable(subject: Subject, chosen: Sequence[Unit]) -> None:
    """Raise ModelError where surgery refuses what was found, so that nobody keeps a plan that cannot be applied."""
    if any(hasattr(module, "_hf_hook") for module in subject.model.modules()):
        return  # spread over devices: it can be measured so, and is cut on another day
    try:
        cut(subject.anatomy, chosen)
    except ModelError as error:
        raise ModelError(
            f"the best that was found, without {', '.join(map(str, sorted(chosen)))}, cannot be cut: {error} Remove "
            "less, --protect blocks, or choose other --units; what was measured is remembered."
        ) from error


def _require_ordinary(subject: Subject, chosen: Sequence[Unit]) -> None:
    """Raise ModelError when the family's config cannot describe what is left, though its sublayers pair up."""
    if over := leftovers(cut(subject.anatomy, chosen)):
        raise ModelError(
            f"without {', '.join(map(str, sorted(chosen)))} a config of this {subject.anatomy.family} model cannot "
            f"describe what is left as ordinary blocks ({', '.join(map(str, over))} would be missing); use --units "
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
        racing = None if exact else Racing()
        with closing(
            make_ablator(subject, text, objective, options, racing=racing, memory=memory, workers=workers)
        ) as own:
            yield own
        return
    if given.anatomy.model is not subject.model:
        other = "model"
    elif given.calibration.digest != text.digest:
        other = "calibration"
    elif (given.objective.name, given.options) != (objective, dict(options)):
        other = "objective"
    else:
        yield given
        return
    raise UserError(f"the ablator was made for another {other}; give this search one of its own, or none.")
