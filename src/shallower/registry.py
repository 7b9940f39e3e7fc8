"""Names of methods. A module of `metrics/`, `objectives/`, `searches/`, `recovery/` or `corpus/quality/` registers one
function; others may, too.

A third party registers by importing the decorator (`from shallower.registry import metric`) in a module that its
package names in the entry-point group `shallower.methods`. Keyword-only parameters of the function become options
(`--set name=value`), of finite numbers, also such that are bounded: `Annotated[int, Above(0)]`. The others are
asked of the framework by name, and one that it does not know is refused at registration.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from shallower.errors import UnknownName, UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINTS = "shallower.methods"


@dataclass(frozen=True)
class Above:
    """Marks a number as larger than `bound`, at most `most`, and less than `below`:
    `share: Annotated[float, Above(0, 1)] = 1.0`.
    """

    bound: float
    most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.bound < value <= self.most and value < self.below

    def __str__(self) -> str:
        ends = {"at most": self.most, "below": self.below}
        return f"above {self.bound:g}" + "".join(f" and {word} {end:g}" for word, end in ends.items() if end < math.inf)


@dataclass(frozen=True)
class AtLeast(Above):
    """The same, or as large as `bound`."""

    def holds(self, value: float) -> bool:
        return value == self.bound or super().holds(value)

    def __str__(self) -> str:
        return super().__str__().replace("above", "of at least", 1)


@dataclass(frozen=True)
class Option:
    """A keyword-only parameter that a user may set. bounds: what its values keep to, None for any finite number."""

    name: str
    annotation: Any
    default: Any
    bounds: Above | None = None

    @property
    def takes(self) -> str:
        """Its values in words, such as `a whole number above 0`."""
        if get_origin(self.annotation) is Literal:
            return " or ".join(str(choice) for choice in get_args(self.annotation))
        words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[self.annotation]
        return words if self.bounds is None else f"{words} {self.bounds}"

    def parse(self, text: str) -> Any:
        """Turn the text of `--set name=text` into a value.

        Raises UserError when the text does not fit the annotation.
        """
        kind, text = self.annotation, str(text)  # from Python it may come as the value itself
        try:
            if get_origin(kind) is Literal:
                choices = {str(choice): choice for choice in get_args(kind)}
                return choices[text]
            if kind is bool:
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
            value = kind(text)
            if (kind is float and not math.isfinite(value)) or (
                self.bounds is not None and not self.bounds.holds(value)
            ):
                raise ValueError(text)
            return value
        except (KeyError, ValueError):
            raise UserError(f"option {self.name}={text!r} does not fit: it takes {self.takes}.") from None


@dataclass(frozen=True)
class Method:
    """A registered function with what the framework and the user may ask of it.

    code: of the file that it is in, as it was when it was registered. published: other names that papers have for it.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    source: str
    options: Mapping[str, Option]
    traits: Mapping[str, Any] = field(default_factory=dict)
    code: str = field(default="", repr=False)
    published: tuple[str, ...] = ()

    def is_published_as(self, name: str) -> bool:
        """Whether papers call it so, however that is spelled (`ShortGPT`, `short-gpt`)."""
        return _letters(name) in map(_letters, self.published)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def trained(self) -> bool:
        """Of a recovery: whether it trains."""
        return bool(self.traits.get("trained"))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the framework supplies (all that are not options)."""
        return tuple(name for name in inspect.signature(self.function).parameters if name not in self.options)

    def option(self, name: str, given: Mapping[str, Any]) -> Any:
        """The value of an option, given or by default; None where there is no such option."""
        known = self.options.get(name)
        return given.get(name, None if known is None else known.default)

    def options_in_use(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options: those that are set, and the defaults of the others."""
        return {**{name: option.default for name, option in self.options.items()}, **given}

    def parse_options(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Check `--set` texts against the options and fill in nothing that was not given.

        Raises UnknownName for a key that is not an option.
        """
        unknown = [key for key in given if key not in self.options]
        if unknown:
            raise UnknownName("option", unknown[0], self.options, of=f"{self.kind} {self.name!r}")
        return {key: self.options[key].parse(text) for key, text in given.items()}


Configured = tuple[Method, Mapping[str, Any]]  # a method and its options


def share_options(what: str, methods: Sequence[Method], given: Mapping[str, str]) -> list[dict[str, Any]]:
    """`--set` texts for several methods at once: to each those that it knows, parsed.

    Raises UnknownName, with the nearest option of `what`, for one that none of them knows.
    """
    known = {option for method in methods for option in method.options}
    for key in given:
        if key not in known:
            raise UnknownName("option", key, sorted(known), of=what)
    return [
        method.parse_options({key: text for key, text in given.items() if key in method.options}) for method in methods
    ]


class Registry:
    """The methods of one kind. Built-in modules of `package` and third-party entry points load at the first look-up."""

    def __init__(
        self,
        kind: str,
        package: str,
        supplied: str | None = None,
        *,
        apart: Sequence[str] = (),
        of_traits: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """supplied: names of the parameters that a method may ask for, besides its options, with spaces between them;
        None where it is called by position. apart: groups of these, of which a method may ask for one. of_traits: names
        for methods with a trait.
        """
        self.kind = kind
        self._package = package
        self._supplied = supplied
        self._apart = [group.split() for group in apart]
        self._of_traits = of_traits
        self._methods: dict[str, Method] = {}
        self._loaded = False

    def __call__(
        self, name: str, *, source: str = "", published: Sequence[str] = (), **traits: Any
    ) -> Callable[[F], F]:
        """Decorator that registers a function under `name`. published: what papers call it; `shallower methods` finds
        it by these names, too, and the error about one says the name that counts.

        Raises TypeError when the name is taken, a keyword-only parameter has no parsable annotation or no default, or
        parameters of two groups are asked for that are not supplied together, and UnknownName for a parameter that is
        none of those that can be asked for.
        """

        def register(function: F) -> F:
            if name in self._methods and self._methods[name].function.__module__ != function.__module__:
                raise TypeError(f"{self.kind} {name!r} is registered twice")
            method = Method(
                self.kind, name, function, source, _options(function), traits, source_of(function), tuple(published)
            )
            self._require_supplied(method)
            self._methods[name] = method
            return function

        return register

    def supplied(self, traits: Mapping[str, Any]) -> list[str] | None:
        """What a method with these traits may ask for; None where it is called by position."""
        names = next((names for trait, names in self._of_traits.items() if traits.get(trait)), self._supplied)
        return None if names is None else names.split()

    def _require_supplied(self, method: Method) -> None:
        known = self.supplied(method.traits)
        if known is None:
            return
        for name in method.parameters:
            if name not in known:
                raise UnknownName(
                    "parameter",
                    name,
                    known,
                    f"Options are keyword-only. See the docstring of {self._package}.",
                    of=f"{self.kind} {method.name!r}",
                )
        asked = [group for group in self._apart if not set(group).isdisjoint(method.parameters)]
        if len(asked) > 1:
            groups = " and ".join(f"({', '.join(group)})" for group in asked)
            raise TypeError(
                f"{self.kind} {method.name!r} asks for what is never there together: {groups}; ask for one of these "
                f"groups. See the docstring of {self._package}."
            )

    def get(self, name: str) -> Method:
        """Look a method up. Raises UnknownName, with the nearest name, when there is none."""
        self._load()
        try:
            return self._methods[name]
        except KeyError:
            meant = next((method.name for method in self if method.is_published_as(name)), "")
            known = sorted(self._methods)
            raise UnknownName(self.kind, name, known, "See `shallower methods`.", meant=meant) from None

    def __iter__(self) -> Iterator[Method]:
        self._load()
        return iter(sorted(self._methods.values(), key=lambda method: method.name))

    def _load(self) -> None:
        if self._loaded:
            return
        from importlib.metadata import entry_points  # takes as long as the rest of `import shallower`

        self._loaded = True  # first, as a method's module may look another method up
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            for point in entry_points(group=ENTRY_POINTS):
                _load_from(point)
        except BaseException:
            self._loaded = False  # else the next look-up would say that the method does not exist
            raise


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _load_from(point: EntryPoint) -> None:
    """Import what another package registers. Raises UserError when it cannot be imported."""
    try:
        point.load()
    except UserError:
        raise
    except Exception as error:
        package = "a package" if point.dist is None else f"the package {point.dist.name}"
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{package} registers methods in {point.value}, which cannot be imported ({why}): repair or uninstall it."
        ) from error


def source_of(function: Callable[..., Any]) -> str:
    """A function's code with all that is in its file, which may be another one later than what was imported."""
    function = inspect.unwrap(function)
    try:
        return "".join(inspect.findsource(function)[0])
    except (OSError, TypeError):  # typed into an interpreter
        code = getattr(function, "__code__", None)
        defaults = getattr(function, "__kwdefaults__", None)
        return repr((instructions(code) if isinstance(code, CodeType) else repr(function), defaults))


def instructions(code: CodeType) -> tuple[Any, ...]:
    """What compiled code does, without where in memory or in a file it is."""
    return code.co_code.hex(), code.co_names, [_constant(held) for held in code.co_consts]


def _constant(held: object) -> object:
    if isinstance(held, CodeType):
        return instructions(held)
    if isinstance(held, frozenset):  # in another order in each process
        return ["frozenset", *sorted(map(repr, held))]
    return [_constant(item) for item in held] if isinstance(held, tuple) else repr(held)


def settable_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, with annotations that are types."""
    settable = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    # those of the others may be imported for type checkers only
    hints = typing.get_type_hints(
        SimpleNamespace(__annotations__={name: item.annotation for name, item in settable.items()}),
        globalns=getattr(inspect.unwrap(function), "__globals__", {}),
        include_extras=True,
    )
    return {name: parameter.replace(annotation=hints[name]) for name, parameter in settable.items()}


def _options(function: Callable[..., Any]) -> dict[str, Option]:
    options = {}
    for name, parameter in settable_parameters(function).items():
        kind, above = parameter.annotation, None
        if get_origin(kind) is Annotated:
            kind, *marks = get_args(kind)
            above = next((mark for mark in marks if isinstance(mark, Above)), None)
        if parameter.default is inspect.Parameter.empty or not (
            kind in (int, float, bool, str) or get_origin(kind) is Literal
        ):
            raise TypeError(
                f"option {name!r} of {function.__qualname__} needs a default and int, float, bool, str or Literal"
            )
        options[name] = Option(name, kind, parameter.default, above)
    return options


# What the framework supplies is said in the docstrings of these packages, and worked out by those who call the methods.
metric = Registry(
    "metric",
    "shallower.metrics",
    """
    before after dot before_l2 after_l2 change_l2 before_l1 after_l1 change_l1 before_before before_after after_after
    weights gradients fisher gate units losses differences rng
    """,
    apart=(
        "before after",
        "dot before_l2 after_l2 change_l2 before_l1 after_l1 change_l1",
        "before_before before_after after_after",
        "weights gradients fisher",
        "gate",
        "units losses differences rng",
    ),
)
objective = Registry(
    "objective",
    "shallower.objectives",
    """
    logits targets dense_logits hidden dense_hidden target_logits log_normalizer dense_mean_logit dense_entropy
    log_likelihoods tokens bytes gold
    """,
    apart=(
        """
        logits targets dense_logits hidden dense_hidden target_logits log_normalizer dense_mean_logit dense_entropy
        """,
        "log_likelihoods tokens bytes gold",
    ),
)
search = Registry("search", "shallower.searches", "units budget scores spans losses start rng")
recovery = Registry(
    "recovery",
    "shallower.recovery",
    "repair",
    of_traits={"trained": "student anatomy removed calibration held_out folder seed"},
)
quality = Registry("quality", "shallower.corpus.quality")
REGISTRIES = (metric, objective, search, recovery, quality)
