"""Names of methods: what registers, what is refused at registration, and how third parties take part."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch

from shallower import registry as registry_module
from shallower.errors import UnknownName, UserError
from shallower.registry import REGISTRIES, Above, AtLeast, Method, Registry
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.registry import search as searches
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model
from shallower.verbs.search import search


def plain(before: float, after: float) -> float:
    """First line.

    More.
    """
    return after - before


def with_options(
    before: float,
    *,
    steps: int = 4,
    rate: float = 0.5,
    twice: bool = False,
    label: str = "x",
    below: Literal["after", "before"] = "after",
    power: Literal[1, 2] = 1,
) -> float:
    """Has one option of each kind."""
    return before


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of an empty package."""
    (tmp_path / "no_methods").mkdir()
    (tmp_path / "no_methods" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "no_methods", raising=False)
    return Registry("metric", "no_methods")


def with_bounds(*, rate: Annotated[float, Above(0)] = 0.5, steps: Annotated[int, Above(1)] = 4) -> None:
    """Has numbers that must be above something."""


def test_numbers_that_must_be_above_something(registry: Registry) -> None:
    registry("bounded")(with_bounds)
    method = registry.get("bounded")
    assert method.parse_options({"rate": "0.001", "steps": "2"}) == {"rate": 0.001, "steps": 2}
    for text in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=rf"option rate='{text}' does not fit: it takes a finite number above 0\."):
            method.parse_options({"rate": text})
    with pytest.raises(UserError, match=r"steps='1' does not fit: it takes a whole number above 1\."):
        method.parse_options({"steps": "1"})


def with_ends(
    *, share: Annotated[float, Above(0, 1)] = 0.5, rank: Annotated[int, AtLeast(0)] = 4, rate: float = 1
) -> None:
    """Has numbers of which the bounds themselves are allowed, and one without bounds."""


def test_numbers_up_to_and_from_a_bound_on_and_none_without_end(registry: Registry) -> None:
    registry("bounded")(with_ends)
    method = registry.get("bounded")
    given = {"share": "1", "rank": "0", "rate": "-3"}
    assert method.parse_options(given) == {"share": 1.0, "rank": 0, "rate": -3.0}
    for name, text, takes in (
        ("share", "1.5", "a finite number above 0 and at most 1"),
        ("share", "0", "a finite number above 0 and at most 1"),
        ("rank", "-1", "a whole number of at least 0"),
        ("rate", "nan", "a finite number"),
        ("rate", "inf", "a finite number"),
        ("rate", "-inf", "a finite number"),
    ):
        with pytest.raises(UserError, match=rf"option {name}='{text}' does not fit: it takes {takes}\."):
            method.parse_options({name: text})


def test_a_registered_function_is_found_and_left_as_it_is(registry: Registry) -> None:
    assert registry("plain", source="arXiv:0000.00000", spans=True)(plain) is plain
    method = registry.get("plain")
    assert method.function is plain
    assert method.summary == "First line."
    assert method.parameters == ("before", "after")
    assert (method.options, method.traits, method.source) == ({}, {"spans": True}, "arXiv:0000.00000")


def test_methods_are_listed_by_name(registry: Registry) -> None:
    registry("b")(plain)
    registry("a")(plain)
    assert [method.name for method in registry] == ["a", "b"]


def test_keyword_only_parameters_are_options(registry: Registry) -> None:
    registry("m")(with_options)
    method = registry.get("m")
    assert method.parameters == ("before",)
    texts = {"steps": "8", "rate": "1e-3", "twice": "Yes", "label": "y", "below": "before", "power": "2"}
    expected = {"steps": 8, "rate": 1e-3, "twice": True, "label": "y", "below": "before", "power": 2}
    assert method.parse_options(texts) == expected
    assert method.parse_options({"twice": True, "steps": 8, "rate": 1e-3}) == {"twice": True, "steps": 8, "rate": 1e-3}
    with pytest.raises(UserError, match=r"option steps='2\.7' does not fit"):
        method.parse_options({"steps": 2.7})
    assert method.parse_options({}) == {}
    assert {name: option.default for name, option in method.options.items()}["below"] == "after"


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("steps", "1.5", "option steps='1.5' does not fit: it takes a whole number"),
        ("steps", "", "it takes a whole number"),
        ("rate", "fast", "it takes a finite number"),
        ("twice", "maybe", "it takes true or false"),
        ("below", "under", "it takes after or before"),
        ("power", "3", "it takes 1 or 2"),
        ("step", "1", "unknown option 'step' of metric 'm'; did you mean 'steps'"),
    ],
)
def test_options_that_are_refused(registry: Registry, key: str, text: str, message: str) -> None:
    registry("m")(with_options)
    with pytest.raises(UserError, match=message):
        registry.get("m").parse_options({key: text})


def no_default(before: float, *, steps: int) -> float:
    return before


def no_annotation(before: float, *, steps=4) -> float:  # type: ignore[no-untyped-def]
    return before


def unparsable(before: float, *, steps: list[int] | None = None) -> float:
    return before


@pytest.mark.parametrize("function", [no_default, no_annotation, unparsable])
def test_options_that_cannot_be_parsed_fail_at_registration(registry: Registry, function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"option 'steps' of .* needs a default and int, float, bool, str or Literal"):
        registry("m")(function)


def trained_method(student: Elsewhere, task: Elsewhere, *, steps: int = 4) -> Elsewhere:  # noqa: F821
    return student


def test_a_trained_method_may_name_types_that_are_imported_for_type_checkers_only(registry: Registry) -> None:
    from shallower.training.recipe import Recipe, trainable

    registry("m")(trainable(Recipe(lr=0.5))(trained_method))
    found = {name: (option.annotation, option.default) for name, option in registry.get("m").options.items()}
    assert found["steps"] == (int, 4)
    assert found["lr"] == (float, 0.5)
    with pytest.raises(TypeError, match=r"option 'steps' of no_annotation needs a default and int"):
        registry("n")(trainable(Recipe())(no_annotation))


def misspelt(before: float, aftr: float, *, power: float = 1.0) -> float:
    return before


def untrainable(student: object, task: object) -> None:
    """What `@trainable` would have turned into a recovery."""


@pytest.mark.parametrize(
    ("methods", "function", "traits", "message"),
    [
        (
            registry_module.metric,
            misspelt,
            {},
            r"unknown parameter 'aftr' of metric 'mine'; did you mean 'after'\? Known: before, after, .*, rng\. "
            r"Options are keyword-only\. See the docstring of shallower\.metrics\.",
        ),
        (registry_module.objective, misspelt, {}, "parameter 'before' of objective 'mine'"),
        (registry_module.search, misspelt, {}, "parameter 'before' of search 'mine'"),
        (registry_module.recovery, untrainable, {}, r"parameter 'student' of recovery 'mine'.* Known: repair\."),
        (
            registry_module.recovery,
            untrainable,
            {"trained": True},
            r"parameter 'task' of recovery 'mine'.* Known: student, .*, seed\.",
        ),
    ],
)
def test_a_parameter_that_nothing_supplies_is_refused_at_registration(
    methods: Registry, function: Callable[..., Any], traits: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownName, match=message):
        methods("mine", **traits)(function)
    assert "mine" not in [method.name for method in methods]


def test_what_can_be_asked_for_is_what_is_supplied(monkeypatch: pytest.MonkeyPatch) -> None:
    from shallower.budget import Budget, Limit
    from shallower.corpus import CalibrationSet
    from shallower.engine import gradients, scoring, stream
    from shallower.testing.families import tiny_model
    from shallower.units import Unit
    from shallower.verbs.recover import recover
    from shallower.verbs.score import ADAPTIVE
    from shallower.verbs.search import search as searching
    from shallower.verbs.trail import run_search

    rows = {"logits", "dense_logits", "targets"}
    for methods, supplied in (
        (registry_module.metric, stream.STREAM | gradients.WEIGHTS | ADAPTIVE),
        (registry_module.objective, scoring.STREAM | scoring.REDUCED | scoring.CHOICES | rows),
    ):
        assert set(methods.supplied({}) or ()) == supplied
        assert all(name in (importlib.import_module(methods._package).__doc__ or "") for name in supplied)

    def greedy(units, budget, scores, spans, losses, start, rng):  # type: ignore[no-untyped-def]
        yield frozenset(units)

    def repaired(repair):  # type: ignore[no-untyped-def]
        repair.notes.append("was here")

    def trained(student, anatomy, removed, calibration, held_out, folder, seed):  # type: ignore[no-untyped-def]
        return student

    recovery, search = registry_module.recovery, registry_module.search
    for methods in (recovery, search):
        monkeypatch.setattr(methods, "_methods", {method.name: method for method in methods})
    search("of-all")(greedy)
    recovery("of-all")(repaired)
    recovery("of-all-trained", trained=True)(trained)
    assert [search.get("of-all").parameters, recovery.get("of-all-trained").parameters] == [
        tuple(search.supplied({}) or ()),
        tuple(recovery.supplied({"trained": True}) or ()),
    ]
    block = Unit(1, "block")
    budget = Budget((Limit("units", 1.0, 6.0, {block: 1.0}),))
    run_search([(search.get("of-all"), {})], [block], budget, lambda candidates, keep=None, race=True: [], None, 0)
    model = tiny_model("llama")
    text = CalibrationSet("x", torch.arange(3, 99).reshape(3, 32), None)
    plan = searching(model, "block.1", calibration=text)
    assert "of-all: was here" in recover(model, "of-all,of-all-trained", plan=plan, calibration=text).notes


def test_a_name_is_taken_once(registry: Registry) -> None:
    registry("m")(plain)
    registry("m")(plain)  # a module that is loaded again
    with pytest.raises(TypeError, match="metric 'm' is registered twice"):
        registry("m")(textwrap.dedent)


def test_an_unknown_name_gets_the_nearest(registry: Registry) -> None:
    registry("cosine")(plain)
    with pytest.raises(UnknownName, match=r"unknown metric 'cosin'; did you mean 'cosine'.*See `shallower methods`"):
        registry.get("cosin")


def test_a_module_that_fails_fails_every_time(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_methods" / "broken.py").write_text("raise ImportError('needs a library')")
    for _ in range(2):
        with pytest.raises(ImportError, match="needs a library"):
            registry.get("anything")


@pytest.mark.parametrize("method", [method for registry in REGISTRIES for method in registry], ids=lambda m: m.name)
def test_every_method_is_documented_and_alone_in_the_file_of_its_name(method: Method) -> None:
    module = method.function.__module__.rsplit(".", 1)[-1]
    assert module == method.name.replace("-", "_")
    assert method.summary.endswith(".")
    if method.source:
        assert all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", source) for source in method.source.split(", ")), method.source


def test_the_page_on_methods_has_every_one(root: Path) -> None:
    page = (root / "docs" / "methods.md").read_text(encoding="utf-8")
    for listed in (metrics, objectives, searches):
        for method in listed:
            assert f"\n| `{method.name}` |" in page, method.name


# The example of CONTRIBUTING.md, as a third party would use it


def _block(text: str, language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[number]


@pytest.fixture(scope="module")
def package(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package with the metric and the entry point that CONTRIBUTING.md shows."""
    guide = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code, project = _block(guide, "python"), _block(guide, "toml")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10, "CONTRIBUTING.md promises ten lines"
    group, entry = re.search(r'entry-points\."(.+?)"\]\n(.+)', project).groups()  # type: ignore[union-attr]
    name, module = re.fullmatch(r'(\S+) = "(\S+)"', entry.strip()).groups()  # type: ignore[union-attr]
    folder = tmp_path_factory.mktemp("site")
    (folder / f"{module}.py").write_text(code)
    (folder / "stretch-1.0.dist-info").mkdir()
    (folder / "stretch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stretch\nVersion: 1.0\n")
    (folder / "stretch-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    return folder


def test_the_metric_of_the_guide_is_found_through_its_entry_point(package: Path) -> None:
    program = """
        import torch
        from shallower.registry import metric
        method = metric.get("stretch")
        assert "cosine" in [other.name for other in metric]
        before = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        options = method.parse_options({"power": "2"})
        print(method.parameters, method.function(before, 2 * before, **options))
    """
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n" + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "('before', 'after') tensor([0.4805, 0.4805])"  # log(2) squared


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_like_this\n")
    (tmp_path / "bad-1.0.dist-info").mkdir()
    (tmp_path / "bad-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (tmp_path / "bad-1.0.dist-info" / "entry_points.txt").write_text("[shallower.methods]\nbad = bad\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from shallower.cli import main; "
    program += "sys.exit(main.run(['methods', 'cosine']))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    told = "the package bad registers methods in bad, which cannot be imported (ModuleNotFoundError: No module named "
    assert told + "'nothing_like_this'): repair or uninstall it." in ran.stderr


def test_the_guide_is_not_among_the_built_in_methods() -> None:
    assert "stretch" not in [method.name for method in metrics]


def test_every_example_of_set_is_an_option_that_takes_the_value(root: Path) -> None:
    options = [option for kind in REGISTRIES for method in kind for option in method.options.values()]

    def fits(name: str, value: str) -> bool:
        for option in options:
            if option.name == name.replace("-", "_"):
                with contextlib.suppress(UserError):
                    option.parse(value)
                    return True
        return False

    found = {
        example
        for path in (root / "README.md", *(root / "docs").glob("*.md"), *(root / "src").rglob("*.py"))
        for example in re.findall(r"--set ([a-z][\w-]*)=([a-z0-9](?:[\w.-]*\w)?)", path.read_text(encoding="utf-8"))
    }
    assert len(found) > 10
    assert not {(name, value) for name, value in found if name != "name" and not fits(name, value)}


def test_what_is_never_supplied_together_is_refused_at_registration() -> None:
    def both(before: object, dot: object) -> None: ...

    def questions(logits: object, gold: object) -> None: ...

    with pytest.raises(
        TypeError, match=r"metric 'mine' asks for .*together: \(before, after\) and \(dot, .*one of these"
    ):
        registry_module.metric("mine")(both)
    with pytest.raises(TypeError, match=r"objective 'mine' asks .*\(logits, .*\) and \(log_likelihoods, "):
        registry_module.objective("mine")(questions)


def test_an_option_is_what_was_given_or_the_default() -> None:
    def mine(logits: object, *, temperature: float = 2.0) -> None: ...

    methods = Registry("objective", "shallower.objectives")
    methods("mine")(mine)
    method = methods._methods["mine"]
    assert method.option("temperature", {}) == 2.0
    assert method.option("temperature", {"temperature": 3.0}) == 3.0
    assert method.option("width", {}) is None


def test_what_the_framework_supplies_may_be_annotated_for_type_checkers_only() -> None:
    namespace: dict[str, Any] = {"__name__": "typed", "Annotated": Annotated, "Above": Above}
    source = """
    from __future__ import annotations
    def mine(before: Tensor, after: Tensor, *, power: Annotated[float, Above(0)] = 1.0) -> Tensor:
        return before
    """
    exec(textwrap.dedent(source), namespace)
    registry = Registry("metric", "shallower.metrics", "before after")
    registry("mine")(namespace["mine"])
    assert registry._methods["mine"].options["power"].parse("2") == 2.0


def test_a_search_that_ranks_by_no_metric_of_its_own_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "_methods", {method.name: method for method in searches})
    one_shot = searches.get("one-shot").function
    searches("mine")(lambda scores, budget: one_shot(scores, budget))
    model = tiny_model("llama")
    given: dict[str, Any] = {"search": "mine", "calibration": sample_text(model)}
    with pytest.raises(UserError, match="'mine' ranks units by a metric, and has none of its own: add --metric cosine"):
        search(model, 2, **given)
    assert len(search(model, 2, metric="cosine", **given).remove) == 2
