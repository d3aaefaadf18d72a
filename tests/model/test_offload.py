"""What accelerate keeps elsewhere is pruned as if it were in memory, and nobody's files are written over."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import itertools
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from safetensors import safe_open

from optimum_dsa import DSAConfig, DSAPruner, ReconstructConfig, UpdateConfig
from optimum_dsa.model.architecture import UnprunableError, find_architecture, find_stacks
from optimum_dsa.model.calls import feed
from optimum_dsa.model.offload import is_offloaded, resident
from optimum_dsa.model.walk import walk_blocks

from ..conftest import FAMILIES


BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "larger_than_memory.py"
CONFIG = DSAConfig(0.5, batch_size=4)

# untied; tied; tied, with transposed weights; fused experts that are stored apart; two stacks, tied
MODELS = ["llama", "gemma", "gpt2", "mixtral", "t5"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, path in paths.items():
        tiny(name).save_pretrained(path, max_shard_size="20KB")
    return paths


def load(name: str, path: Path, **kwargs):
    return getattr(transformers, FAMILIES[name].auto).from_pretrained(path, **kwargs).eval()


def disk(name: str, path: Path, folder: Path):
    return load(name, path, device_map={"": "disk"}, offload_folder=folder)


def every_other_block_on_disk(name: str, path: Path, folder: Path):
    model = load(name, path)
    blocks = [f"{stack}.{index}" for stack in find_stacks(model) for index in range(len(model.get_submodule(stack)))]
    outside = {weight.rpartition(".")[0] for weight in model.state_dict()}
    places = {module: "cpu" for module in outside if not module.startswith(tuple(f"{block}." for block in blocks))}
    places |= dict(zip(blocks, itertools.cycle(["disk", "cpu"])))
    return load(name, path, device_map=places, offload_folder=folder)


def accelerate_cpu(name: str, path: Path, folder: Path):
    return accelerate.cpu_offload(load(name, path), execution_device="cpu")


def accelerate_disk(name: str, path: Path, folder: Path):
    return accelerate.disk_offload(load(name, path), folder, execution_device="cpu")


PLACES = [disk, every_other_block_on_disk, accelerate_cpu, accelerate_disk]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def same_output(model, other, batch) -> bool:
    with torch.no_grad():
        return torch.equal(feed(model, batch).logits, feed(other, batch).logits)


def same_weights(model, other) -> bool:
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.contract
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_an_offloaded_model_is_pruned_as_if_it_were_in_memory(name, place, checkpoints, inputs, tmp_path):
    path, batch = checkpoints[name], inputs(name)
    before = digests(path)
    expected, found = DSAPruner(load(name, path)), DSAPruner(place(name, path, tmp_path / "offload"))
    assert is_offloaded(found.model) and not is_offloaded(expected.model)
    for sparsity in (0.4, 0.6):  # the second time over what was written back the first time
        config = DSAConfig(sparsity, batch_size=4)
        assert expected.prune(batch, config).achieved == found.prune(batch, config).achieved
        assert same_output(expected.model, found.model, batch)
    found.save_pretrained(tmp_path / "out")
    assert same_weights(load(name, tmp_path / "out"), expected.model)
    assert same_output(expected.model, found.model, batch)
    assert digests(path) == before


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_methods_without_inputs_and_with_updates_write_back_too(method, checkpoints, inputs, tmp_path):
    path, batch = checkpoints["llama"], inputs("llama")
    expected, found = DSAPruner(load("llama", path)), DSAPruner(disk("llama", path, tmp_path))
    for pruner in (expected, found):
        pruner.prune(batch, DSAConfig(0.5, method, "uniform"))
    assert same_output(expected.model, found.model, batch)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_dense_targets_are_those_of_the_model_in_memory(name, place, checkpoints, inputs, tmp_path):
    path, batch = checkpoints[name], inputs(name)
    expected, found = DSAPruner(load(name, path)), DSAPruner(place(name, path, tmp_path))
    for pruner in (expected, found):
        update = UpdateConfig(targets="dense", true_sequential=True, residual=True)
        pruner.prune(batch, DSAConfig(0.5, "sparsegpt", "uniform", update=update, batch_size=4))
    assert same_output(expected.model, found.model, batch)


@pytest.mark.parametrize("place", PLACES)
def test_channels_in_another_order_are_written_back_with_their_biases(place, tiny, inputs, tmp_path):
    model, path, batch = tiny("gpt2"), tmp_path / "model", inputs("gpt2")
    for block in model.transformer.h:
        torch.nn.init.normal_(block.mlp.c_fc.bias, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path, max_shard_size="20KB")
    expected, found = DSAPruner(load("gpt2", path)), DSAPruner(place("gpt2", path, tmp_path / "offload"))
    for pruner in (expected, found):
        assert pruner.prune(batch, DSAConfig(0.5, "wanda", "uniform", pattern="2:4", permute="ria")).permuted
    assert same_output(expected.model, found.model, batch)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_trained_blocks_are_written_back(name, place, checkpoints, inputs, tmp_path):
    path, batch = checkpoints[name], inputs(name)
    expected, found = DSAPruner(load(name, path)), DSAPruner(place(name, path, tmp_path))
    for pruner in (expected, found):
        report = pruner.prune(batch, DSAConfig(0.5, "wanda", "uniform", reconstruct=ReconstructConfig(4, rate=1e-3)))
        assert any(block.steps for block in report.reconstruction.values())
    assert same_output(expected.model, found.model, batch)


@pytest.mark.contract
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_pruned_head_stays_tied_or_untied(name, place, checkpoints, inputs, tmp_path):
    path, batch = checkpoints[name], inputs(name)
    expected, found = DSAPruner(load(name, path)), DSAPruner(place(name, path, tmp_path / "offload"))
    for pruner in (expected, found):
        report = pruner.prune(batch, DSAConfig(0.5, allocation="uniform", include=("lm_head", "embed_tokens")))
        assert sum(report.allocation.sizes.values()) <= report.parameters
    assert same_output(expected.model, found.model, batch)
    found.save_pretrained(tmp_path / "out")
    assert same_weights(load(name, tmp_path / "out"), expected.model)


@pytest.mark.contract
@pytest.mark.parametrize("place", PLACES)
def test_a_tied_weight_is_saved_once(place, checkpoints, inputs, tmp_path):
    pruner = DSAPruner(place("gemma", checkpoints["gemma"], tmp_path / "offload"))
    pruner.prune(inputs("gemma"), CONFIG)
    pruner.save_pretrained(tmp_path / "out")
    saved = []
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            saved += shard.keys()
    assert "model.embed_tokens.weight" in saved and "lm_head.weight" not in saved


def test_resident_weights_are_on_their_device_and_then_let_go(checkpoints, tmp_path):
    model = disk("llama", checkpoints["llama"], tmp_path)
    block, other = model.model.layers[0], model.model.layers[1]
    with resident(model, ["model.layers.0"]):
        with resident(model, ["model.layers.0.mlp"]):
            pass
        assert {p.device.type for p in block.parameters()} == {"cpu"}
        assert {p.device.type for p in other.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("place", [disk, every_other_block_on_disk, accelerate_disk])
def test_what_is_not_named_as_changed_is_not_written_back(place, checkpoints, inputs, tmp_path):
    model, batch = place("llama", checkpoints["llama"], tmp_path), inputs("llama")
    with resident(model, ["model.layers.0.mlp"]):
        model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert same_output(model, load("llama", checkpoints["llama"]), batch)


@pytest.mark.parametrize("place", PLACES)
def test_after_an_exception_the_model_runs_and_can_be_pruned(place, checkpoints, inputs, tmp_path):
    path, batch = checkpoints["llama"], inputs("llama")
    expected, found = load("llama", path), place("llama", path, tmp_path)

    def prune_the_first_block(model, failing_at):
        for index, walked in enumerate(walk_blocks(model, find_architecture(model), [batch])):
            if index == failing_at:
                raise KeyboardInterrupt
            for weight in walked.weights:
                walked.tensor(weight)[::2] = 0
                walked.changed(weight)

    for model in (expected, found):
        with pytest.raises(KeyboardInterrupt):
            prune_the_first_block(model, 1)
    assert same_output(expected, found, batch)
    assert is_offloaded(found)
    for model in (expected, found):
        DSAPruner(model).prune(batch, CONFIG)
    assert same_output(expected, found, batch)


def test_models_that_share_an_offload_folder_do_not_share_weights(checkpoints, inputs, tmp_path):
    path, batch = checkpoints["llama"], inputs("llama")
    first, second = (DSAPruner(disk("llama", path, tmp_path)) for _ in range(2))
    first.prune(batch, DSAConfig(0.3))
    second.prune(batch, DSAConfig(0.7))
    expected = DSAPruner(load("llama", path))
    expected.prune(batch, DSAConfig(0.3))
    assert same_output(first.model, expected.model, batch)


@pytest.mark.contract
@pytest.mark.parametrize("folder", ["offload", None])
def test_written_weights_go_with_the_model(folder, checkpoints, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path, batch = checkpoints["llama"], inputs("llama")
    model = disk("llama", path, folder and tmp_path / folder)
    before = digests(tmp_path)
    DSAPruner(model).prune(batch, CONFIG)
    assert len(digests(tmp_path)) > len(before)
    del model
    gc.collect()
    assert digests(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_a_checkpoint_larger_than_memory_is_pruned(tmp_path, monkeypatch):
    """60 % of a checkpoint of 150 MB, beyond the interpreter and its code, which alone take more."""
    spec = importlib.util.spec_from_file_location("larger_than_memory", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    # one thread, and freed memory is handed back at once
    for name, value in {"OMP_NUM_THREADS": 1, "MALLOC_MMAP_THRESHOLD_": 65536, "MALLOC_TRIM_THRESHOLD_": 0}.items():
        monkeypatch.setenv(name, str(value))
    source, target = tmp_path / "original", tmp_path / "pruned"
    size = benchmark.write_checkpoint(source, hidden=768, layers=9, shard_bytes=50 * benchmark.MB)
    before = digests(source)
    limit = {"limit": int(0.6 * size), "beyond": True}
    done = benchmark.run_child(source=source, target=target, shard=32, plain=False, **limit)
    assert done is not None, "out of memory"
    benchmark.verify(source, target)
    assert digests(source) == before


@pytest.mark.parametrize("family", ["llama4", "dbrx"])
def test_a_model_that_reads_weights_where_they_are_not_is_refused_in_one_line(family, tiny, inputs):
    model = accelerate.cpu_offload(tiny(family), execution_device="cpu")
    with pytest.raises(UnprunableError, match="looks at weights that are on disk or kept back.*device_map='auto'"):
        DSAPruner(model).prune(inputs(family), DSAConfig(0.5, allocation="uniform"))


def test_what_is_shared_and_stays_dense_is_counted_once_wherever_it_is(tiny):
    expected = find_architecture(tiny("zamba2")).dense_sizes
    assert find_architecture(accelerate.cpu_offload(tiny("zamba2"), execution_device="cpu")).dense_sizes == expected
    assert sum(expected.values()) < sum(tiny("zamba2").get_parameter(name).numel() for name in expected)
