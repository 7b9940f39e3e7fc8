"""What `prune` refuses before it searches, and whose each of its settings is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shallower import progress
from shallower.anatomy import Anatomy, dissect
from shallower.corpus import CalibrationSet
from shallower.errors import ModelError, UserError
from shallower.exporters import export
from shallower.launched import world_size
from shallower.registry import Configured
from shallower.surgery import cut
from shallower.units import Kind, Unit, plain
from shallower.verbs.recoveries import Resume, require_place, require_ready, trained_parameters
from shallower.verbs.recovery_steps import named_recoveries, parse_recoveries, require_first
from shallower.verbs.request import Request
from shallower.verbs.search_methods import settable
from shallower.verbs.subject import Subject
from shallower.verbs.training_text import Training


def require_consistent(remove: object, plan: object, repair: str, recover: str, form: str) -> None:
    """Raise UserError for what contradicts itself with any model."""
    if (remove is None) == (plan is None):
        raise UserError(
            "say what to remove: give either an amount or units (--remove) or a plan (--plan), and not both."
        )
    if plan is not None and repair:
        raise UserError(
            f"a plan says what goes, so --repair {repair} would change nothing: drop it, or repair what the plan "
            f"leaves with --recover {repair}."
        )
    if recover and form == "padded":
        raise UserError(
            "a padded checkpoint has no place for what a recovery repairs: drop --recover, or --stock and --form."
        )
    if world_size() > 1:
        raise UserError(
            "prune works in one process: start it without 'accelerate launch', and train what it wrote with "
            "'accelerate launch -m shallower recover'."
        )


def split_settings(
    names: str,
    settings: Mapping[str, str],
    search: str,
    objective: str,
    repair: str = "",
    metric: str | None = None,
    *,
    planned: bool = False,
) -> tuple[Sequence[Configured], dict[str, str]]:
    """Recoveries with their options, and the options of search, metric, objective and the repair that judges; one that
    both sides have is for both.

    planned: nothing is searched, so that all options have to be for the recoveries.
    """
    if planned and settings and not names:
        raise UserError(
            f"a plan says what goes, so the settings {', '.join(settings)} would change nothing; drop them, or name "
            "the recovery that they are for."
        )
    if not names:
        return [], dict(settings)
    if planned:
        return parse_recoveries(names, settings), {}
    known = {option for method, _ in parse_recoveries(names, {}) for option in method.options}
    wanted = settable(search, objective, metric)
    wanted |= {option for method in (named_recoveries(repair) if repair else ()) for option in method.options}
    theirs = {key: text for key, text in settings.items() if key in known}
    others = {key: text for key, text in settings.items() if key not in known or key in wanted}
    return parse_recoveries(names, theirs, elsewhere=wanted), others


def require_storable(
    subject: Subject, request: Request, steps: Sequence[Configured], form: str, *, saved: bool
) -> None:
    """Try, before a search, to cut and store the model without one unit of each kind that may go: raise ModelError
    where none could be stored that is cut, and tell what else fails. saved: also what maps at their cuts become.

    What cannot be cut is only told of, as other units, or more of them, may leave what a config can say: whole periods.
    Sublayers that cannot be missing alone may still go in pairs, where the family's pair up.
    """
    anatomy, by_kind = subject.anatomy, dict[Kind, list[Unit]]()
    faults, uncut = dict[Unit, ModelError](), dict[Unit, ModelError]()
    for unit in request.units:
        by_kind.setdefault(unit.kind, []).append(unit)
    for units in by_kind.values():
        middle = units[len(units) // 2]
        parts = plain((middle,))
        try:
            smaller = cut(anatomy, parts)
        except ModelError as error:
            uncut[middle] = error
            continue
        try:
            export(anatomy, parts, smaller, form)
            if saved:
                require_place(steps, anatomy, frozenset(parts))
        except ModelError as error:
            faults[middle] = error
    if len(faults) == len(by_kind) and not ({"attn", "mlp"} <= by_kind.keys() and subject.pairs):
        raise next(iter(faults.values()))
    for unit, fault in (faults | uncut).items():
        progress.note(f"what the search chooses may be impossible to store, as the model without {unit} is: {fault}")


def require_prunable(
    subject: Subject,
    request: Request,
    steps: Sequence[Configured],
    text: CalibrationSet,
    training: Training | None,
    resume: Resume,
) -> None:
    """Raise, before the search, as `require_ready` does, and OutputError without room for the trainings: for the cut
    model where it is known by then what goes; else for the dense one, and for the blocks that can stay.
    """
    if not steps:
        return
    dense, removed = subject.anatomy, frozenset[Unit]()
    if request.budget is None:
        removed = frozenset(request.units)
    elif {unit.kind for unit in request.units} == {"block"}:
        require_first(steps, len(dense.blocks) - max(limit.fewest for limit in request.budget.limits))
    student = dissect(cut(dense, removed)) if removed else dense
    require_ready(student, dense, removed, steps, text, training)
    _require_room(student, request, steps, resume)


def _require_room(student: Anatomy, request: Request, steps: Sequence[Configured], resume: Resume) -> None:
    """Raise OutputError, before the search, unless there is room for what each training keeps of the cut model; of at
    least so many parameters, where the student is the dense model and it is for the search to say what goes.
    """
    # blocks are numbered anew, so that each that goes in front of `first` takes one behind it out of the training
    whole = [(method, {**options, "first": 0}) for method, options in steps]
    both = zip(trained_parameters(steps, student.model), trained_parameters(whole, student.model), strict=True)
    for trained, every in both:
        gone = 0.0 if request.budget is None else request.budget.heaviest(_of_units(student, request.units, every))
        resume.require_room(max(0, sum(trained.values()) - round(gone)))


def _of_units(anatomy: Anatomy, units: Collection[Unit], trained: Mapping[str, int]) -> dict[Unit, float]:
    """How many of the trained parameters are in each unit. trained: their number by name."""

    def held(unit: Unit) -> float:
        inside = tuple(f"{name}." for part in plain((unit,)) for name in anatomy.names_of(part))
        return float(sum(count for name, count in trained.items() if f"{name}.".startswith(inside)))

    return {unit: held(unit) for unit in units}
