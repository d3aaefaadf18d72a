import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, find_architecture, prune
from optimum_dsa.pruning.allocation import split_count
from optimum_dsa.pruning.unstructured.patterns import Pattern, removal_order
from optimum_dsa.search.masking import MaskedModel, quantise
from optimum_dsa.search.objective import Objective

from ..tiny import same_state, state, tiny_llama, tokens


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
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
        gradient = gradient if weight.expert is None else gradient[weight.expert]
        expected = gradient.t() if weight.transposed else gradient
        assert received[weight.name].shape == weight.shape
        assert torch.allclose(received[weight.name], expected, rtol=1e-3, atol=1e-7), weight.name


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
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


@pytest.fixture
def objective():
    model = tiny_llama()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data *= 3  # or nothing that is removed would matter
    return Objective(model, Calibration({"input_ids": tokens()}, "x"), tokens(4, 16, seed=5), DSAConfig(0.6), top=30)


def counts_of(objective, share):
    return {name: round(share * size) for name, size in objective.sizes.items()}


def test_nothing_removed_costs_nothing_and_more_costs_more(objective):
    losses = [objective.loss(counts_of(objective, share), range(4)) for share in (0.0, 0.4, 0.8)]
    assert losses[0] == pytest.approx(0, abs=2e-3)
    assert losses[0] < losses[1] < losses[2]


def test_the_loss_is_the_divergence_from_the_dense_model(objective):
    counts = counts_of(objective, 0.7)
    whole = Objective(objective.model, objective.calibration, objective.validation, objective.config, top=97)
    loss = whole.loss(counts, range(4))
    with torch.no_grad():
        dense = objective.model(objective.validation).logits.log_softmax(-1)
        with whole.masked.active():
            sparse = objective.model(objective.validation).logits.log_softmax(-1)
    assert loss == pytest.approx((dense.exp() * (dense - sparse)).sum(-1).mean().item(), rel=5e-3)
    assert 0 < objective.loss(counts, range(4)) <= loss * 1.01  # fewer outcomes are told apart


def test_windows_add_up(objective):
    counts = counts_of(objective, 0.7)
    parts = [objective.loss(counts, range(i, i + 1)) for i in range(4)]
    assert objective.loss(counts, range(4)) == pytest.approx(sum(parts) / 4, rel=1e-4)


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_the_sequential_loss_is_that_of_the_model_that_prune_leaves(method):
    model = tiny_llama()
    before = state(model)
    config = DSAConfig(0.6, method, "atp", spread=0.1)
    calibration, validation = Calibration({"input_ids": tokens()}, "x"), tokens(4, 16, seed=5)
    objective = Objective(model, calibration, validation, config)
    counts = {}
    report_model = tiny_llama()
    report = prune(report_model, calibration, config)
    for block, count in report.allocation.counts().items():
        weights = objective.architecture.units("block")[block]
        counts |= split_count(count, {weight.name: weight.size for weight in weights})
    found, _ = objective.sequential(counts, range(4))
    assert same_state(model, before)
    model.load_state_dict(report_model.state_dict())
    objective.masked.counts = {}
    with torch.no_grad():
        assert found == pytest.approx(objective._divergence(range(4)).mean().item(), rel=1e-4)


def test_slopes_are_the_change_of_the_loss_along_the_masks(objective):
    """Against the loss itself, one matrix at a time moved by a few per cent."""
    counts = counts_of(objective, 0.6)
    before = state(objective.model)
    loss, slopes = objective.slopes(counts, range(4), band=0.02)
    assert loss == pytest.approx(objective.loss(counts, range(4)), rel=1e-4)
    measured, predicted = [], []
    for name, size in objective.sizes.items():
        more, less = dict(counts), dict(counts)
        more[name] += round(0.02 * size)
        less[name] -= round(0.02 * size)
        change = objective.loss(more, range(4)) - objective.loss(less, range(4))
        measured.append(change / (more[name] - less[name]))
        predicted.append(slopes[name])
    correlation = torch.corrcoef(torch.tensor([measured, predicted]))[0, 1]
    assert correlation > 0.8
    assert same_state(objective.model, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in objective.model.parameters())


def test_slopes_follow_what_an_update_makes_of_the_kept_weights():
    """Against the sequential prune itself, one matrix of the last block at a time, where the loss is nearly linear."""
    calibration, validation = Calibration({"input_ids": tokens()}, "x"), tokens(16, 16, seed=5)
    objective = Objective(tiny_llama(), calibration, validation, DSAConfig(0.6, "sparsegpt"))
    counts = counts_of(objective, 0.6)
    objective.move_anchor(counts)
    loss, slopes = objective.slopes(counts, range(16), band=0.05)
    assert loss == pytest.approx(objective.loss(counts, range(16)), rel=1e-4)
    last = list(objective.architecture.units("block").values())[-1]
    for weight in (weight for weight in last if "mlp" in weight.name):
        width = int(0.05 * weight.size)
        fewer, more = (
            objective.sequential(counts | {weight.name: counts[weight.name] + way}, range(16))[0]
            for way in (-width, width)
        )
        assert slopes[weight.name] == pytest.approx((more - fewer) / (2 * width), rel=0.25)
    objective.move_anchor(counts)
    objective.loss(counts, range(16))  # which needs no changes
    assert objective.slopes(counts, range(16), band=0.05)[1] == slopes
