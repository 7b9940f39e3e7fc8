"""What can be known of a study before a model is loaded: whether it can run at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from shallower import progress
from shallower.checkpoint.locate import locate
from shallower.corpus import CalibrationSet, ChoiceSet, is_saved, open_source
from shallower.corpus.calibration import saved_spec
from shallower.corpus.options import NAMED
from shallower.corpus.sources import place_of
from shallower.corpus.specification import Specification, parse_specification, raise_all
from shallower.engine import reads_choices
from shallower.errors import CorpusError, UserError
from shallower.files import expanded
from shallower.registry import objective as objectives
from shallower.studies.findings import OWN_OUTCOMES
from shallower.studies.grid import Study
from shallower.studies.result import search_and_metric
from shallower.verbs.search_methods import require_possible, settable
from shallower.verbs.supply import supply


def require_runnable(given: Study) -> None:
    """Refuse what is wrong with any model. Raises UserError."""
    for objective in given.objectives:
        for name, metric in map(search_and_metric, given.searches):
            for remove in given.remove:
                settings = settings_of(given, name, objective, metric)
                require_possible(remove, name, objective, metric, settings, units=given.units, protect=given.protect)
    known = {
        option
        for objective in given.objectives
        for name, metric in map(search_and_metric, given.searches)
        for option in settable(name, objective, metric)
    }
    if unknown := [key for key in given.settings if key not in known]:
        raise UserError(f"none of the study's searches, metrics and objectives has an option {unknown[0]!r}; drop it.")
    both = set(given.held_out) & set(given.tasks)
    if both:
        raise UserError(f"{sorted(both)[0]!r} names a held-out text and a task; give them different names.")
    if taken := [name for name in (*given.held_out, *given.tasks) if name in OWN_OUTCOMES]:
        raise UserError(
            f"{taken[0]!r} names a held-out text or task, and is what every study calls an outcome of its own "
            f"({', '.join(OWN_OUTCOMES)}); give the text another name."
        )
    _require_found(given)


def _require_found(given: Study) -> None:
    """Refuse models and texts that are not there, also those that only the last cells need. Raises UserError that tells
    all.
    """
    asking = [reads_choices(objectives.get(name)) for name in given.objectives]
    texts = [*([] if all(asking) else given.texts.values()), *given.held_out.values()]
    checks: list[Callable[[], object]] = [partial(locate, model) for model in given.models]
    checks += [partial(_require_text, spec) for spec in dict.fromkeys(texts)]
    if any(asking):
        checks += [partial(_require_questions, f"text {name!r}", spec) for name, spec in given.texts.items()]
    checks += [partial(_require_questions, f"task {name!r}", spec) for name, spec in given.tasks.items()]
    checks += [partial(_require_axes, given, name) for name in given.texts]
    checks += [partial(_require_judging_apart, given, name) for name in (*given.held_out, *given.tasks)]
    faults: dict[str, UserError] = {}  # by what they say: a text that cannot be read is found by two checks
    with progress.silent():  # what is read instead of a domain is told when it is read
        for check in checks:
            try:
                check()
            except UserError as fault:
                faults.setdefault(str(fault), fault)
    raise_all(list(faults.values()))


def _require_text(spec: str) -> None:
    """Raise UserError unless all that a text is mixed of can be opened; nothing is read."""
    parsed = parsed_text(spec)
    if not is_saved(expanded(parsed.source)):
        for term in parsed.terms:
            open_source(term.source, replace(supply(), sample=_unsaid))


def _require_axes(given: Study, name: str) -> None:
    """Raise CorpusError for a text that has a size, seed or format of its own which is not the study's: its cells would
    be alike where the study varies it, or would not be what they are called.
    """
    parsed = parsed_text(given.texts[name])
    path = expanded(parsed.source)
    fixed: dict[str, str | None]
    if is_saved(path):
        told, instead = "is a finished set with", "name the text that it was built from"
        fixed = {**_size(path, given), "seed": None, "format": None}
    else:
        told, instead = "says", "leave it out of the text"
        fixed = {"sequences" if key == "questions" else key: value for key, value in parsed.options.items()}
    axes = {"sequences": given.sequences, "length": given.length, "seed": given.seeds, "format": given.format}
    for axis, value in fixed.items():
        levels = [str(level) for level in axes.get(axis, ("",))]
        fits = axis == "seed" or value is None or levels[0] in ("", value)
        if len(levels) > 1 or not fits:
            own = f"a {axis} of its own" if value is None else f"{axis}={value}"
            raise CorpusError(
                f"text {name!r} {told} {own}, but the study asks for {axis} {', '.join(levels)}: {instead}, or let the "
                "study ask for that one."
            )


def _size(saved: Path, given: Study) -> dict[str, str | None]:
    """What a finished set has of `sequences` and, of text, `length`."""
    if all(reads_choices(objectives.get(objective)) for objective in given.objectives):
        return {"sequences": str(ChoiceSet.load(saved).questions)}
    text = CalibrationSet.load(saved)
    return {"sequences": str(text.sequences), "length": str(text.length)}


def _unsaid(start: str, *, tokens: int, seed: int) -> Iterator[str]:
    """What a model that is not loaded yet says."""
    return iter(())


def _require_questions(what: str, spec: str) -> None:
    if not os.path.exists(os.path.expanduser(parsed_text(spec).source)):
        raise CorpusError(f"{what} reads {spec}, which does not exist.")


def _require_judging_apart(given: Study, name: str) -> None:
    """Raise CorpusError where a held-out text or task is to read documents that a calibration text reads, too."""
    spec = given.held_out.get(name) or given.tasks[name]
    for calibration in shared_texts(given, spec):
        own = _origin(given.texts[calibration]).options.get("part", "train")
        judging = _origin(spec).options.get("part", "held-out")
        if own == judging or "all" in (own, judging):
            raise CorpusError(
                f"plans are judged on {name!r}, which reads part={judging} of a text of which {calibration!r} reads "
                f"part={own} for calibration: name another text, or leave `part` out of both, so that what judges is "
                "left out of what calibrates."
            )


def shared_texts(given: Study, judging: str) -> list[str]:
    """The names of the calibration texts that have a source in common with a text that judges, or one which is inside
    the other, however they are spelled.
    """
    places = _places(judging)
    return [
        name
        for name, spec in given.texts.items()
        if any(one in (other, *other.parents) or other in one.parents for one in _places(spec) for other in places)
    ]


def _places(spec: str) -> list[Path]:
    return [place_of(term.source) for term in _origin(spec).terms]


def _origin(spec: str) -> Specification:
    """A text as it is specified; of a finished set, what it was built from."""
    parsed = parsed_text(spec)
    path = expanded(parsed.source)
    if not is_saved(path):
        return parsed
    try:
        origin = parsed_text(saved_spec(path))
    except UserError:  # a set that was made in memory is called what its maker likes
        return parsed
    return replace(origin, options={"part": "all", **origin.options})


def parsed_text(spec: str) -> Specification:
    """Raises UserError for what cannot be read; values of options are looked at when the text is."""
    return parse_specification(spec, NAMED)


def settings_of(given: Study, name: str, objective: str, metric: str | None) -> dict[str, str]:
    """Of the study's settings those that this search, its metric or the objective knows."""
    known = settable(name, objective, metric)
    return {key: value for key, value in given.settings.items() if key in known}
