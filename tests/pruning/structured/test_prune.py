"""A model made smaller: the budget, what goes, and what makes up for it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from optimum_dsa import demo_model, demo_texts, find_architecture, load_tokens, perplexity
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.pruning.structured.configuration import UPDATES, DSAStructuredConfig
from optimum_dsa.pruning.structured.importance import CHANNELS, IMPORTANCES
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.slicing import silence
from optimum_dsa.pruning.structured.structures import find_structures

from ...tiny import same_state, state, tiny_llama, tokens
from .families import EVERY, FAMILIES, batch_of


@pytest.fixture(scope="module")
def demo():
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    cut = {"num_samples": 16, "sequence_length": 128}
    return [load_tokens(demo_texts(part), tokenizer, **cut) for part in ("calibration", "validation")]


def demo_llama():
    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()


OF_CHANNELS = sorted(name for name in IMPORTANCES if "ffn" in IMPORTANCES.fact(name, "kinds", CHANNELS))


@pytest.mark.parametrize(
    ("importance", "structures"),
    [*((name, ("ffn", "kv_group")) for name in OF_CHANNELS), ("flap", ("ffn",)), ("obs", ("kv_group",))],
)
def test_no_more_goes_than_was_asked_and_all_of_it(importance, structures):
    model = tiny_llama()
    before, prunable = count_parameters(model), sum(weight.size for weight in find_architecture(model).weights)
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.15, structures, importance, layout="per_layer"))
    assert (
        before - count_parameters(model)
        == report.removed
        == sum(report.costs[unit] * len(gone) for unit, gone in report.gone.items())
    )
    assert 0.15 * prunable - max(report.costs.values()) < report.removed <= 0.15 * prunable
    assert report.prunable == prunable and report.parameters == before
    assert {unit.partition(":")[2] for unit, gone in report.gone.items() if gone} <= set(structures)
    assert model(tokens()).logits.isfinite().all()


def test_without_an_update_it_is_the_model_with_what_goes_silenced():
    dense, model = tiny_llama(), tiny_llama()
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.3, ("ffn", "kv_group"), update="none"))
    for unit, each in find_structures(dense, find_architecture(dense), batch_of("Llama")).structures.items():
        silence(dense, each, torch.tensor(report.gone[unit], dtype=torch.int64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits)


def test_nothing_asked_changes_nothing():
    model = tiny_llama()
    before = state(model)
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.0))
    assert same_state(model, before) and report.sparsity == 0


def test_what_makes_up_for_it_helps(demo):
    """On text that nothing was fitted to: least squares is better than nothing, and training better than it."""
    calibration, validation = demo
    lost = {}
    for name, update, steps in (("none", "none", 0), ("refit", "refit", 0), ("trained", "refit", 16)):
        model = demo_llama()
        config = DSAStructuredConfig(0.2, update=update, reconstruct={"steps": steps, "rate": 1e-3} if steps else 0)
        report = prune_structures(model, calibration, config)
        lost[name] = perplexity(model, validation)
        assert len(report.reconstruction) == (10 if steps else 0)
    assert lost["trained"] < lost["refit"] < lost["none"]


def test_the_least_important_go():
    """In the first block, whose inputs are the dense model's, against hooks and the formula."""
    dense, model, seen = tiny_llama(), tiny_llama(), []
    down = dense.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(tokens())
    config = DSAStructuredConfig(0.2, true_sequential=False, update="none")
    gone = prune_structures(model, tokens(), config).gone["model.layers.0:ffn"]
    scores = down.weight.detach().abs().sum(0) * seen[0].norm(dim=0)
    assert len(gone) > 10 and set(gone) == set(scores.argsort()[: len(gone)].tolist())


def test_a_bias_stands_in_for_the_mean_of_what_goes():
    """Of inputs that never change nothing is lost."""
    model = FAMILIES["Llama with biases"][0]()
    dense = copy.deepcopy(model)
    same = torch.full((4, 8), 5)
    prune_structures(model, same, DSAStructuredConfig(0.3, importance="flap", update="bias", sequential=False))
    with torch.no_grad():
        torch.testing.assert_close(model(same).logits, dense(same).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("ViT", "T5")])
def test_every_family_is_cut(family):
    make, kinds = FAMILIES[family]
    model = make()
    calibration = {name: value.repeat(4, 1) for name, value in batch_of(family).items()}
    report = prune_structures(model, calibration, DSAStructuredConfig(0.05, tuple(kinds), layout="padded"))
    assert 0 < report.sparsity <= 0.05 and model(**batch_of(family)).logits.isfinite().all()


@pytest.mark.parametrize("family", [name for name in EVERY if name not in ("ViT", "T5", "GPT2", "Bloom", "Mpt")])
def test_what_is_left_is_a_plain_model_that_transformers_loads(family, tmp_path):
    make, kinds = EVERY[family]
    model, batch = make(), batch_of(family)
    calibration = {name: value.repeat(4, 1) for name, value in batch.items()}
    # Where a head's size is derived of their number, heads have to stay.
    kinds = [kind for kind in kinds if kind != "head"]
    # Of two groups in a block one can go, and with nothing else to cut no other share than that can be met.
    share = 0.25 if {"ffn", "expert"} & {*kinds} else 1 / 14 + 1e-6
    report = prune_structures(model, calibration, DSAStructuredConfig(share, tuple(kinds)))
    assert report.sparsity > 0
    model.save_pretrained(tmp_path)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report.parameters - report.removed


@pytest.mark.parametrize(("family", "structures"), [("GPT2", ("head",)), ("Bloom", ("ffn",)), ("Bert", ("head",))])
def test_what_no_configuration_says_is_refused_before_work(family, structures):
    model = FAMILIES[family][0]()
    before = state(model)
    with pytest.raises(ValueError, match="Config cannot say what is left .* use layout='per_layer'"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.2, structures))
    assert same_state(model, before)
    assert prune_structures(model, tokens(), DSAStructuredConfig(0.2, structures, layout="per_layer")).sparsity > 0


def test_heads_with_slopes_of_their_own_are_of_no_plain_class():
    model = FAMILIES["Bloom"][0]()
    before = state(model)
    with pytest.raises(ValueError, match="h.0:head would lose heads, of which the model gives each a slope by their"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.1, ("head",)))
    assert same_state(model, before)
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.1, ("head",), layout="padded"))
    assert report.padding and model(tokens()).logits.isfinite().all()


def test_of_numbers_of_heads_that_no_configuration_says_the_next_is_taken(tmp_path):
    """Three of four heads do not divide 32, and two are of another size: all of it is of the MLPs then."""
    model = FAMILIES["OPT"][0]()
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.25, ("ffn", "head")))
    block = "model.decoder.layers.0"
    assert report.kept[f"{block}:head"] == 4 and report.kept[f"{block}:ffn"] < 30
    assert 0.24 < report.sparsity <= 0.25
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_heads_that_no_configuration_says_are_refused_where_nothing_else_may_go():
    model = FAMILIES["OPT"][0]()
    with pytest.raises(ValueError, match="OPTConfig cannot say what is left .num_attention_heads=3"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.15, ("head",)))


def test_widths_that_stay_are_round():
    model = tiny_llama()
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.3, round_to=8))
    assert all(number % 8 == 0 for number in report.kept.values()) and report.sparsity > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structures": ("channel",)}, "Structures are of .*; 'channel' is none"),
        ({"structures": ()}, "none was given"),
        ({"update": "fit"}, "update"),
        ({"reconstruct": 4, "sequential": False}, "leave out one of both"),
        ({"unstable": "more"}, "unstable='more' is read by allocation='stability' alone; use them, or leave unst"),
        ({"spread": 0.1}, "spread=0.1 is read by allocation='stability' and allocation functions alone"),
        ({"damping": 0.5, "update": "none"}, "damping=0.5 is read by a refit, importances such as 'obs' and"),
        ({"blockwise": True}, "blockwise=True is read by gradients: 'taylor' and others, allocation='fisher' alone"),
        ({"round_to": 16, "structures": ("kv_group",)}, "round_to=16 is read by channels"),
        ({"rounds": 2, "learner": "projected_gates"}, "rounds=2 takes importances anew .* learner='projected_gates'"),
        ({"rounds": 2, "structures": ("block",)}, "rounds=2 takes importances anew .* 'block' goes at once"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DSAStructuredConfig(0.2, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.9, "structures": ("ffn", "kv_group")}, "of the structures that may only .* can"),
        ({"sparsity": 0.9}, "of the structures that may only .* can; lower the share"),
        ({"cost": "kv"}, "bytes .* are to go, and what may go has none of them; let other structures go as well"),
        ({"sparsity": 0.001}, "takes nothing: the least that can go is 0.0"),
        (
            {"structures": ("head",)},
            "LlamaForCausalLM has no head that could be cut out.* It has 'ffn' and 'kv_group'",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_before_work(changes, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        prune_structures(model, tokens(), DSAStructuredConfig(**{"sparsity": 0.2, **changes}))
    assert same_state(model, before)


def test_an_importance_that_is_none_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'wanda_sp'"):
        DSAStructuredConfig(0.2, importance="wanda")


def test_what_takes_nothing_is_said(caplog):
    report = prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.0))
    assert report.removed == 0 and caplog.messages == ["sparsity=0 takes nothing: the model stays as it is."]
    caplog.clear()
    report = prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.1, ("ffn", "kv_group")))
    assert report.removed and all(not gone for unit, gone in report.gone.items() if unit.endswith("kv_group"))
    assert any(each.startswith("Of kv_group nothing goes: as many from all blocks") for each in caplog.messages)


def test_a_report_says_in_a_line_what_stays():
    report = prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.2, round_to=8))
    said = str(report)
    assert said.endswith("(asked 0.2); ffn: 32 of 48 stay") and f"{report.removed:,} of {report.parameters:,}" in said


def test_a_kind_that_the_model_has_not_is_said(caplog):
    prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.1, ("ffn", "head", "ffn")))
    assert "LlamaForCausalLM has no head that could be cut out. It has 'kv_group'." in caplog.messages
    caplog.clear()
    model = FAMILIES["T5"][0]()
    prune_structures(model, batch_of("T5"), DSAStructuredConfig(0.1, ("ffn", "head"), layout="padded"))
    (said,) = (each for each in caplog.messages if "no head" in each)
    assert said.endswith("could be cut out. Of 'head' as many go in all blocks, with layout='uniform'.")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"structures": ("block",), "sparsity": 0.5}),
        ("Llama", {"structures": ("ffn", "kv_group"), "layout": "per_layer", "sparsity": 0.3}),
        ("Llama", {"layout": "padded"}),
        ("Llama", {"update": "bias"}),
        ("Bert", {"structures": ("ffn", "head"), "layout": "per_layer"}),
        ("Bert", {}),
    ],
)
@torch.no_grad()
def test_a_model_that_was_made_of_the_same_configuration_stays_as_it_is(family, settings):
    model, batch = EVERY[family][0](), batch_of(family)
    twin = type(model)(model.config).eval()
    assert twin.config is model.config
    kind, said, before = type(twin.config), twin.config.to_dict(), twin(**batch).logits
    prune_structures(model, batch, DSAStructuredConfig(**{"sparsity": 0.2, **settings}))
    assert type(twin.config) is kind and twin.config.to_dict() == said != model.config.to_dict()
    assert torch.equal(twin(**batch).logits, before)
    held = {id(part.config) for part in model.modules() if getattr(part, "config", None) is not None}
    assert id(twin.config) not in held


def test_a_size_that_is_another_ones_name_stays():
    """DeepSeek calls the part of a head that turns with the position head_dim."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    ranks = {"v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 2}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **ranks)).eval()
    before = model.config.head_dim
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.2, ("head",), update="none"))
    assert report.sparsity > 0 and model.config.head_dim == before == 4 and model.config.num_attention_heads == 2


def test_a_configuration_is_plain_data():
    config = DSAStructuredConfig(0.2, ("ffn", "kv_group"), "obs", reconstruct=8, round_to=16)
    assert DSAStructuredConfig.from_dict(config.to_dict()) == config and "none" in UPDATES


@pytest.mark.parametrize("structures", [("ffn",), ("ffn", "kv_group")])
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_a_multiple_that_no_width_leaves_room_for_is_refused_by_its_name(structures, layout):
    config = DSAStructuredConfig(0.2, structures, round_to=64, layout=layout)
    with pytest.raises(ValueError, match="round_to=64 keeps multiples of it, and model.layers.0:ffn has 48 channels"):
        prune_structures(tiny_llama(), tokens(), config)


@pytest.mark.parametrize("family, mixer", [("Jamba", "mamba"), ("Qwen3Next", "linear_attn")])
def test_mixers_that_cannot_be_cut_stay_and_are_said(family, mixer):
    model = EVERY[family][0]()
    before = {name: value for name, value in state(model).items() if mixer in name}
    report = prune_structures(model, batch_of(family, 2), DSAStructuredConfig(0.1, ("ffn", "kv_group"), update="none"))
    assert report.removed and before and set(report.left) <= set(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert f"{len(report.left)} weights stay whole, such as model.layers.0.{mixer}" in str(report)
