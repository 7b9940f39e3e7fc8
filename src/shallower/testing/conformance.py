"""What every registered method must satisfy. A method enters these checks by being registered; third parties can run
them.

    from shallower.testing.conformance import check_metric
    check_metric("my-metric", model)

Each check raises AssertionError with what was seen.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import dissect, substitutes
from shallower.corpus.answers import Answers
from shallower.corpus.calibration import CalibrationSet
from shallower.corpus.choices import ChoiceSet
from shallower.engine import reads_stream, reads_weights
from shallower.registry import metric as metrics
from shallower.scores import Scores
from shallower.units import Unit
from shallower.verbs.score import score

TOLERANCE = 1e-5  # float32 sums in another order


def sample_text(model: PreTrainedModel, *, sequences: int = 6, length: int = 24, padded: bool = True) -> CalibrationSet:
    """Random token ids for a tiny model; with `padded`, some rows end in padding."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, length // 2 :] = 0
        mask[-1, length - 3 :] = 0
    return CalibrationSet("random", ids, mask, ())


def sample_choices(model: PreTrainedModel, *, questions: int = 5, length: int = 16) -> ChoiceSet:
    """Questions of random token ids for a tiny model, with two and three choices, and choices of unequal length."""
    question = torch.tensor([number for number in range(questions) for _ in range(2 + number % 2)])
    text = sample_text(model, sequences=len(question), length=length)
    tokens = torch.full((len(question),), length) if text.attention_mask is None else text.attention_mask.sum(1)
    positions = torch.arange(length)[None, :]
    choice = (positions >= tokens[:, None] - 2 - question[:, None] % 3) & (positions < tokens[:, None])
    gold = torch.cat([torch.ones(1, dtype=torch.bool), question.diff().bool()])  # the first
    return ChoiceSet(
        "random", text.input_ids, text.attention_mask, answers=Answers(choice, question, gold, choice.sum(1) * 3)
    )


def with_identity_block(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """A copy of `model` in which one block adds nothing to the stream: its attention and MLP give nothing back."""
    changed = copy.deepcopy(model)
    block = dissect(changed).blocks[index]
    for kind in ("attn", "mlp"):
        block.module._modules.update(substitutes(block, kind))
    return changed


def check_metric(name: str, model: PreTrainedModel) -> None:
    """A metric ranks a block that does nothing lowest, ignores padding, batches and order, and changes nothing."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    text = sample_text(model)
    first = _scores(name, model, text)
    again = _scores(name, model, text)
    assert first.rows == again.rows, f"{name}: the same question twice gave two answers"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{name} changed {key}"
    assert set(first.units) == {Unit(index, "block") for index in range(first.model.blocks)}

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mask = text.attention_mask
    assert mask is not None
    _compare(f"{name} depends on the order of sequences", first, _scores(name, model, text.subset(order.tolist())))
    longer = CalibrationSet(
        "random", nn.functional.pad(text.input_ids, (0, 5), value=1), nn.functional.pad(mask, (0, 5)), ()
    )
    _compare(f"{name} depends on padding", first, _scores(name, model, longer))
    often = text.subset([*range(text.sequences)] * 8)  # several batches, with the same means
    _compare(f"{name} depends on batches", first, _scores(name, model, often))


def check_identity_is_lowest(name: str, model: PreTrainedModel, index: int = 2) -> None:
    """A block that adds nothing has the lowest score of all."""
    found = _scores(name, with_identity_block(model, index), sample_text(model)).units
    lowest = min(found, key=found.__getitem__)
    assert lowest == Unit(index, "block"), f"{name}: {lowest} is below the identity block.{index}: {found}"


def static_metrics() -> list[str]:
    """Registered metrics that read the stream, weights or gradients of the dense model, and never run another."""
    return [method.name for method in metrics if reads_stream(method) or reads_weights(method)]


def _scores(name: str, model: PreTrainedModel, text: CalibrationSet) -> Scores:
    return score(model, name, calibration=text)


def _compare(what: str, first: Scores, second: Scores) -> None:
    for unit, value in first.units.items():
        found = second.units[unit]
        assert abs(value - found) <= TOLERANCE * max(1.0, abs(value)), f"{what}: {unit} {value} → {found}"
