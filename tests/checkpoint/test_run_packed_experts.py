"""Experts of a checkpoint come packed, whichever way it holds them; what is damaged is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, DSAQuantizationConfig, prune
from optimum_dsa.checkpoint import unpacking
from optimum_dsa.checkpoint.convert import convert
from optimum_dsa.packed.experts import PackedExperts
from optimum_dsa.packed.pack_model import packed_layers, unpack_model

from ..tiny import needs_compressed_loading, same_state, state, tokens


pytestmark = [pytest.mark.contract, needs_compressed_loading]


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def stored(request, tiny, tmp_path_factory):
    """A pruned model, and a compressed folder: with a tensor for each expert, or for all of them."""
    folder = tmp_path_factory.mktemp(request.param)
    pruner = DSAPruner(tiny(request.param))
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform", skip_unprunable=True))
    pruner.save_pretrained(folder / "compressed", compressed=True)
    return pruner.model, folder / "compressed"


def experts(model):
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_they_are_loaded_packed_and_at_most_one_parameter_is_dense(stored, dtype, monkeypatch):
    model, folder = stored
    packed, whole = [], unpacking.pack

    def once(tensor):
        packed.append(tensor.shape)
        return whole(tensor)

    monkeypatch.setattr(unpacking, "pack", once)
    options = {"quantization_config": DSAQuantizationConfig(run_packed=True), "dtype": dtype or "auto"}
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, **options, output_loading_info=True)
    assert not any(found.values()) and len(experts(loaded)) == model.config.num_hidden_layers
    # one at a time where it is put together, and none where the file has it whole
    assert len(packed) == (2 * model.config.num_hidden_layers if "mixtral" in type(model).__name__.lower() else 0)
    told = [each.generate(tokens(1)[:, :5], max_new_tokens=5, do_sample=False) for each in (loaded, model)]
    assert dtype or torch.equal(*told)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    unpack_model(loaded)
    assert same_state(loaded, state(plain)) and list(loaded.state_dict()) == list(plain.state_dict())


def test_a_model_without_its_head_and_one_that_is_placed(stored):
    model, folder = stored
    packed = DSAQuantizationConfig(run_packed=True)
    base = AutoModel.from_pretrained(folder, quantization_config=packed)
    assert experts(base) and torch.isfinite(base(tokens(1)).last_hidden_state).all()
    placed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packed, device_map={"": "cpu"})
    torch.testing.assert_close(placed(tokens(1)).logits, model(tokens(1)).logits, rtol=1e-4, atol=1e-5)


def test_with_few_zeros_they_stay_dense_and_the_rest_is_packed(tiny, tmp_path):
    model = tiny("mixtral")
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform", exclude=("*experts*",)))
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert packed_layers(loaded) and not experts(loaded)
    unpack_model(loaded)
    assert same_state(loaded, state(model))


def test_damage_is_refused_by_name(stored, tmp_path):
    _, folder = stored
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            name = next(name for name in tensors if "experts" in name and tensors[name].dtype == torch.uint8)
            tensors[name][200] ^= 255
            save_file(tensors, bad / path.name, {"format": "pt"})
        else:
            (bad / path.name).write_bytes(path.read_bytes())
    # What fails while several tensors are put together, transformers lists, and ends with a sentence of its own.
    with pytest.raises((ValueError, RuntimeError), match="damaged|does not fit|`CONVERSION` entries"):
        AutoModelForCausalLM.from_pretrained(bad, quantization_config=DSAQuantizationConfig(run_packed=True))
