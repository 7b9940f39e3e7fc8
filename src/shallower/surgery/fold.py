"""Fold a repair into weights that a stock checkpoint has: a constant into a bias, a map into a writing matrix.

Where a family has no bias at the place, its config may have a switch for one (Llama's `mlp_bias` and `attention_bias`):
the skeleton built with the switch on shows which biases there are then; all but the wanted one are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shallower.anatomy.dissect import Anatomy, probe_ids
from shallower.anatomy.writers import Halves, Writer
from shallower.corpus.calibration import Batch
from shallower.engine.trace import trace
from shallower.engine.twins import Point
from shallower.errors import ModelError
from shallower.surgery.config import stored_text
from shallower.surgery.skeleton import skeleton, skeleton_blocks


def fold_constant(anatomy: Anatomy, writer: Writer, constant: Tensor) -> None:
    """Let the model add `constant` [hidden] to the stream where `writer` writes, in place. Exact.

    Raises ModelError when the family has no bias there, and no config field that gives it one.
    """
    if writer.bias is None:
        give_bias(anatomy, writer)
    assert writer.bias is not None
    writer.replace(bias=writer.bias.double() + constant.double().to(writer.bias.device) / writer.factor)


def fold_map(writer: Writer, matrix: Tensor) -> None:
    """Let `matrix` [hidden, hidden] act on what `writer` writes, weight and bias, in place. Exact."""
    matrix = matrix.double().to(writer.weight.device)
    bias = None if writer.bias is None else matrix @ writer.bias.double()
    writer.replace(matrix @ writer.weight.double(), bias)


def can_have_bias(anatomy: Anatomy, writer: Writer) -> bool:
    """Whether `writer` has a bias, or a config field gives it one."""
    return writer.bias is not None or bias_switch(anatomy, writer) is not None


def give_bias(anatomy: Anatomy, writer: Writer) -> None:
    """Turn on the config field that gives `writer` a bias; all new biases are zero.

    Raises ModelError when there is no such field.
    """
    model = anatomy.model
    name = bias_switch(anatomy, writer)
    if name is None:
        raise ModelError(
            f"{anatomy.family} has no bias at {writer.path} and no config field that gives it one, so a constant after "
            f"{writer.kind}.{writer.block.index} cannot be folded into an ordinary checkpoint."
        )
    turn_on(model, anatomy.path, name)


def turn_on(model: PreTrainedModel, path: str, name: str) -> None:
    """Set a config field that `bias_switch` named, and add its biases as zeros."""
    config = _with(model.config, name)
    built = skeleton_blocks(model, config, path)
    own = dict(model.get_submodule(path).named_modules())
    for place, described in built.named_modules():
        module = own.get(place)  # none where a sublayer is missing
        if module is None or getattr(described, "bias", None) is None:
            continue
        if getattr(module, "bias", None) is None:
            weight: Tensor = module.weight
            zeros = torch.zeros(described.bias.shape, dtype=weight.dtype, device=weight.device)
            module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    setattr(stored_text(model.config), name, True)


def bias_switch(anatomy: Anatomy, writer: Writer) -> str | None:
    """The config field that gives `writer` a bias and changes nothing else; None when there is none."""
    model = anatomy.model
    now = _shapes(skeleton(model, model.config))
    blocks = f"{anatomy.path}."
    wanted = f"{blocks}{writer.block.index}.{writer.path}.bias"
    fields: dict[str, object] = vars(stored_text(model.config))
    for name, value in fields.items():
        if "bias" not in name or value is not False:
            continue
        try:
            then = _shapes(skeleton(model, _with(model.config, name)))
        except (TypeError, ValueError, NotImplementedError):  # a family that refuses the combination
            continue
        gained = then.keys() - now.keys()
        kept = all(then.get(key) == shape for key, shape in now.items())
        inside = all(key.startswith(blocks) and key.endswith(".bias") for key in gained)  # ERNIE's head gains one, too
        if wanted in gained and kept and inside:
            return name
    return None


def _with(config: PretrainedConfig, name: str) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    setattr(stored_text(changed), name, True)
    return changed


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def fold_scale(anatomy: Anatomy, here: Point, factor: float, halves: Sequence[Halves]) -> None:
    """Multiply the stream at `here` by `factor`, in place: the embedding and all that writes to the stream before.

    Exact where every norm takes the length out again, up to its epsilon. A tied embedding is untied. Proven on a few
    tokens.

    Raises ModelError, with the model as it was, when the stream does not follow: an embedding that is normed, norms
    behind the sublayers, or a matrix of the kind that `find_writers` does not find.
    """
    model = anatomy.model
    inside = here.index + (1 if here.without else 0)
    writers = [
        writer
        for index, half in enumerate(halves[:inside])
        for writer in (half.attn, None if here.without and index == here.index else half.mlp)
        if writer is not None
    ]
    before = _stream_at(anatomy, here)
    kept: list[tuple[nn.Module, Any, Any]] = [(w.module, w.module.weight, w.module.bias) for w in writers]
    blocks = set(model.get_submodule(anatomy.path).modules())
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in blocks]
    kept += [(table, table.weight, None) for table in tables]
    tied = model.config.tie_word_embeddings

    def multiply(by: float) -> None:
        for module, weight, bias in kept:
            module.weight = _times(weight, by)
            if bias is not None:
                module.bias = _times(bias, by)

    multiply(2.0)  # no rounding, unlike by the factor itself
    wanted = 2 * before.double()
    lengths = wanted.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    # of the worst token: a sink is so long that what all others miss does not count beside it
    wrong = float(((_stream_at(anatomy, here).double() - wanted).norm(dim=-1) / lengths).max())
    if wrong <= 5e-2:  # norms add an epsilon; what does not follow is off by tens of percents
        multiply(factor)
        head = model.get_output_embeddings()
        if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
            _untie(model)
        return
    for module, weight, bias in kept:
        module.weight = weight
        if bias is not None:
            module.bias = bias
    raise ModelError(
        f"the stream of {anatomy.family} cannot be rescaled by its weights (off by {wrong:.0%}): its embedding "
        "or what its sublayers write is normed. Use another recovery."
    )


def _times(parameter: nn.Parameter, factor: float) -> nn.Parameter:
    scaled = (parameter.detach().double() * factor).to(parameter.dtype)
    return nn.Parameter(scaled, requires_grad=parameter.requires_grad)


def _untie(model: PreTrainedModel) -> None:
    """Say in the config that embedding and head are two tensors."""
    for config in {id(part): part for part in (model.config, stored_text(model.config))}.values():
        config.tie_word_embeddings = False
    own = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {
        name: source for name, source in model.all_tied_weights_keys.items() if own.get(name) is own.get(source)
    }


def _stream_at(anatomy: Anatomy, here: Point) -> Tensor:
    with torch.no_grad():
        replay = trace(anatomy, Batch(probe_ids(anatomy.model), None))
        hidden = replay.entry
        for index in range(here.index):
            hidden = replay.run(index, hidden)
        return replay.run(here.index, hidden, here.without) if here.without else hidden
