"""The model card of a pruned checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers import PreTrainedModel

from shallower.anatomy.weigh import size
from shallower.checkpoint.dtype import dtype_name
from shallower.filenames import PLAN
from shallower.forms import FORMS, Form
from shallower.packaged import LeavesOut
from shallower.plan import PruningPlan, options_in_words
from shallower.units import listed
from shallower.version import __version__


def model_card(
    model: PreTrainedModel,
    plan: PruningPlan | None,
    measured: str | None,
    *,
    form: Form = FORMS["ordinary"],
    notes: Sequence[str] = (),
    tokenizer: bool = True,
    recoveries: Sequence[str] = (),
    rounded: str = "",
) -> str:
    """README.md of a checkpoint: where it comes from, what is missing, how to load it.

    Args:
        model: The cut model.
        plan: What was removed and how it was chosen.
        measured: Markdown that ends the card.
        form: In which it is stored.
        notes: What else a user of this form should know, one sentence each.
        tokenizer: Whether one is stored, too.
        recoveries: What changed the cut model afterwards, by name, in order.
        rounded: Formats of weights of the original that are finer than what is stored, such as `float32`.
    """
    name = plan.model.name if plan is not None else str(model.config._name_or_path)
    if os.path.isabs(name) or os.path.exists(name):
        name = os.path.basename(os.path.normpath(name))  # where it was on one machine helps nobody
        on_hub = False
    else:
        on_hub = name.count("/") == 1
    lines = ["---"]
    if on_hub:
        lines += [f"base_model: {name}", "base_model_relation: finetune"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- shallower", "- depth-pruning"]
    lines += ["---", "", f"# {name or model.config.model_type}, made shallower", ""]
    lines += [_what(model, plan, form, recoveries, rounded), ""]
    if plan is not None:
        lines += _how(plan)
    code = form.loading("path/to/this/folder", tokenizer=tokenizer).replace("'", '"')
    lines += ["## Loading it", "", " ".join([form.meaning, *notes]), "", "```python", code, "```", ""]
    if measured:
        lines += [measured.strip(), ""]
    lines += [f"Made with shallower {__version__}.", ""]
    return "\n".join(lines)


def _what(model: PreTrainedModel, plan: PruningPlan | None, form: Form, recoveries: Sequence[str], rounded: str) -> str:
    parameters, _ = size((model,))
    maps = _only_maps(model)
    blocks = model.config.get_text_config().num_hidden_layers - maps
    beside = f", {maps} more that {'holds only a map' if maps == 1 else 'hold only maps'}," if maps else ""
    told = f"{blocks} blocks{beside} and {parameters:,} parameters"
    if plan is None:
        return f"A language model of {told}."
    left = f"{told} are left of {plan.model.blocks} blocks"
    if blocks == plan.model.blocks:
        left = f"All {blocks} blocks and {parameters:,} parameters are left"
    removed = f"`{listed(plan.remove, '`, `')}`"
    changed = "The weights that are left were not changed by the removal."
    if recoveries:
        changed = f"What is left was then changed by {', '.join(recoveries)}, as told under Recovery."
    elif form.name.startswith("padded"):
        changed = (
            "Of the sublayers that are still there the output projections are zero; no other weights were changed."
        )
    if rounded:
        stored = dtype_name(model.dtype)
        changed += f" Weights that the original holds in {rounded} were rounded to {stored}."
    return f"{left}. Removed, counted from 0: {removed}. {changed}"


def _only_maps(model: PreTrainedModel) -> int:
    """How many blocks hold no sublayer: they are there for a map at a cut where whole blocks went."""
    if not isinstance(model, LeavesOut):
        return 0
    return sum(entry.attention.no_op and entry.ffn.no_op for entry in model.config.block_configs)


def _how(plan: PruningPlan) -> list[str]:
    made = plan.made_by
    calibration = made.calibration
    rows = [
        ("search", made.search),
        ("objective", made.objective),
        ("metric", made.metric),
        ("options", options_in_words(made.options) or None),
        ("seed", made.seed),
        ("calibration", calibration and f"{calibration.title}, {calibration.tokens:,} tokens"),
        ("fingerprint of the original", plan.model.fingerprint),
    ]
    table = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return ["## How it was chosen", "", "| | |", "|---|---|", *table, "", f"`{PLAN}` holds the removal order.", ""]
