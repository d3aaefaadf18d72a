"""A sparse adapter lives up to PEFT's contract, and no step of it brings a zero back."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from optimum_dsa import MODES, Allocation, DSAConfig, SparseLoraConfig, prune
from optimum_dsa.recovery.adapters.ranks import ranks_for

from ...tiny import same_state, state, tiny_llama, tokens


pytestmark = pytest.mark.contract


def sparse_llama(pattern="row", sparsity=0.5, **changes):
    model = tiny_llama(**changes)
    prune(model, tokens(), DSAConfig(sparsity, "wanda", "uniform", pattern=pattern))
    return model


def config(mode="mask", **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["lm_head"]}
    return SparseLoraConfig(mode=mode, **{**settings, **changes})


def zeros(model):
    """Where the blocks' matrices are zero, by name without PEFT's additions."""
    found = {}
    for name, weight in model.named_parameters():
        if "layers" in name and weight.dim() == 2 and "lora_" not in name:
            found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = weight == 0
    return found


def same_zeros(model, before):
    after = zeros(model)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def train(model, steps=4, rate=0.02):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for step in range(steps):
        data = tokens(4, 12, step)
        model(input_ids=data, labels=data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(tokens(2, 10, 9)).logits


@pytest.mark.parametrize("mode", sorted(MODES))
def test_training_merging_and_unmerging_keep_the_zeros(mode):
    model = sparse_llama()
    before, dense = zeros(model), logits(model)
    base = state(model)
    adapted = get_peft_model(copy.deepcopy(model), config(mode))
    assert torch.allclose(logits(adapted), dense, atol=1e-6)  # an adapter starts as nothing
    trained = logits(train(adapted))
    assert not torch.allclose(trained, dense, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), dense)
    adapted.merge_adapter()
    assert same_zeros(adapted, before)
    assert torch.allclose(logits(adapted), trained, atol=1e-5)
    adapted.unmerge_adapter()
    kept = {name.replace(".base_layer", ""): value for name, value in adapted.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in base.items())
    merged = adapted.merge_and_unload(safe_merge=True)
    assert type(merged) is type(model) and same_zeros(merged, before)
    assert torch.allclose(logits(merged), trained, atol=1e-5)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_merging_into_a_tied_head_leaves_the_embedding_and_every_output_alone(mode):
    model = tiny_llama(tie_word_embeddings=True)
    adapted = get_peft_model(model, config(mode, target_modules=["lm_head", "q_proj"], exclude_modules=None))
    trained, embedding = logits(train(adapted)), model.get_input_embeddings().weight.clone()
    adapted.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.allclose(logits(adapted), trained, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.allclose(logits(adapted), trained, atol=1e-5)
    assert model.lm_head.base_layer.weight is model.get_input_embeddings().weight
    assert torch.allclose(logits(adapted.merge_and_unload()), trained, atol=1e-5)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_the_formula(mode, dropout):
    torch.manual_seed(0)
    weight = torch.randn(12, 8) * (torch.rand(12, 8) > 0.5)
    holder = torch.nn.Sequential(torch.nn.Linear(8, 12))
    holder[0].weight.data = weight.clone()
    adapted = peft.inject_adapter_in_model(
        SparseLoraConfig(mode=mode, r=3, lora_alpha=6, target_modules=["0"], lora_dropout=dropout,
                         init_lora_weights=False, **({"group_size": 3} if mode == "grouped" else {})), holder,
    )  # fmt: skip
    layer, x = adapted[0], torch.randn(2, 5, 8, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(1)
    result = layer(x)
    result.square().sum().backward()
    found = [x.grad.clone(), a.grad.clone(), b.grad.clone()]
    for tensor in (x, a, b):
        tensor.grad = None

    def pooled(a):  # 8 columns in groups of 3
        return torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in a.split(3, dim=1)], dim=1)

    formula = {
        "mask": lambda: 2 * (b @ a) * (weight != 0),
        "scale": lambda: weight * (b @ a) - weight,
        "grouped": lambda: 2 * (b @ pooled(a)) * (weight != 0),
        "spp": lambda: 2 * weight * (a.repeat_interleave(4, 0) * b),
    }[mode]
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, dropout)
    expected = x @ weight.t() + holder[0].base_layer.bias + dropped @ formula().t()
    expected.square().sum().backward()
    assert torch.allclose(result, expected, atol=1e-5)
    for value, wanted in zip(found, (x.grad, a.grad, b.grad)):
        assert torch.allclose(value, wanted, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_a_grouped_adapter_merges_into_offsets_and_leaves_every_code():
    """Codes of 4 bits, a step and an offset for every row and 8 columns: what is merged is on the grid that moved."""
    torch.manual_seed(0)
    codes, steps = torch.randint(0, 16, (12, 4, 8)).float(), torch.rand(12, 4, 1) + 0.5
    offsets = torch.rand(12, 4, 1) + 0.1  # no weight is zero, so that all may change
    holder = torch.nn.Sequential(torch.nn.Linear(32, 12))
    holder[0].weight.data = ((codes + offsets) * steps).flatten(1)
    asked = SparseLoraConfig(
        mode="grouped", r=3, lora_alpha=6, group_size=8, target_modules=["0"], init_lora_weights=False
    )
    layer = peft.inject_adapter_in_model(asked, holder)[0]
    change = layer.get_delta_weight("default").unflatten(1, (4, 8))
    moved = change[..., :1] / steps
    assert moved.abs().min() > 1e-4 and torch.equal(change, change[..., :1].expand_as(change))
    layer.merge()
    found = layer.get_base_layer().weight.unflatten(1, (4, 8)) / steps - offsets - moved
    assert (found - codes).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("mode", "group_size", "words"),
    [("mask", 8, "group_size=8 is for mode 'grouped'"), ("grouped", 0, "a number of columns, 1 or more")],
)
def test_groups_that_cannot_be_are_refused(mode, group_size, words):
    with pytest.raises(ValueError, match=words):
        SparseLoraConfig(mode=mode, group_size=group_size)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_save_and_load_in_every_way_peft_and_transformers_have(mode, tmp_path):
    sparse_llama().save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    adapted = train(get_peft_model(model, config(mode)))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for again in (
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), tmp_path / "adapter", low_cpu_mem_usage=True
        ),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(again.eval()), expected)


def test_a_fresh_process_loads_an_adapter_after_the_import(tmp_path):
    sparse_llama().save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    get_peft_model(model, config()).save_pretrained(tmp_path / "adapter")
    code = (
        "from optimum_dsa import SparseLoraConfig\nfrom peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r})\n"
        "print(type(model.peft_config['default']).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["SparseLoraConfig"], done.stderr


def test_several_adapters_of_different_modes_live_together(tmp_path):
    model = sparse_llama()
    before = zeros(model)
    adapted = train(get_peft_model(model, config("mask")))
    first = logits(adapted)
    for mode in ("scale", "spp"):
        adapted.add_adapter(mode, config(mode))
        adapted.set_adapter(mode)
        train(adapted)
    third = logits(adapted)
    adapted.set_adapter("default")
    assert torch.allclose(logits(adapted), first, atol=1e-6)
    adapted.base_model.set_adapter(["default", "scale", "spp"])
    together = logits(adapted)
    adapted.merge_adapter()
    assert torch.allclose(logits(adapted), together, atol=1e-5) and same_zeros(adapted, before)
    adapted.unmerge_adapter()
    adapted.delete_adapter("scale")
    adapted.set_adapter("spp")
    assert torch.allclose(logits(adapted), third, atol=1e-6)
    data = tokens(3, 10, 9)
    with torch.no_grad():
        mixed = adapted(data, adapter_names=["__base__", "default", "spp"]).logits
    assert torch.allclose(mixed[1], first_of(adapted, "default", data[1:2]), atol=1e-5)
    assert torch.allclose(mixed[2], first_of(adapted, "spp", data[2:]), atol=1e-5)


def first_of(adapted, name, data):
    adapted.set_adapter(name)
    with torch.no_grad():
        return adapted(data).logits[0]


def test_masked_adapters_can_be_added_and_others_say_why_not():
    adapted = train(get_peft_model(sparse_llama(), config("mask")))
    before = zeros(adapted)
    adapted.add_adapter("second", config("mask"))
    adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", "cat")
    adapted.set_adapter("both")
    assert same_zeros(adapted.merge_and_unload(), before)
    adapted = get_peft_model(sparse_llama(), config("spp"))
    with pytest.raises(ValueError, match="multiply the weight and cannot be added"):
        adapted.add_weighted_adapter(["default"], [1.0], "both", "cat")


@pytest.mark.parametrize("mode", sorted(MODES))
def test_bfloat16_two_of_four_and_gradient_checkpointing(mode):
    model = sparse_llama("2:4").to(torch.bfloat16)
    before = zeros(model)
    adapted = get_peft_model(model, config(mode))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    merged = train(adapted).merge_and_unload()
    assert same_zeros(merged, before)
    for name, zero in zeros(merged).items():
        assert merged.get_parameter(name).dtype == torch.bfloat16
        assert (zero.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_autocast_trains_float32_weights():
    adapted = get_peft_model(sparse_llama(), config())
    data = tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=data, labels=data).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_conv1d(mode, tiny):
    model = tiny("gpt2")
    prune(model, tokens(vocabulary=80), DSAConfig(0.5, "magnitude", "uniform"))
    modules = ["c_attn", "c_proj", "c_fc"]
    matrices = [name for name, weight in model.named_parameters() if weight.dim() == 2 and ".h." in name]
    before = {name: model.get_parameter(name) == 0 for name in matrices}
    adapted = train(get_peft_model(model, config(mode, target_modules=modules, exclude_modules=None)))
    trained = logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    assert all(torch.equal(merged.get_parameter(name) == 0, zero) for name, zero in before.items())


def test_a_merged_weight_that_rounds_to_zero_stays_alive():
    holder = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    holder[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    adapted = peft.inject_adapter_in_model(SparseLoraConfig(r=1, lora_alpha=1, target_modules=["0"]), holder)
    adapted[0].lora_A["default"].weight.data = torch.ones(1, 2)
    adapted[0].lora_B["default"].weight.data = torch.tensor([[-1.0], [0.0]])
    adapted[0].merge()
    weight = adapted[0].get_base_layer().weight
    assert ((weight != 0) == torch.eye(2).bool()).all() and 0 < weight[0, 0] < 1e-30
    adapted[0].unmerge()
    assert torch.equal(adapted[0].get_base_layer().weight, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


def test_no_matrix_of_the_weights_size_is_held_for_the_backward_pass():
    adapted = get_peft_model(sparse_llama(), config())
    layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 3, 32, requires_grad=True))
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in own] == [(2, 3, 32)]


def test_ranks_follow_the_allocation_and_keep_the_mean():
    allocation = Allocation(
        {"model.layers.0": 0.3, "model.layers.1": 0.6, "model.layers.2": 0.9}, {f"model.layers.{i}": 10 for i in "012"}
    )
    ranks = ranks_for(allocation, 8)
    assert sum(ranks.values()) == 24 and list(ranks.values()) == sorted(ranks.values())
    assert len(set(ranks.values())) == 3
    adapted = get_peft_model(
        tiny_llama(), SparseLoraConfig.for_allocation(allocation, 8, 16, target_modules="all-linear")
    )
    for unit, rank in ranks.items():
        layer = adapted.get_submodule(f"base_model.model.{unit}.mlp.up_proj")
        assert layer.r["default"] == rank and layer.scaling["default"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"use_dora": True}, "has no use_dora"),
        ({"target_parameters": ["experts.down_proj"]}, "has no target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the frozen weight"),
    ],
)
def test_what_makes_another_product_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_an_unknown_mode_and_an_embedding_are_refused():
    with pytest.raises(KeyError, match="Did you mean 'mask'"):
        config("masks")
    with pytest.raises(ValueError, match="embed_tokens: a sparse adapter needs an nn.Linear or Conv1D"):
        get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"], exclude_modules=None))


def test_native_adapters_of_transformers():
    needed = transformers.integrations.peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers {transformers.__version__} adds adapters with peft {needed} or newer")
    model = sparse_llama()
    before, dense = state(model), logits(model)
    model.add_adapter(config())
    assert torch.allclose(logits(model), dense, atol=1e-6)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not same_state(sparse_llama(seed=1), before)
