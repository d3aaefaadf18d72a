"""Attention and MLPs that go whole: the model without them is the one in which what reads them is silenced."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, find_architecture, find_share
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import dense_of, prune_structures, stays_in
from optimum_dsa.pruning.structured.slicing import cut_out, silence
from optimum_dsa.pruning.structured.wholes.entire import find_entire

from ....tiny import same_state, state
from .. import loads
from ..families import EVERY, batch_of, deeper


BOTH = ("attention", "mlp")
DEPTH = 4
# Where no attention can go from a block: one head of keys for all, one bias for all blocks, the residual inside.
WITHOUT = ("Llama with one head of keys", "Falcon", "T5", "Bloom")
MIXED = ("Mixtral", "Qwen3Moe", "GptOss")  # MLPs of experts, which go one by one
# Two types of layers of which the first attention stays; and one attention in all.
STAY = {"Gemma2": {0, 1}, "GptOss": {0, 1}, "Lfm2": {1}}


def made(family):
    return EVERY[family][0]() if family == "Lfm2" else deeper(family, DEPTH)


def config_of(sparsity=0.3, structures=BOTH, **settings):
    settings = {"layout": "per_layer", "update": "none", **settings}
    return DSAStructuredConfig(sparsity, structures, **settings)


def outputs_of(model, block, batch):
    """What a block of a model gives, (samples, length, hidden size)."""
    given = []
    with model.get_submodule(block).register_forward_hook(lambda module, args, output: given.append(output)):
        loads.said(model, batch)
    return given[0]


@pytest.fixture(scope="module")
def found():
    """Family -> a model of it, and what can go."""
    known = {}

    def find(family):
        if family not in known:
            model = made(family)
            before = state(model)
            known[family] = model, find_entire(model, find_architecture(model), batch_of(family))
            assert same_state(model, before)
        return known[family]

    return find


@pytest.mark.parametrize("family", EVERY)
def test_a_model_without_them_gives_what_it_gives_when_they_are_silenced(family, found):
    model, those = found(family)
    units, batch = those.structures, batch_of(family, samples=2)
    units = {unit: each for unit, each in units.items() if not each.least}
    kinds = {each.goes_as for each in units.values()}
    assert ("mlp" in kinds) == (family not in MIXED) and ("attention" in kinds) == (family not in (*WITHOUT, "Lfm2"))
    for each in units.values():
        silenced, cut, gone = copy.deepcopy(model), copy.deepcopy(model), torch.arange(len(each))
        silence(silenced, each, gone)
        cut_out(cut, each, gone)
        assert count_parameters(model) - count_parameters(cut) == len(each) * each.cost(model)
        torch.testing.assert_close(loads.said(cut, batch), loads.said(silenced, batch), rtol=1e-4, atol=1e-5)
        assert (loads.said(cut, batch) - loads.said(model, batch)).abs().max() > 1e-5


@pytest.mark.parametrize("family", EVERY)
def test_the_first_attention_of_every_kind_stays(family, found):
    model, those = found(family)
    blocks = [name for name, _ in model.named_modules() if name.rpartition(".")[2].isdecimal()]
    gone = {each.block for each in those.structures.values() if each.kind != "ffn" and not each.least}
    first = set() if family in ("Bert", "ViT") else STAY.get(family, {0})  # of what writes nothing, all may go
    stays = {name for name in blocks if int(name.rpartition(".")[2]) in first}
    assert not gone & stays
    if gone and family in STAY:
        assert any("the first attention of its kind stays" in why for why in those.left.values())


def test_why_others_stay_is_told(found):
    why = {family: " ".join(found(family)[1].left.values()) for family in WITHOUT}
    assert "all query heads share its head of keys and values" in why["Falcon"]
    assert "its heads go alike from all blocks" in why["T5"] and "does not run without it" in why["Bloom"]


@pytest.mark.parametrize("layout", ["per_layer", "padded"])
@pytest.mark.parametrize("family", ["Llama with biases", "Gemma2", "GPT2", "OPT", "Mpt", "Bert"])
def test_what_prune_leaves_is_the_silenced_model(family, layout, tmp_path):
    model, silenced, batch = made(family), made(family), batch_of(family, 2)
    report = prune_structures(model, batch, config_of(0.4, layout=layout))
    units = dense_of(silenced, batch, config_of(0.4, layout=layout)).units
    for unit, gone in report.gone.items():
        assert len(gone) in (0, len(units[unit])) and report.kept[unit] + len(gone) == len(units[unit])
        silence(silenced, units[unit], torch.tensor(gone, dtype=torch.int64))
    assert sum(map(bool, report.gone.values())) > 1 and 0 < report.sparsity <= 0.4
    torch.testing.assert_close(loads.said(model, batch), loads.said(silenced, batch), rtol=1e-4, atol=1e-5)
    if layout == "padded":
        assert type(model) is type(silenced) and report.padding == report.removed
    model.save_pretrained(tmp_path)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    torch.testing.assert_close(loads.said(loaded, batch), loads.said(model, batch))
    counted = {unit: place.count(loaded) for unit, place in report.places.items()}
    assert counted == dict(report.kept)


def test_a_fresh_process_has_the_model(tmp_path):
    """Class, outputs, texts by every cache, and a step of training, of code that lies beside the weights."""
    asked, expected = {}, {}
    for family in ("Llama", "Gemma2", "GPT2", "GptOss"):
        model, folder = made(family), tmp_path / family
        config = config_of(0.05, ("attention",)) if family in MIXED else config_of(0.4, importance="random")
        assert any(prune_structures(model, batch_of(family, 2), config).gone.values())
        model.save_pretrained(folder)
        torch.save(("AutoModelForCausalLM", batch_of(family)), folder / loads.INPUTS)
        asked[family], expected[family] = [str(folder), None, True], loads.said(model, batch_of(family))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-W", "ignore", loads.__file__, json.dumps(asked)]
    ran = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for family, other in json.loads(ran.stdout.splitlines()[-1]).items():
        assert "error" not in other, other["error"]
        torch.testing.assert_close(torch.tensor(other["logits"]), expected[family], rtol=1e-4, atol=1e-5)
        assert other["learnt"] and all(text == other["written"][0] for text in other["written"])


def test_those_that_turn_their_tokens_least_for_what_they_cost_go():
    model, batch = made("Llama"), batch_of("Llama", 3)
    dense = dense_of(model, batch, config_of())
    turned = {}
    for unit, each in dense.units.items():
        silenced = copy.deepcopy(model)
        silence(silenced, each, torch.arange(len(each)))
        # The same inputs: what is before the block is as it was.
        made_of = [outputs_of(one, each.block, batch) for one in (model, silenced)]
        turned[unit] = float(1 - torch.cosine_similarity(*made_of, dim=-1).mean())
        stays = each.least == len(each)  # and nothing is run to score it
        assert dense.worth[unit] == pytest.approx(0 if stays else turned[unit], rel=1e-3, abs=1e-6)
    report = prune_structures(model, batch, config_of(0.35))
    order = sorted(turned, key=lambda unit: turned[unit] / (dense.sizes[unit].cost * dense.sizes[unit].count))
    order = [unit for unit in order if dense.units[unit].least == 0]
    assert {order[0]} <= {unit for unit, gone in report.gone.items() if gone} <= set(order)


def test_a_model_without_some_is_pruned_further(tmp_path):
    model, batch = made("Llama"), batch_of("Llama", 4)
    pruner = DSAPruner(model)
    pruner.prune(batch, DSAStructuredConfig(0.15, ("ffn", "kv_group"), layout="per_layer"))
    pruner.prune(batch, config_of(0.35, importance="random"))
    pruner.prune(batch, DSAStructuredConfig(0.1, layout="per_layer"))
    pruner.prune(batch, DSAConfig(0.5, "sparsegpt"))
    assert pruner.report.sparsity == pytest.approx(0.5, abs=1e-3)
    for folder, compressed in ((tmp_path / "plain", False), (tmp_path / "packed", True)):
        pruner.save_pretrained(folder, compressed=compressed)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loads.said(loaded, batch), loads.said(model, batch))
        assert DSAPruner.from_pretrained(folder).verify().holds


def test_a_search_and_a_tolerance_take_them_whole():
    model, calibration = made("Llama"), torch.randint(97, (8, 16), generator=torch.Generator().manual_seed(1))
    validation = torch.randint(97, (8, 16), generator=torch.Generator().manual_seed(2))
    pruner, before = DSAPruner(model), state(model)
    result = pruner.search(
        calibration, config_of(), validation=validation, strategy="level_switch", budget="4k tokens"
    )
    assert same_state(model, before) and set(result.best.sparsity.values()) == {0.0, 1.0}
    share = find_share(model, calibration, config_of(0.0), "1%", trials=3).sparsity
    assert same_state(model, before)
    report = pruner.prune(calibration, config_of(allocation=result.best))
    assert dict(report.allocation.sparsity) == dict(result.best.sparsity)
    assert share == 0 or any(prune_structures(made("Llama"), calibration, config_of(share)).gone.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structures": ("mlp", "ffn")}, "'mlp' goes with all that it is made of, and 'ffn' is to go as well"),
        ({"layout": "uniform"}, "leaves blocks that differ, and layout='uniform' has one shape for all"),
        ({"allocation": "owl"}, "allocation='owl' says how many of a block's structures go, and 'att"),
        ({"allocation": "milp"}, "allocation='milp' says how many"),
        ({"cost": "latency"}, "cost='latency' is timed by the width of what stays"),
        ({"learner": "policy_gradient"}, "A learner is of channels and heads, and 'attention' is to go"),
        ({"spread": 0.1}, "spread=0.1 says how far apart the shares of blocks are, and 'attention' goes whole"),
        ({"rounds": 2}, "rounds=2 takes importances anew .*, and 'attention' goes at once"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


@pytest.mark.parametrize(("settings", "way"), [({}, "zeros."), ({"structures": ("ffn",)}, "layout='uniform'.")])
def test_an_encoder_without_a_class_is_told_of_layouts_that_it_can_have(settings, way):
    with pytest.raises(ValueError, match=f"T5.* has no class whose layers may differ .*{way}$"):
        prune_structures(made("T5"), batch_of("T5", 2), config_of(0.2, **settings))


def test_an_offloaded_model_is_refused_by_name(tmp_path):
    deeper("Llama", DEPTH).save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{number}": "disk" if number else "cpu" for number in range(DEPTH)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
    )
    with pytest.raises(ValueError, match="tries blocks without a part of them, in the whole model.*offloaded"):
        prune_structures(model, batch_of("Llama", 2), config_of())


def test_in_how_many_blocks_none_is_left_is_said():
    said = "none in 2 of 4 blocks, 40 to 48 of 48 stay in the others"
    assert stays_in([(0, 48), (48, 48), (40, 48), (0, 48)]) == said
    assert stays_in([(0, 2), (0, 2)]) == "none in 2 of 2 blocks" and stays_in([(1, 2), (1, 2)]) == "1 of 2 stay"
    report = prune_structures(made("Llama"), batch_of("Llama", 2), config_of(0.2, ("mlp",)))
    assert "; ffn: none in 1 of 4 blocks, 48 of 48 stay in the others" in str(report)


def test_shares_are_of_all_attention_that_which_stays_included():
    report = prune_structures(deeper("Llama", DEPTH), batch_of("Llama", 2), config_of(0.1, ("attention",)))
    assert report.shares["kv"] == pytest.approx(1 / DEPTH)
    assert "kv_group: none in 1 of 4 blocks" in str(report)
    report = prune_structures(deeper("Llama", DEPTH), batch_of("Llama", 2), config_of(0.25, cost="kv"))
    assert report.shares["kv"] == pytest.approx(1 / DEPTH)


def test_a_model_without_some_is_pickled(tmp_path):
    model, batch = made("GPT2"), batch_of("GPT2")
    prune_structures(model, batch, config_of(0.4))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(loads.said(again, batch), loads.said(model, batch))
    assert torch.equal(loads.said(copy.deepcopy(again), batch), loads.said(model, batch))


def test_where_nothing_can_go_it_is_said():
    with pytest.raises(ValueError, match="has no attention that could be cut out .*share its head"):
        prune_structures(made("Falcon"), batch_of("Falcon", 2), config_of(0.1, ("attention",)))


def test_less_than_the_least_is_refused():
    with pytest.raises(ValueError, match="takes nothing: the least that can go is 0.1000 of the blocks"):
        prune_structures(made("Llama"), batch_of("Llama", 2), config_of(0.05))
