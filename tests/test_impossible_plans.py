"""Plans that can never be cut are refused by the search, not by what comes after it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shallower.corpus import CalibrationSet
from shallower.errors import BudgetError
from shallower.verbs.search import search

TEXT = CalibrationSet("x", torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(1)), None, ())


def small(model_type: str, **fields: object) -> PreTrainedModel:
    """A random model of three blocks, of a family that has no tiny model of its own."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("remove", "units", "says"),
    [
        ("attn.0-2", "block", "names all 3 blocks"),
        ("95%", "attn", "only with all 3 blocks, and something must stay"),
        ("95%", "block", "only with all 3 blocks, and something must stay"),
    ],
)
def test_something_stays_of_blocks_that_have_one_half(remove: str, units: str, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        search(small("mamba", state_size=8), remove, units=units, calibration=TEXT)
