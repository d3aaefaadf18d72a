import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.pruning.unstructured.patterns import Pattern, removal_order
from optimum_dsa.search.realise.masked_model import MaskedModel, quantise

from ...tiny import same_state, state, tiny_llama, tokens


@pytest.mark.parametrize("text", ["row", "matrix", "group:4", "group:3"])
@pytest.mark.parametrize("levels", [None, 3])
def test_one_order_holds_the_masks_of_all_sparsities(text, levels):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(levels, (5, 13), generator=generator).float() if levels else torch.rand(5, 13)
    pattern = Pattern.parse(text)
    order = removal_order(pattern, scores)
    for count in range(scores.numel() + 1):
        assert torch.equal(pattern.keep(scores, count), order >= count)


def test_the_order_of_n_of_m_goes_level_by_level():
    scores, pattern = torch.rand(5, 16), Pattern.parse("mixed:4")
    order = removal_order(pattern, scores)
    for removed in range(5):
        assert torch.equal(pattern.keep(scores, 20 * removed), order >= 20 * removed)


def masked(model):
    architecture = find_architecture(model)
    found = MaskedModel(model, architecture)
    for weight in architecture.weights:
        found.orders[weight.name] = quantise(removal_order(Pattern("row"), weight.tensor(model).abs()))
    return found


@pytest.mark.contract
@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_a_masked_model_computes_as_the_pruned_one_and_stays_whole(share):
    model, twin = tiny_llama(), tiny_llama()
    before = state(model)
    found = masked(model)
    found.counts = {name: round(share * weight.size) for name, weight in found.weights.items()}
    for name, weight in found.weights.items():
        keep = found.keep(name, found.counts[name])
        assert int((~keep).sum()) == found.counts[name]
        weight.tensor(twin).mul_(keep)
    with torch.no_grad(), found.active():
        inside = model(tokens()).logits
    with torch.no_grad():
        assert torch.equal(inside, twin(tokens()).logits)
        assert not torch.equal(inside, model(tokens()).logits) or share == 0
    assert same_state(model, before)


def test_an_exception_inside_leaves_the_model_whole():
    model = tiny_llama()
    before, forwards = state(model), [vars(module).get("forward") for module in model.modules()]
    found = masked(model)
    found.counts = {name: weight.size // 2 for name, weight in found.weights.items()}
    with pytest.raises(IndexError), found.active():
        model(tokens() + 10**6)
    assert same_state(model, before)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "llama4", "dbrx", "longcat", "jamba"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gradients_are_those_of_the_masked_weights_one_by_one(family, share, tiny, inputs):
    """Of transposed ones and of single experts too, (out_features, in_features), removed entries included."""
    model, twin, batch = tiny(family), tiny(family), inputs(family)
    found = masked(model)
    found.counts = {name: round(share * weight.size) for name, weight in found.weights.items()}
    received = {}
    with found.active(), found.gradients(lambda weight, gradient: received.update({weight.name: gradient.clone()})):
        model(**batch).logits.square().mean().backward()
    for name, weight in found.weights.items():
        weight.tensor(twin).data.mul_(found.keep(name, found.counts[name]))
    twin(**batch).logits.square().mean().backward()
    assert received.keys() == found.weights.keys()
    for weight in found.weights.values():
        gradient = twin.get_submodule(weight.module)._parameters[weight.attribute].grad
        expected = weight.matrix(gradient)
        assert received[weight.name].shape == weight.shape
        assert torch.allclose(received[weight.name], expected, rtol=1e-3, atol=1e-7), weight.name


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "llama4", "dbrx", "jamba"])
def test_values_take_the_place_of_transposed_weights_and_of_experts(family, tiny, inputs):
    model, twin, batch = tiny(family), tiny(family), inputs(family)
    found = masked(model)
    found.counts = {name: weight.size // 3 for name, weight in found.weights.items()}
    for name, weight in found.weights.items():
        found.values[name] = weight.tensor(model).detach() * 1.5
        weight.tensor(twin).data.mul_(1.5 * found.keep(name, found.counts[name]))
    with torch.no_grad(), found.active():
        inside = model(**batch).logits
    assert torch.allclose(inside, twin(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_band_is_what_a_little_more_or_less_would_change():
    found = masked(tiny_llama())
    name, weight = next(iter(found.weights.items()))
    for count in (0, 5, weight.size // 2, weight.size):
        band = found.band(name, count, 20)
        gone = found.keep(name, count - 20) & ~found.keep(name, count + 20)
        assert torch.equal(band, gone)
        assert int(band.sum()) == min(count + 20, weight.size) - max(count - 20, 0)
    assert found.keep(name, 0).all() and not found.keep(name, weight.size).any()
    assert found.keep(name, -5).all() and not found.keep(name, weight.size + 5).any()
