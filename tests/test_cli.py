"""The command line: what each verb prints and writes, and what it says to mistakes. In-process where it can be."""

from __future__ import annotations

import errno
import importlib
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from typer.main import get_command

from shallower import progress, registry
from shallower.cli import main, options
from shallower.cli.methods import paper_links, unbroken
from shallower.cli.output import say
from shallower.cli.plan import show_plan
from shallower.cli.progress import lines
from shallower.errors import UserError, VerificationError
from shallower.plan import MadeBy, ModelIdentity, PruningPlan
from shallower.reporting.wording import number
from shallower.scores import Scores, ScoreSheet
from shallower.units import Unit
from shallower.version import __version__

SHALLOWER = (sys.executable, "-c", "from shallower.cli.main import main; main()")
SMALL = ("--sequences", "4", "--length", "32", "--device", "cpu", "--dtype", "float32")
BLOCKS = 6


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main.run([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tiny models, two texts, and scores of attentions alone; tests write nothing here."""
    from shallower.testing.families import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("cli")
    for name, family, seed in (("tiny", "llama", 0), ("other", "llama", 1), ("learned", "gpt2", 0)):
        tiny_model(family, blocks=BLOCKS, seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    sentences = [f"Number {n} is followed by {n + 1}, and {n} times {n} is {n * n}." for n in range(400)]
    paragraphs = [" ".join(sentences[start : start + 20]) for start in range(0, len(sentences), 20)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    (folder / "held-out.txt").write_text("\n\n".join(reversed(paragraphs)).replace("followed", "succeeded"))
    asked = ["score", folder / "tiny", "--units", "attn", "--out", folder / "attentions.json", "--quiet"]
    assert main.run([str(word) for word in (*asked, "--calibration", folder / "text.txt", *SMALL)]) == 0
    return folder


@pytest.fixture(scope="session")
def plan(place: Path) -> Path:
    """A plan of three removals for the model `tiny`."""
    path = place / "plan.json"
    asked = ["search", place / "tiny", "--remove", 3, "--out", path, "--calibration", place / "text.txt", *SMALL]
    assert main.run([str(word) for word in asked] + ["--json"]) == 0
    return path


@pytest.fixture(scope="session")
def pruned(place: Path, plan: Path) -> Path:
    """A checkpoint with its report."""
    folder = place / "smaller"
    asked = ["prune", place / "tiny", "--plan", plan, "--out", folder, "--calibration", place / "text.txt", *SMALL]
    asked += ["--window", 32, "--windows", 2, "--text", place / "held-out.txt", "--quiet"]
    assert main.run([str(word) for word in asked]) == 0
    return folder


def sentence(ran: Ran, code: int = 2) -> str:
    """The one line that a failing command line prints."""
    assert (ran.code, ran.out) == (code, "")
    [line] = ran.err.splitlines()
    assert line.startswith("shallower: ")
    assert line.endswith((".", "?"))
    return line.removeprefix("shallower: ")


# Before any verb


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib", "rich", "tokenizers", "safetensors"}
    program = (
        "import sys; from shallower.cli.main import run; code = run(['--help']);"
        f"print(*sorted({heavy!r} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time, which does not depend on what else the machine does
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert (ran.returncode, ran.stderr.strip()) == (0, "")
    assert min(seconds) < 0.3


def test_help_names_every_verb(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    for verb in (
        "inspect",
        "score",
        "search",
        "prune",
        "recover",
        "eval",
        "bench",
        "study",
        "run",
        "report",
        "methods",
        "demo",
        "plan",
        "corpus",
    ):
        assert re.search(rf"^  {verb} +\w", ran.out, re.MULTILINE)
    assert "..." not in ran.out.split("Commands:")[1]
    assert cli() == ran


def test_version(cli: Cli) -> None:
    assert cli("--version") == Ran(0, f"shallower {__version__}\n", "")


def test_the_reference_is_that_of_the_program(root: Path) -> None:
    sys.path.insert(0, str(root / "tools"))
    try:
        from make_cli_reference import PAGE, reference
    finally:
        sys.path.pop(0)
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tools/make_cli_reference.py"
    shared, *verbs = reference().split("\n## `")
    assert shared.count("- `--json`") == 1
    assert all("`--json`" in verb and "- `--json`" not in verb for verb in verbs if " VERB " not in verb)


def test_the_help_names_every_method_that_ships() -> None:
    shipped = {
        options._shipped(package) for package in ("metrics", "objectives", "searches", "recovery", "corpus/quality")
    }
    registered = {", ".join(method.name for method in kind if _ships(method)) for kind in registry.REGISTRIES}
    assert shipped == registered


def test_the_help_tells_the_defaults_that_methods_have(cli: Cli) -> None:
    told = " ".join(cli("score", "--help").out.split())
    traits = {method.name: method.traits for method in registry.metric if _ships(method)}
    spanned, last = ([name for name in traits if traits[name].get(trait)] for trait in ("spans", "positions"))
    assert f"Default: for {' and '.join(spanned)}." in told
    assert f"auto: the last for {' and '.join(last)}, all for the others." in told
    own = [
        f"{method.traits['metric']} for {method.name}"
        for method in registry.search
        if _ships(method) and "metric" in method.traits
    ]
    assert f"Default: {', '.join(own)}." in " ".join(cli("search", "--help").out.split())


def _ships(method: registry.Method) -> bool:
    return method.function.__module__.startswith("shallower.")


def test_what_a_race_may_get_wrong_is_told(cli: Cli, root: Path) -> None:
    from shallower.engine import Racing

    racing = Racing()
    stated = (
        f"the winner of a race is more than {100 * racing.tie:g} % worse than the best with a probability of at most "
    )
    stated += f"{100 * racing.error:g} %"
    for told in (cli("search", "--help").out, (root / "README.md").read_text(encoding="utf-8")):
        assert stated in " ".join(told.split())


# Each verb


def test_inspect(cli: Cli, place: Path) -> None:
    ran = cli("inspect", place / "tiny", "--remove", "block.1-2,attn.4")
    assert ran.code == 0
    assert "Removes 2 of 6 blocks: block.1-2; 1 attention sublayer: attn.4 (numbered from 0)." in ran.out
    assert re.search(r"That is [\d,]+ of [\d,]+ parameters \([\d.]+ %; [\d.]+ % of those in blocks\)", ran.out)
    of_attentions = cli("inspect", place / "tiny", "--remove", "attn.3-4").out
    assert "2 attention sublayers: attn.3-4 (numbered from 0)" in of_attentions
    assert "; 33.3 % of those in blocks)" in cli("inspect", place / "tiny", "--remove", "block.1-2").out
    told = cli("inspect", place / "tiny", "--remove", "block.1", "--json").json
    assert told["model"]["blocks"] == BLOCKS
    assert f"tiny: llama in {told['dtype']}, {BLOCKS} blocks" in ran.out
    assert told["removed"]["units"] == ["block.1"]
    assert told["removed"]["parameters"] == told["units"]["block.1"]["parameters"]


def test_score(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    asked = ("score", place / "tiny", "--metric", "angular", "--calibration", place / "text.txt", *SMALL)
    ran = cli(*asked, "--out", out)
    assert ran.code == 0
    assert "block.0" in ran.out
    assert re.search(r"Length +Least span +angular", ran.out)
    assert f"Wrote the scores to {out}" in ran.out
    scores = Scores.load(out)
    assert len(scores.units) == BLOCKS
    assert len(scores.spans) == BLOCKS * (BLOCKS + 1) // 2
    assert cli(*asked, "--json").json == json.loads(out.read_text())
    assert len(cli(*asked, "--no-spans", "--units", "sublayer", "--json").json["rows"]) == 2 * BLOCKS
    assert "Least span" not in cli(*asked, "--no-spans").out
    assert sentence(cli(*asked, "--out", out, "--quiet")).startswith(f"--out {out} exists; name another file")
    assert cli(*asked, "--out", out, "--force", "--positions", "all").code == 0
    assert Scores.load(out).made_by.options["positions"] == "all"


def test_several_metrics_side_by_side(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    text = ("--calibration", place / "text.txt", *SMALL)
    asked = ("score", place / "tiny", "--metric", "cosine,taylor,magnitude", *text)
    ran = cli(*asked, "--out", out)
    assert ran.code == 0
    assert re.search(r"Unit +cosine +taylor +magnitude", ran.out)
    assert len(re.findall(r"^ *block\.\d+( +[1-6] +[\d.]+){3} *$", ran.out, re.MULTILINE)) == BLOCKS
    assert "Spearman's rho above the diagonal" in " ".join(ran.out.split())
    assert f"--scores {out} --metric cosine" in ran.out
    told = cli(*asked, "--json").json
    assert ScoreSheet.from_json(told).metrics == ("cosine", "taylor", "magnitude")  # kept as it was printed
    assert [row["second"] for row in told.pop("correlations")] == ["taylor", "magnitude", "magnitude"]
    assert told == json.loads(out.read_text())
    chosen = ("search", place / "tiny", "--remove", 2, "--search", "one-shot", "--scores", out, *text)
    assert sentence(cli(*chosen, "--quiet")).endswith("choose one with --metric: cosine, taylor, magnitude.")
    assert cli(*chosen, "--metric", "taylor", "--json").json["made_by"]["metric"] == "taylor"


@pytest.mark.parametrize(
    ("units", "metric", "way"),
    [
        *((units, "cosine", "one-shot") for units in ("block", "attn", "mlp", "sublayer", "all")),
        *((units, "angular", "contiguous") for units in ("block", "sublayer")),
        *((units, "angular", "one-shot") for units in ("attn", "all")),
    ],
)
def test_what_is_advised_after_scores_can_be_typed(
    cli: Cli, place: Path, tmp_path: Path, units: str, metric: str, way: str
) -> None:
    text = ("--metric", metric, "--calibration", place / "text.txt", *SMALL)
    ran = cli("score", place / "tiny", "--units", units, *text, "--out", tmp_path / "it's scores.json")
    [advice] = re.findall("^Next: shallower (.*)$", ran.out, re.MULTILINE)
    assert f" --search {way} " in advice
    found = cli(*shlex.split(advice), "--json")
    assert found.code == 0, found.err
    assert (
        found.json["made_by"]["calibration"]["digest"]
        == json.loads((tmp_path / "it's scores.json").read_text())["made_by"]["calibration"]["digest"]
    )


def test_what_is_advised_after_a_search_reads_the_same_text(cli: Cli, place: Path, tmp_path: Path) -> None:
    text = place / "text.txt"
    out = tmp_path / "plan.json"
    ran = cli("search", place / "tiny", "--remove", "block.2", "--calibration", text, *SMALL, "--out", out)
    [advice] = re.findall("^Next: shallower (.*)$", ran.out, re.MULTILINE)
    told = f"--calibration {shlex.quote(str(text))} --sequences 4 --length 32 --dtype float32"
    assert advice.endswith(f"--plan {shlex.quote(str(out))} --out FOLDER {told}")


def test_what_is_advised_after_a_search_repairs_as_that_judged(cli: Cli, place: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join([(place / "text.txt").read_text()] * 3))
    how = ("--calibration", tmp_path / "text.txt", "--repair", "linear-fold", "--set", "width=2", "--set", "ridge=0.01")
    asked = ("search", place / "tiny", "--remove", 1, "--search", "beam", *how, *SMALL)
    ran = cli(*asked, "--out", tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    [advice] = re.findall("^Next: shallower (.*)$", ran.out, re.MULTILINE)
    assert " --out FOLDER --recover linear-fold --set ridge=0.01 --calibration " in advice
    pruned = cli(*shlex.split(advice.replace("FOLDER", str(tmp_path / "out"))), "--no-speed", "--json")
    assert pruned.code == 0, pruned.err
    assert not [note for note in pruned.json["notes"] if "was not repaired" in note]


def test_search_by_scores(cli: Cli, place: Path, tmp_path: Path) -> None:
    text = ("--calibration", place / "text.txt")
    assert cli("score", place / "tiny", *text, *SMALL, "--out", tmp_path / "s.json", "--quiet").code == 0
    ran = cli(
        "search", place / "tiny", "--remove", 2, "--search", "one-shot", "--scores", tmp_path / "s.json", *text, *SMALL
    )
    assert ran.code == 0
    assert "Removes 2 of 6 blocks" in ran.out
    assert "parameters (" in ran.out
    assert "Nothing was written; add --out FILE" in ran.out


def test_what_goes_is_counted_without_weighing_the_model(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = ("--remove", "block.2,block.4")
    [told] = [line for line in cli("inspect", place / "tiny", *units).out.splitlines() if line.startswith("That is ")]
    monkeypatch.delattr("shallower.verbs.subject.weigh")
    ran = cli("search", place / "tiny", *units, "--calibration", place / "text.txt", *SMALL)
    assert told in ran.out.splitlines()


def test_search_writes_what_it_prints_as_json(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    text = ("--calibration", place / "text.txt", "--objective", "nll", "--seed", 3)
    ran = cli("search", place / "tiny", "--remove", "block.2,block.3", "--out", out, "--json", *text, *SMALL)
    spent = ran.json["spent"]
    assert {key: value for key, value in ran.json.items() if key != "spent"} == json.loads(out.read_text())
    assert PruningPlan.from_json(ran.json) == PruningPlan.load(out)  # kept as it was printed it is a plan, too
    assert PruningPlan.load(out).made_by.seed == 3
    assert spent["tokens"] > 0
    assert (spent["exhaustive"], spent["recalled"]) == (spent["tokens"], 0)
    again = cli("search", place / "tiny", "--remove", "block.2,block.3", "--json", *text, *SMALL).json
    assert again == {**ran.json, "spent": {"tokens": 0, "exhaustive": 0, "recalled": again["spent"]["recalled"]}}
    assert again["spent"]["recalled"] > 0
    assert ran.err == ""


def test_options_of_a_method(cli: Cli, place: Path) -> None:
    text = ("--calibration", place / "text.txt", "--json", *SMALL)
    ran = cli("search", place / "tiny", "--remove", 1, "--search", "beam", "--set", "width=2", *text)
    assert ran.json["made_by"]["options"]["width"] == 2


def test_plan_show_and_cut(cli: Cli, plan: Path, tmp_path: Path) -> None:
    ran = cli("plan", "show", plan)
    assert ran.code == 0
    assert "Removes 3 of 6 blocks" in ran.out
    assert cli("plan", "show", plan, "--json").json == json.loads(plan.read_text())
    out = tmp_path / "shorter.json"
    assert "Removes 1 of 6 blocks" in cli("plan", "cut", plan, "--remove", 1, "--out", out).out
    assert PruningPlan.load(out).order == PruningPlan.load(plan).order[:1]
    assert [PruningPlan.load(path).made_by.options["remove"] for path in (plan, out)] == ["3", "1"]
    assert sentence(cli("plan", "cut", plan, "--remove", 1, "--out", out)).startswith(f"--out {out} exists")
    shown = cli("plan", "cut", plan, "--remove", 1).out
    assert "Removes 1 of 6 blocks" in shown
    assert "Nothing was written; add --out FILE to keep the plan." in shown
    more = cli("plan", "cut", plan, "--remove", 4, "--out", tmp_path / "more.json")
    assert sentence(more) == "cannot cut the plan to 4 units: it holds 3."


def test_what_overflows_is_shown_alike_by_the_search_and_from_its_file() -> None:
    block = [Unit(index, "block") for index in range(2)]
    made_by = MadeBy("greedy", "nll", None, {}, 0, None, "0")
    plan = PruningPlan(
        ModelIdentity("m", None, "sha256:0", 4), tuple(block), ((block[0], 3.5), (block[1], math.inf)), 3.25, made_by
    )
    shown = []
    for each in (plan, PruningPlan.from_json(plan.to_json())):
        console = Console(file=io.StringIO(), width=100)
        show_plan(console, each)
        shown.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert shown[0] == shown[1]
    assert re.search(r"1 +block\.0 +3\.5000 +\+0\.2500", shown[0])
    assert re.search(r"2 +block\.1 +– *\n", shown[0])


@pytest.mark.parametrize(
    ("content", "window", "complaint"),
    [("a", 32, r"the evaluation text has 1 tokens"), ("The cat sat. " * 20, 2, r"use a window of at least 3")],
)
def test_what_cannot_be_measured_is_told_before_the_search(
    cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, window: int, complaint: str
) -> None:
    monkeypatch.setattr("shallower.verbs.prune.search_plan", pytest.fail)
    module = importlib.import_module("shallower.evaluation.perplexity")  # the package's name is the function
    monkeypatch.setattr(module, "resolve_bos", lambda *_: (None, 1))
    (tmp_path / "held-out.txt").write_text(content)
    words = ("--calibration", place / "text.txt", "--text", tmp_path / "held-out.txt", "--window", window, "--quiet")
    ran = cli("prune", place / "tiny", "--remove", 2, "--out", tmp_path / "out", *words, *SMALL)
    assert re.search(complaint, sentence(ran))


def test_prune_says_what_it_cost_and_how_to_load_it(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    ran = cli(
        *("prune", place / "tiny", "--remove", "30%", "--search", "contiguous", "--metric", "angular", "--out", out),
        *(
            "--calibration",
            place / "text.txt",
            "--text",
            place / "held-out.txt",
            "--window",
            32,
            "--windows",
            2,
            *SMALL,
        ),
    )
    assert ran.code == 0, ran.err
    assert "Removes 2 of 6 blocks" in ran.out
    assert "Parameters" in ran.out
    assert "Weights in float32" in ran.out
    assert "Perplexity on held-out.txt" in ran.out
    assert f"Page:  {out / 'report.html'}" in ran.out
    load = ran.out[ran.out.index("from transformers import") :].strip()
    assert len(load.splitlines()) == 3
    found: dict[str, Any] = {}
    exec(load, found)
    assert found["model"].config.num_hidden_layers == 4
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]
    told = json.loads((out / "report.json").read_text())
    assert told["speed_setting"].endswith("medians of 5 alternating runs")
    for side in ("dense", "pruned"):
        least, most = told[side]["decode_range"]
        assert least <= told[side]["decode_tokens_per_s"] <= most
    assert re.search(
        r"\| decoding, tokens/s \| \S+ \| \S+: (\S+× (faster|slower)|unchanged)", (out / "README.md").read_text()
    )


def test_prune_by_plan_and_json(cli: Cli, place: Path, plan: Path, tmp_path: Path) -> None:
    short = ("--calibration", place / "text.txt", "--window", 32, "--windows", 1, "--no-speed", *SMALL)
    ran = cli("prune", place / "tiny", "--plan", plan, "--out", tmp_path / "smaller", "--json", *short)
    assert (ran.json["dense"]["blocks"], ran.json["pruned"]["blocks"]) == (6, 3)
    assert ran.json["plan"] == json.loads(plan.read_text())
    assert ran.err == ""
    again = cli("prune", place / "tiny", "--plan", plan, "--out", tmp_path / "smaller", "--force", "--quiet", *short)
    assert "; 50.0 % of those in blocks)" in again.out


def test_a_plan_chosen_behind_a_repair_says_so(cli: Cli, plan: Path, tmp_path: Path) -> None:
    told = json.loads(plan.read_text())
    told["made_by"]["options"]["repair"] = "low-rank"
    repaired = tmp_path / "plan.json"
    repaired.write_text(json.dumps(told))
    shown = [" ".join(cli("plan", "show", path).out.split()) for path in (plan, repaired)]
    assert ["nll after low-rank Difference" in text for text in shown] == [False, True]
    assert ["objective nll after low-rank" in text for text in shown] == [False, True]
    assert ["repairs were not fitted" in text for text in shown] == [False, True]


def test_report(cli: Cli, pruned: Path) -> None:
    page = (pruned / "report.html").read_text(encoding="utf-8")
    (pruned / "report.html").unlink()
    ran = cli("report", pruned)
    assert ran.code == 0
    assert "Removes 3 of 6 blocks" in ran.out
    assert (pruned / "report.html").read_text(encoding="utf-8") == page
    assert cli("report", pruned, "--json").json["pruned"]["blocks"] == 3
    assert "report.json" in sentence(cli("report", pruned.parent, "--quiet"))


@pytest.mark.parametrize("made_by", ["prune", "recover"])
def test_report_names_no_page_that_it_could_not_write(
    made_by: str, cli: Cli, pruned: Path, place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    if made_by == "prune":
        shutil.copytree(pruned, folder)
    else:
        asked = ("--teacher", place / "tiny", "--with", "emulated-update", "--calibration", place / "text.txt", *SMALL)
        assert cli("recover", pruned, *asked, "--out", folder, "--windows", 1).code == 0
    page = folder / "report.html"
    assert f"Page:  {page}" in cli("report", folder).out
    page.unlink()
    page.mkdir()
    assert "Page:" not in (ran := cli("report", folder)).out
    assert "the page was not made anew: cannot write" in ran.err
    assert cli("report", folder, "--json").json["page"] is None


def test_recover_shows_what_each_step_gave(cli: Cli, place: Path, pruned: Path, tmp_path: Path) -> None:
    asked = ("recover", pruned, "--teacher", place / "tiny", "--with", "emulated-update", "--out", tmp_path / "out")
    texts = ("--text", place / "held-out.txt", "--window", 32, "--windows", 2)
    ran = cli(*asked, "--calibration", place / "text.txt", *SMALL, *texts)
    assert ran.code == 0
    written = json.loads((tmp_path / "out" / "recovery.json").read_text())
    before, after = written["recovery"]
    lines = [line.split() for line in ran.out.splitlines()]
    [head] = [" ".join(words) for words in lines if "Perplexity" in words]
    assert head.startswith("Perplexity on held-out.txt Parameters added Tokens read Time")
    rows = {words[0]: words[1:] for words in lines if words}
    measured = cli("eval", place / "tiny", *texts, "--dtype", "float32", "--device", "cpu", "--json").json
    [dense] = measured["evaluations"]
    assert written["dense"] == {"held-out.txt": pytest.approx(dense["perplexity"])}
    assert rows["dense"] == [number(dense["perplexity"])]
    assert f"\n| dense | {number(dense['perplexity'])} |" in (tmp_path / "out" / "README.md").read_text()
    assert rows["cut"] == [number(before["perplexity"]["held-out.txt"])]
    told = [number(after["perplexity"]["held-out.txt"]), f"{after['parameters']:,}", f"{after['tokens']:,}"]
    assert rows["emulated-update"][:3] == told
    assert after["parameters"] > 0
    assert f"Model: {tmp_path / 'out'}" in ran.out
    page = tmp_path / "out" / "report.html"
    shown = page.read_text(encoding="utf-8")
    assert f"repaired by emulated-update: perplexity on held-out.txt {rows['cut'][0]} → {told[0]}" in shown
    page.unlink()
    again = cli("report", tmp_path / "out")
    assert again.out.split() == ran.out.split()
    assert str(tmp_path) not in shown
    assert page.read_text(encoding="utf-8") == shown
    answer = cli("report", tmp_path / "out", "--json").json
    assert (answer["recovery"], answer["page"]) == (written["recovery"], str(page))
    unwritten = cli(*asked[:-2], "--calibration", place / "text.txt", *SMALL, *texts, "--json").json
    assert set(unwritten) == set(answer)
    assert [unwritten[key] for key in ("folder", "page", "form")] == [None] * 3


def test_eval_compares_with_the_first(cli: Cli, place: Path, pruned: Path) -> None:
    texts = ("--text", place / "text.txt", "--text", place / "held-out.txt", "--window", 32, "--windows", 2)
    ran = cli("eval", place / "tiny", pruned, *texts, "--dtype", "float32")
    assert ran.code == 0
    for word in ("tiny", "smaller", "text.txt", "held-out.txt"):
        assert word in ran.out
    assert ran.out.count("×)") == 2
    told = cli("eval", place / "tiny", pruned, *texts, "--stride", 16, "--dtype", "float32", "--json").json[
        "evaluations"
    ]
    assert [(row["model"], row["text"]) for row in told[::3]] == [("tiny", "text.txt"), ("smaller", "held-out.txt")]


def test_eval_tells_models_and_texts_of_one_name_apart(cli: Cli, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    shutil.copy(place / "text.txt", tmp_path)
    ran = cli(
        *("eval", place / "tiny", tmp_path / "tiny", "--text", place / "text.txt", "--text", tmp_path / "text.txt"),
        *("--window", 32, "--windows", 1),
    )
    for label in (f"{place.name}/tiny", f"{tmp_path.name}/tiny", f"{place.name}/text.txt", f"{tmp_path.name}/text.txt"):
        assert label in ran.out
    assert ran.out.count("×)") == 2


def test_eval_compares_no_perplexity_on_other_windows(cli: Cli, place: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(place / "tiny", tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    asked = ("eval", place / "tiny", short, place / "other", "--text", place / "text.txt", "--dtype", "float32")
    asked += ("--window", 32, "--windows", 4)
    ran = cli(*asked)
    assert ran.out.count("×)") == 1  # of the third model alone
    assert re.search(r"text\.txt: [\d,]+ tokens scored in 4 windows, other windows by short; bits per byte", ran.out)
    told = cli(*asked, "--json").json
    shorter, note = told["notes"]
    assert shorter == "short reads 16 tokens at most: its windows are of 16 tokens instead of 32."
    assert re.match(
        r"text\.txt: short was scored on \d+ tokens \([\d,]+ bytes\) in 4 windows, tiny on \d+ tokens", note
    )
    assert note in " ".join(ran.out.split())
    assert [row["model"] for row in told["differences"]] == ["other"]


def test_methods(cli: Cli) -> None:
    ran = cli("methods")
    assert ran.code == 0
    told = cli("methods", "--json").json["methods"]
    assert {method["kind"] for method in told} == {kind.kind for kind in registry.REGISTRIES}
    assert all(method["name"] in ran.out and method["summary"] for method in told)
    one = cli("methods", "angular").out
    assert "Angle between the stream before and after" in one
    assert "https://arxiv.org/abs/2403.17887" in one
    assert "--set width=" in cli("methods", "beam").out
    assert "true or false; default false" in cli("methods", "refit").out
    assert "did you mean 'greedy'?" in sentence(cli("methods", "gredy"))


@pytest.mark.parametrize(
    ("published", "names"),
    [
        ("sleb", ["greedy"]),
        ("BlockPruner", ["greedy"]),
        ("evopress", ["evolutionary"]),
        ("shortgpt", ["cosine"]),
        ("block-influence", ["cosine"]),
        ("bi", ["cosine"]),
        ("ppl", ["loss"]),
        ("ReplaceMe", ["linear-fold"]),
        ("gromov", ["angular", "contiguous"]),
    ],
)
def test_methods_are_found_by_what_papers_call_them(cli: Cli, published: str, names: list[str]) -> None:
    assert [method["name"] for method in cli("methods", published, "--json").json["methods"]] == names


def test_a_description_is_broken_where_its_paragraphs_end() -> None:
    text = "One line\nand more.\n\nlr, clip: a rate\nand a norm.\nminutes: time.\n\n- an item\n  of two lines"
    told = "One line and more.\n\nlr, clip: a rate and a norm.\nminutes: time.\n\n- an item of two lines"
    assert unbroken(text) == told


def test_sentences_break_between_words_on_a_terminal_alone() -> None:
    def printed(**kind: bool) -> str:
        stream = io.StringIO()
        say(Console(file=stream, width=20, **kind), "a sentence of several needed words")
        return stream.getvalue()

    assert printed(force_terminal=True) == "a sentence of \nseveral needed words\n"
    assert printed() == "a sentence of several needed words\n"


def test_links() -> None:
    assert paper_links("arXiv:2402.09025, arXiv:2406.10594.") == [
        "https://arxiv.org/abs/2402.09025",
        "https://arxiv.org/abs/2406.10594",
    ]
    assert paper_links("a book") == []


def test_demo_ends_with_what_to_look_at(
    cli: Cli, pruned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from shallower.reporting.data import ReportData
    from shallower.verbs import demo

    class Job(NamedTuple):
        report: ReportData

    asked: list[Any] = []

    def job(out: Path, **given: Any) -> Job:
        asked.append((out, given["force"]))
        return Job(ReportData.load(pruned / "report.json"))

    monkeypatch.setattr(demo, "demo", job)
    program = tmp_path / "bin" / "shallower"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    ran = cli("demo", "--out", tmp_path / "d", "--force")
    assert ran.code == 0
    assert asked == [(tmp_path / "d", True)]
    assert f"shallower report {tmp_path / 'd'}" in ran.out
    assert "activate" not in ran.out
    assert cli("demo", "--json").json["folder"] == "smollm2-shallower"
    assert asked[1] == (Path("smollm2-shallower"), False)
    environment = tmp_path / "clone" / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").touch()
    monkeypatch.setattr(sys, "prefix", str(environment.parent))
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "What next?\n  . .venv/bin/activate    # so that the shell finds shallower\n" in cli("demo").out


# Mistakes


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (["serch"], r"no such command 'serch'. Did you mean 'search'.*\?"),
        (["score", "{tiny}", "--metrc", "x"], r"no such option.*--metrc.*--metric"),
        (["score"], r"missing argument 'MODEL'\. See 'shallower score --help'\."),
        (["search", "{tiny}"], r"missing option '--remove'"),
        (["score", "{tiny}", "--sequences", "none"], r"invalid value for '--sequences'"),
        (["score", "{tiny}", "--sequences", "0"], r"^--sequences 0: give 1 or more"),
        (["score", "{tiny}", "--positions", "first"], r"'first' is not one of 'auto', 'all', 'last'"),
        (["score", "{tiny}", "--units", "blok"], r"'blok' is not one of 'block', 'attn', 'mlp', 'sublayer', 'all'"),
        (["score", "{place}/none"], r"none"),
        (["inspect", "{place}/none"], r"none"),
        (["inspect", "{place}"], r"config\.json"),
        (["inspect", "{tiny}", "--remove", "block.6"], r"block\.6 does not exist"),
        (["inspect", "{tiny}", "--device", "tpu"], r"unknown device 'tpu'.*Known: auto"),
        (["inspect", "{tiny}", "--dtype", "floot32"], r"unknown dtype 'floot32'; did you mean 'float32'\?"),
        (["eval", "{tiny}"], r"nothing to evaluate: name at least one --text, some --tasks or a --suite"),
        (["eval", "{tiny}", "--text", "{place}/none.txt"], r"none\.txt"),
        (["score", "{tiny}", "--metric", "cosin"], r"unknown metric 'cosin'; did you mean 'cosine'\?"),
        (["score", "{tiny}", "--set", "beam"], r"--set 'beam' cannot be read: write name=value"),
        (["score", "{tiny}", "--set", "a=1", "--set", "a=2"], r"--set names 'a' twice"),
        (["score", "{tiny}", "--set", "a=1"], r"unknown option 'a' of metric 'cosine'\. There is none\."),
        (["score", "{tiny}", "--seed", "-1"], r"^--seed -1: give 0 or more\. See"),
        (["score", "{tiny}", "--length", "1"], r"^--length 1: give 2 or more\. See"),
        (["search", "{tiny}", "--remove", "25"], r"something must stay\. For a share write 25%\."),
        (["search", "{tiny}", "--remove", "25%,"], r"--remove '25%,' cannot be read, as an item is empty:"),
        (["search", "{tiny}", "--remove", "nan%"], r"--remove 'nan%' cannot be read, as 'nan%' is no share:"),
        (["search", "{tiny}", "--remove", "2", "--search", "SLEB"], r"unknown search 'SLEB', which is called 'greedy'"),
        (
            ["score", "{place}/mute"],
            r"mute has no tokenizer.*put the tokenizer's files \(tokenizer\.json, tokenizer_conf",
        ),
        (
            ["score", "{tiny}", "--calibration", "{place}/text.txt", "--sequences", "1000000"],
            r"but 1,000,000 sequences of 128 need [\d,]+: use --sequences \d+, a shorter",
        ),
        (
            ["score", "{tiny}", "--calibration", "{place}/text.txt?sequences=1000000"],
            r"but 1,000,000 sequences of \d+ need [\d,]+: use sequences=\d+, a shorter",
        ),
        (
            ["study", "{place}/broken.yaml"],
            r"cannot be read as a study: line 2, column 2: expected ',' or '\]', but got",
        ),
        (["score", "{tiny}", "--calibration", "{place}/empty.txt"], r"empty\.txt"),
        (["score", "{tiny}", "--calibration", "{place}/short.txt", "--length", "200"], r"short\.txt"),
        (["score", "{tiny}", "--calibration", "{place}/binary.txt"], r"binary\.txt"),
        (["score", "{tiny}", "--out", "{place}/empty.txt/scores.json"], r"empty\.txt is not a folder"),
        (["prune", "{tiny}", "--remove", "1", "--out", "{place}/empty.txt/out"], r"empty\.txt is not a folder"),
        (["eval", "{tiny}", "--text", "{tiny}", "--out", "{place}/empty.txt/out"], r"empty\.txt is not a folder"),
        (
            ["recover", "{tiny}", "--with", "refit", "--plan", "p", "--out", "{place}/empty.txt/out"],
            r"empty\.txt is not a folder",
        ),
        (
            ["corpus", "build", "python:docs", "--model", "{tiny}", "--out", "{place}/empty.txt/set"],
            r"empty\.txt is not",
        ),
        (["score", "{tiny}", "--out", "{place}"], r"is a folder; name a file"),
        (["score", "{tiny}", "--out", "{place}/" + "a" * 300], r"File name too long .*; choose another name"),
        (
            ["search", "{tiny}", "--remove", "2", "--search", "gredy"],
            r"unknown search 'gredy'; did you mean 'greedy'\?",
        ),
        *(
            (["search", "{place}/no-model", "--remove", "2", "--search", names], complaint)
            for names, complaint in (
                ("evolutionary,greedy", r"throws away what evolutionary finds, as greedy starts anew"),
                ("greedy,one-shot", r"can stand \(annealing, evolutionary, swap\); drop greedy or one-shot\."),
                ("greedy,swap,milp", r"throws away what swap finds, as milp starts anew"),
            )
        ),
        *(
            (["search", "{place}/no-model", "--remove", "2", *words], complaint)
            for words, complaint in (
                (["--scores", "{attentions}"], r"takes no --metric or --scores; drop it or use one-shot"),
                (
                    ["--search", "one-shot", "--scores", "{place}/none.json"],
                    r"none\.json cannot be read as scores.*`shallower score MODEL --out FILE`",
                ),
                (["--search", "one-shot", "--scores", "{place}/text.txt"], r"text\.txt cannot be read as scores"),
                (
                    ["--search", "one-shot", "--metric", "taylor", "--scores", "{attentions}"],
                    r"--metric taylor and --scores of metric cosine contradict each other",
                ),
                (["--search", "one-shot", "--metric", "taylor", "--stream-blocks"], r"metric taylor needs gradients"),
                (["--protect", "attn.3"], r"--protect 'attn\.3' cannot be read"),
                (
                    ["--exact", "--repair", "low-rank"],
                    r"do not race with --repair low-rank, so --exact would change no",
                ),
                (["--exact", "--stream-blocks"], r"do not race where blocks are streamed, so --exact would change"),
            )
        ),
        (["search", "{tiny}", "--remove", "2", "--objective", "nl"], r"unknown objective 'nl'; did you mean 'nll'\?"),
        (["search", "{tiny}", "--remove", "0"], r"--remove 0 removes nothing"),
        (["search", "{tiny}", "--remove=-1"], r"--remove -1 removes nothing"),
        (["search", "{tiny}", "--remove", "6"], r"cannot remove 6 units"),
        (["search", "{tiny}", "--remove", "99%"], r"only with all 6 blocks, and something must stay: remove less"),
        (["search", "{tiny}", "--remove", "12", "--units", "all"], r"cannot remove 12 units"),
        (["search", "{tiny}", "--remove", "block.0-5"], r"names all 6 blocks"),
        (["search", "{tiny}", "--remove", "attn.0-5,mlp.0-5"], r"names all 6 blocks, whole or by their sublayers"),
        (["search", "{tiny}", "--remove", "block.0-2,attn.3-5,mlp.3-5"], r"names all 6 blocks"),
        (
            ["search", "{learned}", "--remove", "1", "--length", "300"],
            r"300 tokens.* the 256 positions .* --length 256",
        ),
        (["search", "{tiny}", "--remove", "1", "--memory", "9" * 400], r"--memory 9{12}… is more than any machine has"),
        (
            ["search", "{tiny}", "--remove", "2", "--search", "milp", "--scores", "{attentions}"],
            r"block\.0 \(one of 6\) has no score; score with --units block\.",
        ),
        (
            ["search", "{tiny}", "--remove", "2", "--search", "one-shot", "--units", "all", "--scores", "{attentions}"],
            r"block\.0 \(one of 12\) has no score; score with --units all\.",
        ),
        *(
            (["search", "{tiny}", "--remove", "2", "--search", name, "--set", f"{option}={value}"], complaint)
            for name, option, value, complaint in (
                ("annealing", "cold", "0", r"option cold='0' does not fit: it takes a finite number above 0\."),
                ("annealing", "hot", "-1", r"option hot='-1' does not fit"),
                ("annealing", "hot", "nan", r"option hot='nan' does not fit"),
                ("exhaustive", "limit", "-5", r"option limit='-5' does not fit: it takes a whole number above 0\."),
                ("beam", "width", "0", r"option width='0' does not fit"),
                ("annealing", "steps", "0", r"option steps='0' does not fit"),
                ("swap", "rounds", "0", r"option rounds='0' does not fit"),
                ("evolutionary", "generations", "-5", r"option generations='-5' does not fit"),
                ("evolutionary", "offspring", "0", r"option offspring='0' does not fit"),
                ("evolutionary", "patience", "0", r"option patience='0' does not fit"),
            )
        ),
        *(
            (["search", "{tiny}", "--remove", "2", "--objective", name, "--set", f"temperature={value}"], complaint)
            for name in ("kl", "js")
            for value in ("0", "-1", "nan", "inf")
            for complaint in [rf"option temperature='{value}' does not fit: it takes a finite number above 0\."]
        ),
        (["search", "{tiny}", "--remove", "130%"], r"--remove 130% would remove every block"),
        (["search", "{tiny}", "--remove", "block.3", "--metric", "angular"], r"so --metric would change nothing"),
        (
            ["search", "{tiny}", "--remove", "block.3", "--search", "last"],
            r"--remove block\.3 names what goes, so --search would change nothing; drop it\.",
        ),
        (
            ["search", "{place}/no-model", "--remove", "block.3", "--scores", "{place}/none.json"],
            r"so --scores would change nothing",
        ),
        (
            ["search", "{tiny}", "--remove", "block.3", "--units", "all", "--search", "beam", "--set", "width=2"],
            r"so --search, --units, --set would change nothing; drop them\.",
        ),
        (["search", "{tiny}", "--remove", "block.99"], r"block\.99 does not exist"),
        (["search", "{tiny}", "--remove", "blok.1"], r"'blok\.1' is not a unit"),
        (["search", "{tiny}", "--remove", "block.1,block.1"], r"block\.1 is named twice"),
        (["search", "{tiny}", "--remove", "block.1,attn.1"], r"attn\.1 is part of block\.1"),
        (["search", "{tiny}", "--remove", "2", "--protect", "first:9"], r"--protect first:9 is more than"),
        (["search", "{tiny}", "--remove", "2", "--metric", "cosine"], r"takes no --metric"),
        (["plan", "show", "{place}/none.json"], r"there is no plan at"),
        (["plan", "show", "{place}/text.txt"], r"cannot be read as a plan"),
        (["plan"], r"[mM]issing command"),
        (["report", "{place}/tiny"], r"holds no report\.json"),
        (["methods", "loses"], r"unknown method 'loses'; did you mean 'loss'\?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(cli: Cli, place: Path, tmp_path: Path, asked: list[str], complaint: str) -> None:
    for name, content in (
        ("empty.txt", b""),
        ("short.txt", b"Too short."),
        ("binary.txt", bytes(range(256)) * 64),
        ("broken.yaml", b"a: [1\nb: {"),
    ):
        (place / name).write_bytes(content)
    known = {"tiny": place / "tiny", "learned": place / "learned", "attentions": place / "attentions.json"}
    if not (place / "mute").exists():
        shutil.copytree(place / "tiny", place / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    words = [word.format(place=place, **known) for word in asked]
    if asked[0] in ("score", "search") and {"{tiny}", "{learned}"} & set(asked):
        words += [] if "--calibration" in asked else ["--calibration", str(place / "text.txt")]
        words += ["--quiet"] + ([] if "--out" in asked else ["--out", str(tmp_path / "file.json")])
        words += [] if "--length" in asked or "--sequences" in asked else list(SMALL)[:4]
    elif asked[0] in ("inspect", "score", "eval"):
        words.append("--quiet")
    assert re.search(complaint, sentence(cli(*words)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overflows", "complaint"),
    [
        (
            lambda removed: len(removed) > 1,
            r"without block\.\d(-|, block\.)\d, the best that was found, the model gives no",
        ),
        (lambda removed: True, r"the model itself gives no finite losses on this text.* try --dtype float32"),
    ],
    ids=["without", "dense"],
)
def test_a_search_without_a_finite_loss_ends_with_a_sentence(
    cli: Cli,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overflows: Callable[[Any], bool],
    complaint: str,
) -> None:
    from shallower.engine import Ablator

    def losses(self: Ablator, candidates: Any, keep: int | None = None, *, race: bool = True) -> list[float]:
        return [math.inf if overflows(removed) else 3.0 for removed in candidates]

    monkeypatch.setattr(Ablator, "losses", losses)
    asked = ("search", place / "tiny", "--remove", 2, "--calibration", place / "text.txt", "--quiet", *SMALL)
    assert re.search(complaint, sentence(cli(*asked, "--out", tmp_path / "plan.json")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "shallower.plan/9"}, r"has format 'shallower\.plan/9'; this version .* reads 'shallower\.plan/1'"),
        ({"removed": []}, r"has an unknown key 'removed' \(did you mean 'remove'\?\)"),
        ({"remove": ["block.0"]}, r"'order' does not list the same units"),
    ],
)
def test_a_plan_with_a_fault(
    cli: Cli, place: Path, plan: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(plan.read_text()), **change}))
    for asked in (
        ["plan", "show", path],
        [
            "prune",
            place / "tiny",
            "--plan",
            path,
            "--out",
            tmp_path / "out",
            "--quiet",
            "--calibration",
            place / "text.txt",
        ],
    ):
        assert re.search(complaint, sentence(cli(*asked)))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (["other", "--plan", "{plan}"], r"this plan was made for tiny \(6 blocks, .*\), not for other"),
        (["tiny"], r"say what to remove"),
        (["tiny", "--remove", "2", "--plan", "{plan}"], r"say what to remove"),
        (["tiny", "--plan", "{plan}", "--search", "last"], r"--plan says what goes, so --search would change nothing"),
        (
            ["tiny", "--plan", "{plan}", "--recover", "refit", "--set", "rigde=0.1"],
            r"'rigde' of .*; did you mean 'ridge'\?",
        ),
        (["tiny", "--plan", "{plan}", "--recover", "refit", "--set", "beam=4"], r"unknown option 'beam' of .*refit"),
        (["tiny", "--plan", "{plan}", "--recover", "refit", "--memory", "4XB"], r"4XB"),  # a repair keeps to it
        (["tiny", "--plan", "{plan}", "--repair", "refit"], r"--plan says what goes, so --repair would change nothing"),
        (["tiny", "--remove", "2", "--search", "last", "--repair", "refit"], r"'last' judges no candidates"),
        (["tiny", "--remove", "2", "--repair", "refit", "--workers", "2"], r"drop --objective and --workers"),
        (["tiny", "--plan", "{plan}", "--memory", "4GB"], r"--plan says what goes, so --memory would change nothing"),
        (["tiny", "--remove", "2", "--search", "gredy"], r"unknown search 'gredy'; did you mean 'greedy'\?"),
        (["tiny", "--remove", "2", "--metric", "cosin"], r"unknown metric 'cosin'; did you mean 'cosine'\?"),
        (["tiny", "--remove", "0"], r"removes nothing"),
        (["tiny", "--remove", "6"], r"cannot remove 6 units"),
        (["tiny", "--remove", "block.1,block.1"], r"named twice"),
        (
            ["tiny", "--remove", "block.1", "--search", "one-shot", "--metric", "taylor"],
            r"--remove block\.1 names what goes, so --search, --metric would change nothing; drop them\.",
        ),
        (
            ["tiny", "--remove", "block.1", "--search", "one-shot", "--metric", "taylor", "--set", "order=2"],
            r"so --search, --metric, --set would change nothing; drop them\.",
        ),
        (["tiny", "--remove", "block.1", "--exact"], r"so --exact would change nothing; drop it\."),
        (["tiny", "--remove", "block.1", "--search", "gredy"], r"unknown search 'gredy'; did you mean 'greedy'\?"),
        (["tiny", "--remove", "2", "--text", "none.txt"], r"none\.txt"),
        (["tiny", "--plan", "none.json", "--text", "none.txt"], r"there is no plan at none\.json"),
        (["nowhere", "--remove", "2", "--exact", "--repair", "refit"], r"--exact would change nothing; drop it\."),
        (["nowhere", "--remove", "2", "--protect", "attn.3"], r"--protect 'attn\.3' cannot be read"),
        (["truncated", "--remove", "2"], r"truncated"),
        (["pickle", "--remove", "2"], r"pickle"),
        (["encoder", "--remove", "2"], r"encoder|decoder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_prune_refuses_before_it_writes(
    cli: Cli, place: Path, plan: Path, tmp_path: Path, asked: list[str], complaint: str
) -> None:
    model = place / asked[0]
    if not model.exists() and asked[0] != "nowhere":
        shutil.copytree(place / "tiny", model)
        weights = model / "model.safetensors"
        if asked[0] == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif asked[0] == "pickle":
            weights.rename(model / "pytorch_model.bin")
        else:
            (model / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    words = [word.format(plan=plan) for word in asked[1:]]
    text = ("--calibration", place / "text.txt", "--window", 32, "--windows", 1, "--no-speed", *SMALL)
    ran = cli("prune", model, *words, "--out", tmp_path / "out", "--quiet", *text)
    assert re.search(complaint, sentence(ran))
    assert list(tmp_path.iterdir()) == []


def test_prune_does_not_replace_unasked(cli: Cli, place: Path, pruned: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in pruned.iterdir()}
    asked = ("prune", place / "tiny", "--remove", 2, "--out", pruned, "--quiet", "--calibration", place / "text.txt")
    assert re.search("exists; choose another .* --force", sentence(cli(*asked)))
    assert {path.name: path.stat().st_mtime_ns for path in pruned.iterdir()} == before


def test_a_full_disk(cli: Cli, place: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    told = sentence(cli("plan", "cut", plan, "--remove", 1, "--out", tmp_path / "plan.json"))
    assert "No space left on device" in told
    assert list(tmp_path.iterdir()) == []


# What is not the user's fault


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("no."), 2, "no."),
        (VerificationError("differs."), 1, "differs."),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; nothing half-written. Run the same command again: it goes on with what",
        ),
        (main.Terminated(signal.SIGTERM), 143, "terminated; nothing half-written."),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 2, "the disk is full (x.bin)"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "Permission denied (x)"),
        (
            sqlite3.OperationalError("database or disk is full"),
            2,
            "measurements cannot be kept in the cache (database or",
        ),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (RuntimeError("Could not determine home directory."), 2, "a path begins with ~"),
        (ZeroDivisionError("a\nb"), 1, "this is a defect in shallower"),
    ],
)
def test_what_errors_are_told_as(error: BaseException, code: int, told: str) -> None:
    said, found = main.explain(error, debug=True)
    assert found == code
    assert said.startswith(told)


@pytest.mark.parametrize(
    ("module", "function", "asked", "advice"),
    [
        (
            "score",
            "score_many",
            ["--metric", "cosine"],
            "give a smaller --length, another --dtype or another --device.",
        ),
        ("score", "score_many", ["--memory", "4GB"], "give less --memory, a smaller --length"),
        (
            "recover",
            "recover",
            ["--with", "full", "--out", "o"],
            "give a smaller --set at_once=… or --set recompute=true in training, a smaller --length, a smaller",
        ),
        ("recover", "recover", ["--with", "refit", "--memory=4GB"], "give less --memory, a smaller --set"),
        ("prune", "prune", ["--plan", "p", "--out", "o"], "give a smaller --length, a smaller --window"),
        ("prune", "prune", ["--remove", "2", "--out", "o"], "give less --memory, a smaller --length"),
        (
            "prune",
            "prune",
            ["--plan", "p", "--recover", "refit", "--memory=4GB", "--out", "o"],
            "give less --memory, a smaller --set",
        ),
        ("evaluate", "evaluate", ["--text", "t"], "give a smaller --window, another --dtype"),
        ("evaluate", "evaluate", ["--tasks", "boolq", "--batch", "8"], "give a smaller --batch, another --dtype"),
        ("ratio_curve", "ratio_curve", ["--tasks", "boolq", "--plan", "p"], "give less --memory, another --dtype"),
        ("bench", "bench", [], "give a smaller --prompt, a smaller --batch, another"),
    ],
)
def test_what_saves_memory_is_what_the_verb_heeds(
    cli: Cli,
    place: Path,
    module: str,
    function: str,
    asked: list[str],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_room(*args: Any, **how: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(importlib.import_module(f"shallower.verbs.{module}"), function, no_room)
    verb = "eval" if module in ("evaluate", "ratio_curve") else module
    assert f"out of memory; {advice}" in sentence(cli(verb, place, *asked))


def test_a_verb_of_a_verb_says_what_saves_memory(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any, **how: Any) -> None:
        raise MemoryError

    (tmp_path / "text.txt").write_text("words")
    monkeypatch.setattr(importlib.import_module("shallower.verbs.corpus"), "build", no_room)
    told = sentence(cli("corpus", "show", str(tmp_path / "text.txt"), "--model", "demo"))
    assert "out of memory; give a smaller --length" in told


def test_a_defect_keeps_its_traceback(cli: Cli, plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(path: Path) -> PruningPlan:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(PruningPlan, "load", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = sentence(cli("plan", "show", plan), code=1)
    assert "ZeroDivisionError: by zero. The traceback is in" in told
    [kept] = tmp_path.iterdir()
    assert str(kept) in told
    assert "in broken" in kept.read_text()
    by_option = cli("plan", "show", plan, "--debug")
    monkeypatch.setenv("SHALLOWER_DEBUG", "1")
    for shown in (by_option, cli("plan", "show", plan)):
        assert "Traceback" in shown.err
        assert "shallower: this is a defect" in shown.err


# Progress


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 62.0, 63.0, 64.0, 65.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.listening(lines()), progress.task("outer", 2) as step, progress.task("inner"):
        step()
    assert capsys.readouterr().err.splitlines() == [
        "outer: 1 of 2 after 62 s",
        "  inner: 62.0 s",
        "outer: 64.0 s",
    ]


def test_progress_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from shallower.cli import bars

    screen = io.StringIO()
    monkeypatch.setattr(bars, "Console", lambda **_: Console(file=screen, force_terminal=True, width=80, height=9))
    with bars.bars() as (listener, _), progress.listening(listener), progress.task("reading a model"):
        name = "a-text-with-quite-a-long-name.jsonl"
        with progress.task(f"perplexity of the dense model on {name}", 12) as step, progress.task("training", 1000):
            step(3)
            time.sleep(0.3)  # what is done is drawn ten times a second
    with bars.bars() as (listener, _), progress.listening(listener), progress.task("training", progress.PARTS) as step:
        step(250)
        time.sleep(0.3)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    shown = [" ".join(line.split()) for line in re.split(r"[\r\n]+", plain)]
    assert any(re.fullmatch(r"\S reading a model \S+ 0:00", line) for line in shown)
    assert any(re.fullmatch(r"\S perplexity of…long-name\.jsonl \S+ 3/12 0:00.*", line) for line in shown)
    assert any(re.search(r"training .* 25 % 0:00", line) for line in shown)
    assert not [line for line in shown if "?" in line or "250/" in line]


def test_progress_of_work_that_ends_by_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 62.0, 63.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.listening(lines()), progress.task("training", progress.PARTS) as step:
        step(250)
    assert capsys.readouterr().err.splitlines() == ["training: 25 % after 62 s", "training: 63.0 s"]


@pytest.mark.parametrize("verb", [("score",), ("search", "--remove", 1), ("prune", "--remove", 1)])
def test_who_names_no_text_is_told_what_is_read(cli: Cli, place: Path, tmp_path: Path, verb: tuple[Any, ...]) -> None:
    name, *rest = verb
    asked = (name, place / "tiny", *rest, *SMALL, "--out", tmp_path / "out.json")
    brief = ("--window", 32, "--windows", 1, "--no-speed") if name == "prune" else ()
    assert cli(*asked, *brief).err.count("No text was named") == 1
    named = cli(*asked, *brief, "--force", "--calibration", place / "text.txt")
    assert (named.code, "No text was named" in named.err) == (0, False)


def test_progress_goes_to_stderr_or_nowhere(cli: Cli, place: Path) -> None:
    asked = ("inspect", place / "tiny")
    assert re.search(r"^loading tiny: [\d.]+ s$", cli(*asked).err, re.MULTILINE)
    assert cli(*asked, "--quiet").err == ""
    assert cli(*asked, "--json").err == ""


@pytest.mark.parametrize(
    "verb",
    [
        ("prune", "m", "--remove", "1"),
        ("recover", "m", "--teacher", "t", "--with", "refit"),
        ("evaluate", "m", "--text", "t"),
    ],
    ids=lambda verb: verb[0],
)
@pytest.mark.parametrize(("given", "read"), [(["--windows", "all"], None), (["--windows", "3"], 3), ([], 12)])
def test_all_windows_may_be_asked_for(
    verb: tuple[str, ...], given: list[str], read: int | None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def noted(*_: Any, max_windows: int | None, **__: Any) -> None:
        asked.append(max_windows)
        raise UserError("enough.")

    monkeypatch.setattr(importlib.import_module(f"shallower.verbs.{verb[0]}"), verb[0], noted)
    typed = ("eval" if verb[0] == "evaluate" else verb[0], *verb[1:], "--out", "o")
    assert sentence(cli(*typed, *given)) == "enough."
    assert asked == [None if verb[0] == "evaluate" and not given else read]
    assert "'0' is not 1 or more, or all" in sentence(cli(*typed, "--windows", "0"))


# Signals


def test_ctrl_c_leaves_nothing_half_written(place: Path, tmp_path: Path) -> None:
    asked = ["prune", place / "tiny", "--remove", 3, "--out", tmp_path / "out", "--calibration", "python:docs"]
    asked += ["--sequences", 256, "--length", 128, "--dtype", "float32"]
    process = subprocess.Popen(
        [*SHALLOWER, *map(str, asked)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:  # until the model is loaded and work has begun
            if line.startswith("tokens of"):
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith(
        "shallower: interrupted; nothing half-written. Run the same command again:"
    )
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["search", "m", "--remove", "1"], main.RESUME),
        (["bench", "m"], main.ANEW),
        (["inspect", "m"], main.ANEW),
        (["corpus", "build", "python", "--model", "m"], main.ANEW),
        (["corpus", "clean", "t.txt"], main.ANEW),
        (["corpus", "clean", "t.txt", "--datatrove", "f"], main.RESUME),
    ],
)
def test_what_was_kept_is_told_of_verbs_that_keep_something(
    words: list[str], again: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(get_command(main.app)), "invoke", interrupted)
    assert main.run(words) == 130
    assert capsys.readouterr().err == f"shallower: interrupted; {again}.\n"


def test_a_hang_up_is_ignored_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "run", lambda _: 0)
    before = {name: signal.getsignal(name) for name in (signal.SIGHUP, signal.SIGTERM)}
    found = []
    try:
        for inherited in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, inherited)
            with pytest.raises(SystemExit):
                main.main()
            found.append(signal.getsignal(signal.SIGHUP))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found == [signal.SIG_IGN, main._terminate]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing_behind(
    cli: Cli, place: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from shallower.surgery import save

    monkeypatch.setattr(sys.modules[save.__module__], "verify_saved", lambda *_, **__: signal.raise_signal(number))
    before = signal.signal(signal.SIGTERM, main._terminate)
    try:
        short = ("--calibration", place / "text.txt", "--window", 32, "--windows", 1, "--no-speed", *SMALL)
        ran = cli("prune", place / "tiny", "--plan", plan, "--out", tmp_path / "out", "--quiet", *short)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "nothing half-written" in sentence(ran, code=128 + number)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough(plan: Path) -> None:
    process = subprocess.Popen(
        [*SHALLOWER, "plan", "show", str(plan), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate()
    assert (process.returncode, error) == (141, b"")


def test_a_home_folder_after_an_equals_sign_is_what_shells_make_of_one(
    cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scores.json").write_text("precious")
    asked = ("score", place / "tiny", "--calibration", place / "text.txt", *SMALL, "--quiet")
    assert "exists; name another file" in sentence(cli(*asked, "--out=~/scores.json"))
    assert (tmp_path / "scores.json").read_text() == "precious"
    assert cli(*asked, "--out=~/others.json").code == 0
    assert (tmp_path / "others.json").is_file()
