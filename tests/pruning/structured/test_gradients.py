"""Weights times gradients, summed by what structures own: laws, and formulas against gradients taken plainly."""

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.model.gradients import loss_of
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.gradients import collect_products
from optimum_dsa.pruning.structured.importance import IMPORTANCES, Parts
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.structures import find_structures

from ...tiny import same_state, state, tokens
from .families import FAMILIES, batch_of


READ = sorted(name for name in IMPORTANCES if IMPORTANCES.fact(name, "gradients"))


def samples(family, number=3):
    batch = batch_of(family, number)
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(number)]


def units_of(model, family):
    return find_structures(model, find_architecture(model), samples(family)[0]).structures


def plain_gradients(model, batches):
    """(batches, ...) by parameter."""
    found = {}
    for batch in batches:
        model.zero_grad()
        logits, ids = model(**batch).logits, batch["input_ids"]
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        for name, parameter in model.named_parameters():
            found.setdefault(name, []).append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


def test_every_row_is_its_formula_of_plain_gradients():
    """A group of heads, by hand: its two query heads' rows, the rows of its keys and values, columns of the output."""
    model, batches = FAMILIES["Llama"][0](), samples("Llama")
    units, gradients = units_of(model, "Llama"), plain_gradients(model, batches)
    each, prefix = units["model.layers.1:kv_group"], "model.layers.1.self_attn."
    products = collect_products(model, units, batches, "mixed")[each.unit]
    parts = Parts((), (), each.reads[0].index, products=products)
    group = 1
    owned = []  # (samples, vectors, elements) of p_j by matrix
    for name, rows in (("q", slice(16, 32)), ("k", slice(8, 16)), ("v", slice(8, 16)), ("o", slice(16, 32))):
        name = f"{prefix}{name}_proj.weight"
        p = model.get_parameter(name).detach() * gradients[name]
        owned.append(p.mT[:, rows] if "o_proj" in name else p[:, rows])
    mixed = [p.mean(0) - p.square().mean(0) / 2 for p in owned]
    vector = [p.sum(-1).mean(0) - p.sum(-1).square().mean(0) / 2 for p in owned]
    expected = {
        "taylor": sum(p.mean(0).abs().sum() for p in owned),
        "taylor_vector": sum(p.mean(0).sum(-1).abs().sum() for p in owned),
        "taylor_second": sum(p.square().mean(0).sum() for p in owned),
        "taylor_mix": sum(m.abs().sum() for m in mixed),
    }
    for name, value in expected.items():
        torch.testing.assert_close(IMPORTANCES[name](parts)[group], value, rtol=1e-4, atol=1e-7)
    vectors = sum((found.first - found.first_squared / 2).abs().sum(1) for found in products)
    torch.testing.assert_close(vectors[group], sum(v.abs().sum() for v in vector), rtol=1e-4, atol=1e-7)
    mix = IMPORTANCES["taylor_mix"](parts)
    fused = IMPORTANCES["saap"](parts)
    torch.testing.assert_close(fused, vectors / vectors.mean() / 2 + mix / mix.mean() / 2)
    torch.testing.assert_close(IMPORTANCES["saap_learned"](parts), fused)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert", "T5", "Mixtral"])
def test_a_pass_for_every_block_gives_the_same(family):
    model, batches = FAMILIES[family][0](), samples(family)
    before, flags = state(model), [parameter.requires_grad for parameter in model.parameters()]
    units = units_of(model, family)
    whole, apart = (collect_products(model, units, batches, "mixed", blockwise) for blockwise in (False, True))
    assert whole.keys() == apart.keys() == units.keys()
    for unit, each in units.items():
        for one, other in zip(whole[unit], apart[unit], strict=True):
            assert one.first.shape[0] == len(each) and one.mixed.abs().sum() > 0
            for name in vars(one):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-8)
    assert same_state(model, before) and all(parameter.grad is None for parameter in model.parameters())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


def test_what_is_not_needed_is_not_held():
    model, batches = FAMILIES["Llama"][0](), samples("Llama", 1)
    units = units_of(model, "Llama")
    held = {needed: collect_products(model, units, batches, needed) for needed in ("vectors", "elements")}
    for products in held["vectors"].values():
        assert all(each.elements is None and each.mixed is None for each in products)
    for products in held["elements"].values():
        assert all(each.elements is not None and each.mixed is None for each in products)


def test_padding_has_no_loss():
    model, batch = FAMILIES["Llama"][0](), samples("Llama", 1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 8:] = 0
    short = {"input_ids": batch["input_ids"][:, :8]}
    padded = {**batch, "attention_mask": mask}
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, padded, "causal"), loss_of(model, short, "causal"))


def test_the_loss_is_that_of_the_models_own_class():
    for family, kind in (("Llama", "causal"), ("GPT2", "causal"), ("T5", "sequence-to-sequence")):
        model, batch = FAMILIES[family][0](), samples(family, 1)[0]
        labels = batch["input_ids"] if kind == "causal" else batch["decoder_input_ids"].roll(-1, 1)
        if kind != "causal":
            labels[:, -1] = -100
        with torch.no_grad():
            torch.testing.assert_close(loss_of(model, batch, kind), model(**batch, labels=labels).loss)


@pytest.mark.parametrize("name", READ)
def test_gradients_that_are_not_finite_are_refused_by_name(name):
    model = FAMILIES["Llama"][0]()
    model.model.norm.weight.data[3] = 1e38  # finite outputs of all blocks, and a loss that is not
    before = state(model)
    with pytest.raises(ValueError, match=r"gradient of model\.layers\.1\..*weight holds NaN or infinities"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.2, importance=name))
    assert same_state(model, before)


def test_a_model_without_tokens_has_no_loss():
    with pytest.raises(ValueError, match="ViTForImageClassification reads pictures, so there is no loss"):
        collect_products(FAMILIES["ViT"][0](), {}, samples("ViT"), "vectors")


def test_a_pass_a_block_takes_the_same_structures():
    given = batch_of("Llama", 4)
    gone = [
        prune_structures(
            FAMILIES["Llama"][0](), given, DSAStructuredConfig(0.2, ("ffn",), "saap", "none", blockwise=blockwise)
        ).gone
        for blockwise in (False, True)
    ]
    assert gone[0] == gone[1] and any(gone[0].values())


def test_a_learner_begins_with_gradients_as_well():
    model = FAMILIES["Llama"][0]()
    config = DSAStructuredConfig(0.2, ("ffn",), "saap", "none", learner="policy_gradient", learn_steps=1)
    assert prune_structures(model, batch_of("Llama", 4)["input_ids"], config).sparsity > 0.19
