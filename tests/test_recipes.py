"""Recipes: what ships can be run, and a run goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
import typer.main

from shallower.cli import main
from shallower.errors import UnknownName, UserError
from shallower.recipes import read_recipe, shipped


@pytest.mark.parametrize("name", shipped())
def test_every_step_of_what_ships_is_a_command_line_of_ours(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    assert {"demo", "paper"} <= set(recipe.sizes)
    assert recipe.source.startswith("arXiv:")
    verbs = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
    for size in recipe.sizes:
        for command in recipe.commands(size, tmp_path, {}):
            verb, *words = shlex.split(command)
            verbs[verb].make_context(verb, words)  # raises on an option or a value that there is not


def written(folder: Path, **changes: object) -> Path:
    """A recipe of two steps on a tiny model."""
    from shallower.testing.families import tiny_model, tiny_tokenizer

    tiny_model("llama", blocks=4).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text("\n\n".join(f"{n} and {n} make {2 * n}, {n + 1} does not." for n in range(200)))
    data = {
        "title": "Two steps",
        "source": "arXiv:0000.00000",
        "about": "Rank and plan.",
        "steps": [
            "score {model} --calibration {text} --sequences 2 --length 16 --out {out}/scores.json",
            "search {model} --remove {remove} --search one-shot --scores {out}/scores.json --calibration {text} "
            "--sequences 2 --length 16 --out {out}/plan.json",
        ],
        "sizes": {"demo": {"model": str(folder / "tiny"), "text": str(folder / "text.txt"), "remove": "9"}},
        **changes,
    }
    path = folder / "two.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("prune {model} --remove {remove} --recover refit,lora --out {out}/x", "lora needs the package `peft`, which"),
        ("recover {out}/x --teacher {model} --with=lora --out {out}/y", "lora needs the package `peft`, which is not"),
        ("recover {out}/x --teacher {model} --with refit --set ridge=-1 --out {out}/y", "ridge='-1' does not fit"),
        ("recover {out}/x --teacher {model} --with refitt --out {out}/y", "did you mean 'refit'"),
        ("eval {model} --tasks boolq --out {out}/y", "asking tasks needs the package `lm-eval`, which is not"),
        ("eval {model} --suite commonsense --out {out}/y", "pip install 'shallower[eval]'"),
    ],
)
def test_what_cannot_run_is_told_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: str, said: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("peft", "lm_eval") else found(name))
    first = "score {model} --calibration {text} --sequences 2 --length 16 --out {out}/scores.json"
    recipe, out = (
        written(tmp_path, steps=[first, f"{step} --calibration {{text}} --memory {{remove}}GB"]),
        tmp_path / "out",
    )
    assert main.run(["run", str(recipe), "--out", str(out), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert f"step 2 of {recipe} cannot run: " in told
    assert said in told
    assert not out.exists()


def test_a_run_goes_on_after_the_step_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = written(tmp_path), tmp_path / "out"
    assert main.run(["run", str(recipe), "--out", str(out), "--quiet"]) == 2  # 9 of 4 blocks
    assert "9" in capsys.readouterr().err
    scores = (out / "scores.json").read_bytes()
    assert main.run(["run", str(recipe), "--out", str(out), "--set", "remove=1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(step["command"].split()[0], step.get("done")) for step in told["steps"]] == [
        ("score", True),
        ("search", None),
    ]
    assert (out / "scores.json").read_bytes() == scores
    assert len(json.loads((out / "plan.json").read_text())["remove"]) == 1


def test_memory_and_workers_go_to_the_steps_that_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they would change nothing verbs refuse them, after whatever has run before."""
    searching = " --memory 1GB --workers 2"
    given = {
        "score {model} --metric loss": "",
        "search {model} --remove 2": searching,
        "search {model} --remove 2 --repair refit": " --memory 1GB",
        "search {model} --remove 2 --stream-blocks": " --memory 1GB",
        "prune {model} --remove 2 --recover lora --out {out}/a": searching,
        "prune {model} --plan {out}/plan.json --recover lora --out {out}/a": "",
        "recover {out}/a --teacher {model} --with lora": "",
        "eval {model} --tasks boolq": "",
        "study {here}/study.yaml --out {out}/study": searching,
    }
    recipe = tmp_path / "many.yaml"
    told = {"title": "Many steps", "source": "arXiv:0000.00000", "about": "All that there is."}
    recipe.write_text(json.dumps({**told, "steps": list(given), "sizes": {"demo": {"model": "tiny"}}}))
    asked = ["run", str(recipe), "--out", str(tmp_path / "out"), "--json", "--dry-run"]
    assert main.run(asked) == 0
    plain = json.loads(capsys.readouterr().out)["steps"]
    assert main.run([*asked, "--memory", "1GB", "--workers", "2"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps == [step + more for step, more in zip(plain, given.values(), strict=True)]


def test_with_force_what_follows_from_another_value_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = written(tmp_path), tmp_path / "out"
    data = json.loads(recipe.read_text())
    recipe.write_text(
        json.dumps(data | {"steps": [*data["steps"], "plan cut {out}/plan.json --remove 1 --out {out}/less.json"]})
    )

    def run(remove: int, *more: str) -> list[bool]:
        code = main.run(["run", str(recipe), "--out", str(out), "--set", f"remove={remove}", "--json", *more])
        told = capsys.readouterr()
        if code:
            assert "plan.json exists; name another file, or add --force" in told.err
            return []
        assert len(json.loads((out / "plan.json").read_text())["remove"]) == remove
        return [step.get("done", False) for step in json.loads(told.out)["steps"]]

    assert run(1) == [False, False, False]
    assert run(2) == []
    assert run(1, "--trust-remote-code", "--memory", "1GB") == [True, True, True]
    assert run(2, "--force", "--trust-remote-code") == [True, False, False]
    assert run(2) == [True, True, True]
    assert run(1, "--force") == [True, False, False]


def test_device_and_number_format_are_given_to_the_steps_that_take_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = written(tmp_path), tmp_path / "out"
    data = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(data | {"steps": [*data["steps"], "plan cut {out}/plan.json --remove 1"]}))
    asked = ["run", str(recipe), "--out", str(out), "--set", "remove=2", "--json"]
    pin = ["--dtype", "float32", "--device", "cpu"]
    assert main.run([*asked, *pin, "--dry-run"]) == 0
    ends = [step.partition(" --device")[2] for step in json.loads(capsys.readouterr().out)["steps"]]
    assert ends == [" cpu --dtype float32", " cpu --dtype float32", ""]
    assert main.run([*asked, "--trust-remote-code", "--force", "--dry-run"]) == 0
    ends = [step.partition(" --trust")[2] for step in json.loads(capsys.readouterr().out)["steps"]]
    assert ends == ["-remote-code --force", "-remote-code --force", ""]
    assert main.run([*asked, "--memory", "1GB", "--workers", "2", "--dry-run"]) == 0
    ends = [step.partition(" --memory")[2] for step in json.loads(capsys.readouterr().out)["steps"]]
    assert ends == ["", " 1GB --workers 2", ""]  # the metric of the score needs no memory, and would refuse it
    assert main.run([*asked, "--memory", "much", "--dry-run"]) == 2
    assert "--memory 'much' cannot be read" in capsys.readouterr().err
    assert main.run([*asked, *pin, "--memory", "1GB"]) == 0
    assert json.loads((out / "plan.json").read_text())["made_by"]["options"]["dtype"] == "float32"
    capsys.readouterr()
    asked[3] = str(tmp_path / "other")
    assert main.run([*asked, "--dtype", "fp16", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "unknown dtype 'fp16'" in told


def test_a_step_is_done_once_its_work_is_whatever_becomes_of_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = written(tmp_path), tmp_path / "out"
    asked = ["run", str(recipe), "--set", "remove=1", "--quiet", "--out"]
    with monkeypatch.context() as unread:

        def gone(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        unread.setattr("shallower.cli.score.print_written", gone)
        assert main.run([*asked, str(out)]) == 130
    assert [path.name for path in sorted(out.iterdir())] == ["scores.json", "steps.json"]
    monkeypatch.chdir(tmp_path)
    assert main.run([*asked, "out"]) == 0  # another spelling of the same folder
    assert "is done already" in capsys.readouterr().out
    assert (out / "plan.json").is_file()


def test_a_recipe_in_a_recipe_is_done_when_all_of_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner, out = written(tmp_path), tmp_path / "out"  # its second step fails
    data = json.loads(inner.read_text())
    outer = {**data, "steps": [f"run {inner} --out {{out}}/inner"], "sizes": {"demo": {}}}
    (tmp_path / "outer.yaml").write_text(json.dumps(outer))
    for _ in range(2):
        assert main.run(["run", str(tmp_path / "outer.yaml"), "--out", str(out), "--quiet"]) == 2
        assert "cannot remove 9" in capsys.readouterr().err


def test_with_force_a_recipe_in_a_recipe_reads_what_the_outer_one_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner, out = written(tmp_path), tmp_path / "out"
    data = json.loads(inner.read_text())
    plan = data["steps"][1].replace("--scores {out}/scores.json ", "").replace("one-shot", "contiguous")
    less = f"plan cut {out}/plan.json --remove 1 --out {{out}}/less.json"
    again = "plan cut {out}/less.json --remove 1 --out {out}/again.json"
    inner.write_text(json.dumps({**data, "steps": [less, again], "sizes": {"demo": {}}}))
    outer = tmp_path / "outer.yaml"
    outer.write_text(json.dumps({**data, "steps": [plan, f"run {inner} --out {{out}}/inner"]}))
    made = [out / "plan.json", out / "inner" / "less.json", out / "inner" / "again.json"]

    def run(*more: str) -> list[bool]:
        """Which of the files were written."""
        before = [path.stat().st_ino if path.exists() else None for path in made]
        assert main.run(["run", str(outer), "--out", str(out), "--quiet", *more]) == 0
        return [path.stat().st_ino != old for path, old in zip(made, before, strict=True)]

    assert run("--set", "remove=2") == [True] * 3
    assert run("--set", "remove=2") == [False] * 3
    assert run("--set", "remove=1", "--force") == [True] * 3
    assert run("--set", "remove=1", "--force") == [True] * 3
    # half of the inner one is done, from what is made anew now
    ledger = out / "inner" / "steps.json"
    ledger.write_text(json.dumps({"steps": json.loads(ledger.read_text())["steps"][:1]}))
    assert run("--set", "remove=2", "--force") == [True] * 3
    assert len(json.loads(ledger.read_text())["steps"]) == 2


def test_a_folder_with_a_space_is_one_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my work").mkdir()
    recipe, out = written(tmp_path / "my work"), tmp_path / "it's out"
    asked = ["run", str(recipe), "--out", str(out), "--set", "remove=1"]
    commands = read_recipe(str(recipe)).commands("demo", out, {"remove": "1"})
    assert shlex.split(commands[0])[-1] == f"{out}/scores.json"
    assert main.run([*asked, "--dry-run"]) == 0
    assert f"shallower {commands[0]}" in capsys.readouterr().out
    assert main.run([*asked, "--quiet"]) == 0
    assert len(json.loads((out / "plan.json").read_text())["remove"]) == 1


def test_a_step_with_a_quote_that_does_not_end(tmp_path: Path) -> None:
    path = written(tmp_path, steps=["score {model} --calibration '{text}", "eval {model} --set {remove}"])
    with pytest.raises(UserError, match=r"step 1 of .*two\.yaml cannot be split into words \(no closing quotation\)"):
        read_recipe(str(path))


def test_all_faults_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, sizes={"demo": {"model": "m", "txt": "t"}}, stpes=[])
    with pytest.raises(UserError) as caught:
        read_recipe(str(path))
    for part in ("'stpes' (did you mean 'steps'?)", "no value for 'remove'", "no value for 'text'", "has 'txt'"):
        assert part in str(caught.value)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="deeper-layers"):
        read_recipe("deeper-layer")
    recipe = read_recipe(str(written(tmp_path)))
    with pytest.raises(UnknownName, match="demo"):
        recipe.commands("demos", tmp_path, {})
    with pytest.raises(UnknownName, match="remove"):
        recipe.commands("demo", tmp_path, {"remov": "1"})
