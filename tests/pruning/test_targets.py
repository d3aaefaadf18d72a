"""Dense targets: a pruned matrix is fitted to what the dense model has in its place."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from optimum_dsa import (
    Allocation,
    DSAConfig,
    LayerStatistics,
    UpdateConfig,
    demo_model,
    demo_texts,
    find_architecture,
    prune,
    verify,
    walk_blocks,
)
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.pruning.targets import dense_target
from optimum_dsa.pruning.unstructured.methods import METHODS
from optimum_dsa.pruning.unstructured.updates import UPDATES

from ..tiny import same_state, state, tiny_llama, tokens


FITTING = sorted(name for name in UPDATES if UPDATES.fact(name, "reads", "nothing") == "gram")
METHOD = "sparsegpt"


def config(sparsity=0.6, targets="dense", true_sequential=False, allocation="uniform", residual=False, **changes):
    update = UpdateConfig(targets=targets, true_sequential=true_sequential, residual=residual)
    return DSAConfig(sparsity, METHOD, allocation, update=update, **changes)


def statistics(inputs, dense):
    found = LayerStatistics(inputs.shape[-1], with_gram=True, sequences=1)
    found.update_(inputs)
    found.pair_(inputs, dense)
    return found


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 8, generator=generator), torch.randn(60, 8, generator=generator)
    return weight, inputs, inputs + 0.3 * torch.randn(60, 8, generator=generator)


def test_the_target_is_the_ridge_solution(numbers):
    weight, inputs, dense = numbers
    found = dense_target(weight, statistics(inputs, dense), damping=0.05)
    penalty = 0.05 * inputs.square().sum(0).mean()
    # least squares with the pull to W as further rows
    left = torch.cat([inputs, penalty.sqrt() * torch.eye(8)])
    right = torch.cat([dense @ weight.t(), penalty.sqrt() * weight.t()])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.t(), rtol=1e-4, atol=1e-5)


def test_with_what_the_stream_lacks_the_target_is_the_ridge_solution_of_the_sum(numbers):
    weight, inputs, dense = numbers
    missing = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    penalty = 0.05 * inputs.square().sum(0).mean()
    left = torch.cat([inputs, penalty.sqrt() * torch.eye(8)])
    for others in (dense, inputs):
        found = statistics(inputs, others)
        found.lack_(inputs, missing)
        right = torch.cat([others @ weight.t() + missing, penalty.sqrt() * weight.t()])
        expected = torch.linalg.lstsq(left, right).solution.t()
        torch.testing.assert_close(dense_target(weight, found, 0.05), expected, rtol=1e-4, atol=1e-5)


def test_any_update_of_the_target_has_the_objective_against_the_dense_outputs(numbers):
    weight, inputs, dense = numbers
    target = dense_target(weight, statistics(inputs, dense), damping=0.0)

    def loss(new):
        return (inputs @ new.t() - dense @ weight.t()).square().sum()

    other = weight.masked_fill(weight.abs() < 0.5, 0)
    distance = (inputs @ (other - target).t()).square().sum()
    torch.testing.assert_close(loss(other) - loss(target), distance, rtol=1e-4, atol=1e-3)


def test_identical_inputs_have_the_weight_itself_as_target(numbers):
    weight, inputs, _ = numbers
    found = statistics(inputs, inputs)
    assert dense_target(weight, found) is weight
    assert torch.equal(found.cross, found.gram)


def test_the_cross_gram_is_what_its_name_says_and_is_added_up_in_parts(numbers):
    _, inputs, dense = numbers
    whole, parts = statistics(inputs, dense), LayerStatistics(8, with_gram=True)
    torch.testing.assert_close(whole.cross, dense.t() @ inputs, rtol=1e-4, atol=1e-4)
    for rows, others in zip(inputs.split(7), dense.split(7)):
        parts.update_(rows)
        parts.pair_(rows, others)
    torch.testing.assert_close(parts.cross, whole.cross, rtol=1e-4, atol=1e-4)


def test_inputs_of_which_some_have_no_dense_counterpart_are_fitted_as_without(numbers):
    weight, inputs, dense = numbers
    found = statistics(inputs, dense)
    found.update_(inputs[:1])
    assert dense_target(weight, found) is weight
    with pytest.raises(ValueError, match="cross_gram"):
        _ = found.cross


def test_an_input_that_never_fired_and_an_ill_conditioned_gram_leave_no_infinities(numbers):
    weight, inputs, dense = numbers
    inputs[:, 2], dense[:, 3] = 0, 0
    inputs[:, 5] = inputs[:, 4]
    for damping in (0.0, 0.01):
        assert dense_target(weight, statistics(inputs, dense), damping).isfinite().all()


def test_the_first_block_is_as_with_sparse_targets_and_later_ones_are_not():
    sparse, dense = tiny_llama(), tiny_llama()
    prune(sparse, tokens(), config(targets="sparse"))
    report = prune(dense, tokens(), config())
    assert verify(dense, report).holds and report.sparsity == pytest.approx(0.6, abs=1e-3)
    same = [
        same_state(block, state(other)) for block, other in zip(sparse.model.layers, dense.model.layers, strict=True)
    ]
    assert same == [True, False, False]


@pytest.mark.parametrize("true_sequential", [False, True])
def test_nothing_pruned_before_a_block_leaves_it_as_with_sparse_targets(true_sequential):
    """Only the last block is pruned; within it, true_sequential makes matrices differ from each other's inputs."""
    names = [f"model.layers.{index}" for index in range(3)]
    sizes = dict.fromkeys(names, 32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    allocation = Allocation(dict(zip(names, (0.0, 0.0, 0.75))), sizes)
    models = [tiny_llama(), tiny_llama()]
    for model, targets in zip(models, ("sparse", "dense")):
        prune(model, tokens(), config(0.25, targets, true_sequential, allocation))
    one, other = (model.model.layers[2] for model in models)
    assert same_state(one.self_attn.q_proj, state(other.self_attn.q_proj))
    assert same_state(one, state(other)) != true_sequential
    assert all(same_state(models[1].model.layers[index], state(tiny_llama().model.layers[index])) for index in (0, 1))


@pytest.mark.parametrize("update", FITTING)
def test_a_sparsity_of_0_leaves_every_weight(update):
    model = tiny_llama()
    before = state(model)
    method = next(name for name in METHODS if METHODS[name].update == update)
    prune(model, tokens(), DSAConfig(0.0, method, "uniform", update=UpdateConfig(update, targets="dense")))
    assert same_state(model, before)


@torch.no_grad()
def outputs(model, batch):
    """The hidden states behind every block for tokens (samples, length): (blocks, samples, length, hidden size)."""
    found = []
    handles = [block.register_forward_hook(lambda m, a, output: found.append(output)) for block in model.model.layers]
    model(batch)
    for handle in handles:
        handle.remove()
    return torch.stack([each[0] if isinstance(each, tuple) else each for each in found])


def test_blocks_of_a_trained_model_come_closer_to_the_dense_ones():
    """At 60 %; the error of each block's output, on the tokens that it was fitted to and on others."""
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    before, text = state(model), calibration_tokens()
    expected, errors = outputs(model, text), {}
    for settings in ("sparse", False), ("sparse", True), ("dense", False), ("dense", True), ("dense", True, True):
        model.load_state_dict(before)
        targets, true_sequential, *residual = settings
        prune(model, text[:24], config(0.6, targets, true_sequential, residual=bool(residual)))
        lost = (outputs(model, text) - expected).square()
        errors[settings] = lost[:, :24].sum(dim=(1, 2, 3)), lost[:, 24:].sum(dim=(1, 2, 3))
    for true_sequential in (False, True):
        for sparse, dense in zip(errors["sparse", true_sequential], errors["dense", true_sequential], strict=True):
            assert (dense[1:] < sparse[1:]).all(), (sparse, dense)
    for without, full in zip(errors["dense", False], errors["dense", True], strict=True):
        assert (full < without).all()
    # What the stream lacks is fitted closely: so few tokens (1,536) say how well, and not how well it generalises.
    assert (errors["dense", True, True][0][1:] < errors["dense", True][0][1:]).all()


def calibration_tokens(samples=32, length=64):
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    numbers = tokenizer("\n".join(demo_texts("calibration"))[:60_000])["input_ids"]
    return torch.tensor(numbers[: samples * length]).view(samples, length)


def test_updates_that_fit_nothing_are_refused_with_the_way_out():
    for method in ("wanda", "magnitude"):
        with pytest.raises(ValueError, match=f"update of method '{method}', does not; use one of .*sparsegpt"):
            DSAConfig(0.5, method, update=UpdateConfig(targets="dense"))
    assert DSAConfig(0.5, "wanda", update=UpdateConfig("sparsegpt", targets="dense")).update.targets == "dense"


def test_targets_that_would_change_nothing_are_refused():
    with pytest.raises(ValueError, match="changes nothing.*leave out one of both"):
        config(sequential=False)
    with pytest.raises(ValueError, match="targets"):
        UpdateConfig(targets="dence")


def test_a_residual_without_dense_targets_is_refused():
    with pytest.raises(ValueError, match="targets='sparse' has none; use targets='dense' with it"):
        UpdateConfig(residual=True)


def test_statistics_from_elsewhere_are_refused_before_a_weight_is_changed():
    model = tiny_llama()
    before, found = state(model), find_architecture(model)
    walk = walk_blocks(model, found, [{"input_ids": tokens()}], reads={"gram"}, sequential=False)
    collected = {name: each for walked in walk for name, each in walked.statistics.items()}
    with pytest.raises(ValueError, match="over batches of inputs"):
        prune(model, CollectedStatistics(collected, "elsewhere"), config())
    assert same_state(model, before)


def test_a_config_with_dense_targets_survives_its_own_form():
    assert DSAConfig.from_dict(config().to_dict()) == config()
    assert DSAConfig.from_dict({"sparsity": 0.5, "method": METHOD, "targets": "dense"}).update.targets == "dense"


def test_batches_of_any_size_give_the_same_weights():
    found = []
    for size in (1, 4, 8):
        model = tiny_llama()
        prune(model, tokens(), replace(config(true_sequential=True, residual=True), batch_size=size))
        found.append(state(model))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_stay_bfloat16():
    model = tiny_llama().to(torch.bfloat16)
    report = prune(model, tokens(), config(true_sequential=True))
    assert verify(model, report).holds and {w.tensor(model).dtype for w in find_architecture(model).weights} == {
        torch.bfloat16
    }


def test_what_dense_targets_cannot_be_had_for_is_said(caplog):
    """The dense model routes other tokens to an expert: its outputs are of no token that the pruned one is given."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    prune(tiny_llama(), tokens(), config())
    assert "their own outputs" not in caplog.text
    architecture = find_architecture(model)
    experts = [weight for weight in architecture.weights if weight.expert is not None]
    prune(model, tokens(), config())
    share = sum(weight.size for weight in experts) / sum(weight.size for weight in architecture.weights)
    (said,) = [line for line in caplog.messages if "their own outputs" in line]
    assert said.startswith(f"{len(experts)} of {len(architecture.weights)} matrices ({100 * share:.0f} % of their")
    assert "model.layers.*.mlp.experts" in said
