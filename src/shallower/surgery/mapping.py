"""Put a small map where a sublayer was removed: what a repair finds is kept there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy, Block, dissect, probe_ids, unpack
from shallower.anatomy.patch import Patch
from shallower.anatomy.writers import find_writers
from shallower.engine.twins import Point
from shallower.errors import ModelError
from shallower.packaged import Absent, LeavesOut
from shallower.surgery.adopt import restate
from shallower.surgery.cut import assemble, refusing
from shallower.surgery.pairing import Layer, in_place, mlp_side
from shallower.surgery.patch import patches, patches_at
from shallower.surgery.stations import layers_of, stations
from shallower.surgery.verify import difference, full_logits, tolerance
from shallower.units import Kind, Unit


def put_map(
    model: PreTrainedModel,
    unit: Unit,
    *,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    mean: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Let `model` add (x - mean) @ down @ up + bias to the stream x where `unit` was removed (arXiv:2407.16286).

    Args:
        model: A cut model that misses `unit` alone. It is changed, and is packaged with its maps when it is saved.
        unit: A sublayer by its place in the dense model.
        bias: [hidden].
        down: [hidden, rank], together with `up`. A full map is one of rank `hidden`.
        up: [rank, hidden].
        mean: [hidden]; together with `down`.
        factor: What the block multiplies that sublayer's output by (Granite's `residual_multiplier`).

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
                getattr(new, part).copy_(tensor if part in ("down", "mean") else tensor / factor)
    block._modules[name] = new
    try:
        _require_stream(anatomy, place, unit, new, factor)
    except ModelError:
        block._modules[name] = stand_in
        raise
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "block_configs"):
            config.block_configs[place][half]["map"] = kind


def mapped(student: PreTrainedModel, dense: Anatomy, removed: Collection[Unit]) -> PreTrainedModel:
    """A model that computes what the cut and patched `student` does, with each patch as the map of a missing sublayer.

    It is of the class that a packaged checkpoint has. Where only whole blocks are missing behind a patch, one of them
    stays as an empty block that holds nothing but the map. Tensors are shared with the student.

    dense: of the model that `student` was cut from, in the same type. removed: what `student` lacks.

    Raises ModelError where the family has no place for such a map, PlanError when `student` is not `dense` without
    `removed`.
    """
    own = dissect(student)
    layers = layers_of(own, dense, removed)
    halves = find_writers(dense)
    wanted: dict[Unit, Patch] = {}
    for station in stations(own, dense, removed, halves):
        held = _held(own, station.here)
        slots = [half for unit in station.missing for half in _sublayers(unit, dense)]
        if len(held) > len(slots):
            raise ModelError(
                f"{len(held)} maps stand where {len(slots)} sublayers are missing, and each needs the place of one: "
                "use one recovery that puts maps at cuts."
            )
        wanted |= zip(slots, held, strict=False)
    homes = {unit.index for unit in wanted}
    apart = {half for unit in removed for half in (_sublayers(unit, dense) if unit.index in homes else (unit,))}
    described = in_place(dense, apart, keep_empty=True)
    model = assemble(dense, described, padded=False, thorough=True)
    _transplant(student, own, layers, model, dense, described)
    restate(model, student)
    ids = probe_ids(model)
    expected = full_logits(student, ids)
    with refusing(dense.family):
        for unit, patch in wanted.items():
            writer = halves[unit.index].writer(unit.kind)
            with_rank = {} if patch.rank == 0 else {"down": patch.down, "up": patch.up, "mean": patch.mean}
            put_map(model, unit, bias=patch.bias, factor=1.0 if writer is None else writer.factor, **with_rank)
        away = difference(full_logits(model, ids), expected)
    allowed = tolerance(model, expected)
    if away > allowed:
        raise ModelError(
            f"{dense.family} computes something else with maps in the place of missing sublayers than with maps at "
            f"cuts: logits differ by {away:.3g}."
        )
    return model


def _held(anatomy: Anatomy, here: Point) -> list[Patch]:
    """The patches at a point of the stream."""
    if here.without:
        return patches_at(anatomy, here.index, "middle")
    behind = patches_at(anatomy, here.index - 1, "exit") if here.index else []
    return behind + (patches_at(anatomy, here.index, "entry") if here.index < len(anatomy.blocks) else [])


def _sublayers(unit: Unit, dense: Anatomy) -> tuple[Unit, ...]:
    """The unit itself, or the two halves of a block that has two."""
    block = dense.blocks[unit.index]
    if unit.kind != "block" or block.attn is None or block.mlp is None:
        return (unit,)
    return Unit(unit.index, "attn"), Unit(unit.index, "mlp")


def _transplant(
    student: PreTrainedModel,
    own: Anatomy,
    layers: Sequence[Layer],
    model: PreTrainedModel,
    dense: Anatomy,
    described: Sequence[Layer],
) -> None:
    """Give `model`, whose blocks are `described`, the parameters of the student, whose blocks are `layers`."""
    sides = mlp_side(dense)
    place_of = {layer.home: place for place, layer in enumerate(described)}
    maps = {id(part) for _, patch in patches(student) for part in patch.parameters()}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if id(parameter) in maps:
            continue
        owner, _, key = name.rpartition(".")
        if owner.startswith(f"{own.path}."):
            place, _, inside = owner.removeprefix(f"{own.path}.").partition(".")
            layer = layers[int(place)]
            source = layer.mlp if inside.partition(".")[0] in sides[layer.home] else layer.attn
            home = place_of[layer.home if source is None else source]
            owner = ".".join(filter(None, (dense.path, str(home), inside)))
        try:
            holder = model.get_submodule(owner)
        except AttributeError:  # a norm of a missing sublayer, which stayed in the student
            continue
        if key in holder._parameters:
            holder._parameters[key] = parameter


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


@contextmanager
def _alone(block: Block, stand_in: Absent, other: Kind) -> Iterator[None]:
    """Inside the `with`, the block's other half adds nothing, whether it is there or a map stands for it."""
    if block.sublayer(other) is not None:
        with block.without(other):
            yield
        return
    modules = block.module._modules
    maps = {name: child for name, child in modules.items() if isinstance(child, Absent) and child is not stand_in}
    modules.update({name: Absent(one.arguments, one.arity, one.adds_residual) for name, one in maps.items()})
    try:
        yield
    finally:
        modules.update(maps)


def _require_stream(anatomy: Anatomy, place: int, unit: Unit, stand_in: Absent, factor: float) -> None:
    """Raise ModelError unless the block, without its other half, adds to its input x what the map makes of x."""
    block = anatomy.blocks[place]
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        assert isinstance(given, Tensor)
        seen.update(before=given, after=unpack(output))

    handle = block.module.register_forward_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad(), _alone(block, stand_in, "mlp" if unit.kind == "attn" else "attn"):
            anatomy.model(input_ids=probe_ids(anatomy.model), use_cache=False)
            x = seen["before"]
            update = torch.zeros_like(x)
            if stand_in.down is not None and stand_in.up is not None:
                update = (x if stand_in.mean is None else x - stand_in.mean) @ stand_in.down @ stand_in.up
            wanted = x + factor * (update if stand_in.bias is None else update + stand_in.bias)
    finally:
        handle.remove()
    if not torch.allclose(seen["after"].float(), wanted.float(), rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
        raise ModelError(
            f"what stands where {unit} was does not see the stream itself in {anatomy.family}, or does not add to it "
            "unchanged, so that no map can be put there."
        )
