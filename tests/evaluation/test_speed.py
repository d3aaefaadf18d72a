"""How fast a model is: what is counted is right, and rates are of what was timed."""

import json
import os

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from optimum_dsa import (
    DSAConfig,
    DSAStructuredConfig,
    demo_model,
    measure_speed,
    prune,
    prune_structures,
    read_speed,
)
from optimum_dsa.packed.pack_model import pack_model

from ..test_commands import run
from ..tiny import tiny_llama, tokens


SMALL = {"prompt": 16, "new_tokens": 4, "rounds": 2}


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr("optimum_dsa.evaluation.reading.PROBE", 2**16)
    monkeypatch.setattr("optimum_dsa.evaluation.reading._CACHE", 2**16)


def test_what_is_counted_is_what_the_model_has():
    model = tiny_llama()
    found = measure_speed({"tiny": model}, **SMALL).speeds["tiny"]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    held = [*model.parameters(), *model.buffers()]
    assert found.weight_bytes == sum(value.numel() * value.element_size() for value in held)
    # 3 blocks, 2 heads of keys and of values, 8 numbers each, of 4 bytes
    assert found.cache_bytes == 3 * 2 * 2 * 8 * 4
    matrices = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.dim() == 2)
    assert found.flops >= 2 * matrices and found.prefill > 0 and found.decode > 0 and found.peak_bytes is None


def test_attention_is_counted_as_well():
    """A token of a longer prompt looks back at more others, and the head is run for the last token alone."""
    short, longer = (measure_speed({"tiny": tiny_llama()}, **{**SMALL, "prompt": size}) for size in (16, 48))
    head = 2 * 32 * 97
    assert longer.speeds["tiny"].flops - head // 48 > short.speeds["tiny"].flops - head // 16


def test_a_smaller_model_takes_less():
    dense, model = tiny_llama(), tiny_llama()
    prune_structures(model, tokens(), DSAStructuredConfig(0.2, ("kv_group",)))
    found = measure_speed({"smaller": model, "dense": dense}, **SMALL).speeds
    for part in ("parameters", "weight_bytes", "flops", "cache_bytes"):
        assert getattr(found["smaller"], part) < getattr(found["dense"], part)


def test_a_packed_model_reads_and_multiplies_less():
    dense, model = tiny_llama(), tiny_llama()
    prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    pack_model(model)
    found = measure_speed({"packed": model, "dense": dense}, **SMALL).speeds
    packed = found["packed"]
    assert packed.parameters == found["dense"].parameters and packed.flops < found["dense"].flops
    assert packed.packed_bytes < packed.weight_bytes < found["dense"].weight_bytes
    assert packed.read_bytes < found["dense"].read_bytes


def test_models_are_measured_in_turn_and_the_first_round_is_not_counted(monkeypatch):
    order, clock = [], iter(range(1000))
    models = {"one": tiny_llama(), "other": tiny_llama(1)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    monkeypatch.setattr("optimum_dsa.evaluation.speed.time.perf_counter", lambda: next(clock))
    found = measure_speed(models, **SMALL)
    # three rounds of reading once and writing four times each, and one forward pass each for FLOPs
    assert order == 3 * (5 * ["one"] + 5 * ["other"]) + ["one", "other"]
    assert {(speed.prefill, speed.decode) for speed in found.speeds.values()} == {(16.0, 4.0)}


def test_what_is_read_for_a_token_is_every_matrix_and_half_of_what_the_cache_grows_by():
    found = measure_speed({"tiny": tiny_llama()}, **SMALL, batch_size=2)
    (speed,) = found.speeds.values()
    rows_looked_up = 97 * 32 * 4
    assert speed.read_bytes == (speed.weight_bytes - rows_looked_up) // 2 + speed.cache_bytes * (16 + 2)
    assert speed.bandwidth == speed.read_bytes * speed.decode and found.bandwidth > 0
    assert found.share_of_bandwidth("tiny") == speed.bandwidth / found.bandwidth
    assert (speed.packed_bytes, speed.resident_bytes, speed.file_bytes) == (None, None, None)


def test_the_memory_of_what_is_loaded_here_is_measured():
    def loaded():
        model = tiny_llama()
        model.more = torch.nn.Buffer(torch.ones(2**24))  # 64 MB
        return model

    there, *others = measure_speed({"loaded": loaded, "there": tiny_llama()}, **SMALL).speeds.values()
    assert 2**26 <= there.resident_bytes < 2**26 + 2**24 and others[0].resident_bytes is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 0}, "prompt is a whole number of at least 1, got 0"),
        ({"rounds": 1.5}, "rounds is a whole number"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        measure_speed({"tiny": tiny_llama()}, **settings)


def test_more_tokens_than_there_is_room_for_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match="32"):
        measure_speed({"tiny": model}, prompt=31, new_tokens=2)


def test_a_model_that_does_not_write_is_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(intermediate_size=48, **sizes)).eval()
    with pytest.raises(ValueError, match="mine is a BertForMaskedLM, and only causal models write on"):
        measure_speed({"mine": model})
    with pytest.raises(ValueError, match="Name a model"):
        measure_speed({})


def test_the_command_measures_two_models(monkeypatch, capsys, tmp_path):
    tiny_llama(vocab_size=97).save_pretrained(tmp_path / "tiny")
    threads = torch.get_num_threads()
    arguments = ["--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--threads", "1"]
    model, file = str(tmp_path / "tiny"), str(tmp_path / "tiny" / "speed.json")
    both = ["bench", model, "--against", str(demo_model()), *arguments]
    code, output, errors = run(monkeypatch, capsys, *both, "--output", file, "--json")
    torch.set_num_threads(threads)
    found = json.loads(output)
    assert code == 0 and list(found["speeds"]) == [model, str(demo_model())] and found["threads"] == 1
    assert read_speed(file).to_dict() == found
    sizes = [speed["file_bytes"] for speed in found["speeds"].values()]
    assert sizes == [(place / "model.safetensors").stat().st_size for place in (tmp_path / "tiny", demo_model())]
    assert all(speed["resident_bytes"] is not None for speed in found["speeds"].values())
    code, output, errors = run(monkeypatch, capsys, "bench", model, "--against", model, *arguments)
    torch.set_num_threads(threads)
    assert code == 2 and "is the model itself" in errors
    monkeypatch.setenv("OPTIMUM_DSA_JIT", "0")  # and put back at the end
    code, output, errors = run(monkeypatch, capsys, "bench", model, "--threads", "0", "--compile-kernels")
    assert os.environ["OPTIMUM_DSA_JIT"] == "1"
    assert code == 2 and "--threads is a whole number" in errors
    code, output, errors = run(monkeypatch, capsys, *both, "--output", str(tmp_path / "tiny" / "config.json"))
    torch.set_num_threads(threads)
    assert code == 2 and "config.json exists and holds no speeds of optimum-dsa; choose another file" in errors
