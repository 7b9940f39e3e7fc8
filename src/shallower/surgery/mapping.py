"""Put a small map where a sublayer was removed: what a repair without training finds is kept there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy, dissect, probe_ids, unpack
from shallower.errors import ModelError
from shallower.packaged import Absent, LeavesOut
from shallower.units import Unit


def put_map(
    model: PreTrainedModel,
    unit: Unit,
    *,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    """Let `model` add (x - mean) @ down @ up + bias to the stream x where `unit` was removed (arXiv:2407.16286).

    Args:
        model: A cut model that misses `unit` alone. It is changed, and is packaged with its maps when it is saved.
        unit: A sublayer by its place in the dense model.
        bias: [hidden].
        down: [hidden, rank], together with `up`. A full map is one of rank `hidden`.
        up: [rank, hidden].
        mean: [hidden]; together with `down`.

    Raises:
        ModelError: Nothing stands for `unit`, shapes do not fit, or what stands there does not see or reach the stream
            itself (norms that it shares with another sublayer, scaled branches).
    """
    place, name, stand_in = _find(model, unit)
    half = "attention" if unit.kind == "attn" else "ffn"
    width = model.config.hidden_size
    given = {"bias": bias, "mean": mean, "down": down, "up": up}
    shapes = {part: tuple(tensor.shape) for part, tensor in given.items() if tensor is not None}
    rank = None if down is None else down.shape[-1]
    wanted = {"bias": (width,), "mean": (width,), "down": (width, rank), "up": (rank, width)}
    if not shapes or (down is None) != (up is None) or (mean is not None and down is None):
        raise ModelError(f"a map for {unit} is a bias, or down and up with or without a mean; given: {list(shapes)}.")
    if wrong := [part for part, shape in shapes.items() if shape != wanted[part]]:
        raise ModelError(f"the map for {unit} has {wrong[0]} of shape {shapes[wrong[0]]}, not {wanted[wrong[0]]}.")
    anatomy = dissect(model)
    block = anatomy.blocks[place].module
    kind = {"mean": mean is not None, "bias": bias is not None, "rank": rank}
    new = Absent(stand_in.arguments, stand_in.arity, stand_in.adds_residual, kind, width)
    new.unit = unit
    new.to(device=model.device, dtype=model.dtype)
    with torch.no_grad():
        for part, tensor in given.items():
            if tensor is not None:
                getattr(new, part).copy_(tensor)
    block._modules[name] = new
    try:
        _require_stream(anatomy, place, unit, new)
    except ModelError:
        block._modules[name] = stand_in
        raise
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "block_configs"):
            config.block_configs[place][half]["map"] = kind


def _find(model: PreTrainedModel, unit: Unit) -> tuple[int, str, Absent]:
    """The place of the block, the name of the module in it and the module that stand for `unit`."""
    if isinstance(model, LeavesOut):
        blocks = model.get_submodule(model.config.packaged["blocks_at"])
        assert isinstance(blocks, nn.ModuleList)
        for place, block in enumerate(blocks):
            found = [
                (n, child) for n, child in block.named_children() if isinstance(child, Absent) and child.unit == unit
            ]
            if len(found) == 1:
                return place, *found[0]
    raise ModelError(f"nothing single stands where {unit} was, so that no map can be put there.")


def _require_stream(anatomy: Anatomy, place: int, unit: Unit, stand_in: Absent) -> None:
    """Raise ModelError unless the block, without its other half, adds to its input x what the map makes of x."""
    block = anatomy.blocks[place]
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        assert isinstance(given, Tensor)
        seen.update(before=given, after=unpack(output))

    other = "mlp" if unit.kind == "attn" else "attn"
    handle = block.module.register_forward_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad(), block.without(other):  # type: ignore[arg-type]
            anatomy.model(input_ids=probe_ids(anatomy.model), use_cache=False)
            x = seen["before"]
            update = torch.zeros_like(x)
            if stand_in.down is not None and stand_in.up is not None:
                update = (x if stand_in.mean is None else x - stand_in.mean) @ stand_in.down @ stand_in.up
            wanted = x + update if stand_in.bias is None else x + update + stand_in.bias
    finally:
        handle.remove()
    if not torch.allclose(seen["after"].float(), wanted.float(), rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
        raise ModelError(
            f"what stands where {unit} was does not see the stream itself in {anatomy.family}, or does not add to it "
            "unchanged, so that no map can be put there."
        )
