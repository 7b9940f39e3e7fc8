"""Find blocks, attention and MLP sublayers by structure, and observe how they pass the residual stream on.

Nothing here knows a family by name. The block list is the one `nn.ModuleList` as long as the text config says; in a
block the attention is the child that owns a KV cache slot (`layer_idx`) or calls itself attention, the MLP is every
other child with weight matrices. One forward of a few tokens then shows what each part returns, so that a part can be
replaced by nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shallower.anatomy.patch import Patch
from shallower.errors import BudgetError, ModelError
from shallower.packaged import Absent, LeavesOut, stock_type
from shallower.units import Kind, Unit

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Sublayer:
    """A module that reads the residual stream, and the form in which it gives it back.

    names: attribute names of the modules inside the block (OPT's MLP is two linear maps in a row, Granite's is two
    summed).
    arities: for each module, None when it returns a tensor, else the length of the tuple whose first entry is the
    tensor.
    adds_residual: the module adds the stream itself (Bloom, MPT), so that without it the stream comes back unchanged.
    """

    names: tuple[str, ...]
    arities: tuple[int | None, ...]
    adds_residual: bool = False


@dataclass(frozen=True)
class Block:
    """One decoder layer. `attn` or `mlp` is None when the block has no such sublayer."""

    index: int
    module: nn.Module
    arity: int | None
    attn: Sublayer | None
    mlp: Sublayer | None

    def sublayer(self, kind: Kind) -> Sublayer | None:
        return {"attn": self.attn, "mlp": self.mlp}.get(kind)

    def modules_of(self, kind: Kind) -> tuple[nn.Module, ...]:
        """The modules that `kind` consists of: the whole block, or those of a sublayer."""
        if kind == "block":
            return (self.module,)
        sublayer = self.sublayer(kind)
        return () if sublayer is None else tuple(self.module.get_submodule(name) for name in sublayer.names)

    @contextmanager
    def without(self, kind: Kind) -> Iterator[None]:
        """Inside the `with`, the block runs as if its attention or MLP added nothing to the stream."""
        sublayer = self.sublayer(kind)
        assert sublayer is not None, f"{kind}.{self.index} does not exist"
        originals = {name: self.module._modules[name] for name in sublayer.names}
        try:
            for name, substitute in substitutes(self, kind).items():
                self.module._modules[name] = substitute
            yield
        finally:
            self.module._modules.update(originals)


def substitutes(block: Block, kind: Kind) -> dict[str, nn.Module]:
    """Modules to put in place of a sublayer's, by child name, so that the block runs without it."""
    sublayer = block.sublayer(kind)
    assert sublayer is not None
    modules: dict[str, nn.Module] = {}
    for name, arity in zip(sublayer.names, sublayer.arities, strict=True):
        original = block.module.get_submodule(name)
        if isinstance(original, nn.Linear) and name != sublayer.names[-1]:
            modules[name] = nn.Identity()  # feeds the next linear map, which is the one that gives nothing back
        else:
            modules[name] = Absent(_arguments(original), arity, sublayer.adds_residual)
    return modules


def pack(hidden: Tensor, arity: int | None) -> Any:
    """Give `hidden` [sequences, tokens, hidden] the form that the replaced module would have returned: itself, or a
    tuple of `arity` that begins with it.
    """
    return hidden if arity is None else (hidden, *[None] * (arity - 1))


def unpack(output: Any) -> Tensor:
    """The hidden states [sequences, tokens, hidden] in what a block or sublayer returned: it, or a tuple's first."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Blocks of a model in order, where they are, and which sublayers they have."""

    model: PreTrainedModel
    path: str
    blocks: tuple[Block, ...]

    @property
    def family(self) -> str:
        """What users know the model as: of a packaged one, the stock family that it builds on."""
        return stock_type(self.model.config)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every unit that could be removed, in depth order."""
        units = []
        for block in self.blocks:
            units.append(Unit(block.index, "block"))
            units += [Unit(block.index, kind) for kind in ("attn", "mlp") if block.sublayer(kind) is not None]
        return tuple(units)

    def require(self, units: Iterable[Unit]) -> None:
        """Raise BudgetError for a unit that the model has not, or that cannot be told apart in it."""
        last = len(self.blocks) - 1
        for unit in sorted(set(units).difference(self.units)):
            if unit.index > last:
                raise BudgetError(f"{unit} does not exist: this {self.family} model has blocks 0 to {last}.")
            raise BudgetError(
                f"{unit} does not exist: {unit.kind} is not a part of block {unit.index} of this {self.family} model "
                "that can be told apart."
            )

    def names_of(self, unit: Unit) -> tuple[str, ...]:
        """Names of the modules that a unit consists of, as the model names them."""
        block = f"{self.path}.{unit.index}"
        sublayer = self.blocks[unit.index].sublayer(unit.kind)
        inside = () if sublayer is None else tuple(f"{block}.{name}" for name in sublayer.names)
        return (block,) if unit.kind == "block" else inside

    def of_kind(self, *kinds: Kind) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.kind in kinds)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks.

    Raises ModelError saying what was found when there is no such list, or more than one.
    """
    expected = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [
        (name, module)
        for name, module in lists
        if len(module) == expected and all(isinstance(member, GradientCheckpointingLayer) for member in module)
    ]
    if len(fitting) != 1:
        seen = ", ".join(
            f"{name} ({len(module)} × {type(module[0]).__name__})" for name, module in lists if len(module)
        )
        raise ModelError(
            f"cannot tell which modules of {type(model).__name__} are its {expected} blocks: "
            f"{len(fitting)} lists fit. Module lists found: {seen or 'none'}."
        )
    return fitting[0]


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the anatomy of a decoder-only language model; runs one forward of a few tokens.

    Raises ModelError when the blocks cannot be found or do not pass one residual stream on.
    """
    path, modules = find_blocks(model)
    mixers = [
        () if gone else _mixer_names(block)
        for block, gone in zip(modules, _attentions_gone(model, len(modules)), strict=True)
    ]
    named = [(_attention_names(mix), _mlp_names(block, mix)) for block, mix in zip(modules, mixers, strict=True)]
    returned: dict[nn.Module, int | None] = {}
    gave: dict[nn.Module, Tensor] = {}
    entangled: set[nn.Module] = (
        set()
    )  # give the stream besides their output (DBRX's attention), so nothing replaces them
    watched = list(modules) + [
        block.get_submodule(name) for block, names in zip(modules, named, strict=True) for name in sum(names, ())
    ]

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        returned[module] = len(output) if isinstance(output, tuple) else None
        gave[module] = unpack(output)
        more = output[1:] if isinstance(output, tuple) else ()
        if any(isinstance(one, Tensor) and one.shape == output[0].shape for one in more):
            entangled.add(module)

    handles = [module.register_forward_hook(remember) for module in watched]
    run_probe(model, handles)

    def sublayer(block: nn.Module, names: tuple[str, ...]) -> Sublayer | None:
        called = tuple(name for name in names if block.get_submodule(name) in returned)
        if not called or entangled & {block.get_submodule(name) for name in called}:
            return None
        linear = [isinstance(block.get_submodule(name), nn.Linear) for name in called]
        if any(linear[:-1]) and not all(linear):
            return None  # beside the MLP a map narrows the stream to what only the block knows (Gemma 4)
        last = block.get_submodule(called[-1])
        adds_residual = "residual" in _arguments(last)
        if gave[last] is gave.get(block) and not adds_residual:
            return None  # what it returns is the block's own stream (Zamba), which would go with it
        arities = tuple(returned[block.get_submodule(name)] for name in called)
        return Sublayer(called, arities, adds_residual)

    blocks = []
    for index, (block, (attention, mlp)) in enumerate(zip(modules, named, strict=True)):
        if block not in returned:
            raise ModelError(
                f"block {index} of {type(model).__name__} ({path}.{index}) was not run by the model's forward."
            )
        blocks.append(Block(index, block, returned[block], sublayer(block, attention), sublayer(block, mlp)))
    return Anatomy(model, path, tuple(blocks))


def probe_ids(model: PreTrainedModel, sequences: int = 1) -> Tensor:
    """A few token ids, int64 [sequences, PROBE_TOKENS], spread over the vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(sequences * PROBE_TOKENS, device=model.device) * 7919 % max(vocabulary - 1, 1)
    return torch.as_tensor(ids).view(sequences, PROBE_TOKENS)


def run_probe(model: PreTrainedModel, handles: Iterable[RemovableHandle]) -> None:
    """Run a model on a few tokens while hooks look on, and take these off."""
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


_MIXES_TOKENS = re.compile(
    r"att|mixer|mamba|(?<!o)ssm|conv|delta|recurrent|temporal|lstm", re.IGNORECASE
)  # not GptOssMLP
_FEEDS_FORWARD = re.compile(r"(mlp|moe|feed_?forward|ffn)$", re.IGNORECASE)  # at the end: not Qwen2MoeAttention


def _attentions_gone(model: PreTrainedModel, blocks: int) -> list[bool]:
    """Of each block, whether its attention was removed. Then nothing that is left there is one, though an MLP may carry
    a cache slot's index, too (HunYuan), and be the only child that does.
    """
    if not isinstance(model, LeavesOut):
        return [False] * blocks
    return [bool(entry["attention"]["no_op"]) for entry in model.config.block_configs]


def _mixer_names(block: nn.Module) -> tuple[str, ...]:
    """The children that mix tokens: they own a cache slot, or call themselves attention."""
    children = [
        (name, child)
        for name, child in block.named_children()
        if _is_sublayer(child) and not _FEEDS_FORWARD.search(type(child).__name__)  # `mixer` may be one (Nemotron-H)
    ]
    owners = [(name, child) for name, child in children if hasattr(child, "layer_idx")]
    if len(owners) == 1:
        return (owners[0][0],)
    # An MLP may carry the index too (HunYuan); some attentions do not (GPT-Neo).
    return tuple(
        name
        for name, child in owners or children
        if _MIXES_TOKENS.search(name) or _MIXES_TOKENS.search(type(child).__name__)
    )


def _attention_names(mixers: tuple[str, ...]) -> tuple[str, ...]:
    """The child that mixes tokens; none when there are several side by side (Falcon-H1), which one unit cannot name."""
    return mixers if len(mixers) == 1 else ()


def _mlp_names(block: nn.Module, mixers: tuple[str, ...]) -> tuple[str, ...]:
    """Every child with weight matrices that does not mix tokens; in calling order as declared (OPT: fc1, fc2)."""
    return tuple(name for name, child in block.named_children() if name not in mixers and _is_sublayer(child))


def _is_sublayer(module: nn.Module) -> bool:
    """Whether it is what a sublayer consists of: something with matrices, that does not stand for what was removed, and
    is more than what a recovery put at a cut.
    """
    patched = {id(weight) for part in module.modules() if isinstance(part, Patch) for weight in part.parameters()}
    return not isinstance(module, Absent) and any(
        parameter.dim() >= 2 and id(parameter) not in patched for parameter in module.parameters()
    )


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
