"""LoRA beside packed layers is LoRA beside the layers that they stand for."""

import pytest
import torch

from optimum_dsa import DSAConfig, DSAPruner, SparseLoraConfig, lora_on_packed, prune
from optimum_dsa.packed.pack_model import packed_layers

from ...tiny import same_state, state, tiny_llama, tokens


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.contract
TARGETS = ["q_proj", "down_proj"]


def packed_pruner():
    model = tiny_llama(num_hidden_layers=1)
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner = DSAPruner(model)
    assert pruner.pack().packed
    return pruner


def test_it_trains_as_on_the_dense_model_and_is_saved_and_loaded(tmp_path):
    dense, packed = tiny_llama(num_hidden_layers=1), packed_pruner()
    prune(dense, None, DSAConfig(0.6, "magnitude", "uniform"))
    ids, models = tokens(2), []
    for model in (dense, packed.model):
        config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False)
        torch.manual_seed(0)
        models.append(peft.get_peft_model(model, config if model is dense else lora_on_packed(config)))
        models[-1](input_ids=ids, labels=ids).loss.backward()
    names = [name for name, parameter in models[0].named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * len(TARGETS)
    for name in names:
        one, other = (model.get_parameter(name) for model in models)
        assert torch.equal(one, other) and one.grad.abs().sum() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    models[1].save_pretrained(tmp_path)
    again = packed_pruner()
    config = lora_on_packed(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(again.model, tmp_path, config=config)
    assert torch.equal(loaded(ids).logits, models[1](ids).logits)


def test_what_would_change_packed_weights_is_refused_by_name():
    pruner = packed_pruner()
    for given, said in (
        ({"use_dora": True}, "has no use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": "all-linear"}, "name target_modules"),
    ):
        with pytest.raises(ValueError, match=said):
            lora_on_packed(peft.LoraConfig(**{"target_modules": TARGETS, **given}))
    sparse = SparseLoraConfig(target_modules=TARGETS)
    with pytest.raises(ValueError, match="A SparseLoraConfig changes weights"):
        lora_on_packed(sparse)
    with pytest.raises(ValueError, match="PackedLinear.*unpack a packed model"):
        peft.get_peft_model(packed_pruner().model, sparse)
    with pytest.raises(ValueError, match="PackedLinear"):
        peft.get_peft_model(packed_pruner().model, peft.LoraConfig(target_modules=TARGETS))
    model = peft.get_peft_model(pruner.model, lora_on_packed(peft.LoraConfig(target_modules=TARGETS)))
    with pytest.raises(ValueError, match="is not merged into packed layers"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="has adapters on packed layers"):
        DSAPruner(model).unpack()
    assert len(packed_layers(model)) == 7
    unloaded = model.unload()
    assert len(DSAPruner(unloaded).unpack()) == 7
    dense = tiny_llama(num_hidden_layers=1)
    prune(dense, None, DSAConfig(0.6, "magnitude", "uniform"))
    assert same_state(unloaded, state(dense))


def test_a_model_with_adapters_is_not_packed():
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), peft.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="has adapters, which are merged into weights that are there"):
        DSAPruner(model).pack()
