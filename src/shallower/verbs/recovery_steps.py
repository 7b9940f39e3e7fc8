"""Recoveries in order, with their options: all that can be known of them before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shallower.errors import UserError, require_package
from shallower.launched import spreads
from shallower.registry import Configured, Method, share_options
from shallower.registry import recovery as recoveries
from shallower.training.recipe import check_recipe, require_blocks


def named_recoveries(names: str) -> list[Method]:
    """The recoveries of `refit,low-rank`.

    Raises UserError when there is no name, UnknownName for one that does not exist.
    """
    methods = [recoveries.get(name.strip()) for name in names.split(",") if name.strip()]
    if not methods:
        known = ", ".join(method.name for method in recoveries)
        raise UserError(f"no recovery is named in {names!r}: name one or several of {known}, as in refit.")
    return methods


def parse_recoveries(
    names: str, settings: Mapping[str, str], what: str = "", *, elsewhere: Collection[str] = ()
) -> Sequence[Configured]:
    """Recoveries by name with their options. what: whom to name in the error about an option that none of them has.
    elsewhere: options that others read, too.

    Raises UserError when there is no name, UnknownName for one that does not exist, or an option that none has or none
    reads, or a value out of range, or for an order that cannot be, or a package that is not installed.
    """
    methods = named_recoveries(names)
    require_packages(methods)
    steps = list(zip(methods, share_options(what or f"recovery {names!r}", methods, settings), strict=True))
    for method, given in steps:
        if method.trained:
            check_recipe(given)
    require_order(steps)
    require_read(steps, {*settings} - {*elsewhere})
    return steps


def require_packages(methods: Iterable[Method]) -> None:
    """Raise UserError where a recovery needs a package that is not installed."""
    for method in methods:
        for extra, packages in method.traits.get("packages", {}).items():
            for package in packages:
                require_package(package, extra, method.name, UserError)


def require_order(steps: Sequence[Configured]) -> None:
    """Raise UserError where a recovery that needs the plain cut comes behind another."""
    for method, given in steps[1:]:
        if what := _asked(method, given, "plain"):
            names = ",".join(step.name for step, _ in steps)
            raise UserError(
                f"{what} needs the cut model that nothing was repaired of, and in {names!r} {steps[0][0].name} comes "
                f"before: let {method.name} come first, or choose another way for it (--set)."
            )


def that_need_plain(steps: Sequence[Configured]) -> str:
    """What the first of the recoveries needs the cut model for that nothing was repaired of; empty where it does not.

    Behind the first none can (`require_order`).
    """
    method, given = steps[0]
    return _asked(method, given, "plain")


def require_read(steps: Sequence[Configured], settings: Collection[str]) -> None:
    """Raise UserError for a setting, other than the default, that none of the recoveries reads with its other ones."""
    for name in sorted(settings):
        whys = [_unread(method, given, name) for method, given in steps if name in given]
        if whys and all(whys):
            instead = "add --distill 0.9" if whys[0] == "without distill" else "change that (--set)"
            raise UserError(f"nothing reads {name} {whys[0]}: leave it out, or {instead}.")


def _unread(method: Method, given: Mapping[str, Any], name: str) -> str:
    """Why a method does not read an option that was given; empty where it does, or it is the default."""
    unread = method.traits.get("unread") or getattr(method.function, "unread", None)
    if unread is None or given[name] == method.options[name].default:
        return ""
    return str(unread(method.options_in_use(given)).get(name, ""))


def _asked(method: Method, given: Mapping[str, Any], trait: str) -> str:
    """The options that a trait of a method goes with, or its name where it goes with all; empty without trait or
    options.
    """
    wanted = method.traits.get(trait)
    if wanted is None or not wanted.items() <= given.items():
        return ""
    return ", ".join(f"{name}={value}" for name, value in wanted.items()) or method.name


def that_fold(steps: Sequence[Configured]) -> list[Method]:
    """Those of the recoveries that need a matrix in front of each cut, with their options."""
    return [method for method, given in steps if _asked(method, method.options_in_use(given), "folds")]


def in_closed_form(steps: Sequence[Configured]) -> bool:
    """Whether one of the recoveries is, and so reads the text of a repair."""
    return any(not method.trained for method, _ in steps)


def require_launch(steps: Sequence[Configured]) -> None:
    """Raise UserError where the processes that were launched together spread weights in a way that one of these
    recoveries cannot train with: before the first begins.
    """
    version = spreads()
    for method, options in steps if version else ():
        if not method.trained:
            continue
        if version != 2:
            raise UserError(
                f"--use_fsdp spreads the model by FSDP {version}, and {method.name} trains with FSDP 2 only: add "
                "--fsdp_version 2 to 'accelerate launch', or leave out --use_fsdp."
            )
        if what := _asked(method, options, "whole"):
            raise UserError(
                f"{what} needs the whole model in every process, and --use_fsdp spreads it: launch without --use_fsdp, "
                "or train with full or lora."
            )


def require_training(steps: Sequence[Configured], sequences: int | None, instructions: str | Path | None) -> None:
    """Raise UserError where it is said what to train on, and none of the recoveries trains."""
    given = {"--train-sequences": sequences, "--instructions": instructions}
    idle = [flag for flag, value in given.items() if value is not None]
    if idle and not any(method.trained for method, _ in steps):
        are, them = ("is", "it") if len(idle) == 1 else ("are", "them")
        raise UserError(
            f"{' and '.join(idle)} {are} for recoveries that train, such as full or lora: name one, or drop {them}."
        )


def require_closed_form(steps: Sequence[Configured], sequences: int | None, memory: int | str | None) -> None:
    """Raise UserError where it is said what recoveries in closed form read or may keep, and all of them train."""
    if in_closed_form(steps):
        return
    instead = {"--sequences": "say what is read by --train-sequences", "--memory": "make at_once smaller (--set)"}
    for (flag, way), value in zip(instead.items(), (sequences, memory), strict=True):
        if value is not None:
            raise UserError(
                f"{flag} is for recoveries in closed form, such as refit, and all that are named train: drop it; to "
                f"change what training takes, {way}."
            )


def require_first(steps: Sequence[Configured], blocks: int) -> None:
    """Raise UserError where a recovery that trains would begin behind the last of so many blocks."""
    for method, options in steps:
        if method.trained:
            require_blocks(options, blocks)
