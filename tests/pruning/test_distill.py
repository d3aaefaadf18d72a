"""Distillation: kept weights of the whole model trained towards what the dense one predicts, masks held."""

import copy

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from optimum_dsa import (
    DSAConfig,
    DSAPruner,
    DSAStructuredConfig,
    ReconstructConfig,
    demo_model,
    demo_texts,
    find_architecture,
    load_tokens,
    perplexity,
    prune,
    verify,
)
from optimum_dsa.model.calls import feed
from optimum_dsa.model.examples import logits_of
from optimum_dsa.pruning import distill
from optimum_dsa.pruning.distill import Distillation
from optimum_dsa.pruning.report import PruningReport

from ..tiny import VOCABULARY, same_state, state, tiny_llama, tokens
from .test_reconstruct import FAMILIES, zeros


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_gemma():
    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, **sizes)).eval()


def tiny_bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SMALL)).eval()


def tiny_bart():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes)).eval()


ALL = FAMILIES | {"a cap on what it predicts": tiny_gemma, "masked": tiny_bert, "a bias of words": tiny_bart}


def config(steps=8, sparsity=0.5, **changes):
    return DSAConfig(sparsity, "wanda", "uniform", reconstruct=ReconstructConfig(distill=steps), **changes)


def divergence(dense, model, text):
    """Nats a token, by plain forward passes."""
    with torch.no_grad():
        target, own = (log_softmax(logits_of(feed(one, {"input_ids": text})), -1) for one in (dense, model))
    return (kl_div(own, target, reduction="sum", log_target=True) / target[..., 0].numel()).item()


@pytest.mark.parametrize("family", ALL)
def test_the_mask_is_held_and_predictions_come_nearer_on_windows_held_out(family):
    model = ALL[family]()
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    prune(plain, tokens(32)[:-2], config(0))
    report = prune(model, tokens(32), config())
    assert report.sparsity == 0.5 and verify(model, report).holds
    pruned, trained = zeros(plain), zeros(model)
    assert all(torch.equal(pruned[name], trained[name]) for name in pruned)
    found = report.distillation
    assert found["steps"] and 0 < found["after"] < found["before"]
    if "cap" not in family:  # which is left out
        held_out = tokens(32)[-2:]
        assert found["before"] == pytest.approx(divergence(dense, plain, held_out), rel=1e-3)
        assert found["after"] == pytest.approx(divergence(dense, model, held_out), rel=1e-3)
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.parameters())


def test_what_is_outside_the_blocks_stays_and_the_head_runs_as_before():
    model, dense = tiny_llama(), tiny_llama()
    prune(model, tokens(32), config())
    for name, value in dense.named_parameters():
        if not name.startswith("model.layers"):
            assert torch.equal(value, model.get_parameter(name)), name
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=tokens(1)).logits.shape[-1] == VOCABULARY


def test_without_steps_nothing_changes():
    model, other = tiny_llama(), tiny_llama()
    report = prune(model, tokens(16), config(0))
    prune(other, tokens(16), DSAConfig(0.5, "wanda", "uniform"))
    assert same_state(model, state(other)) and report.distillation == {} and "distillation" not in report.to_dict()


def test_the_report_says_what_it_did_and_comes_back():
    report = prune(tiny_llama(), tokens(32), config())
    assert PruningReport.from_dict(report.to_dict()).distillation == report.distillation
    assert "the whole model trained" in str(report) and "nats a token" in str(report)


def test_a_prune_that_was_interrupted_ends_as_an_undisturbed_one(tmp_path):
    model, other = tiny_llama(), tiny_llama()
    report = prune(model, tokens(16), config(), checkpoints=tmp_path)
    (tmp_path / "block-0002.safetensors").unlink()
    assert prune(other, tokens(16), config(), checkpoints=tmp_path, resume=True).distillation == report.distillation
    assert same_state(other, state(model))


def test_predictions_in_parts_are_those_of_all_at_once(monkeypatch):
    model = tiny_llama()
    architecture = find_architecture(model)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens(4).split(1)]
    batches[0]["attention_mask"][:, -3:] = 0
    found = Distillation(model, architecture, batches, 1, 4)
    for weight in architecture.weights:
        weight.tensor(model).mul_(3)
    found.parameters = distill.trained(model, architecture)
    with distill._heard(model, found.head) as found.heard:
        whole = found.lost(0, found.parameters)
        monkeypatch.setattr(distill, "CHUNK", 3 * VOCABULARY)
        parts = found.lost(0, found.parameters)
    assert torch.allclose(whole, parts, rtol=1e-3) and whole > 0
    # padding predicts nothing
    assert found.size(0) == batches[0]["input_ids"].numel() - 3


def test_a_head_that_is_pruned_as_well_is_compared_with_the_dense_one():
    model, dense, text = tiny_llama(), tiny_llama(), tokens(32)
    report = prune(model, text, config(include=("lm_head",)))
    assert report.distillation["after"] == pytest.approx(divergence(dense, model, text[-2:]), rel=1e-3)


def test_it_helps_a_trained_model_on_text_that_it_has_not_seen():
    losses = {}
    for steps in (0, 16):
        pruner = DSAPruner.from_pretrained(demo_model())
        text, other = (
            load_tokens(demo_texts(part), pruner.tokenizer, num_samples=32, sequence_length=64)
            for part in ("calibration", "validation")
        )
        pruner.prune(text, config(steps, 0.6))
        losses[steps] = perplexity(pruner.model, other, 8)
    assert losses[16] < 0.95 * losses[0]


def test_structures_that_are_gone_stay_gone():
    model, text = tiny_llama(), tokens(32)
    for layer in model.model.layers:  # so that it is no noise that is lost
        layer.mlp.down_proj.weight.data.mul_(20)
    dense = copy.deepcopy(model)
    how = DSAStructuredConfig(0.3, structures=("ffn",), update="none", reconstruct=ReconstructConfig(distill=8))
    found = DSAPruner(model).prune(text, how).distillation
    assert found["steps"] and found["after"] < found["before"]
    assert found["after"] == pytest.approx(divergence(dense, model, text[-2:]), rel=1e-3)
    assert model.model.layers[0].mlp.gate_proj.weight.shape[0] < dense.model.layers[0].mlp.gate_proj.weight.shape[0]


@pytest.mark.parametrize(
    ("make", "inputs", "said"),
    [
        (
            lambda: BertModel(BertConfig(vocab_size=VOCABULARY, **SMALL)),
            tokens(8),
            "BertModel has no output embedding",
        ),
        (
            lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)),
            {"pixel_values": torch.randn(8, 3, 16, 16)},
            "has no output embedding",
        ),
        (tiny_llama, tokens(1), "distill=8 trains on calibration windows"),
    ],
    ids=["no head", "pictures", "one window"],
)
def test_what_cannot_be_is_refused_before_work(make, inputs, said):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=said):
        prune(model, inputs, config())
    assert same_state(model, before)


def test_an_offloaded_model_is_refused():
    with pytest.raises(ValueError, match="distill=8 trains the whole model"):
        ReconstructConfig(distill=8).check_place(offloaded=True)
