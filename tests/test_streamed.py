"""Models whose blocks are streamed: the same numbers, with each block brought to the device once a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import shallower
from shallower.anatomy import dissect
from shallower.anatomy.streamed import StreamedBlock, is_streamed, stream_from_processor
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, Racing, StreamStatistic, stream_scores
from shallower.errors import ModelError, UserError
from shallower.registry import metric as metrics
from shallower.testing.families import BLOCKS, CORE, FAMILIES, VOCAB, tiny_model, tiny_tokenizer
from shallower.units import Unit
from shallower.verbs.measuring import make_ablator
from shallower.verbs.subject import open_subject

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCAB, (6, 100), generator=torch.Generator().manual_seed(0))  # three batches
MASK = torch.ones_like(IDS)
MASK[1, 70:] = 0
TEXT = CalibrationSet("random", IDS, MASK)


def _streamed(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    stream_from_processor(model, CPU)
    return model


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each block's weights came to the device, by the identity of its module."""
    counts: Counter[int] = Counter()
    own = StreamedBlock.held

    @contextmanager
    def held(self: StreamedBlock) -> Iterator[None]:
        counts[id(self._module)] += not self._holds
        with own(self):
            yield

    monkeypatch.setattr(StreamedBlock, "held", held)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_blocks_give_what_resident_ones_give(family: str) -> None:
    resident, streamed = dissect(tiny_model(family)), dissect(_streamed(family))
    candidates = [frozenset(), *({unit} for unit in resident.units), set(resident.of_kind("block")[1:3])]
    [wanted, found] = [
        Ablator(anatomy, TEXT, threads=1, memory=1 << 28).sums(candidates) for anatomy in (resident, streamed)
    ]
    assert np.array_equal(found, wanted)  # bit for bit: the arithmetic is in the same order


@pytest.mark.parametrize("objective", ["nll", "kl", "hidden-cosine"])
@pytest.mark.parametrize("memory", [0, 3_000_000, 1 << 30])
def test_every_budget_gives_the_same(objective: str, memory: int) -> None:
    anatomies = [dissect(tiny_model("llama")), dissect(_streamed("llama"))]
    first = [frozenset({unit}) for unit in anatomies[0].units]
    second = [removed | {Unit(3, "block")} for removed in first if all(unit.index != 3 for unit in removed)]
    [wanted, found] = [
        ablator.losses(first) + ablator.losses(second)
        for ablator in (Ablator(anatomy, TEXT, objective, memory=memory) for anatomy in anatomies)
    ]
    assert found == pytest.approx(wanted, abs=2e-6)


def test_a_sweep_brings_each_block_once(brought: Counter[int]) -> None:
    anatomy = dissect(_streamed("llama"))
    ablator = Ablator(anatomy, TEXT, "kl", memory=1 << 30)
    brought.clear()
    ablator.losses([frozenset({unit}) for unit in anatomy.units])
    assert [brought[id(block.module)] for block in anatomy.blocks] == [1] * BLOCKS
    assert ablator.spent.tokens == TEXT.tokens * len(anatomy.units)
    brought.clear()
    ablator.losses([frozenset({Unit(0, "block"), Unit(BLOCKS - 1, "block")})])  # begins behind block 4, which is kept
    assert [brought[id(block.module)] for block in anatomy.blocks] == [0] * BLOCKS


def test_little_memory_takes_more_sweeps(brought: Counter[int]) -> None:
    anatomy = dissect(_streamed("llama"))
    ablator = Ablator(anatomy, TEXT, memory=2_000_000)
    brought.clear()
    ablator.losses([frozenset({unit}) for unit in anatomy.units])
    assert 1 < brought[id(anatomy.blocks[-1].module)] < 3 * len(anatomy.units)


def test_races_and_metrics_of_a_streamed_model() -> None:
    anatomies = [dissect(tiny_model("llama")), dissect(_streamed("llama"))]
    blocks = [frozenset({unit}) for unit in anatomies[0].of_kind("block")]
    statistics = [StreamStatistic(metrics.get("cosine")), StreamStatistic(metrics.get("angular"), spans=True)]
    [raced, scored] = [
        [
            (Ablator(anatomy, TEXT, racing=Racing(), threads=1).losses(blocks, 1)),
            stream_scores(anatomy, TEXT, statistics, anatomy.units),
        ]
        for anatomy in anatomies
    ]
    assert raced == scored


@pytest.mark.parametrize("family", CORE)
def test_a_checkpoint_is_searched_streamed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = {"calibration": TEXT, "units": "all", "dtype": "float32", "device": "cpu"}
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "streamed"))
    plan = shallower.search(tmp_path / "model", 2, stream_blocks=True, **given)  # type: ignore[arg-type]
    assert not plan.spent["recalled"]
    assert plan.spent["tokens"] == plan.spent["exhaustive"]  # nothing races
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "resident"))
    wanted = shallower.search(tmp_path / "model", 2, exact=True, **given)  # type: ignore[arg-type]
    assert not wanted.spent["recalled"]
    assert (plan.order, plan.dense, plan.model) == (wanted.order, wanted.dense, wanted.model)
    again = shallower.search(tmp_path / "model", 2, stream_blocks=True, **given)  # type: ignore[arg-type]
    assert again.spent["recalled"]  # what is measured is remembered for both


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system tells no mappings")
def test_weights_stay_mapped_from_their_files(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    subject = open_subject(tmp_path / "model", dtype="float32", device="cpu", stream_blocks=True)
    assert is_streamed(subject.model)
    Ablator(subject.anatomy, TEXT).losses([frozenset()])
    mapped = [line.split("-", 1) for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [(int(start, 16), int(rest.split()[0], 16)) for start, rest in mapped]
    weights = [weight for block in subject.anatomy.blocks for weight in block.module.parameters()]
    assert all(any(start <= weight.data_ptr() < stop for start, stop in ranges) for weight in weights)


def test_a_number_format_that_is_not_the_stored_one_is_told(tmp_path: Path, notes: list[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    open_subject(tmp_path / "model", dtype="bfloat16", device="cpu", stream_blocks=True)
    assert notes == [
        "model is stored in float32 and loaded in bfloat16, so all of it takes memory on the processor. With --dtype "
        "float32 its blocks are read from their files as they run."
    ]


def test_what_streamed_blocks_cannot_do_is_refused() -> None:
    model = _streamed("llama")
    with pytest.raises(UserError, match=r"metric taylor needs gradients .*: leave --stream-blocks out"):
        shallower.score(model, "taylor", calibration=TEXT)
    for option, given in (("--repair", {"repair": "linear-fold"}), ("--ordinary", {"ordinary": True, "units": "all"})):
        refused = rf"{option} cuts .* which streamed blocks do not allow: drop {option} or --stream-blocks"
        with pytest.raises(UserError, match=refused):
            shallower.search(model, 1, calibration=TEXT, **given)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=refused):  # before the model is looked for
            shallower.search("nowhere", 1, calibration=TEXT, stream_blocks=True, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"metric taylor, gate-gradient needs gradients"):
        shallower.verbs.score.score_many("nowhere", "taylor,gate-gradient", calibration=TEXT, stream_blocks=True)
    with pytest.raises(UserError, match=r"this one is in memory: give its name or path"):
        shallower.score(tiny_model("llama"), calibration=TEXT, stream_blocks=True)
    with pytest.raises(ModelError, match=r"streamed model can be scored and searched, but not cut"):
        shallower.prune(model, 1, calibration=TEXT, tokenizer=tiny_tokenizer())
    with pytest.raises(UserError, match=r"--workers loads the whole model in each worker.*: drop --workers or"):
        make_ablator(open_subject(model), TEXT, "nll", workers=2)
