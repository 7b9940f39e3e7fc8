"""LoRA adapters on a student's linear maps: attached by peft, and merged into weights that are the student's own."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shallower import progress
from shallower.anatomy.dissect import dissect, find_blocks
from shallower.errors import ModelError
from shallower.training.heal import block_of

_ROUTER = re.compile("Router|Gat(e|ing)$")  # and not what ends in GatedMLP, or the like
_READ_BY_MAMBA = frozenset({"dt_proj", "out_proj", "x_proj"})


Maps = Literal["all", "attn", "mlp"]


def projections(student: PreTrainedModel, first: int = 0, maps: Maps = "all") -> list[str]:
    """Names of the linear maps in the student's blocks from `first` on that get adapters, or of those of its attention
    or MLP sublayers. Routers do not, as most give more than a product, nor a Mamba's maps whose weights are read past
    an adapter, nor experts in one tensor.

    Raises ModelError when there are none.
    """
    wanted = _wanted(student, first, maps)
    if any(
        ".experts." in name and parameter.ndim == 3 and wanted(name) for name, parameter in student.named_parameters()
    ):
        progress.note("experts that are one tensor have no adapters, and stay as they are: full trains them")
    return _plain_maps(student, first, maps)


def require_adaptable(student: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Raise ModelError where nothing from the block `first` on can have adapters."""
    _plain_maps(student, options["first"], options["maps"])


def adapter_parameters(student: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, int]:
    """How many parameters the adapters of each linear map have, by the map's name."""
    names = _plain_maps(student, options["first"], options["maps"])
    return {name: options["rank"] * sum(student.get_submodule(name).get_parameter("weight").shape) for name in names}


def require_quantisable(student: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Raise ModelError, beside what adapters need, for linear maps that cannot be quantised."""
    require_adaptable(student, options)
    for name in _plain_maps(student, options["first"], options["maps"]):
        _require_linear(student, name)


def _require_linear(student: PreTrainedModel, name: str) -> nn.Linear:
    module = student.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{name} is a {type(module).__name__}, which cannot be quantised: use lora.")
    return module


def _wanted(student: PreTrainedModel, first: int, maps: Maps) -> Callable[[str], bool]:
    """Whether what has a name is in a block from `first` on, and in a sublayer that is asked for."""
    place = block_of(student)
    inside: tuple[str, ...] = ("",)
    if maps != "all":
        anatomy = dissect(student)
        inside = tuple(f"{name}." for unit in anatomy.of_kind(maps) for name in anatomy.names_of(unit))

    def wanted(name: str) -> bool:
        index = place(name)
        return index is not None and index >= first and f"{name}.".startswith(inside)

    return wanted


def _plain_maps(student: PreTrainedModel, first: int, maps: Maps) -> list[str]:
    wanted = _wanted(student, first, maps)
    linear = [name for name, module in student.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    found = [name for name in linear if wanted(name) and _is_plain(student, name)]
    if not found:
        raise ModelError(
            f"{type(student).__name__} has no linear maps in its blocks from {first} on to put adapters on "
            f"(maps={maps}; experts in one tensor take none): choose others by --set first and maps, or full."
        )
    return found


def _is_plain(student: PreTrainedModel, name: str) -> bool:
    """Whether a linear map is no router, or part of one, and all that is done with its weights is its product."""
    path = name.split(".")
    around = [student.get_submodule(".".join(path[: depth + 1])) for depth in range(len(path))]
    if any(_ROUTER.search(type(module).__name__) for module in around):
        return False
    # Mamba and its kernels multiply by these maps' weights; of what has A_log, linear attention has no D and does not
    return not (path[-1] in _READ_BY_MAMBA and hasattr(around[-2], "A_log") and hasattr(around[-2], "D"))


def adapt(
    student: PreTrainedModel, names: Collection[str], *, rank: int, alpha: float, dropout: float, seed: int
) -> None:
    """Put an adapter, alpha / rank · B A, beside each named linear map; they are float32, and all that is trained."""
    from peft import LoraConfig, inject_adapter_in_model

    # peft is given the list of blocks, as in a whole model it takes some families' names for other modules'
    path, blocks = find_blocks(student)
    own = [name.removeprefix(f"{path}.") for name in names]
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=own)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # of Conv1D: peft says that it does what is right
        inject_adapter_in_model(settings, blocks)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge(student: PreTrainedModel, plain: Mapping[str, nn.Module] | None = None) -> None:
    """Add each adapter to a copy of the weights that it stands beside, and take it out.

    plain: by name, what `quantise` returned; these get the sum of what they were rounded to and the adapter.
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in student.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        module = base if plain is None else plain[name]
        added = layer.get_delta_weight("default").float()
        module.weight = nn.Parameter((_weight(base).float() + added).to(module.weight.dtype))
        student.set_submodule(name, module)
    vars(find_blocks(student)[1]).pop("peft_config", None)


def quantise(student: PreTrainedModel, names: Collection[str]) -> dict[str, nn.Module]:
    """Replace the named linear maps by ones of four bits (NF4). Returns the maps that were replaced, by name, without
    their weights (on `meta`).

    Raises ModelError for a map that bitsandbytes cannot quantise.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    replaced: dict[str, nn.Module] = {}
    for name in names:
        module = _require_linear(student, name)
        small = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=module.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        small.weight = Params4bit(module.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=small)
        small.bias = module.bias
        small.support_avx512bf16_for_cpu = False  # it would repack, and round, the weights at each measurement
        empty = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
        kept = {id(module.weight): empty, id(module.bias): module.bias}
        replaced[name] = copy.deepcopy(module, dict(kept))
        student.set_submodule(name, small.to(module.weight.device))
    return replaced


def _weight(module: nn.Module) -> Tensor:
    """A linear map's weights, unpacked where they are quantised."""
    weight = module.get_parameter("weight").detach()
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    unpacked: Tensor = dequantize_4bit(weight, state)
    return unpacked
