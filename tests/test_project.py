"""The project's own promises: versions agree, imports go one way, nothing depends on one machine."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main

import shallower
from shallower.cli.main import app
from shallower.corpus import CalibrationSet, SourceRecord
from shallower.evaluation.comparison import Comparison, Evaluation
from shallower.evaluation.generation import Continuation, Generation
from shallower.evaluation.perplexity import Perplexity
from shallower.evaluation.tasks import LoadedTasks, TaskMetric, TaskResult, TaskSettings
from shallower.plan import CalibrationIdentity, MadeBy, ModelIdentity, PruningPlan
from shallower.reporting.data import RecoveryData, RecoveryMadeBy, RecoveryStage, ReportData, Side
from shallower.scores import Score, Scores, ScoreSheet
from shallower.timing import Speed, Spread
from shallower.verbs.bench import Bench, Timed
from shallower.verbs.corpus import clean
from shallower.verbs.measured_by import measured_by, measured_model
from shallower.verbs.questions import Questions
from shallower.version import __version__

LIGHT_MODULES = (
    "budget",
    "errors",
    "exchange",
    "files",
    "plan",
    "progress",
    "reduction",
    "registry",
    "scores",
    "strict_json",
    "units",
    "version",
)


def text_files(root: Path) -> list[Path]:
    """Files that are under version control or would be, as far as they are text."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [root / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def test_no_file_names_a_place_on_one_machine(root: Path) -> None:
    places = re.compile(r"(?<![\w.:/}-])/(?:(?:root|work|Users)/\w|home/(?!me\b|you\b)\w)")
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in text_files(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if places.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_changelog_begins_with_this_version(root: Path) -> None:
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert versions[0][0] == __version__
    assert [when for _, when in versions[1:]].count("unreleased") == 0


def test_every_dependency_is_pinned_for_development(root: Path) -> None:
    names = {
        name.lower() for name in re.findall(r"^([\w.-]+)==", (root / "constraints-dev.txt").read_text(), re.MULTILINE)
    }
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    core = project[project.index("\ndependencies") : project.index("\ndynamic")]
    extras = r"^(?:gguf|data|ray|datatrove) = [^\n]*$|^dev = \[.*?^\]"
    development = re.findall(extras, project, re.MULTILINE | re.DOTALL)
    wanted = re.findall(r'"([\w.-]+)>=', core + "\n".join(development))
    assert len(wanted) > 12
    assert {name.lower() for name in wanted} <= names


@pytest.mark.parametrize("target", ["help", "setup", "demo", "test", "check", "format", "lowest", "docs", "clean"])
def test_make_knows(root: Path, target: str) -> None:
    alone = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of a make that runs the tests
    planned = subprocess.run(["make", "-n", target], cwd=root, env=alone, capture_output=True, text=True, check=False)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert re.search(rf"^{target}:.*## ", (root / "Makefile").read_text(), re.MULTILINE)  # what `make help` says of it


def test_value_types_load_nothing_heavy() -> None:
    program = (
        f"import sys; [__import__('shallower.' + name) for name in {LIGHT_MODULES!r}];"
        "print(*sorted({'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr, result.returncode) == ("", "", 0)


# The pages on files and on Python: docs/files.md, docs/api.md


def test_the_page_on_files_has_every_key(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "files.md").read_text(encoding="utf-8")
    sections = {text.split(",")[0].split()[0]: text for text in page.removeprefix("# ").split("\n## ")}

    def missing(section: str, keys: Collection[str], *records: type) -> list[str]:
        wanted = {*keys, *(field.name for record in records for field in dataclasses.fields(record))}
        return [f"{section}: {key}" for key in sorted(wanted) if f"`{key}`" not in sections[section]]

    model = ModelIdentity("m", None, "sha256:0", 2)
    made_by = MadeBy("greedy", "nll", None, {}, 0, None, "0")
    scores = Scores(model, "cosine", (), made_by)
    both = ScoreSheet((scores, dataclasses.replace(scores, metric="loss")))
    text = {"text": Perplexity(1.0, None, 2, 1, 4, (2.0,), (2,))}
    task = TaskResult("t", "1", 0, 1, "test", "folder", (TaskMetric("acc", 1.0, None, True, (1.0,)),))
    written = Generation(1.0, 1.0, 0.0, 1.0, 0.0, (Continuation("a", "b", 1, False, False),))
    evaluations = (Evaluation(name, 2, 9, text, (task,), written, removed=1) for name in "ab")
    subject: Any = SimpleNamespace(identity=model, dtype="float32", model=SimpleNamespace(device=torch.device("cpu")))
    asked = Questions({"t": "a text"}, LoadedTasks((), {}, {}), TaskSettings(), generation=False)
    how = measured_by([measured_model(subject)], asked, 1024, None, None)
    evaluation = Comparison(tuple(evaluations), made_by=how).to_json()
    rows = [row for name in ("evaluations", "tasks", "generation", "differences") for row in evaluation[name]]
    inner = [how, *how["models"], *how["texts"], how["windows"], how["tasks"], how["versions"]]
    inner += (evaluation["tasks"][0]["metrics"]["acc"], evaluation["generation"][0]["continuations"][0])
    found = missing("plan.json", PruningPlan(model, (), (), None, made_by).to_json(), MadeBy)
    found += missing("The", (), ModelIdentity, CalibrationIdentity)  # what comes again in several files
    found += missing("scores.json", {**scores.to_json(), **both.to_json()}, Score)
    found += missing("evaluation.json", {key for document in (evaluation, *rows, *inner) for key in document})
    found += missing("recovery.json", (), RecoveryData, RecoveryStage, RecoveryMadeBy)
    found += missing("report.json", (), ReportData, Side)
    spread = Spread(1.0, 1.0, 1.0, 4)
    timed = [Timed(name, 2, 2, 2, 9, "float32", (Speed(spread, spread, 1, 1, 1, 1, 1, 1),)) for name in "ab"]
    bench = Bench(tuple(timed), (), 1, 1, "float32", "cpu", 1, None).to_json()
    found += missing("bench", {*bench, *bench["models"][1], *bench["models"][1]["speeds"][0]}, Spread)
    found += missing("bench", bench["models"][1]["speeds"][0]["decode_faster"])
    saved = CalibrationSet("s", torch.ones((1, 2), dtype=torch.int64), None, tokenizer="sha256:0").to_json()
    found += missing("manifest.json", saved, SourceRecord)
    assert not found
    pytest.importorskip("datasketch")
    same = [json.dumps({"id": name, "text": "the same words " * 9}) for name in ("one", "two")]
    (tmp_path / "text.jsonl").write_text("\n".join(same))
    clean(tmp_path / "text.jsonl", report=tmp_path / "report")
    clusters = json.loads((tmp_path / "report" / "clusters.json").read_text())
    found += missing("clusters.json", {*clusters, *clusters["clusters"][0], *clusters["clusters"][0]["members"][0]})
    assert not found


def test_the_page_on_python_is_that_of_the_functions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "tools"))
    from make_api_reference import PAGE, reference

    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tools/make_api_reference.py"


def test_the_page_on_python_tells_where_names_differ_from_the_command_line(root: Path) -> None:
    page = (root / "docs" / "api.md").read_text(encoding="utf-8")
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        function = getattr(shallower, {"eval": "evaluate"}.get(verb, verb), None)
        if not callable(function):
            assert f"`{verb}`" in page
            continue
        options = [option for parameter in command.params for option in parameter.opts]
        arguments = list(inspect.signature(function).parameters)
        for option in options:
            assert option.lstrip("-").replace("-", "_") in arguments or re.search(rf"`[^`\n]*{option}\b", page), option
        for argument in set(arguments) - {option.lstrip("-").replace("-", "_") for option in options}:
            assert re.search(rf"`{argument}\b", page), argument


# Import directions


def check_imports(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "tools" / "check_imports.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_two_types_have_one_name(root: Path) -> None:
    places: dict[str, list[str]] = {}
    for path in sorted((root / "src").rglob("*.py")):
        for name in types_of(path):
            places.setdefault(name, []).append(str(path.relative_to(root / "src")))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def types_of(path: Path) -> Iterator[str]:
    """Classes of a module, and the names that it gives to types."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and re.search("^_?[A-Z].*[a-z]", target.id):
                yield target.id


def test_imports_go_one_way(root: Path) -> None:
    result = check_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"engine/trace.py": "from shallower.reporting import page"}, "engine imports reporting, which comes after it"),
        (
            {"engine/trace.py": "def f():\n    import shallower.verbs"},
            "trace.py:2: engine imports verbs, which comes after",
        ),
        ({"engine/trace.py": "from ..cli import main"}, "engine imports cli, which comes after it"),
        ({"engine/trace.py": "from shallower import __version__"}, "engine imports shallower, which comes after it"),
        ({"verbs/demo.py": "from shallower.testing import families"}, "verbs imports testing, which comes after it"),
        ({"metrics/a.py": "from shallower.searches import b"}, "metrics imports searches, which stands beside it"),
        ({"metrics/a.py": "from .b import b", "metrics/b.py": ""}, "not shallower.metrics.b"),
        ({"searches/a.py": "import torch.nn as nn"}, "searches must not know torch"),
        (
            {"searches/a.py": "import typing\nif typing.TYPE_CHECKING:\n    from shallower.engine import Ablator"},
            "searches must not know engine",
        ),
        ({"surgery/cut.py": "from shallower.metrics import cosine"}, "surgery must not know metrics"),
        ({"units.py": "import torch"}, "units must import quickly, but shallower.units imports torch"),
        ({"__init__.py": "import numpy"}, "must import quickly, but shallower imports numpy"),
        (
            {
                "cli/main.py": "import shallower.verbs.prune",
                "verbs/prune.py": "from shallower import x",
                "x.py": "import torch",
            },
            "shallower.cli.main imports shallower.verbs.prune imports shallower.x imports torch",
        ),
        (
            {"cli/main.py": "import shallower.engine.a", "engine/__init__.py": "import torch", "engine/a.py": ""},
            "shallower.cli.main imports shallower.engine.a imports shallower.engine imports torch",
        ),
        ({"helpers.py": ""}, "'helpers' has no place yet"),
    ],
)
def test_an_import_that_goes_the_wrong_way_is_named(
    root: Path, tmp_path: Path, files: dict[str, str], complaint: str
) -> None:
    _write(tmp_path, files)
    result = check_imports(root, str(tmp_path))
    assert result.returncode == 1
    assert complaint in result.stdout


def test_imports_that_are_allowed(root: Path, tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "units.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
            "cli/main.py": "def run():\n    import torch\n    from shallower.verbs import prune",
            "verbs/prune.py": "import torch\nfrom shallower import progress\nfrom shallower.verbs import score",
            "verbs/score.py": "from shallower.engine import trace",
            "engine/trace.py": "import torch\nfrom . import head",
            "engine/head.py": "",
            "progress.py": "",
            "searches/a.py": "from shallower.searches import Losses\nfrom shallower.units import Unit",
            "searches/__init__.py": "Losses = None",
            "testing/families.py": "from shallower.verbs import prune",
        },
    )
    result = check_imports(root, str(tmp_path))
    assert result.returncode == 0, result.stdout


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
