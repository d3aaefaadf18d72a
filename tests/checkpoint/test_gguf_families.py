"""Every family in a GGUF: what the real llama.cpp makes of it, and what comes out again; what is refused."""

import shutil

import pytest
import torch

from optimum_dsa.checkpoint.exports import export
from optimum_dsa.checkpoint.gguf_families import FAMILIES as WRITTEN
from optimum_dsa.checkpoint.gguf_families import family_of
from optimum_dsa.checkpoint.gguf_read import read_gguf
from optimum_dsa.checkpoint.load import load_model

from .engine import FAMILIES, deviation, family, save, sentencepiece, served


pytest.importorskip("gguf")
EXACT = ("mlp.gate.weight", "wpe.weight")  # routers and positions
PROMPT = [1, *range(3, 33)]  # longer than the windows


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("gemma")`: a family's tiny model with zeros in half of its matrices' places, and its folder."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = family(name), tmp_path_factory.mktemp(name) / "model"
            with torch.no_grad():
                for part, parameter in model.named_parameters():
                    parameter.copy_(parameter.bfloat16())
                    if parameter.dim() > 1 and "embed" not in part and "wte" not in part:
                        parameter[torch.rand(parameter.shape) < 0.5] = 0
            made[name] = model, save(model, folder, sentencepiece() if name in ("mistral", "phi3") else None)
            (folder / "dsa_config.json").write_text("{}")
        return made[name]

    return get


def read_back(path, folder):
    """The model that a GGUF holds."""
    shutil.rmtree(folder, ignore_errors=True)
    read_gguf(path, folder)
    (folder / "dsa_config.json").unlink()
    return load_model(str(folder), dtype=torch.float32, attn_implementation="eager")


def test_every_row_has_a_tiny_model():
    assert WRITTEN.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_real_engine_says_what_the_model_says(name, saved, tmp_path):
    pytest.importorskip("xllamacpp")
    model, folder = saved(name)
    export(folder, tmp_path / "out.gguf", "gguf", "f32")
    # its cache holds float16: 0.003 at most was measured
    assert deviation(served(tmp_path / "out.gguf"), model, PROMPT) < (0.006, 1e-9)


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_zeros_stay_and_what_was_written_comes_out_again(name, kind, saved, tmp_path):
    model, folder = saved(name)
    export(folder, tmp_path / "out.gguf", "gguf", kind)
    found = read_back(tmp_path / "out.gguf", tmp_path / "back").state_dict()
    assert found.keys() == model.state_dict().keys()
    for part, tensor in model.state_dict().items():
        assert (found[part][tensor == 0] == 0).all(), part
        if kind == "f32" or tensor.dim() < 2:
            assert torch.equal(found[part], tensor), part
        else:
            assert 0 < (found[part] - tensor).abs().max() < tensor.abs().max() / 7 or part.endswith(EXACT)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_the_engine_computes_with_the_numbers_that_were_written(name, kind, saved, tmp_path):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "out.gguf"
    export(saved(name)[1], path, "gguf", kind)
    held = read_back(path, tmp_path / "back")
    # It multiplies inputs of 8 bits: 0.06 at most was measured, of random weights.
    assert deviation(served(path), held, PROMPT) < (0.12, 0.12)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar=8 beside a head_dim of 32"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "no attn_logit_softcapping"),
        ("gemma3_text", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "windows in other layers"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=f"the model has .*{message}.*not written as GGUF here"):
        family_of(family(name, **changes).config, "the model")


def test_layers_that_differ_are_of_llamas_alone(saved):
    config = family("qwen3").config
    config.model_type = "dsa_qwen3"
    assert family_of(config, "it").arch == "qwen3"
    config.per_layer_config = {"0": {"intermediate_size": 32}}
    with pytest.raises(ValueError, match="layers that differ.*layout='padded' or 'uniform'"):
        family_of(config, "it")


@pytest.mark.parametrize(("name", "longest"), [("mistral", 16), ("qwen2", 16), ("gemma2", 128)])
def test_a_window_that_the_engine_does_not_know_ends_the_context(name, longest, tmp_path):
    gguf = pytest.importorskip("gguf")
    window = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
    settings = window if name == "qwen2" else {"sliding_window": 16}
    folder = save(family(name, **settings), tmp_path / "model")
    export(folder, tmp_path / "out.gguf", "gguf")
    assert (
        gguf.GGUFReader(tmp_path / "out.gguf").get_field(f"{WRITTEN[name].arch}.context_length").contents() == longest
    )


def test_longrope_goes_along(tmp_path):
    pytest.importorskip("xllamacpp")
    factors = {"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [2.0 + n for n in range(8)]}
    sizes = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
    ropes = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256, **factors}
    model = family("phi3", **sizes, rope_parameters=ropes)
    folder = save(model, tmp_path / "model", sentencepiece())
    export(folder, tmp_path / "out.gguf", "gguf", "f32")
    # The engine takes the short factors, as its context is as long as the original.
    assert deviation(served(tmp_path / "out.gguf"), model, PROMPT) < (0.006, 1e-9)
