"""Experts in one parameter are packed and compute the same, wherever a model takes them."""

import copy
import pickle

import pytest
import torch

from optimum_dsa import DSAConfig, DSAPruner, ValuesConfig, prune
from optimum_dsa.common import fences
from optimum_dsa.evaluation.reading import weights_in, weights_read
from optimum_dsa.packed.experts import PackedExperts, PackedStack
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.ops import linear_experts
from optimum_dsa.packed.pack_model import pack_model, packed_layers, seen_dense, unpack_model
from optimum_dsa.pruning.zeros import found_report

from ..tiny import needs_compressed_loading, same_state, state, tokens
from .test_matrix import sparse, whole


FUSED = ("mixtral", "qwen3_moe", "gpt_oss")  # the last is transposed, has biases, and gates in its own way


def pruned(model, **settings):
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform", skip_unprunable=True, **settings))
    return model.eval()


def stacks(model):
    return [module for module in model.modules() if isinstance(module, PackedStack)]


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_each_vector_meets_its_expert(kind, n):
    """Of three experts of (16, 40); one is asked by nobody, and what is beyond the last gets zeros."""
    if kind == "float":
        matrix = PackedMatrix.of(sparse(48, 40, 0))
    else:
        matrix = whole(48, 40, 0, int(kind[-1]), 8)[0]
    dense, chosen = matrix.dense().view(3, 16, 40), torch.tensor([2, 0, 3, 2, 0, 0, 2])[:n]
    inputs = torch.randn(n, 40, requires_grad=True)
    expected = [dense[e] @ x if e < 3 else torch.zeros(16) for x, e in zip(inputs, chosen.tolist())]
    expected = torch.stack(expected) if n else torch.zeros(0, 16)
    found = linear_experts(inputs, chosen, *matrix.parts, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if n:
        weights = torch.randn(n, 16)
        (gradient,) = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), inputs)[0])


@pytest.mark.contract
@pytest.mark.parametrize("family", FUSED)
def test_a_model_with_experts_is_packed_computes_the_same_and_is_what_it_was(family, tiny):
    model = pruned(tiny(family))
    before, names, kinds = state(model), list(model.state_dict()), [type(each) for each in model.modules()]
    with torch.no_grad():
        expected = model(tokens(2)).logits
        told = model.generate(tokens(1)[:, :5], max_new_tokens=6, do_sample=False)
    packing = pack_model(model)
    assert packing.packed == packed_layers(model) and len(stacks(model)) == 2 * model.config.num_hidden_layers
    assert not [name for name, value in model.named_parameters() if value.dim() == 3]
    assert packing.bytes_packed < 0.65 * packing.bytes_before
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            torch.testing.assert_close(each(tokens(2)).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(tokens(1)[:, :5], max_new_tokens=6, do_sample=False), told)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert unpack_model(model) == packing.packed and same_state(model, before)
    assert list(model.state_dict()) == names and [type(each) for each in model.modules()] == kinds
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2)).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FUSED)
def test_what_reads_weights_reads_those_of_packed_experts(family, tiny):
    model = pruned(tiny(family))
    expected, before, read, size = found_report(model), state(model), weights_read(model), weights_in(model)
    pack_model(model)
    with seen_dense(model):
        assert not stacks(model) and found_report(model) == expected
    assert weights_in(model) == size and weights_read(model) < read
    unpack_model(model)
    assert same_state(model, before)


@needs_compressed_loading
@pytest.mark.parametrize("family, values", [("mixtral", None), ("qwen3_moe", "int8"), ("gpt_oss", "int4")])
def test_it_is_saved_loaded_packed_verified_and_unpacked_bit_for_bit(family, values, tiny, tmp_path):
    pruner = DSAPruner(tiny(family).bfloat16())
    chosen = ValuesConfig(values, group=32, feedback=False) if values else ValuesConfig()
    text = tokens(4) if values else None
    pruner.prune(text, DSAConfig(0.6, "magnitude", "uniform", values=chosen, skip_unprunable=True))
    before, masks = state(pruner.model), dict(pruner.masks())
    pruner.pack()
    kind = {None: torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}[values]
    assert {stack.values.dtype for stack in stacks(pruner.model)} == {kind}
    assert pruner.verify().holds and all(torch.equal(mask, masks[name]) for name, mask in pruner.masks())
    pruner.save_pretrained(tmp_path / "packed")
    loaded = DSAPruner.from_pretrained(tmp_path / "packed")
    assert packed_layers(loaded.model) == packed_layers(pruner.model) and loaded.verify().holds
    parts = loaded.model.state_dict()
    assert all(torch.equal(value, parts[name]) for name, value in pruner.model.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "packed").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    loaded.unpack()
    assert same_state(loaded.model, before)


def test_hooks_of_accelerate_stay(tiny):
    from accelerate import dispatch_model

    model = pruned(tiny("mixtral"))
    expected = model(tokens(2)).logits
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    pack_model(model)
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert experts and all(fences.hooks_of(module) for module in experts)
    torch.testing.assert_close(model(tokens(2)).logits, expected, rtol=1e-4, atol=1e-5)
    unpack_model(model)
    torch.testing.assert_close(model(tokens(2)).logits, expected, rtol=1e-5, atol=1e-6)


def test_it_is_traced_whole_and_gradients_go_through_it(tiny):
    model = pruned(tiny("mixtral"))
    with torch.no_grad():
        expected = model(tokens(1)).logits
    pack_model(model)
    experts = model.model.layers[0].mlp.experts
    hidden, chosen = torch.randn(5, 32, requires_grad=True), torch.tensor([[0, 2], [1, 2], [3, 0], [2, 1], [0, 1]])
    shares = torch.rand(5, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, chosen, shares), experts(hidden, chosen, shares))
    compiled(hidden, chosen, shares).sum().backward()
    assert hidden.grad.abs().sum() > 0
    whole = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens(1)).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_stands_beside_attention_and_is_refused_on_experts(tiny):
    from peft import LoraConfig, get_peft_model

    from optimum_dsa import lora_on_packed

    model = pruned(tiny("mixtral"))
    pack_model(model)
    with pytest.raises(ValueError, match="PackedStack"):
        get_peft_model(copy.deepcopy(model), lora_on_packed(LoraConfig(target_modules=["gate_up_proj"])))
    with pytest.raises(ValueError, match="no target_parameters"):
        lora_on_packed(LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]))
    peft = get_peft_model(model, lora_on_packed(LoraConfig(target_modules=["q_proj", "v_proj"])))
    peft(tokens(2), labels=tokens(2)).loss.backward()
    found = [parameter.grad for name, parameter in peft.named_parameters() if "layers.0" in name and "lora_B" in name]
    assert len(found) == 2 and all(gradient.abs().sum() > 0 for gradient in found)


def test_what_stays_dense_is_named_with_its_share(tiny):
    model = pruned(tiny("mixtral"))
    first, second = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts
    first.gate_up_proj.data[first.gate_up_proj == 0] = 0.01
    first.down_proj.data[first.down_proj == 0] = 0.01
    second._is_expert_parallel = True
    packing = pack_model(model)
    dense = {name.removeprefix("model."): why for name, why in packing.dense.items() if "experts" in name}
    assert dense["layers.0.mlp.experts.down_proj"] == "fewer than 25% zeros"
    assert dense["layers.1.mlp.experts.gate_up_proj"] == "experts of which other processes hold others"
    total = sum(parameter.numel() for parameter in pruned(tiny("mixtral")).parameters())
    share = packing.shares["model.layers.1.mlp.experts.gate_up_proj"]
    assert share == pytest.approx(second.gate_up_proj.numel() / total)
    assert "% of all weights)" in str(packing)


def test_biases_of_experts_are_no_matrices_that_stay_dense(tiny):
    packing = pack_model(pruned(tiny("gpt_oss")))
    assert any("experts" in name for name in packing.packed) and not any("bias" in name for name in packing.dense)
