"""Write a cut model as a Hugging Face checkpoint: whole, verified, or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shallower import files, progress
from shallower.anatomy.dissect import probe_ids
from shallower.checkpoint.dtype import dtype_name
from shallower.checkpoint.gguf import gguf_folder
from shallower.checkpoint.shards import rounded_formats
from shallower.checkpoint.stock import is_quantized, quiet
from shallower.errors import ModelError, OutputError
from shallower.filenames import CARD, PLAN
from shallower.files import replacing_folder, write_text, writing
from shallower.forms import FORMS, Form
from shallower.packaged import LeavesOut
from shallower.plan import PruningPlan
from shallower.strict_json import write_json
from shallower.surgery.card import model_card
from shallower.surgery.contents import listing, written_with
from shallower.surgery.cut import leftovers
from shallower.surgery.patch import patches
from shallower.surgery.runtimes import misreadings
from shallower.surgery.verify import Loader, load_stock, verify_saved
from shallower.units import listed

_BESIDES_WEIGHTS = 64 * 2**20
"""Room for tokenizer, report and directory entries."""


@dataclass(frozen=True, eq=False)
class Export:
    """A model in the form in which it is stored.

    files: text files that come with it, by name. fields: what config.json says besides, or instead. load: how the
    folder is loaded again to be compared. notes: sentences for the model card and the user.
    """

    form: Form
    model: PreTrainedModel = field(repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    load: Loader = load_stock
    notes: tuple[str, ...] = ()


def ordinary(model: PreTrainedModel) -> Export:
    """The model as a checkpoint that any software loads. Raises ModelError when sublayers are missing."""
    require_ordinary(model)
    return Export(form_of("ordinary", model), model, notes=misreadings(model))


def form_of(name: str, model: PreTrainedModel) -> Form:
    """The form of that name, or the one with code where `model` is of code that came with it."""
    return FORMS[name].with_its_code if type(model).is_remote_code() else FORMS[name]


def save(
    model: PreTrainedModel | Export,
    folder: str | os.PathLike[str],
    *,
    plan: PruningPlan | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    recoveries: Sequence[str] = (),
    pages: Mapping[str, str] | None = None,
    force: bool = False,
    max_shard_size: str = "5GB",
    verify_ids: Tensor | None = None,
) -> Path:
    """Write `model` to a temporary folder beside `folder`, load it again, compare, and rename.

    Whatever goes wrong, also Ctrl-C, `folder` is as it was before and nothing else is left behind.

    Args:
        model: A cut model, or the form of one. Its weights and config are not changed.
        folder: Must not exist, or be a checkpoint that `force` may replace.
        plan: Goes into plan.json and the model card.
        tokenizer: Saved with its chat template.
        card: Markdown that the model card ends with: what was measured.
        recoveries: Names of those that changed what is left, in order, for the model card.
        pages: Further text files to put into the folder, by name, such as the report.
        force: Replace an existing checkpoint, at the last moment.
        max_shard_size: As transformers takes it.
        verify_ids: int64 [sequences, tokens] to compare logits on; a few tokens by default.

    Returns:
        The folder.

    Raises:
        ModelError: Sublayers are missing that no stock checkpoint can leave out.
        OutputError: The place is taken, too small, or cannot be written.
        VerificationError: What was written does not load as the same model.
    """
    export = model if isinstance(model, Export) else ordinary(model)
    model = export.model
    require_no_maps(model)
    require_unquantized(model)
    target = Path(os.path.abspath(files.expanded(folder)))
    require_free(target, force=force)
    require_apart(target, model.config._name_or_path)  # the plan's name of the model is not a path
    readme = model_card(
        model,
        plan,
        card,
        form=export.form,
        notes=export.notes,
        tokenizer=tokenizer is not None,
        recoveries=recoveries,
        rounded=" and ".join(_rounded(model)),
    )
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    full = "make room or choose another place."
    with writing(target, when_full=full), progress.task(f"writing {target.name}", 4) as step:
        with replacing_folder(target) as temporary:
            require_space(target, weights)
            _write(model, temporary, max_shard_size)
            if export.fields:
                config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
                write_json(temporary / "config.json", {**config, **export.fields})
            for name, text in export.files.items():
                write_text(temporary / name, text)
            step()
            if tokenizer is not None:
                _write_tokenizer(tokenizer, temporary)
            if plan is not None:
                plan.save(temporary / PLAN)
            for name, text in {CARD: readme + listing(temporary), **(pages or {})}.items():
                write_text(temporary / name, text)
            step()
            ids = probe_ids(model) if verify_ids is None else verify_ids
            verify_saved(temporary, model, ids, load=export.load)
            step()
        step()
    return target


def require_ordinary(model: PreTrainedModel) -> None:
    """Raise ModelError when sublayers are missing that no ordinary checkpoint can leave out, or maps stand at cuts."""
    require_no_maps(model)
    if isinstance(model, LeavesOut):
        missing = listed(leftovers(model), ", ") or "some sublayers"
        raise ModelError(
            f"no ordinary checkpoint can leave out {missing}: this family's blocks always have both sublayers. Remove "
            "whole blocks, or sublayers that pair up (mlp.3 with attn.4), or save it packaged or padded (--stock)."
        )


def require_no_maps(model: PreTrainedModel) -> None:
    """Raise ModelError when a recovery put maps at cuts, for which no checkpoint has a place."""
    if found := [name for name, _ in patches(model)]:
        raise ModelError(
            f"no ordinary checkpoint can hold the {len(found)} maps at cuts that a recovery put into the model "
            f"(the first is {found[0]}): save what surgery.mapping.mapped makes of it, or recover with refit or "
            "linear-fold, which fold into weights."
        )


def require_unquantized(model: PreTrainedModel) -> None:
    """Raise ModelError when weights are in the form of a quantizer: they are neither counted nor cut nor repaired."""
    if is_quantized(model):
        method = model.hf_quantizer.quantization_config.quant_method
        raise ModelError(
            f"the weights of {type(model).__name__} stay quantized in memory ({getattr(method, 'value', method)}), and "
            "nothing smaller can be made of them: use the checkpoint from before the quantization, or one that was "
            "dequantized and saved again. FP8 and MXFP4 are dequantized with --device cpu."
        )


def require_free(folder: str | os.PathLike[str], *, force: bool) -> None:
    """Raise OutputError unless `folder` can be written to: free, or a checkpoint that `force` may replace, with nothing
    beside it that is the user's own.
    """
    target = Path(os.path.abspath(files.expanded(folder)))
    what = "a checkpoint (no config.json with a model_type)"
    known = written_with(target)
    files.require_free(target, str(target), force=force, replaceable=_is_checkpoint, what=what, known=known)


def require_apart(folder: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Raise OutputError when `folder` is one of the `sources`, folders or files of the models that are read, or holds
    one, as a training's folder holds its checkpoints, or is to be inside of one, whose files would then be of two.
    """
    target = os.path.abspath(files.expanded(folder))
    for source in sources:
        if not source or not os.path.exists(source):
            continue
        model = Path(source).resolve()
        above = [place for place in Path(target).resolve().parents if place.exists()]
        if model.is_dir() and any(os.path.samefile(model, place) for place in above):
            raise OutputError(f"{target} is inside the model's own folder ({model}); choose a place outside of it.")
        if not os.path.exists(target):
            continue
        # not by name: a disk may not tell upper from lower case
        if any(os.path.samefile(target, place) for place in (model, *model.parents)):
            is_or_holds = "is the model itself" if os.path.samefile(target, model) else f"holds the model ({model})"
            raise OutputError(f"{target} {is_or_holds}; choose another folder for what becomes of it.")


def _rounded(model: PreTrainedModel) -> tuple[str, ...]:
    """Formats of weights in the folder that `model` was loaded from which those in memory are not as fine as."""
    source = Path(model.config._name_or_path or os.devnull)
    if not _is_checkpoint(source) or source.parent == gguf_folder():  # whose original holds other formats
        return ()
    try:
        return rounded_formats(source, {name: dtype_name(tensor.dtype) for name, tensor in model.state_dict().items()})
    except ModelError:  # of weights that are not read here, such as pickled ones
        return ()


def _is_checkpoint(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def require_space(folder: str | os.PathLike[str], weights: int) -> None:
    """Raise OutputError unless the disk has room for a checkpoint with so many bytes of weights at `folder`, whose
    parents may be missing.
    """
    target = Path(os.path.abspath(files.expanded(folder)))
    needed = weights + _BESIDES_WEIGHTS
    free = shutil.disk_usage(files.nearest_parent(target)).free
    if free < needed:
        raise OutputError(
            f"{target} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on that disk; make room or choose "
            "another place."
        )


def _write(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """Weights, config and generation config."""
    generation, config = model.generation_config, model.config
    # transformers writes type and architecture into the config, and refuses some generation configs that it loads.
    model.config = copy.deepcopy(config)
    model.config._name_or_path = ""
    if not type(model).is_remote_code():
        vars(model.config).pop("auto_map", None)  # of code beside the original that was not run, and is not copied
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        model.config, model.generation_config = config, generation
    if generation is not None:
        fields = json.loads(generation.to_json_string(ignore_metadata=False))
        fields.pop("_from_model_config", None)
        write_json(folder / "generation_config.json", fields)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with quiet():
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if not path.is_file():  # mistral-common's writes tekken.json alone
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    idle = ["name_or_path"] if type(tokenizer)._auto_class is not None else ["name_or_path", "auto_map"]
    kept = {key: value for key, value in fields.items() if key not in idle}
    if kept != fields:
        write_json(path, kept)
