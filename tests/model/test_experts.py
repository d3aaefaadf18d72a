"""Experts in other clothes: batched products, rows below each other, experts that compute nothing."""

import pytest
import torch
import transformers as tf
from torch import nn

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.experts import expert_counts, fused_parameters, is_experts
from optimum_dsa.model.statistics import CollectedStatistics, LayerStatistics
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.prune import prune

from ..conftest import FAMILIES
from ..plain_walk import plain
from ..tiny import needs_compressed_loading


CLOTHES = ["llama4", "dbrx", "longcat"]
HYBRIDS = ["jamba", "zamba2", "qwen3_next"]
METHODS = ["magnitude", "wanda", "sparsegpt"]


def by_hand(model, architecture, batch) -> CollectedStatistics:
    """What a plain forward pass multiplies every weight with."""
    inputs, sequences = plain(model, architecture, batch), len(batch["input_ids"])
    found = {}
    for weight in architecture.weights:
        gram = inputs[weight.name].float()
        found[weight.name] = LayerStatistics(
            weight.shape[1], "cpu", True, inputs.tokens[weight.name], sequences, gram.diagonal().clone(), gram
        )
    return CollectedStatistics(found, "plain hooks")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CLOTHES)
def test_masks_are_those_of_the_inputs_that_plain_hooks_see(family, method, tiny, inputs):
    model, twin, batch = tiny(family), tiny(family), inputs(family)
    config = DSAConfig(0.5, method, "uniform", sequential=False)
    found = find_architecture(model)
    prune(twin, by_hand(twin, found, batch) if method != "magnitude" else None, config)
    prune(model, batch, config)
    for weight in found.weights:
        assert torch.equal(weight.tensor(model) == 0, weight.tensor(twin) == 0), weight.name
        assert torch.allclose(weight.tensor(model), weight.tensor(twin), rtol=1e-3, atol=1e-5), weight.name


@pytest.mark.parametrize("family,last", [("llama4", "down_proj"), ("dbrx", "w2")])
def test_a_row_of_the_last_map_is_one_of_the_outputs(family, last, tiny, inputs):
    """Which way round a matrix is stored; nothing is run by magnitude, which would notice."""
    model, outputs = tiny(family), []
    found = [weight for weight in find_architecture(model).weights if weight.expert is not None]
    for weight in found:
        if weight.attribute == last:
            weight.tensor(model)[3] = 0
    model.get_submodule(found[0].module).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(**inputs(family))
    assert outputs and all((output[..., 3] == 0).all() and (output[..., :3] != 0).any() for output in outputs)


@needs_compressed_loading
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])  # by magnitude, all families are loaded elsewhere
@pytest.mark.parametrize("family", CLOTHES)
def test_pruned_verified_saved_compressed_and_loaded_it_computes_the_same(family, method, tiny, inputs, tmp_path):
    pruner, batch = DSAPruner(tiny(family)), inputs(family)
    report = pruner.prune(batch, DSAConfig(0.5, method, "uniform"))
    assert report.sparsity == 0.5 and pruner.verify().holds
    pruner.save_pretrained(tmp_path, compressed=True)
    loaded = getattr(tf, FAMILIES[family].auto).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, pruner.model(**batch).logits)
    assert DSAPruner.from_pretrained(tmp_path).verify().holds


def test_experts_that_compute_nothing_keep_their_rows_and_are_named(tiny, inputs):
    model, before = tiny("longcat"), tiny("longcat").state_dict()
    report = prune(model, inputs("longcat"), DSAConfig(0.5, allocation="uniform"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert {f"{name}[4]", f"{name}[5]"} <= report.dense.keys() and f"{name}[3]" not in report.dense
    assert report.dense_sizes[f"{name}[4]"] == before[name][4].numel()
    after = model.state_dict()[name]
    assert torch.equal(after[4:], before[name][4:])
    assert all((after[expert] == 0).float().mean() == 0.5 for expert in range(4))
    assert report.dense["model.layers.0.mlp.router.classifier.weight"] == "router of experts"
    assert "expert that computes nothing" in str(report) and "gate_up_proj[*]" in str(report)


def test_an_expert_that_is_handed_every_token_has_seen_those_that_are_its_own(tiny, inputs):
    model, batch = tiny("llama4"), inputs("llama4")
    (block,) = [b for b in walk_blocks(model, find_architecture(model), [batch]) if b.name == "model.layers.1"]
    seen = [found.tokens for name, found in block.statistics.items() if "gate_up_proj" in name]
    assert sum(seen) == 2 * batch["input_ids"].numel() and max(seen) < batch["input_ids"].numel()


@pytest.mark.parametrize("family", HYBRIDS)
def test_of_hybrids_all_plain_maps_are_pruned_in_blocks_of_either_kind(family, tiny, inputs):
    model = tiny(family)
    report = prune(model, inputs(family), DSAConfig(0.5, allocation="uniform"))
    kinds = {"in_proj", "in_proj_qkvz", "out_proj", "x_proj", "q_proj", "o_proj"}
    maps = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in kinds and f"{name}.weight" not in report.dense
    }
    assert len(maps) >= 4 and all(0 < (weight == 0).float().mean() < 1 for weight in maps.values())
    for name, why in report.dense.items():
        assert why in {
            "convolution of single channels",
            "state of a recurrence",
            "router of experts",
            "shared with another part of the model",
        }
        assert (model.get_parameter(name) != 0).any()
    assert any(name.endswith("conv1d.weight") for name in report.dense)
    assert report.dense.keys() == report.dense_sizes.keys()


class Experts(nn.Module):
    """Three experts, their gate and up in one parameter."""

    def __init__(self, first, last):
        super().__init__()
        self.num_experts = 3
        self.first, self.last = nn.Parameter(torch.ones(3, *first)), nn.Parameter(torch.ones(3, *last))


@pytest.mark.parametrize("hidden,inner", [(8, 6), (8, 8), (8, 4), (8, 16)])
def test_which_way_round_gate_and_up_in_one_are_stored_is_told_by_their_shapes(hidden, inner):
    rows = fused_parameters(Experts((2 * inner, hidden), (hidden, inner)))
    columns = fused_parameters(Experts((hidden, 2 * inner), (inner, hidden)))
    assert {how.transposed for how in rows.values()} == {False}
    assert {how.transposed for how in columns.values()} == {True}
    # of a map without a gate nothing is told, and most are kept as (out, in)
    assert {how.transposed for how in fused_parameters(Experts((inner, hidden), (hidden, inner))).values()} == {False}


def test_what_a_module_says_of_itself_is_believed():
    module = Experts((8, 12), (6, 8))
    module.is_transposed = False
    assert {how.transposed for how in fused_parameters(module).values()} == {False}


def test_a_module_of_experts_is_told_from_a_list_of_maps():
    assert expert_counts(Experts((12, 8), (8, 6))) == {3}
    assert not is_experts(nn.Linear(8, 8)) and expert_counts(nn.Linear(8, 8)) == set()
    assert expert_counts(nn.ModuleList(nn.Linear(8, 8) for _ in range(3))) == set()
    assert expert_counts(nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))) == {3}
    # what only hands tokens to the experts is the experts, and what has a router beside them is not
    assert expert_counts(nn.Sequential(Experts((12, 8), (8, 6)))) == {3}
    assert expert_counts(nn.Sequential(nn.Linear(8, 3), Experts((12, 8), (8, 6)))) == set()
