import html
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
from rich.console import Console

import shallower
from shallower.errors import UserError
from shallower.plan import CalibrationIdentity, MadeBy, ModelIdentity, PruningPlan
from shallower.reporting import ReportData, Side
from shallower.reporting.data import RecoveryData, RecoveryMadeBy, RecoveryStage
from shallower.reporting.figures import influence_bars, loss_curve, span_heatmap
from shallower.reporting.page import render, render_recovery
from shallower.reporting.tables import (
    PerplexityRow,
    before_after_table,
    inspection_table,
    new_table,
    perplexity_table,
    scores_table,
    spans_table,
)
from shallower.reporting.wording import comparison, count, duration, headline, number, score, size
from shallower.scores import Score, Scores
from shallower.units import Span, Unit, parse_units

HOSTILE = "<script>alert('x')</script>&\"$\\frac[red]"


def report(blocks: int = 10, remove: str = "block.4-5", *, name: str = "a/model", text: str = "news") -> ReportData:
    model = ModelIdentity(name, None, "sha256:" + "ab" * 32, blocks)
    calibration = CalibrationIdentity("c4.jsonl", 32768, "sha256:" + "cd" * 32)
    made = MadeBy("greedy", "nll", None, {"beam": 4}, 0, calibration, "0.1.0")
    removed = parse_units(remove)
    kinds = ("block",) if all(unit.kind == "block" for unit in removed) else ("attn", "mlp")
    units = [Unit(index, kind) for index in range(blocks) for kind in kinds]
    spans = [Span(start, start + n) for n in range(1, blocks + 1) for start in range(blocks - n + 1)]
    order = tuple((unit, 3.187 + 0.1 * place) for place, unit in enumerate(removed, start=1))
    gone = sum(unit.kind == "block" for unit in removed)
    return ReportData(
        plan=PruningPlan(model, tuple(sorted(removed)), order, 3.187, made),
        dense=Side(blocks, 134_515_008, 269_030_016, 269_000_000, 46_080, {text: 26.2}, {text: 12276}, 812.0, 24.1),
        pruned=Side(
            blocks - gone, 113_274_432, 226_548_864, 226_500_000, 36_864, {text: 70.0}, {text: 12276}, 1003.0, 29.4
        ),
        base_model=name,
        folder="out/model-24",
        influence=(
            Scores(model, "cosine", tuple(Score(u, 0.05 + 0.9 * (u.index == 0), 0.01) for u in units), made),
            Scores(model, "loss", tuple(Score(u, math.sin(u.index) * 0.1) for u in units), made),
        ),
        spans=Scores(model, "angular", tuple(Score(s, 0.02 * s.blocks + s.start / 1000) for s in spans), made),
        speed_setting="prompt 128, generate 32, batch 1, float32, 2 threads",
        seconds={"search": 212.4, "saving": 1.9},
        machine="x86_64, 2 threads",
        notes=("calibration and evaluation text overlap",),
    )


def bare() -> ReportData:
    """Nothing measured but sizes."""
    data = report()
    order = tuple((unit, None) for unit, _ in data.plan.order)
    made = replace(data.plan.made_by, calibration=None, objective=None, search=None)
    return ReportData(
        plan=replace(data.plan, order=order, dense=None, made_by=made),
        dense=Side(10, 100, 200, 200, 10),
        pruned=Side(8, 80, 160, 160, 8),
        base_model="a/model",
        folder="out",
    )


def figures(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def shown(table: object, width: int = 80) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


class Outline(HTMLParser):
    """Tags with their attributes; checks that elements close in order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# the file


@pytest.mark.parametrize("data", [report(), report(remove="attn.3,mlp.4"), bare()], ids=["full", "sublayers", "bare"])
def test_round_trip(data, tmp_path):
    data.save(tmp_path / "report.json")
    assert ReportData.load(tmp_path / "report.json") == data


def test_infinite_perplexity_survives(tmp_path):
    data = report()
    data = replace(data, pruned=replace(data.pruned, perplexity={"news": math.inf}))
    data.save(tmp_path / "report.json")
    assert "Infinity" not in (tmp_path / "report.json").read_text()
    assert ReportData.load(tmp_path / "report.json") == data
    assert "∞" in render(data)


def test_all_faults_are_told_together():
    data = report().to_json()
    data["note"] = []
    data["dense"]["parametres"] = 3
    data["pruned"]["blocks"] = "24"
    del data["machine"]
    data["influence"][0]["rows"][0].pop("value")
    with pytest.raises(UserError) as caught:
        ReportData.from_json(data)
    told = str(caught.value)
    assert "'note' (did you mean 'notes'?)" in told
    assert "'parametres' (did you mean 'parameters'?)" in told
    assert "'blocks' of 'pruned' of the report is '24', not a whole number" in told
    assert "lacks 'machine'" in told
    assert "entry 0 in 'influence'" in told or "'influence' of the report is malformed" in told


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "shallower.report/9"}', "\x00"])
def test_a_file_that_is_no_report(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        ReportData.load(path)
    with pytest.raises(UserError, match="`shallower prune MODEL --remove 25% --out FOLDER` makes one"):
        ReportData.load(tmp_path / "none.json")


def test_data_and_wording_import_neither_torch_nor_matplotlib():
    code = "import sys, shallower.reporting.wording; print({'torch', 'matplotlib', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# words


def test_headline():
    told = "Removed 2 of 10 blocks (20.0 % of blocks, 15.8 % of parameters): "
    assert headline(report()) == told + "perplexity on news 26.2 → 70.0, decoding 1.22× faster."
    assert headline(bare()) == "Removed 2 of 10 blocks (20.0 % of blocks, 20.0 % of parameters)."


def test_a_speed_within_the_spread_of_the_runs_is_told_as_such(tmp_path):
    def timed(slowest: float, fastest: float) -> ReportData:
        """Decoding at 24.1 tokens/s, between 20 and 25, against 29.4."""
        data = report()
        dense = replace(data.dense, decode_range=(20.0, 25.0))
        return replace(data, dense=dense, pruned=replace(data.pruned, decode_range=(slowest, fastest)))

    assert headline(timed(24.0, 31.0)).endswith("decoding 1.22× faster (within the spread).")
    assert headline(timed(26.0, 31.0)).endswith("decoding 1.22× faster.")
    told = {row.label: row.difference for row in comparison(timed(24.0, 31.0))}
    assert told["Decoding, tokens/s"] == "1.22× faster (within the spread)"
    assert told["Prefill, tokens/s"] == "1.24× faster"  # of an early version, which kept no ranges
    (tmp_path / "report.json").write_text(json.dumps(timed(24.0, 31.0).to_json()))
    assert ReportData.load(tmp_path / "report.json") == timed(24.0, 31.0)
    data = timed(24.0, 31.0).to_json()
    for side in ("dense", "pruned"):
        del data[side]["decode_range"], data[side]["prefill_range"]
    assert ReportData.from_json(data) == report()
    data["dense"]["decode_range"] = [25.0, 20.0]
    with pytest.raises(UserError, match=r"'decode_range' of 'dense' of the report is \[25.0, 20.0\], not the least"):
        ReportData.from_json(data)


def test_headline_of_sublayers_and_many_texts():
    data = report(remove="attn.3,attn.9,mlp.4")
    texts = {"a": 10.0, "b": 10.0, "c": 10.0}
    dense, pruned = replace(data.dense, perplexity=texts), replace(data.pruned, perplexity={"a": 11, "b": 30, "c": 20})
    told = headline(replace(data, dense=dense, pruned=replace(pruned, decode_tokens_per_s=20.0)))
    assert told.startswith("Removed 2 attention sublayers and 1 MLP sublayer (15.8 %")
    assert "perplexity on 3 texts 1.10× to 3.00× that of the dense model, decoding 1.21× slower" in told


def test_figures_name_the_kind_that_was_scored_and_stages_that_ran():
    page = render(replace(report(), seconds={"search": 212.4, "speed": 0.0}))
    assert "Importance of each block by cosine" in page
    assert "search 3 min 32 s" in page
    assert "speed 0.0 s" not in page


def test_code_in_notes_is_code_and_stays_escaped():
    page = render(replace(report(), notes=("Load it with `<b>`.",)))
    assert "<li>Load it with <code>&lt;b&gt;</code>.</li>" in page
    assert "nothing but <code>transformers</code> is needed" in page


def test_numbers_in_words():
    assert [count(n) for n in (0, 999, 134_515_008, 8.03e9)] == ["0", "999", "134.5 M", "8.03 B"]
    assert [size(n) for n in (0, 1536, 1 << 20, 5 << 30)] == ["0 B", "1.50 KiB", "1.00 MiB", "5.00 GiB"]
    assert [number(x) for x in (None, math.inf, 26.24, -3.0, 12345.6)] == ["–", "∞", "26.2", "−3.00", "12,346"]
    assert [score(x) for x in (0.0, 3.1874, -0.01234, 1e-7)] == ["0.000", "3.187", "−0.01234", "1.000e−07"]
    assert [duration(s) for s in (1.94, 212.4, 7260)] == ["1.9 s", "3 min 32 s", "2 h 01 min"]


# the page


@pytest.mark.parametrize(
    "data",
    [report(), report(80, "block.40-50,block.60"), report(80, "attn.3-40,mlp.4-20"), report(2, "block.1"), bare()],
    ids=["10", "80", "80-sublayers", "2", "bare"],
)
def test_page_is_sound_and_self_contained(data):
    page = render(data)
    outline = Outline(page)
    assert len(page.encode()) < 1_000_000
    assert len(figures(page)) == (4 if data.spans else 0)
    identifiers = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        for name in ("aria-labelledby", "href", "xlink:href"):
            value = attributes.get(name) or ""
            if not value.startswith("data:"):
                assert {reference.lstrip("#") for reference in value.split()} <= set(identifiers)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert not re.findall(r"https?://", re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", page))
    assert page.count("<table") == page.count("<tbody") <= page.count('scope="row"')
    for svg in figures(page):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title")


def test_sections_stand_in_order():
    page = render(report())
    order = re.findall(r'<section id="(\w+)"', page)
    assert order == ["comparison", "removed", "load", "figures", "provenance", "notes"]
    for told in ("sha256:" + "ab" * 32, "sha256:" + "cd" * 32, "beam = 4", "3 min 32 s", "2 blocks", "block.4-5"):
        assert told in page
    assert "from_pretrained(&#x27;out/model-24&#x27;)" in page


def test_missing_parts_are_left_out():
    page = render(bare())
    assert re.findall(r'<section id="(\w+)"', page) == ["comparison", "removed", "load", "provenance"]
    for word in ("Perplexity", "tokens/s", "None", "nan", "Speed", "Objective", "svg"):
        assert not re.search(rf"\b{word}\b", page[page.index("<body>") :])


def test_text_from_outside_is_escaped():
    data = report(name=HOSTILE, text=HOSTILE)
    hostile = replace(data.plan.made_by, search=HOSTILE, objective=HOSTILE, options={HOSTILE: HOSTILE}, version=HOSTILE)
    data = replace(
        data,
        plan=replace(data.plan, made_by=hostile),
        influence=(replace(data.influence[0], metric=HOSTILE, made_by=hostile),),
        spans=replace(data.spans, metric=HOSTILE),
        folder=HOSTILE,
        seconds={HOSTILE: 1.0},
        machine=HOSTILE,
        speed_setting=HOSTILE,
        notes=(HOSTILE,),
    )
    page = render(data)
    assert "script" not in {tag for tag, _ in Outline(page).tags}
    assert "<script" not in page
    for svg in figures(page):
        ElementTree.fromstring(svg)
    shown_table = shown(before_after_table(data))
    assert "[red]" in re.sub(r"\s", "", shown_table)


def recovered(text: str = "news", **changed: object) -> RecoveryData:
    """What `recover` tells of a model that had been repaired once before."""
    model = ModelIdentity("a/model", None, "sha256:" + "ab" * 32, 10)
    made = RecoveryMadeBy(model, None, CalibrationIdentity("c4.jsonl", 32768, "sha256:" + "cd" * 32), 0, "0.1.0")
    curve = ({"step": 0, "tokens": 0, "minutes": 0.0}, {"step": 9, "tokens": 900, "minutes": 3.5, "loss": 3.1})
    stages = (
        RecoveryStage("repaired", {text: 46.9}),
        RecoveryStage("full", {text: 34.0}, 0, 900, 210.0, curve, {"lr": 1e-4}),
    )
    before = (RecoveryStage("cut", {text: 63.1}), RecoveryStage("refit", {text: 46.9}, 0, 32768, 40.0))
    told = {"made_by": made.to_json(), "recovery": [stage.to_json() for stage in before]}
    return replace(RecoveryData(made, {text: 24.5}, stages, (), "packaged", told), **changed)


def test_a_recovery_is_shown_with_what_came_before_it():
    data = recovered()
    page = render_recovery(report().plan, data, "healed")
    sections = ["recovery", "before", "removed", "load", "provenance"]
    assert re.findall(r'<section id="(\w+)"', page) == sections
    told = (
        "Removed 2 blocks of a model of 10 blocks, repaired by refit and full: perplexity on news 46.9 → 34.0 (dense "
    )
    assert told + "24.5)." in page
    assert "63.1" in page
    assert "from_pretrained('healed'" in html.unescape(page)
    hostile = recovered(HOSTILE, notes=(HOSTILE,))
    assert "<script" not in render_recovery(report().plan, hostile, HOSTILE)
    plan = replace(report().plan, remove=(), order=())
    assert "Removed nothing of a model of 10 blocks, repaired by refit and full" in render_recovery(plan, data, "x")
    assert "repaired by" not in render_recovery(plan, recovered(before=None, recovery=data.recovery[:1]), "x")
    early = recovered(form=None, before=None)
    assert re.findall(r'<section id="(\w+)"', render_recovery(report().plan, early, "healed")) == [
        name for name in sections if name not in ("before", "load")
    ]


def test_what_was_measured_is_told_where_something_was():
    made = replace(recovered().made_by, dtype="float32", device="cpu", window=64, windows=1)
    shown = recovered(made_by=made)
    assert "float32 on cpu, the first window of 64 tokens of each text" in render_recovery(report().plan, shown, "x")
    bare = [replace(stage, perplexity={}) for stage in shown.recovery]
    assert "float32 on cpu" not in render_recovery(report().plan, replace(shown, recovery=tuple(bare)), "x")


def test_a_tokenizer_is_loaded_only_where_there_is_one():
    given, repaired = replace(report(), tokenizer=False), recovered(tokenizer=False)
    assert ReportData.from_json(json.loads(json.dumps(given.to_json()))) == given
    assert RecoveryData.from_json(json.loads(json.dumps(repaired.to_json()))) == repaired
    for data, loads in ((report(), True), (given, False), (recovered(), True), (repaired, False)):
        page = render(data) if isinstance(data, ReportData) else render_recovery(report().plan, data, "healed")
        assert ("AutoTokenizer" in page) == loads
    early = {key: value for key, value in report().to_json().items() if key != "tokenizer"}
    assert ReportData.from_json(early) == report()
    with pytest.raises(UserError, match="'tokenizer' of the report is 1, not true or false"):
        ReportData.from_json({**early, "tokenizer": 1})


def test_what_recover_wrote_is_read_again_and_faults_are_named():
    data = recovered()
    assert RecoveryData.from_json(json.loads(json.dumps(data.to_json()))) == data
    told = data.to_json()
    for change, complaint in (
        ({"format": "x"}, "has another format"),
        ({"recovery": []}, "'recovery' of the recovery is empty"),
        ({"before": [1]}, "'before' of the recovery does not tell of a repair"),
        ({"before": {"recovery": [1]}}, "a stage of 'before' is not an object"),
        ({"form": "odd"}, "'form' of the recovery is 'odd'"),
        ({"more": 1}, "unknown key 'more'"),
    ):
        with pytest.raises(UserError, match=re.escape(complaint)):
            RecoveryData.from_json({**told, **change})
    with pytest.raises(UserError, match="not an object"):
        RecoveryData.from_json([])


def test_same_data_same_bytes_whatever_the_settings():
    first = render(report())
    before = matplotlib.rcParams.copy()
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "svg.fonttype": "path"}):
        assert render(report()) == first
        assert matplotlib.rcParams["font.size"] == 20
    assert matplotlib.rcParams == before


def test_a_logarithmic_axis_has_dots_as_bars_would_have_an_arbitrary_length():
    scores = report().influence[0]
    rows = {
        "Bar chart": [0.1 + 0.01 * index for index in range(10)],
        "Dots": [0.01 * 4**index for index in range(10)],
        "Dots over": [0.01 * (-4) ** index for index in range(10)],
    }
    for shape, values in rows.items():
        listed = tuple(Score(Unit(index, "block"), value, 0.001) for index, value in enumerate(values))
        drawn = influence_bars(replace(scores, rows=listed), frozenset({Unit(2, "block")}))
        assert f">{shape}" in drawn
        assert ("log scale" in drawn) == shape.startswith("Dots")
        assert len(re.findall("#d55e00", drawn)) >= 2  # what is removed, and its shade
    assert "The higher, the more a unit matters to the model." in render(report())


def test_nothing_to_draw():
    data = report()
    empty = replace(data.influence[0], rows=(Score(Unit(0, "block"), math.nan),))
    assert influence_bars(empty, data.plan.removed) is None
    assert span_heatmap(empty, data.plan.removed) is None
    assert loss_curve(bare().plan) is None


def test_perplexity_axis_only_beside_nll():
    plan = report().plan
    assert "perplexity" in (loss_curve(plan) or "")
    other = replace(plan, made_by=replace(plan.made_by, objective="kl"))
    assert "perplexity" not in (loss_curve(other) or "")


def test_losses_behind_a_repair_are_not_shown_as_those_of_the_cut():
    data = report()
    made = data.plan.made_by
    page = render(replace(data, plan=replace(data.plan, made_by=replace(made, options={"repair": "linear-fold"}))))
    assert "nll after linear-fold (nats per token), lower is better" in page
    assert "perplexity after linear-fold<" in page
    assert "on the part of the calibration text that this was not fitted on" in page
    assert "The objective on the calibration text" not in page
    assert '<th scope="col">nll after linear-fold</th>' in page
    for word in (" after linear-fold", "not fitted on"):
        assert word not in render(data)


@pytest.mark.parametrize("factor", [1e-9, 1.0, 2000.0, math.inf])
def test_extreme_losses_can_be_drawn(factor):
    plan = report().plan
    order = tuple((unit, loss * factor) for unit, loss in plan.order)
    svg = loss_curve(replace(plan, order=order))
    assert (svg is None) == math.isinf(factor)


def test_a_contiguous_removal_is_outlined():
    data = report()
    assert "removed: block.4-5" in (span_heatmap(data.spans, data.plan.removed) or "")
    assert "removed: " not in (span_heatmap(data.spans, frozenset(parse_units("block.3,block.5"))) or "")
    assert "removed: attn.4-5" in (span_heatmap(data.spans, frozenset(parse_units("attn.4-5,mlp.4-5"))) or "")
    assert "removed: " not in (span_heatmap(data.spans, frozenset(parse_units("attn.4-5,mlp.5"))) or "")


def test_spans_that_end_in_mid_block_are_in_no_cell_of_the_plane():
    data = report()
    halves = tuple(Score(Span(start + 0.5, start + 1.5), -9.0) for start in range(5))
    assert span_heatmap(replace(data.spans, rows=(*data.spans.rows, *halves)), ()) == span_heatmap(data.spans, ())
    table = spans_table(replace(data.spans, rows=(*halves, Score(Span(0, 2.5), 0.25), Score(Span(0, 1), 1.0))))
    assert [[str(cell) for cell in column.cells][:2] for column in table.columns[:2]] == [
        ["1", "2.5"],
        ["attn.1,mlp.0", "block.0-1,attn.2"],
    ]


# the terminal


def test_tables_fit_80_columns():
    data = report()
    rows = [
        PerplexityRow("organisation/a-model-with-a-long-name", 30, 134_515_008, {"wikitext2.test": 26.2, "c4": 30.0}),
        PerplexityRow("[red]pruned", 24, 113_274_432, {"wikitext2.test": 70.0}),
    ]
    sublayers = report(remove="attn.3,mlp.4")
    for table in (
        before_after_table(data),
        before_after_table(sublayers),
        scores_table(data.influence[0]),
        scores_table(sublayers.influence[1]),
        spans_table(data.spans),
        perplexity_table(rows),
    ):
        lines = shown(table).splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
    told = shown(perplexity_table(rows))
    assert "+43.8 (2.67×)" in told
    assert "[red]pruned" in told
    assert re.search(r"^ *3 +block\.0-2 ", shown(spans_table(data.spans)), re.MULTILINE)
    assert "−2 (−20.0 %)" in shown(before_after_table(data))


def test_names_stay_whole_in_80_columns():
    from shallower.evaluation.generation import Continuation, Generation
    from shallower.reporting.evaluation import samples_table
    from shallower.reporting.tables import bench_table
    from shallower.timing.speed import Speed, Spread

    spread = Spread(0.1806, 0.1783, 0.1901, 5)
    speed = Speed(spread, spread, 23_592_960, 538_060_032, 99_000_000, 128, 32, 1)
    name = "SmolLM2-135M-Instruct"
    told = shown(bench_table({name: (speed,), "smaller": (speed,)}, "Measured on a processor. Medians of five runs."))
    assert f"  {name} " in told
    assert max(map(len, told.splitlines())) <= 80
    written = Generation(1.0, 1.0, 0.0, 80.0, 0.0, (Continuation("Once", "Please\n\n" * 80, 80, False, True),))
    told = shown(samples_table({name: written, "smaller": written}))
    assert "Please ⏎⏎ Please" in told
    assert told.count("\n") <= 12


def test_a_caption_is_as_wide_as_the_terminal():
    lines = shown(scores_table(report().influence[0]), 120).splitlines()
    assert "Rank 1 matters least." in lines[-1]
    sentence = " ".join(["word"] * 22)
    assert shown(new_table("A", caption=sentence), 120).splitlines()[-1].rstrip() == sentence


def test_inspection_table_groups_equal_blocks():
    from shallower.anatomy.weigh import UnitWeight, Weights

    units = {}
    for index in range(4):
        units[Unit(index, "block")] = UnitWeight(3_000_000 + (index == 3), 6_000_000, 6_000_000, 1536, 1.0)
        units[Unit(index, "attn")] = UnitWeight(1_000_000, 2_000_000, 2_000_000, 1536, 0.5)
    blocks = UnitWeight(12_000_001, 24_000_000, 24_000_000, 6144, 4.0)
    whole = UnitWeight(20_000_000, 40_000_000, 40_000_000, 6144, 4.0)
    weights = Weights(units, blocks, whole)
    removed = parse_units("block.1,attn.2")
    told = shown(inspection_table(weights, removed, weights.of(removed)))
    assert "blocks 0 to 2, each" in told
    assert "block 3" in told
    assert "after removal" in told
    assert "−20.0 %" in told
    assert "Removed: 1 block, 1 attention sublayer (block.1, attn.2)." in " ".join(told.split())
    assert "3 blocks (block.0-2)" in shown(inspection_table(weights, parse_units("block.0-2"), blocks))
    assert "after removal" not in shown(inspection_table(Weights(units, blocks, whole)))


def test_numbers_are_shown_where_the_page_cannot_be_written(tmp_path, notes):
    data = report()
    (tmp_path / "report.json").write_text(json.dumps(data.to_json()))
    (tmp_path / "report.html").mkdir()
    assert shallower.report(tmp_path) == (data, None)
    (note,) = notes
    assert note.startswith("the page was not made anew: cannot write ")
    (tmp_path / "report.html").rmdir()
    assert shallower.report(tmp_path) == (data, tmp_path / "report.html")
