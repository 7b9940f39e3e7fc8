"""Models whose blocks are on two devices, as accelerate spreads them: simulated on the processor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

import shallower
from shallower import progress
from shallower.anatomy import dissect, streamed
from shallower.anatomy.dissect import find_blocks
from shallower.anatomy.streamed import stream_from_processor
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, StreamStatistic, WeightStatistic, ablator, stream_scores, weight_scores
from shallower.engine.likelihood import Asked, Likelihoods
from shallower.errors import ModelError, UserError
from shallower.plan import MadeBy, PruningPlan
from shallower.registry import metric as metrics
from shallower.surgery import cut
from shallower.testing.families import BLOCKS, tiny_model, tiny_tokenizer
from shallower.units import parse_units
from shallower.verbs.measuring import make_ablator
from shallower.verbs.subject import open_subject

FIRST, SECOND = torch.device("privateuseone:0"), torch.device("privateuseone:1")
IDS = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0
TEXT = CalibrationSet("random", IDS, MASK)
SETS = ["block.1", "block.4", "block.1,block.4", f"block.3-{BLOCKS - 1}", f"block.2-{BLOCKS - 1}", "mlp.1,attn.5"]
CANDIDATES = [frozenset[shallower.Unit](), *(frozenset(parse_units(text)) for text in SETS)]


class Devices(TorchFunctionMode):
    """Tensors stay on the processor but say that they are where they were moved to, and those of two places cannot be
    computed with together. One that was never moved goes with any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = WeakTensorKeyDictionary()  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.places.get(args[0], torch.device("cpu"))
        target = kwargs.pop("device", None)
        if function is Tensor.to:
            target = next((one for one in args[1:] if isinstance(one, (str, torch.device))), target)
            args = tuple(one for one in args if not isinstance(one, (str, torch.device)))
            if target is not None and torch.device(target) != self.places.get(args[0]):
                args = (args[0].clone(), *args[1:])
            if len(args) == 1 and not {"dtype", "other"} & set(kwargs):
                kwargs["dtype"] = args[0].dtype
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = {self.places[one] for one in given if one.dim() and one in self.places}
        if function is Tensor.cpu:
            target = "cpu"
        elif len(there) > 1 and function not in (Tensor.to, Tensor.copy_, Tensor.__setitem__):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {there} in {function}")
        place = torch.device(target) if target is not None else min(there, key=str, default=None)
        result = function(*args, **kwargs)
        if place is not None and place.type != "cpu":
            tree_map_only(Tensor, lambda one: self.places.setdefault(one, place), result)
        return result


class Moved(AlignDevicesHook):
    """What is given to a module goes to its device; the weights are there already."""

    def init_hook(self, module: Any) -> Any:
        return module


def spread(model: PreTrainedModel, devices: Devices) -> PreTrainedModel:
    """The first half of the blocks on one device; the rest, and what comes after, on another."""
    embedding = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        parts = name.split(".")
        late = (parts[2:3] and parts[1] == "layers" and int(parts[2]) >= BLOCKS // 2) or "lm_head" in name
        place = SECOND if late or name.endswith("model.norm") else FIRST
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(weight is embedding for weight in own):
            place = FIRST
        for weight in own:
            devices.places[weight] = place
        if own or (parts[1:2] == ["layers"] and len(parts) == 3):
            add_hook_to_module(module, Moved(execution_device=place))
    add_hook_to_module(model, Moved(execution_device=FIRST, io_same_device=True))
    return model


@pytest.fixture(params=["llama", "llama, tied", "cohere"])  # Cohere's sublayers are parallel
def models(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """A model on two devices, and the same on one."""
    both = []
    for _ in range(2):
        model = tiny_model(request.param.partition(",")[0])
        if "tied" in request.param:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        both.append(model)
    with Devices() as devices:
        model = spread(both[0], devices)
        assert model.device == FIRST
        with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
            IDS.to(FIRST) + IDS.to(SECOND)
        yield model, both[1]


@pytest.mark.parametrize("objective", ["kl", "js", "hidden-cosine"])
@pytest.mark.parametrize("order", ["layer-major", "depth-first"])
def test_candidates_of_a_model_on_two_devices(
    models: tuple[PreTrainedModel, PreTrainedModel], objective: str, order: Any
) -> None:
    found, wanted = (
        Ablator(dissect(model), TEXT, objective, order=order, memory=1 << 28, threads=1).losses(CANDIDATES)
        for model in models
    )
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_streams_and_gradients_of_a_model_on_two_devices(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    statistics = [StreamStatistic(metrics.get("cosine"), spans=True), StreamStatistic(metrics.get("relative-l1"))]
    gates = [WeightStatistic(metrics.get("gate-gradient"))]
    found, wanted = (
        [
            score.value
            for scores in (
                *stream_scores(anatomy, TEXT, statistics, anatomy.units),
                *weight_scores(anatomy, TEXT, gates, anatomy.units),
            )
            for score in scores
        ]
        for anatomy in map(dissect, models)
    )
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_likelihoods_of_a_model_on_two_devices(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    asked = [Asked(tuple(row), tuple(row[-4:])) for row in IDS.tolist()]
    found, wanted = (
        [
            answer[0]
            for places in Likelihoods(dissect(model), CANDIDATES, memory=1 << 28).of(asked)
            for answers in places.values()
            for answer in answers
        ]
        for model in models
    )
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_model_that_accelerate_spread_is_searched_but_not_cut() -> None:
    model = dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    wanted = shallower.search(tiny_model("llama"), 1, calibration=TEXT)
    assert shallower.search(model, 1, calibration=TEXT).removed == wanted.removed
    read: list[str] = []
    refused = r"spread over devices by accelerate.*load it on one device"
    with progress.listening(lambda text, total: nullcontext(lambda n=1: read.append(text))):
        with pytest.raises(ModelError, match=refused):
            shallower.prune(model, 1, calibration=TEXT, tokenizer=tiny_tokenizer())
        with pytest.raises(ModelError, match=refused):
            shallower.search(model, 1, calibration=TEXT, repair="linear-fold")
    assert not read  # refused before anything is measured
    with pytest.raises(ModelError, match=r"each worker \(--workers 2\) would need it all: drop --workers"):
        make_ablator(open_subject(model), TEXT, "nll", workers=2)


def test_a_model_on_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("mps:0"))
    with pytest.raises(UserError, match=r"device 'mps:0' has no float64.*: move the model first"):
        open_subject(tiny_model("llama"))


@pytest.mark.parametrize("family", ["llama", "llama, tied", "cohere", "gpt2", "gemma3"])
def test_streamed_blocks_are_on_the_device_while_they_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = []
    for _ in range(2):
        model = tiny_model(family.partition(",")[0])
        if "tied" in family:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        both.append(model)
    model, resident = both
    monkeypatch.setattr(ablator, "TOKENS_A_BATCH_ELSEWHERE", 32)  # two batches
    wanted = Ablator(dissect(resident), TEXT, "kl", threads=1).losses(CANDIDATES)
    inside = list(find_blocks(model)[1].parameters())
    ran: list[tuple[torch.device, ...]] = []
    own = torch.nn.functional.linear
    with Devices() as devices:

        def placed(data: Tensor, requires_grad: bool) -> torch.nn.Parameter:
            parameter = torch.nn.Parameter(data, requires_grad)
            devices.places[parameter] = data.device
            return parameter

        monkeypatch.setattr(streamed, "Parameter", placed)
        stream_from_processor(model, FIRST)
        assert model.device == FIRST
        assert {weight.device.type for weight in inside} == {"cpu"}
        monkeypatch.setattr(
            torch.nn.functional, "linear", lambda x, w, b=None: ran.append((x.device, w.device)) or own(x, w, b)
        )
        found = Ablator(dissect(model), TEXT, "kl", memory=1 << 28).losses(CANDIDATES)
        assert {weight.device.type for weight in find_blocks(model)[1].parameters()} == {"cpu"}
    assert all(one is other for one, other in zip(inside, find_blocks(model)[1].parameters(), strict=True))
    if family != "gpt2":  # has no linear maps, but convolutions
        assert set(ran) == {(FIRST, FIRST)}
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_teacher_on_another_device_than_its_student_is_refused() -> None:
    teacher, removed = tiny_model("llama"), parse_units("block.2")
    made_by = MadeBy(None, None, None, {}, 0, None, "0")
    plan = PruningPlan(open_subject(teacher).identity, removed, ((removed[0], None),), None, made_by)
    student = copy.deepcopy(cut(dissect(teacher), removed))
    with Devices() as devices:
        for weight in (*student.parameters(), *student.buffers()):
            devices.places[weight] = FIRST
        with pytest.raises(UserError, match=r"is on privateuseone:0 and its teacher .* on cpu, .*: put both on one"):
            shallower.recover(student, "refit", teacher=teacher, plan=plan, calibration=TEXT)
