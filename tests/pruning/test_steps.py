"""Steps over walked blocks: groups in the order in which they run, and statistics of what stands before them."""

from weakref import ref

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from optimum_dsa import Calibration, DSAConfig, DSAPruner, UpdateConfig, find_architecture, prune, verify, walk_blocks
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.pruning.allocate import allocate, architecture_for
from optimum_dsa.pruning.prune import run_steps
from optimum_dsa.pruning.steps import RemoveWeights, union

from ..plain_walk import split
from ..tiny import same_state, state, tiny_llama, tokens


BATCHES = [{"input_ids": tokens(4, 16)}, {"input_ids": tokens(2, 16, seed=1)}]
GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def short(weights):
    return [weight.module.rpartition(".")[2] for weight in weights]


@pytest.mark.parametrize("true_sequential", [False, True])
def test_weights_come_in_groups_of_one_input_in_the_order_in_which_they_run(true_sequential):
    model = tiny_llama()
    for walked in walk_blocks(model, find_architecture(model), BATCHES):
        groups = list(walked.groups(true_sequential))
        assert [short(group.weights) for group in groups] == GROUPS
        for group in groups:
            assert len({id(group.statistics[weight.name]) for weight in group.weights}) == 1
            for weight in group.weights:
                found, before = group.statistics[weight.name], walked.statistics[weight.name]
                assert torch.equal(found.squared_sum, before.squared_sum)  # nothing was changed


def test_without_statistics_there_is_one_group():
    model = tiny_llama()
    for walked in walk_blocks(model, find_architecture(model), None):
        (group,) = walked.groups(True)
        assert group.statistics == {} and len(group.weights) == 7


def test_a_later_group_is_measured_on_what_the_earlier_ones_have_become():
    """Against hooks on a copy whose earlier matrices are zeroed by hand."""
    model, copy = tiny_llama(), tiny_llama()
    block = copy.model.layers[0]
    seen = {}
    for path in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        block.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.setdefault(path, []).append(args[0].detach())
        )
    walked = next(iter(walk_blocks(model, find_architecture(model), BATCHES)))
    for group in walked.groups(true_sequential=True):
        name = group.weights[0].module.removeprefix("model.layers.0.")
        path = "mlp.up_proj" if name == "mlp.gate_proj" else name
        if path != "self_attn.q_proj":
            seen.clear()
            with torch.no_grad():
                for batch in BATCHES:
                    copy(**batch)
            expected = torch.cat([x.flatten(0, 1) for x in seen[path]]).square().sum(0)
            torch.testing.assert_close(group.statistics[group.weights[0].name].squared_sum, expected)
        for weight in group.weights:
            walked.tensor(weight)[:, ::2] = 0
            weight.tensor(copy)[:, ::2] = 0


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_true_sequential_pruning_meets_the_budget_and_differs_behind_the_first_group_only(method, tmp_path):
    plain, sequential = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    config = DSAConfig(0.5, method, "uniform")
    prune(plain, tokens(), config)
    pruner = DSAPruner(sequential)
    report = pruner.prune(tokens(), DSAConfig(0.5, method, "uniform", update=UpdateConfig(true_sequential=True)))
    assert report.sparsity == 0.5 and verify(sequential, report).holds
    (one,), (other,) = plain.model.layers, sequential.model.layers
    assert torch.equal(one.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
    assert not torch.equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight)
    pruner.save_pretrained(tmp_path)
    assert DSAPruner.from_pretrained(tmp_path).report.config == report.config


def test_any_step_is_given_each_block_in_turn_and_what_it_reads():
    model, seen, finished = tiny_llama(), [], []
    before = state(model)

    class Look:
        reads, notes, waiting = frozenset({"inputs", "gram"}), {}, ()

        def __call__(self, walked):
            seen.append(walked.name)
            assert all(found.gram is not None for found in walked.statistics.values())

    class Nothing:
        reads, notes, waiting = frozenset(), {}, ()

        def __call__(self, walked):
            assert seen[-1] == walked.name  # after the step before it

    config = DSAConfig(0.5)
    calibration = Calibration({"input_ids": tokens()}, "tensor")
    steps = [Look(), Nothing()]
    assert union(steps) == {"inputs", "gram"} and union([]) == frozenset()
    run_steps(model, architecture_for(model, config), calibration, config, steps, lambda w: finished.append(w.name))
    assert seen == finished == [f"model.layers.{index}" for index in range(3)] and same_state(model, before)


class Look:
    """A step that reads X·Xᵀ, and holds what it was given as weakly as can be."""

    reads, waiting = frozenset({"inputs", "gram"}), ()

    def __init__(self):
        self.seen, self.notes = [], {}

    def __call__(self, walked):
        assert all(found() is None for found in self.seen)  # those of the blocks before
        assert [name for name, found in walked.statistics.items() if found.gram is not None] == [
            weight.name for weight in walked.weights
        ]
        self.seen += [ref(found) for found in walked.statistics.values()]


def removal(config, model):
    return RemoveWeights(config.resolved, allocate(model, None, config), config.update.true_sequential)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["before", "after"])
def test_statistics_are_freed_when_the_last_step_that_reads_them_is_done(order):
    model, config, look = tiny_llama(), DSAConfig(0.5, "sparsegpt", "uniform"), Look()
    steps = [look, removal(config, model)][order]

    def sink(walked):
        assert not walked.statistics

    calibration = Calibration({"input_ids": tokens()}, "tensor")
    run_steps(model, architecture_for(model, config), calibration, config, steps, sink)
    assert len(look.seen) == 21 and all(found() is None for found in look.seen)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_what_is_derived_of_statistics_is_freed_and_theirs_who_gave_them_stay(method):
    model = tiny_llama()
    walk = walk_blocks(model, find_architecture(model), BATCHES, sequential=False, reads={"inputs", "gram"})
    given = {name: each for block in walk for name, each in block.statistics.items()}
    prune(model, CollectedStatistics(given, "elsewhere"), DSAConfig(0.5, method, "uniform"))
    assert len(given) == 21
    for found in given.values():
        assert found.gram is not None and not found._derived


@pytest.mark.parametrize("reads", [("gram",), ("gram", "cross_gram"), ("gram", "cross_gram", "residual")], ids=len)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_a_walk_in_true_sequence_collects_what_any_other_does(family, reads, tiny, inputs):
    models, batches, calls = [tiny(family), tiny(family)], split(inputs(family), 3), [0, 0]
    walks = []
    for index, model in enumerate(models):
        found = find_architecture(model)
        inner = model.get_submodule(found.blocks[0].weights[-1].module)
        inner.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
        walks.append(walk_blocks(model, found, batches, reads={"inputs", *reads}, true_sequential=bool(index)))
    for one, other in zip(*walks, strict=True):
        for group, same in zip(one.groups(true_sequential=True), other.groups(true_sequential=True), strict=True):
            assert group.weights == same.weights
            for name, statistics in group.statistics.items():
                for part in ("tokens", "sequences", "paired", "squared_sum", "gram", "drift", "lack"):
                    found, expected = getattr(same.statistics[name], part), getattr(statistics, part)
                    if found is not expected:
                        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, msg=f"{name} {part}")
            for walked in (one, other):
                for weight in group.weights:
                    walked.tensor(weight)[:, ::2] = 0
    # The last matrix of a block does not run for those before it, unless experts may be run again.
    assert calls[1] < calls[0] or family == "mixtral"


def test_a_sparsity_for_attention_and_one_for_the_mlp(tmp_path):
    pruner = DSAPruner(tiny_llama())
    report = pruner.prune(tokens(), DSAConfig(0.5, allocation="owl", granularity="block:kind"))
    units = [f"model.layers.{index}.{part}" for index in range(3) for part in ("self_attn", "mlp")]
    assert list(report.achieved) == units and report.allocation.granularity == "block:kind"
    assert report.removed == round(0.5 * sum(report.allocation.sizes.values())) and pruner.verify().holds
    pruner.save_pretrained(tmp_path)
    again = DSAPruner.from_pretrained(tmp_path)
    assert again.verify().holds and again.report.allocation == report.allocation
    other = DSAPruner(tiny_llama())
    assert other.prune(tokens(), DSAConfig(0.5, allocation=str(tmp_path))).achieved == report.achieved


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_of_one_parameter_are_one_group_and_may_see_no_token(method):
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    block = next(iter(walk_blocks(model, find_architecture(model), BATCHES)))
    groups = [sorted({weight.attribute for weight in group.weights}) for group in block.groups()]
    assert groups[-2:] == [["gate_up_proj"], ["down_proj"]]
    update = UpdateConfig(true_sequential=True)
    report = prune(model, tokens(1, 4), DSAConfig(0.5, method, "uniform", update=update))
    assert report.sparsity == 0.5 and report.unseen


def test_parts_that_a_block_lists_are_its_kinds():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    found = find_architecture(T5ForConditionalGeneration(config)).units("block:kind")
    assert list(found)[:2] == ["encoder.block.0.layer.0", "encoder.block.0.layer.1"]
    assert [short(weights) for weights in list(found.values())[:2]] == [["q", "k", "v", "o"], ["wi", "wo"]]


def test_statistics_that_are_there_already_are_not_collected_anew():
    model = tiny_llama()
    statistics = {name: each for block in walk_blocks(model, find_architecture(model), BATCHES, sequential=False)
                  for name, each in block.statistics.items()}  # fmt: skip
    config = DSAConfig(0.5, update=UpdateConfig(true_sequential=True))
    with pytest.raises(ValueError, match="are there already"):
        prune(model, CollectedStatistics(statistics, "elsewhere"), config)


def test_zeros_that_the_model_had_and_that_fit_no_budget_are_said(caplog):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6, "wanda", "owl"))
    caplog.clear()
    report = pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform", pattern="2:4"))
    assert report.sparsity > 0.5 and "more than asked are zero" in caplog.text
