"""The README's commands and Python, run as they stand on a tiny model; options and links of all pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallower
from shallower.cli import main
from shallower.recipes import shipped
from shallower.testing.families import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
COMMANDS = [
    shlex.split(line, comments=True)[2:]
    for line in README.replace("\\\n", " ").splitlines()
    if line.startswith("$ shallower ")
]
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("MODEL")
    tiny_tokenizer().save_pretrained("MODEL")
    for name, start in (("text.jsonl", 0), ("held-out.txt", 9000)):
        lines = (f'{{"text": "{" ".join(str(n * n) for n in range(i, i + 60))}"}}' for i in range(start, start + 120))
        Path(name).write_text("\n".join(lines))
    return tmp_path


def _named(words: list[str]) -> tuple[Any, list[str]] | None:
    """The command that the words begin with, and the rest of them. None when there is no such verb."""
    command: Any = typer.main.get_command(main.app)
    while verbs := getattr(command, "commands", None):
        if not words or words[0] not in verbs:
            return None
        command, words = verbs[words[0]], words[1:]
    return command, words


def test_every_command_of_the_readme_is_understood() -> None:
    assert len(COMMANDS) == 11
    for words in COMMANDS:
        found = _named(words)
        assert found, words
        command, rest = found
        command.make_context(words[0], list(rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_exist(page: Path) -> None:
    """Those of every `shallower VERB …`, up to the end of the line or of the code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"\bshallower ([a-z][^`'\n]*)", text):
        if found := _named(line.partition(" # ")[0].split()):
            command, rest = found
            known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
            assert not {word.partition("=")[0] for word in rest if word.startswith("--")} - known, line
    verbs: Any = getattr(typer.main.get_command(main.app), "commands", {})
    assert not set(re.findall(r"^(?:\$ | {4})shallower ([a-z]\S*)", text, re.MULTILINE)) - set(verbs)


def test_commands_and_code(folder: Path) -> None:
    run = [words for words in COMMANDS if not {"--suite", "--tasks"} & set(words)]  # these need the Hub
    assert [words[0] for words in run] == ["inspect", "prune", "eval", "bench", "recover", "recover", "prune"]
    for words in run:
        brief = [{"minutes=20": "minutes=0.02"}.get(word, word) for word in words]
        # what is refitted later must keep block 0, as trained models do by themselves; prune sees to that
        plain = ["--protect", "block.0"] if words[0] == "prune" and "--recover" not in words else []
        assert main.run([*brief, *plain, "--quiet"]) == 0, words
    loading, library = CODE
    names: dict[str, object] = {}
    exec(loading, names)
    assert names["model"].config.num_hidden_layers == 4  # type: ignore[attr-defined]  # 20 % of 6 is 2 at least
    exec(library.replace('"demo"', '"MODEL"'), names)
    assert AutoModelForCausalLM.from_pretrained("smaller-demo").config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained("smaller-demo") is not None


def test_every_command_of_a_paper_runs(folder: Path) -> None:
    """Those that `docs/methods.md` has beside each paper that the README names; recipes are tried elsewhere."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page.partition("## From a paper to a command")[2].partition("\n## ")[0]
    assert set(re.findall(r"arxiv\.org/abs/[\d.]+\d", README)) == set(re.findall(r"arxiv\.org/abs/[\d.]+\d", table))
    commands = [shlex.split(line) for line in re.findall(r"`shallower (prune [^`]*)`", table)]
    assert len(commands) == 8
    small = [
        "--sequences",
        "2",
        "--length",
        "16",
        "--window",
        "32",
        "--windows",
        "1",
        "--no-speed",
        "--force",
        "--quiet",
    ]
    for words in commands:
        assert main.run([*words, *small]) == 0, words
    assert set(re.findall(r"`shallower run (\S+) --out DIR`", table)) <= {*shipped()}


def _places(page: Path) -> set[str]:
    """What a link into the page may name: its headings, as hosts of Markdown spell them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://") and not (target.exists() and (not place or place in _places(target))):
            dead.append(link)
    assert not dead


def test_every_decision_is_in_the_index() -> None:
    page = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    index, _, decisions = page.partition("\n## ")
    headings = re.findall(r"^## (.*)$", f"## {decisions}", re.MULTILINE)
    assert sorted(re.findall(r"\[([^]]+)\]\(#", index)) == sorted(headings)


def test_public_names_are_sorted_and_exist() -> None:
    assert sorted(shallower.__all__) == shallower.__all__
    for name in shallower.__all__:
        assert getattr(shallower, name) is not None
    assert callable(shallower.search)
    assert callable(shallower.report)
    assert callable(shallower.study)
