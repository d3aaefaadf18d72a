"""Gradients of weights against those that are taken plainly, and what cannot be had said by name."""

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.model.architecture import UnprunableError
from optimum_dsa.model.gradients import check_gradients_can_be_had, collect_gradients, one_by_one, only_gradients_of
from optimum_dsa.model.padding import Whole
from optimum_dsa.model.statistics import CollectedStatistics, LayerStatistics
from optimum_dsa.model.walk import walk_blocks

from ..tiny import same_state, state, tiny_llama, tokens


def batches_of(tokens, size=2):
    return [{"input_ids": part} for part in tokens.split(size)]


def plain_norms(model, batches):
    """√ Σ g² over samples by parameter, from the model's own loss."""
    sums = {}
    for batch in one_by_one(batches):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.square()
    model.zero_grad()
    return {name: total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_they_are_the_norms_over_samples_of_the_gradients_of_the_models_own_loss(tiny, inputs, family):
    model, batches = tiny(family), batches_of(inputs(family)["input_ids"])
    architecture = find_architecture(model)
    before, flags = state(model), [parameter.requires_grad for parameter in model.parameters()]
    found = collect_gradients(model, architecture, batches)
    expected = plain_norms(model, batches)
    assert found.keys() == {weight.name for weight in architecture.weights}
    for weight in architecture.weights:
        theirs = weight.matrix(expected[f"{weight.module}.{weight.attribute}"])
        assert found[weight.name].shape == weight.shape and found[weight.name].dtype == torch.float32
        torch.testing.assert_close(found[weight.name], theirs, rtol=1e-4, atol=1e-7)
    assert same_state(model, before) and all(parameter.grad is None for parameter in model.parameters())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


def test_the_batch_size_changes_nothing():
    model, ids = tiny_llama(), tokens()
    architecture = find_architecture(model)
    for reads in ({"inputs", "gradients"}, {"inputs", "regional"}):
        found = [
            {
                name: statistics.gradient if "gradients" in reads else statistics.regional_gradient
                for walked in walk_blocks(model, architecture, batches_of(ids, size), reads=reads)
                for name, statistics in walked.statistics.items()
            }
            for size in (1, 4)
        ]
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name])
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize("sequential", [True, False])
def test_regional_gradients_are_of_the_norm_of_what_a_block_gives_for_each_sample(sequential):
    """A block that is pruned before moves what goes into the next one, and with it its gradients, as walked."""
    model, ids = tiny_llama(), tokens()
    architecture = find_architecture(model)
    inputs = {}
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: inputs.update(hidden=args[0].detach()))
    for walked in walk_blocks(model, architecture, batches_of(ids), reads={"regional"}, sequential=sequential):
        if walked.name.endswith("0") and sequential:
            walked.tensor(walked.weights[0]).mul_(0)
        if walked.name.endswith("1"):
            found = {name: statistics.regional_gradient for name, statistics in walked.statistics.items()}
            break
    sums = {}
    outputs = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    for sample in ids.split(1):
        model.zero_grad()
        outputs.clear()
        model(sample)
        outputs[0].norm().backward()
        for name in found:
            sums[name] = sums.get(name, 0) + model.get_parameter(name).grad.square()
    hook.remove()
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total.sqrt(), rtol=1e-4, atol=1e-6)


def test_a_groups_gradients_are_of_the_block_as_the_groups_before_left_it():
    model, ids = tiny_llama(), tokens()
    walk = walk_blocks(model, find_architecture(model), batches_of(ids), reads={"regional"}, true_sequential=True)
    groups = next(walk).groups(true_sequential=True)
    first = next(groups)
    before = first.statistics[first.weights[0].name].regional_gradient
    for weight in first.weights:
        weight.tensor(model).mul_(0.5)
    again = {weight.name for weight in next(groups).weights}
    assert before.abs().sum() > 0 and again.isdisjoint({weight.name for weight in first.weights})
    model2 = tiny_llama()
    for weight in first.weights:
        weight.tensor(model2).mul_(0.5)
    plain = next(walk_blocks(model2, find_architecture(model2), batches_of(ids), reads={"regional"}))
    groups = next(walk_blocks(model, find_architecture(model), batches_of(ids), reads={"regional"})).groups()
    for group in groups:
        for name, statistics in group.statistics.items():
            torch.testing.assert_close(statistics.regional_gradient, plain.statistics[name].regional_gradient)


def test_weights_that_share_an_input_share_its_sums_and_what_is_computed_of_them():
    model = tiny_llama()
    walked = next(
        walk_blocks(model, find_architecture(model), batches_of(tokens()), reads={"inputs", "gram", "gradients"})
    )
    groups = list(walked.groups())
    assert [len(group.weights) for group in groups] == [3, 1, 2, 1]
    q, k = (walked.statistics[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert q.shares(k) and q is not k and not q.shares(groups[1].statistics[groups[1].weights[0].name])
    assert q.inverse_factor() is k.inverse_factor()
    assert q.gradient.shape == (32, 32) and k.gradient.shape == (16, 32)
    for weight in groups[0].weights:
        assert "factor" in k._derived
        walked.done(weight, groups[0])
    assert not k._derived


def test_statistics_without_gradients_say_what_to_read():
    with pytest.raises(ValueError, match='reads={"inputs", "gradients"}'):
        print(LayerStatistics(3).gradient)
    with pytest.raises(ValueError, match='reads={"inputs", "regional"}'):
        print(LayerStatistics(3).regional_gradient)


def test_what_cannot_be_had_is_refused_by_name(tiny, inputs):
    vit = tiny("vit")
    with pytest.raises(ValueError, match="ViTForImageClassification .* no loss to take gradients of; choose a metric"):
        collect_gradients(vit, find_architecture(vit), [inputs("vit")])
    model = tiny_llama()
    with_head, collected = find_architecture(model, include=("lm_head",)), CollectedStatistics({}, "training")
    with pytest.raises(UnprunableError, match=r"lm_head\.weight: gradients of what a block gives"):
        next(walk_blocks(model, with_head, batches_of(tokens()), reads={"regional"}))
    with pytest.raises(ValueError, match="these statistics are there already"):
        next(walk_blocks(model, find_architecture(model), collected, reads={"gradients"}))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"The gradient of .*weight holds NaN or infinities; .* a metric that reads"):
        collect_gradients(model, find_architecture(model), batches_of(tokens()))


def test_several_processes_are_refused():
    architecture = find_architecture(tiny_llama())
    with pytest.raises(ValueError, match="not summed over processes"):
        check_gradients_can_be_had(tiny_llama(), architecture, {"regional"}, True, alone=False)
    check_gradients_can_be_had(tiny_llama(), architecture, {"gram"}, True, alone=False)


def test_the_head_has_gradients_of_the_loss():
    model = tiny_llama()
    architecture = find_architecture(model, include=("lm_head",))
    walk = walk_blocks(model, architecture, batches_of(tokens()), reads={"inputs", "gradients"})
    assert list(walk)[-1].statistics["lm_head.weight"].gradient.shape == (97, 32)


def test_a_batch_that_cannot_be_cut_is_one_sample():
    whole = Whole(input_ids=tokens(2), pixel_values=torch.zeros(3, 1))
    assert one_by_one([whole, {"input_ids": tokens(3)}])[0] is whole
    assert len(one_by_one([whole, {"input_ids": tokens(3)}])) == 4


def test_gradients_that_were_there_are_there_afterwards():
    layer = torch.nn.Linear(2, 2).train()
    layer.weight.grad, layer.bias.requires_grad = torch.ones(2, 2), False
    with only_gradients_of(layer, {layer.weight: lambda parameter, gradient: None}):
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is None and not layer.training
    assert torch.equal(layer.weight.grad, torch.ones(2, 2)) and layer.training and not layer.bias.requires_grad
