"""Plans that can never be cut are refused by the search, not by what comes after it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shallower.anatomy import dissect
from shallower.anatomy.weigh import weigh
from shallower.corpus import CalibrationSet
from shallower.errors import BudgetError, ModelError, PlanError
from shallower.plan import MadeBy, PruningPlan
from shallower.surgery import cut
from shallower.testing.families import tiny_model
from shallower.units import Unit, parse_units
from shallower.verbs.prune import prune
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject

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


@pytest.mark.parametrize(
    ("family", "units", "protect", "says"),
    [
        ("gpt2_inverse_scale", "block", "", "cannot describe block"),
        ("qwen3_next", "attn", "block.0,block.2,block.3,block.5", "no attention with a KV cache"),
    ],
)
def test_what_surgery_refuses_is_no_plan(family: str, units: str, protect: str, says: str) -> None:
    with pytest.raises(ModelError, match=f"the best that was found, without .*, cannot be cut: .*{says}"):
        search(tiny_model(family), 2, units=units, protect=protect, calibration=TEXT)


@pytest.mark.parametrize("repair", ["", "low-rank"])
def test_named_units_that_surgery_refuses_are_not_measured(repair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shallower.verbs.search._text", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(
        ModelError, match=r"^without block\.1, which --remove names, no model can be made: .* Name other"
    ):
        search(tiny_model("gpt2_inverse_scale"), "block.1", repair=repair, calibration=TEXT)


def _plan(model: PreTrainedModel, units: str) -> PruningPlan:
    chosen = parse_units(units)
    made_by = MadeBy(None, None, None, {}, 0, None, "0")
    identity = open_subject(model).identity
    return PruningPlan(identity, tuple(sorted(chosen)), tuple((unit, None) for unit in chosen), None, made_by)


def test_what_is_known_to_go_is_cut_before_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shallower.verbs.prune.texts_of_prune", lambda *_, **__: pytest.fail("went on"))
    model = tiny_model("gpt2_inverse_scale")
    for given in ({"remove": "block.1"}, {"plan": _plan(model, "block.1")}):
        with pytest.raises(ModelError, match="cannot describe block"):
            prune(model, calibration=TEXT, speed=False, **given)  # type: ignore[arg-type]
    halves = small("mamba", state_size=8)
    with pytest.raises(
        PlanError, match="the plan removes all 3 blocks, whole or by their sublayers, and something must"
    ):
        prune(halves, plan=_plan(halves, "attn.0-2"), calibration=TEXT, speed=False)


def test_a_form_that_refuses_what_was_found_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise ModelError("No such form.")

    monkeypatch.setattr("shallower.verbs.prune.export", refused)
    with pytest.raises(ModelError, match=r"^No such form\. The search had chosen block\.\d: --remove block\.\d takes"):
        prune(tiny_model("llama"), 1, search="last", calibration=TEXT, speed=False)


def test_a_depth_that_a_config_says_twice_is_refused() -> None:
    anatomy = dissect(small("xlstm", num_blocks=3, num_heads=2, intermediate_size=48))
    with pytest.raises(ModelError, match="for 2 blocks builds 3, as it says their number in another field"):
        cut(anatomy, [Unit(1, "block")])


def test_halves_of_hybrids_have_their_own_names() -> None:
    """Also where a block has one half, called the same whichever it is, or a name that no other family has."""
    kinds = ["mamba", "mlp", "attention"]
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    model = small("nemotron_h", layers_block_type=kinds, **sizes, **heads)
    mixed = dissect(model)
    assert [(block.attn is None, block.mlp is None) for block in mixed.blocks] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    with pytest.raises(BudgetError, match=r"no run of neighbouring units .*, --units block"):
        search(model, 2, search="contiguous", units="sublayer", calibration=TEXT)
    assert search(model, 1, search="contiguous", units="all", protect="2", calibration=TEXT).remove[0].kind == "block"
    cells = dissect(small("xlstm", num_blocks=3, num_heads=2)).blocks[0]
    assert (cells.attn and cells.attn.names, cells.mlp and cells.mlp.names) == (("mlstm_layer",), ("ffn",))
    gated = dissect(small("recurrent_gemma", lru_width=32, attention_window_size=6, **heads)).blocks[0]
    assert (gated.attn and gated.attn.names, gated.mlp and gated.mlp.names) == (("temporal_block",), ("mlp_block",))


def test_an_mlp_beside_inputs_of_its_own_block_is_no_sublayer() -> None:
    anatomy = dissect(tiny_model("gemma4"))
    assert all(block.attn is not None and block.mlp is None for block in anatomy.blocks)
    with pytest.raises(BudgetError, match="mlp is not a part of block 0"):
        anatomy.require([Unit(0, "mlp")])


def test_what_gives_the_stream_itself_is_no_sublayer() -> None:
    """Nothing in place of the Mamba of Zamba's hybrid blocks would wipe the stream out."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
    anatomy = dissect(small("zamba", num_hidden_layers=5, **sizes, **heads))
    kinds = anatomy.model.config.layer_types
    assert kinds.count("hybrid") == 2
    assert [block.attn is None for block in anatomy.blocks] == [kind == "hybrid" for kind in kinds]
    weights = weigh(anatomy)
    assert weights.of(anatomy.of_kind("block")) == weights.blocks
