"""BESA: its sparsity is exact, its losses fall, and masks have the gradient of the chance that a weight stays."""

import logging

import pytest
import torch

from optimum_dsa import DSAConfig, allocate, find_architecture
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.allocation import besa

from ...tiny import same_state, state, tiny_llama, tokens
from .test_whole import seen_of


def test_losses_of_blocks_fall_and_every_block_has_exactly_its_sparsity(monkeypatch, caplog):
    model = tiny_llama()
    before, learnt = state(model), []
    plain = besa._Block.learn
    monkeypatch.setattr(besa._Block, "learn", lambda self: learnt.append(plain(self)) or learnt[-1])
    with caplog.at_level(logging.INFO, "optimum_dsa"):
        found = allocate(model, tokens(), DSAConfig(0.6, "wanda", "besa"))
    assert same_state(model, before) and found.granularity == "matrix"
    assert len(learnt) == 3 and all(one.learnt <= one.uniform for one in learnt)
    assert any(one.learnt < 0.97 * one.uniform for one in learnt)
    assert "block losses" in caplog.text and caplog.text.count("block loss ") == 3
    blocks = find_architecture(model).blocks
    for block in blocks:
        removed = sum(found.counts()[weight.name] for weight in block.weights)
        assert removed == pytest.approx(0.6 * block.size, abs=len(block.weights))
    assert len({round(found.sparsity[weight.name], 3) for weight in blocks[0].weights}) > 3


def test_a_mask_is_hard_and_its_gradient_is_of_the_chance():
    model = tiny_llama()
    seen = seen_of(model)
    reads = {*seen.reads, "outputs"}
    walked = next(walk_blocks(model, seen.architecture, seen.batches(4, None), reads=reads))
    with torch.enable_grad():
        block = besa._Block(seen, walked)
        name = next(iter(block.sizes))
        share = block._share(name)
        assert float(share.detach()) == pytest.approx(0.6, abs=0.01)
        mask = block._mask(name, share)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        gone = (mask == 0).float().mean()
        assert float(gone) == pytest.approx(0.6, abs=1 / 32)
        weight = torch.randn_like(mask)
        (mask * weight).sum().backward()
    logits = block.logits[name].detach().requires_grad_()
    # By hand: weight j of a row stays with the candidates that are not above its place.
    chance = torch.stack(
        [logits.softmax(0)[: place + 1].sum() for place in block.places[name].flatten().tolist()]
    ).view_as(mask)
    (chance * weight).sum().backward()
    torch.testing.assert_close(block.logits[name].grad, logits.grad, rtol=1e-3, atol=1e-6)
    scores = seen.metric(walked.tensor(walked.weights[0]), walked.statistics[name])
    assert (scores[0][block.places[name][0].long().argsort(stable=True)].diff() >= 0).all()


def test_what_was_learnt_is_brought_to_the_target_in_every_block():
    measured = {"m.0.a.weight": ("m.0", 0.9, 100), "m.0.b.weight": ("m.0", 0.5, 300), "m.1.a.weight": ("m.1", 0.1, 50)}
    found = besa.by_learnt(measured, 0.7, None)
    assert found == pytest.approx({"m.0.a.weight": 1.0, "m.0.b.weight": 0.6, "m.1.a.weight": 0.7})
    assert list(found) == list(measured)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "t5"])
def test_experts_of_one_parameter_and_transposed_weights_are_masked_in_their_places(tiny, inputs, family):
    model = tiny(family)
    seen = seen_of(model, inputs(family)["input_ids"])
    walked = next(walk_blocks(model, seen.architecture, seen.batches(4, None), reads={*seen.reads, "outputs"}))
    masks = {weight.name: torch.rand(weight.shape) > 0.5 for weight in walked.weights}
    found = besa._masked(walked.weights, walked, masks)
    for weight in walked.weights:
        masked = weight.matrix(found[f"{weight.module}.{weight.attribute}"])
        assert torch.equal(masked, walked.tensor(weight) * masks[weight.name])
