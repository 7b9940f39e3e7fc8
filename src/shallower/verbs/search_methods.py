"""The methods that a search is made of, and their options: all that can be known of one before a model is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shallower.budget import Amount, parse_remove, require_protect
from shallower.engine import reads_stream
from shallower.errors import UserError
from shallower.registry import Configured, Method, share_options
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.registry import search as searches
from shallower.searches import search_before
from shallower.units import Unit
from shallower.verbs.ranking import metric_of, reads_spans, refuse_ranking, that_rank
from shallower.verbs.recovery_steps import named_recoveries, require_order, require_read
from shallower.verbs.repaired import require_closed
from shallower.verbs.subject import kinds_of

PAIRING = ("sublayer", "all")
"""Values of --units among which sublayers can pair up."""


@dataclass(frozen=True)
class Chosen:
    """The methods of a search, by name as they were asked for, and with the options of each: searches, recoveries that
    candidates are judged behind, objective and, for a search that ranks, metric.
    """

    search: str
    objective: str
    metric: str | None
    repair: str
    stages: list[Configured]
    repairs: Sequence[Configured]
    of_objective: dict[str, Any]
    of_metric: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Of all of them."""
        own = {key: value for _, options in (*self.stages, *self.repairs) for key, value in options.items()}
        return own | self.of_metric | self.of_objective


def require_possible(
    remove: str | int,
    search: str = "greedy",
    objective: str = "nll",
    metric: str | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    units: str = "block",
    ordinary: bool = False,
    protect: str = "",
    exact: bool = False,
    repair: str = "",
    workers: object = None,
) -> Chosen:
    """Look the methods up, and refuse what is wrong with any model, before one is loaded.

    Raises UnknownName for an unknown method or option, BudgetError when `remove`, `protect` or `units` cannot be read,
    and UserError when `ordinary` would restrict nothing, `repair` or `exact` change nothing, or `repair` cannot be
    done.
    """
    chosen = chosen_methods(search, objective, repair, settings or {}, metric)
    stages = chosen.stages
    kinds_of(units)  # refuses another word
    if metric is not None:
        readers = that_rank(stages)
        if not readers:
            refuse_ranking(stages)
        if reads_spans(stages, units) and not reads_stream(metrics.get(metric)):
            raise UserError(
                f"search {readers[0].name!r} ranks spans, of which metric {metric!r} has no scores; use a metric of "
                "the stream, such as angular or cosine."
            )
    asked = parse_remove(str(remove))
    require_protect(protect)
    if repair and exact:
        raise UserError(f"candidates do not race with --repair {repair}, so --exact would change nothing; drop it.")
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
    return chosen


def search_stages(
    names: str, objective: str, settings: Mapping[str, str], metric: str | None = None
) -> tuple[list[Configured], dict[str, Any]]:
    """The searches with their options, and the options of the objective. settings: also those of the metric.

    Raises UnknownName for a method, or an option that none of them has.
    """
    chosen = chosen_methods(names, objective, "", settings, metric)
    return chosen.stages, chosen.of_objective


def settable(names: str, objective: str, metric: str | None = None) -> set[str]:
    """The options that the searches, the objective and the metric that ranks have."""
    stages = search_stages(names, objective, {}, metric)[0]
    ranking = metric_of(stages, metric)
    methods = [objectives.get(objective), *(method for method, _ in stages), *([] if ranking is None else [ranking])]
    return {option for method in methods for option in method.options}


def chosen_methods(names: str, objective: str, repair: str, settings: Mapping[str, str], metric: str | None) -> Chosen:
    """Look the methods up, and share the settings among them.

    Raises as `search_stages`, and UserError for a recovery that is trained, for an order of them that cannot be, or an
    option that none of them reads.
    """
    methods, repairs = searches_named(names), named_recoveries(repair) if repair else []
    require_closed(repairs)
    ranking = metric_of([(method, {}) for method in methods], metric)
    named = {"search": names, "metric": ranking and ranking.name, "objective": objective, "repair": repair}
    *others, last = [f"{kind} {name!r}" for kind, name in named.items() if name]
    asked = [*methods, *repairs, objectives.get(objective), *([] if ranking is None else [ranking])]
    shared = share_options(f"{', '.join(others)} or {last}", asked, settings)
    own, rest = shared[: len(methods)], shared[len(methods) :]
    steps = list(zip(repairs, rest[: len(repairs)], strict=True))
    require_order(steps)
    require_read(steps, {*settings}.difference(*(method.options for method in asked if method not in repairs)))
    return Chosen(
        names,
        objective,
        metric,
        repair,
        list(zip(methods, own, strict=True)),
        steps,
        rest[len(repairs)],
        {} if ranking is None else rest[-1],
    )


def searches_named(names: str) -> list[Method]:
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
    if before := search_before(methods[0]):
        methods.insert(0, searches.get(before))
    return methods
