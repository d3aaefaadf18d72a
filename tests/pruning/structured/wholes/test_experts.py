"""Experts that go as wholes: what they do is seen, the least important go, and what is left is a plain model."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from optimum_dsa import find_architecture
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.layout import LAYOUTS
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.slicing import cut_out, silence
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.wholes.usage import collect_usage

from ....tiny import same_state, state, tiny_llama
from ..families import FAMILIES, batch_of, deeper


MIXTURES = ("Mixtral", "Qwen3Moe", "GptOss")


class Mixture(nn.Module):
    """Experts that are modules each, chosen by a plain linear map, as models that bring their own code have them."""

    def __init__(self, number=4, chosen=2, width=24):
        super().__init__()
        self.num_experts, self.top_k = number, chosen
        self.gate = nn.Linear(32, number, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 32)) for _ in range(number)
        )

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores, index = self.gate(flat).softmax(-1).topk(self.top_k, -1)
        scores, out = scores / scores.sum(-1, keepdim=True), torch.zeros_like(flat)
        for number in range(self.num_experts):
            tokens, place = (index == number).nonzero(as_tuple=True)
            out.index_add_(0, tokens, self.experts[number](flat[tokens]) * scores[tokens, place, None])
        return out.reshape(hidden.shape)


def of_modules():
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Mixture()
    return model.eval()


def experts_of(model, batch):
    found = find_structures(model, find_architecture(model), {name: value[:1] for name, value in batch.items()})
    return {unit: each for unit, each in found.structures.items() if each.kind == "expert"}


def fused_norms(model, layer, batch):
    """Of every expert its tokens and Σ g · ‖f‖, from the router's choice and the matrices, by hand."""
    mlp, seen = model.model.layers[layer].mlp, []
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        hidden = seen[0]
        _, weights, index = mlp.gate(hidden)
        tokens, norms = torch.zeros(2, len(mlp.experts.down_proj))
        for expert in range(len(tokens)):
            gate, up = (hidden @ mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
            out = (mlp.experts.act_fn(gate) * up) @ mlp.experts.down_proj[expert].T
            own = (weights * (index == expert)).sum(-1)
            tokens[expert] = (index == expert).sum()
            norms[expert] = (own * out.norm(dim=-1)).sum()
    return tokens, norms


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_what_an_expert_adds_is_its_weight_times_the_norm_of_its_output(family):
    model, batch = FAMILIES[family][0](), batch_of(family, samples=3)
    found = collect_usage(model, experts_of(model, batch), [batch])["model.layers.1:expert"]
    tokens, norms = fused_norms(model, 1, batch)
    assert torch.equal(found.tokens, tokens) and tokens.sum() == 3 * 12 * 2
    torch.testing.assert_close(found.output, norms, rtol=1e-4, atol=1e-6)


def test_experts_that_are_modules_are_watched_as_well():
    model, batch = of_modules(), batch_of("Llama", samples=2)
    before, mixture, seen = state(model), model.model.layers[0].mlp, []
    found = collect_usage(model, experts_of(model, batch), [batch])["model.layers.0:expert"]
    assert same_state(model, before)
    mixture.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**batch)
        scores, index = mixture.gate(seen[0]).softmax(-1).topk(2, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        for number, expert in enumerate(mixture.experts):
            own = (scores * (index == number)).sum(-1)
            assert found.tokens[number] == (index == number).sum()
            expected = (own * expert(seen[0]).norm(dim=-1)).sum()
            torch.testing.assert_close(found.output[number], expected, rtol=1e-3, atol=1e-5)


def test_padding_is_no_use_of_an_expert():
    model, batch = FAMILIES["Mixtral"][0](), batch_of("Mixtral", samples=1)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5)),
    }
    units = experts_of(model, batch)
    plain, other = (collect_usage(model, units, [each]) for each in (batch, padded))
    for unit in units:
        assert torch.equal(plain[unit].tokens, other[unit].tokens)
        torch.testing.assert_close(plain[unit].output, other[unit].output)


def test_experts_that_are_modules_are_cut_as_a_router_of_minus_infinity_would():
    dense, batch = of_modules(), batch_of("Llama", samples=2)
    silenced, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    for unit, each in experts_of(dense, batch).items():
        assert len(each) == 4 and each.least == 2 and each.cost(dense) == 2 * 32 * 24 + 24 + 32 + 32
        gone = torch.tensor([0, 2] if "0" in unit else [1])
        silence(silenced, each, gone)
        cut_out(cut, each, gone)
    with torch.no_grad():
        expected = silenced(**batch).logits
        torch.testing.assert_close(cut(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - dense(**batch).logits).abs().max() > 1e-3
    assert len(cut.model.layers[0].mlp.experts) == cut.model.layers[0].mlp.num_experts == 2


@pytest.mark.parametrize("family", MIXTURES)
def test_a_silenced_expert_has_no_logit_and_no_tokens(family):
    model, batch = FAMILIES[family][0](), batch_of(family, samples=2)
    units, logits = experts_of(model, batch), []
    each = units["model.layers.0:expert"]
    silence(model, each, torch.tensor([1, 3]))
    router = model.get_submodule(each.cuts[-1].tensor.rpartition(".")[0])
    router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    used = collect_usage(model, units, [batch])[each.unit].tokens
    assert (logits[0][:, [1, 3]] == float("-inf")).all() and logits[0][:, [0, 2]].isfinite().all()
    assert not used[[1, 3]].any() and used.sum() == 2 * 12 * each.least


@pytest.mark.parametrize(
    ("family", "importance"),
    [("Mixtral", "wanda_sp"), ("Mixtral", "taylor"), ("Mixtral", "random"), ("Qwen3Moe", "router_frequency")],
)
def test_the_least_important_experts_go_and_a_plain_model_is_left(family, importance, tmp_path):
    model, batch = FAMILIES[family][0](), batch_of(family, samples=4)
    units = experts_of(model, batch)
    used = collect_usage(model, units, [batch])
    report = prune_structures(model, batch, DSAStructuredConfig(0.3, ("expert",), importance))
    count = len(used["model.layers.0:expert"].tokens)
    for unit, gone in report.gone.items():
        assert 1 <= len(gone) <= count - 2 and report.kept[unit] == count - len(gone)
        scores = {
            "wanda_sp": used[unit].output / used[unit].tokens.clamp_min(1),
            "router_frequency": used[unit].tokens,
        }.get(importance)
        if scores is not None:
            assert set(gone) == set(scores.argsort(stable=True)[: len(gone)].tolist())
    assert 0 < report.sparsity <= 0.3 and report.removed == sum(
        report.costs[unit] * len(gone) for unit, gone in report.gone.items()
    )
    model.save_pretrained(tmp_path)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
        assert model(**batch, output_router_logits=True, labels=batch["input_ids"]).loss.isfinite()


def test_experts_and_groups_of_heads_go_together(tmp_path):
    model, batch = FAMILIES["Mixtral"][0](), batch_of("Mixtral", samples=4)
    report = prune_structures(model, batch, DSAStructuredConfig(0.5, ("kv_group", "expert"), "obs"))
    assert all(len(gone) > 0 for gone in report.gone.values()) and len(report.gone) == 4
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("allocation", ["global", "stability"])
def test_blocks_lose_other_numbers_of_experts(allocation, tmp_path):
    """What is least important for its cost of all blocks', and of which importances vary least from text to text."""
    model, batch = deeper("Qwen3Moe", 4), batch_of("Qwen3Moe", 8)
    with torch.no_grad():
        for scale, layer in zip((1.0, 0.1, 1.0, 0.2), model.model.layers):
            layer.mlp.experts.down_proj.mul_(scale)
    usage = collect_usage(model, experts_of(model, batch), [batch])
    worth = {unit: each.output / each.tokens.clamp_min(1) for unit, each in usage.items()}
    settings = {"layout": "per_layer", "allocation": allocation, "spread": 0.3 if allocation == "stability" else None}
    report = prune_structures(model, batch, DSAStructuredConfig(0.4, ("expert",), "reap", "none", **settings))
    counts = [len(gone) for gone in report.gone.values()]
    assert len(set(counts)) > 1 and max(counts) <= 4
    for unit, gone in report.gone.items():
        assert list(gone) == sorted(worth[unit].argsort(stable=True)[: len(gone)].tolist())
    if allocation == "global":
        assert counts[1] > counts[0] and counts[3] > counts[2]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("structures", "allocation", "message"),
    [
        (("expert",), "er", "allocation='er' is of channels and heads, and 'expert' is to go; use one of 'uniform'"),
        (("expert",), "milp", "allocation='milp' is of channels and heads"),
        (("block",), "global", "Allocations are of what blocks have several of, and 'block' is to go"),
        (("kv_group", "expert"), "global", "importances are 'wanda_sp' of 'kv_group', 'reap' of 'expert'; take one"),
    ],
)
def test_allocations_that_tell_nothing_of_experts_are_refused(structures, allocation, message):
    with pytest.raises(ValueError, match=message):
        DSAStructuredConfig(0.2, structures, layout="per_layer", allocation=allocation)
    assert DSAStructuredConfig(0.2, ("ffn", "expert"), "taylor", layout="per_layer", allocation="global")


def test_as_many_experts_stay_as_are_chosen():
    model, batch = FAMILIES["Mixtral"][0](), batch_of("Mixtral", samples=2)
    before = state(model)
    with pytest.raises(ValueError, match="of the structures that may only .* can; lower the share"):
        prune_structures(model, batch, DSAStructuredConfig(0.6, ("expert",)))
    assert same_state(model, before)
    with pytest.raises(ValueError, match="has 4 structures and 3 are to go; leave 2 at least"):
        cut_out(model, experts_of(model, batch)["model.layers.0:expert"], torch.arange(3))


@pytest.mark.parametrize(
    ("structures", "changes", "message"),
    [
        (("ffn",), {"importance": "reap"}, "importance='reap' is of 'expert', and 'ffn' is to go"),
        (("expert",), {"reconstruct": 4}, "'expert' are gone by then; leave it out"),
    ],
)
def test_settings_that_mean_nothing_for_experts_are_refused(structures, changes, message):
    with pytest.raises(ValueError, match=message):
        DSAStructuredConfig(0.2, structures, **changes)


def test_gradients_of_experts_that_are_modules_are_refused(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "per_layer", lambda *given: None)  # no configuration says what is left of them
    config = DSAStructuredConfig(0.2, ("expert",), "saap", layout="per_layer")
    with pytest.raises(ValueError, match="are modules each; use importance='reap'"):
        prune_structures(of_modules(), batch_of("Llama", 2), config)


def deepseek(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "v_head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    routed = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 24}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **ranks, **routed, **changes)).eval()
    for layer in model.model.layers[1:]:
        # What corrects the choice, and no weight: an expert that is gone is not chosen by it.
        layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(6))
    return model


def test_numbers_that_correct_the_choice_go_with_their_experts(tmp_path):
    dense, batch = deepseek(), batch_of("Llama", samples=3)
    silenced, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    units = experts_of(dense, batch)
    assert list(units) == ["model.layers.1:expert", "model.layers.2:expert"]
    for each in units.values():
        gone = dense.model.layers[1].mlp.gate.e_score_correction_bias.topk(3).indices
        silence(silenced, each, gone)
        cut_out(cut, each, gone)
    with torch.no_grad():
        torch.testing.assert_close(cut(**batch).logits, silenced(**batch).logits, rtol=1e-4, atol=1e-5)
        assert (cut(**batch).logits - dense(**batch).logits).abs().max() > 1e-3
    report = prune_structures(dense, batch, DSAStructuredConfig(0.3, ("expert",)))
    assert all(report.gone.values())
    dense.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch).logits, dense(**batch).logits)


def test_a_dense_first_block_and_experts_are_cut_as_far_as_settings_say(caplog):
    """The channels of experts that all tokens meet are counted by no setting of their own."""
    model = deepseek(n_shared_experts=1)
    report = prune_structures(model, batch_of("Llama", 2), DSAStructuredConfig(0.1, ("ffn", "expert")))
    assert report.gone["model.layers.0:ffn"] and not report.gone["model.layers.1:ffn"]
    assert "No setting says how many channels model.layers.1:ffn have (2 in all); they stay." in caplog.messages
    assert model.config.intermediate_size == report.kept["model.layers.0:ffn"] < 48


def test_excluded_experts_stay():
    model, batch = FAMILIES["Mixtral"][0](), batch_of("Mixtral")
    found = find_structures(model, find_architecture(model, exclude=["*layers.1.mlp.experts.down_proj"]), batch)
    assert "model.layers.0:expert" in found.structures and "model.layers.1:expert" not in found.structures
