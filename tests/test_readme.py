"""The README's commands and Python, run as they stand on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallower
from shallower.cli import main
from shallower.testing.families import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ shallower (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
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


def test_commands_and_code(folder: Path) -> None:
    assert [command.split()[0] for command in COMMANDS] == ["inspect", "prune", "eval", "bench"]
    for command in COMMANDS:
        assert main.run([*shlex.split(command), "--quiet"]) == 0
    loading, library = CODE
    names: dict[str, object] = {}
    exec(loading, names)
    assert names["model"].config.num_hidden_layers == 4  # type: ignore[attr-defined]  # 20 % of 6 is 2 at least
    exec(library.replace('"demo"', '"MODEL"').replace('out="smaller"', 'out="again"'), names)
    assert AutoModelForCausalLM.from_pretrained("again").config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained("again") is not None


def _places(page: Path) -> set[str]:
    """What a link into the page may name: its headings, as hosts of Markdown spell them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://") and not (target.exists() and (not place or place in _places(target))):
            dead.append(link)
    assert not dead


def test_public_names_are_sorted_and_exist() -> None:
    assert sorted(shallower.__all__) == shallower.__all__
    for name in shallower.__all__:
        assert getattr(shallower, name) is not None
    assert callable(shallower.search)
    assert callable(shallower.report)
    assert callable(shallower.study)
