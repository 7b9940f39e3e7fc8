"""What every trained recovery can be told, and how a method gets these options besides its own."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy, dissect, find_blocks
from shallower.checkpoint.dtype import dtype_name
from shallower.corpus.calibration import CalibrationSet
from shallower.engine.head import find_head
from shallower.errors import UserError
from shallower.files import expanded
from shallower.launched import world_size
from shallower.registry import settable_parameters
from shallower.resources import parse_memory
from shallower.training.acceleration import attend
from shallower.training.feed import Feed
from shallower.training.teacher import words_kept
from shallower.units import Unit

TRAINED_AS = 5  # to be raised when a training comes out otherwise than before, or its state holds something else
HeldOut = Callable[[PreTrainedModel], float]
"""Perplexity of a model on text that it is not trained on."""


@dataclass(frozen=True)
class Recipe:
    """All trained methods also take these.

    lr, weight_decay: of AdamW with betas 0.9 and 0.95; norms and biases do not decay. The rate rises over the share
    `warmup` of the training and then falls to 0 along a cosine.
    batch: tokens a step. at_once: tokens that go through the model together; a step's gradients are summed.
    epochs: times that the text is read. minutes: stop after that long; 0 for no limit. The rate follows whichever of
    the two is nearer its end, so with a time limit two runs are not the same to the last digit.
    clip: largest norm of a step's gradient.
    distill: share of the loss that is the divergence from the dense model's probabilities, 0 to 1; the rest is the
    next-token loss. temperature: of both models' probabilities. hidden: weight of 1 - cosine of both models' last
    hidden states. teacher_cache: disk for what the dense model says, as in 2GB, so that several epochs pay for it once;
    only the most probable tokens at each place are kept. Empty: it is computed each time.
    evaluations: how often held-out perplexity is measured; what was best is kept. patience: stop when that many of them
    in a row brought nothing better; 0 for never.
    save_minutes: how often the state is written, where there is a folder to resume from.
    compute: number format of products; auto measures which is faster. Trained weights are float32 all the while.
    recompute: keep no activations of a block for the way back; slower, and needs less memory.
    attention: how transformers computes it while training: eager, sdpa, flash_attention_2 …; empty for the model's way.
    compile: translate the blocks by torch.compile first, which takes half a minute or more; steps then take less time.
    """

    lr: float = 1e-4
    weight_decay: float = 0.1
    batch: int = 4096
    at_once: int = 2048
    epochs: float = 1.0
    minutes: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0
    distill: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0
    teacher_cache: str = ""
    evaluations: int = 10
    patience: int = 0
    save_minutes: float = 5.0
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False
    attention: str = ""
    compile: bool = False

    def __post_init__(self) -> None:
        """Raises UserError that names every value out of range."""
        bounds: dict[str, tuple[float, float]] = {name: (0, float("inf")) for name in ("weight_decay", "minutes")}
        bounds |= {name: (0, float("inf")) for name in ("hidden", "evaluations", "patience", "save_minutes")}
        bounds |= {"distill": (0, 1), "warmup": (0, 0.9), "batch": (1, float("inf")), "at_once": (1, float("inf"))}
        faults = [
            f"{name}={getattr(self, name)} is not between {least:g} and {most:g}"
            for name, (least, most) in bounds.items()
            if not least <= getattr(self, name) <= most
        ]
        faults += [
            f"{name}={getattr(self, name)} is not above 0"
            for name in ("lr", "epochs", "clip", "temperature")
            if not getattr(self, name) > 0
        ]
        if self.epochs == float("inf"):
            faults.append("epochs=inf has no end (give a large number, and minutes to stop by time)")
        if faults:
            raise UserError(f"{'; '.join(faults)}: correct it with --set.")
        if parse_memory(self.teacher_cache or None) is not None and self.hidden:
            raise UserError(
                f"teacher_cache={self.teacher_cache} holds no hidden states, which hidden={self.hidden:g} compares: "
                "leave one of the two out."
            )

    @property
    def needs_teacher(self) -> bool:
        return self.distill > 0 or self.hidden > 0


def check_recipe(options: Mapping[str, Any]) -> None:
    """Raise UserError where those of a trained method's options that the recipe knows are out of range."""
    known = {item.name for item in fields(Recipe)}
    Recipe(**{name: value for name, value in options.items() if name in known})


def unread_without_teacher(options: Mapping[str, Any]) -> dict[str, str]:
    """Of a method's options those that nothing reads with the values of the others, and why."""
    return {} if options["distill"] else dict.fromkeys(("temperature", "teacher_cache"), "without distill")


def unread_unmeasured(options: Mapping[str, Any]) -> dict[str, str]:
    """The same of what only measurements on the way read."""
    return {} if options["evaluations"] else {"patience": "with evaluations=0"}


Trained = Callable[[str], bool]
"""Whether the parameter of that name is trained."""


def require_blocks(options: Mapping[str, Any], blocks: int) -> None:
    """Raise UserError where the first block to be trained is none of so many."""
    if (first := options.get("first", 0)) >= blocks:
        raise UserError(f"first={first}, but the model has only {blocks} blocks: give a smaller number.")


def require_float32(student: PreTrainedModel, trained: Trained) -> None:
    """Raise UserError where weights that are not trained, and so not made float32, are in half precision."""
    if any(
        parameter.is_floating_point() and parameter.dtype != torch.float32 and not trained(name)
        for name, parameter in student.named_parameters()
    ):
        raise UserError(
            f"compute=float32 needs the model in float32, and it is in {dtype_name(student.dtype)}: add --dtype "
            "float32, or leave compute out."
        )


def require_trainable(student: PreTrainedModel, text: CalibrationSet, recipe: Recipe) -> None:
    """Raise CorpusError or UserError where a student cannot be trained on this text so: what is known before any of it
    is read.
    """
    if recipe.recompute and not student.supports_gradient_checkpointing:
        raise UserError(
            f"recompute=true needs a model that can compute its activations again, and {type(student).__name__} "
            "cannot: leave recompute out, and lower at_once to save memory."
        )
    if recipe.hidden and find_head(dissect(student)) is None:
        raise UserError(
            f"hidden={recipe.hidden:g} compares what the output embedding is given, and of {type(student).__name__}, "
            "which does more to its logits than scale or cap them, that is not read: leave hidden out."
        )
    if recipe.compile and world_size() > 1:
        raise UserError("compile=true works in one process: leave it out, or start without 'accelerate launch'.")
    attend(student, attend(student, recipe.attention))  # refused where there is none, else as it was
    feed = Feed(text, recipe.batch, recipe.at_once, 0, world_size())
    if (budget := parse_memory(recipe.teacher_cache or None)) is not None:
        vocabulary = student.get_input_embeddings().weight.shape[0]
        words_kept(budget, feed.scored(tuple(range(text.sequences))), vocabulary)


@dataclass(frozen=True, eq=False)
class Task:
    """What a trained method works with, besides the student.

    anatomy: of the dense model, which is the teacher. removed: what the student lacks. text: what it learns from.
    held_out: None when nothing is to be measured on the way. folder: where the state is kept, None for nowhere. method
    and options: what tells this training from others, for resuming.
    """

    anatomy: Anatomy
    removed: frozenset[Unit]
    text: CalibrationSet
    held_out: HeldOut | None
    folder: Path | None
    seed: int
    recipe: Recipe
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All that decides the result, but for the student's weights, as JSON holds it."""
        return {
            "trained_as": TRAINED_AS,
            "method": self.method,
            "options": {**self.options, **asdict(self.recipe)},
            "text": self.text.digest,
            "removed": [str(unit) for unit in sorted(self.removed)],
            "seed": self.seed,
        }


def _any(student: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """For a method that can train every student."""


def _none(student: PreTrainedModel, options: Mapping[str, Any]) -> Trained:
    """For a method that trains what it adds."""
    return lambda name: False


def _nothing(student: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, int]:
    """For a method that adds no parameters."""
    return {}


def trainable(
    defaults: Recipe,
    *,
    without: Collection[str] = (),
    unread: Callable[[Mapping[str, Any]], dict[str, str]] = unread_without_teacher,
    ready: Callable[[PreTrainedModel, Mapping[str, Any]], None] = _any,
    trained: Callable[[PreTrainedModel, Mapping[str, Any]], Trained] = _none,
    added: Callable[[PreTrainedModel, Mapping[str, Any]], Mapping[str, int]] = _nothing,
) -> Callable[[Callable[..., PreTrainedModel]], Callable[..., PreTrainedModel]]:
    """Turn `method(student, task, *, own options)` into a recovery that takes the recipe's options, too.

    defaults: the recipe's values where nothing is set. without: what of the recipe is no option of the method. ready:
    given a student and all options, raises where the method cannot train that so. The recovery's attribute `ready`, a
    function (student, text, options that are set), raises this and what the recipe cannot do, before anything is done.
    unread: given all options, names those that nothing reads, and why; the recovery's attribute `unread`. trained:
    given the same as `ready`, which of the student's own parameters it trains. added: given that, too, how many
    parameters it adds to train them, at least, by the names of the modules that they are added to. Of both, the
    recovery's attribute `counted`, a function (student, options that are set), gives the numbers by name.
    """

    def decorate(function: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
        names = [item.name for item in fields(Recipe)]

        @functools.wraps(function)
        def method(
            student: PreTrainedModel,
            anatomy: Anatomy,
            removed: frozenset[Unit],
            calibration: CalibrationSet,
            held_out: HeldOut | None,
            folder: str | Path | None,
            seed: int,
            **options: Any,
        ) -> PreTrainedModel:
            check(student, calibration, options)
            recipe = Recipe(**{name: options.pop(name, getattr(defaults, name)) for name in names})
            place = None if folder is None else expanded(folder)
            task = Task(
                anatomy, removed, calibration, held_out, place, seed, recipe, function.__name__, {**own, **options}
            )
            return function(student, task, **options)

        def check(student: PreTrainedModel, text: CalibrationSet, options: Mapping[str, Any]) -> None:
            every = {**values, **options}
            require_blocks(every, len(find_blocks(student)[1]))
            ready(student, every)
            recipe = Recipe(**{name: every[name] for name in names})
            if recipe.compute == "float32":
                require_float32(student, trained(student, every))
            require_trainable(student, text, recipe)

        def counted(student: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, int]:
            every = {**values, **options}
            is_trained = trained(student, every)
            own = {name: one.numel() for name, one in student.named_parameters() if is_trained(name)}
            return {**own, **added(student, every)}

        given = settable_parameters(function)
        own = {name: item.default for name, item in given.items()}
        supplied = list(inspect.signature(method, follow_wrapped=False).parameters.values())[:-1]
        described = {name: item.annotation for name, item in given.items()} | typing.get_type_hints(Recipe)
        values = own | asdict(defaults)
        settable = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=values[name], annotation=described[name])
            for name in values
            if name not in without
        ]
        method.__signature__ = inspect.Signature([*supplied, *settable])  # type: ignore[attr-defined]
        method.__annotations__ = described
        method.unread = lambda options: {**unread_unmeasured(options), **unread(options)}  # type: ignore[attr-defined]
        method.ready = check  # type: ignore[attr-defined]
        method.counted = counted  # type: ignore[attr-defined]
        method.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{inspect.getdoc(Recipe)}"
        return method

    return decorate
