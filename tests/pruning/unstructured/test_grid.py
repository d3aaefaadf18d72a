"""Kept weights on a grid: zeros are held, errors are made up for, and a pruned model stays on it when it is stored."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, ReconstructConfig, convert, find_architecture, prune, walk_blocks
from optimum_dsa.checkpoint.shards import find_shards, packed_headers
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.packed.grid import grid_of, to_grid
from optimum_dsa.packed.whole import WholeHeader
from optimum_dsa.pruning.sections import ValuesConfig
from optimum_dsa.pruning.unstructured.grid import StayOnGrid, fed_back, on_grid, settled

from ...packed.test_matrix import sparse
from ...tiny import needs_compressed_loading, same_state, state, tiny_llama, tokens
from ..test_reconstruct import tiny_gpt2, tiny_mixtral


def statistics_of(columns, seed=0, gram=True):
    """Of inputs that go together, some of them ten times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    found = LayerStatistics(columns, with_gram=gram)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    found.update_(torch.randn(6 * columns, columns, generator=generator) @ mix * torch.linspace(0.2, 2, columns))
    return found


def lost(grid, weight, statistics):
    """Σ ‖(grid − W) x‖² over the inputs that were seen."""
    difference = grid.weights() - weight
    return float(((difference @ statistics.gram) * difference).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32, 256])
@pytest.mark.parametrize("scales", ["absmax", "mse"])
def test_errors_are_made_up_for_and_zeros_take_none(bits, group, scales):
    weight, seen = sparse(48, 300, 0), statistics_of(300)
    before = weight.clone()
    grid = fed_back(weight, seen, bits, group, scales)
    assert torch.equal(weight, before) and torch.equal(grid.numbers != 0, weight != 0)
    assert grid.group == group and grid.scales.shape == (48, -(-300 // group) if group else 1)
    assert lost(grid, weight, seen) < 0.95 * lost(to_grid(weight, bits, group, scales), weight, seen)
    assert torch.equal(grid_of(grid.weights(), bits).weights(), grid.weights())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_every_sweep_comes_nearer_with_the_same_scales_and_zeros(bits, group, monkeypatch):
    weight, seen = sparse(48, 300, 0), statistics_of(300)
    first = fed_back(weight, seen, bits, group)
    losses = [lost(first, weight, seen)]
    for sweeps in (1, 3):
        grid = settled(weight, first, seen, bits, 0, sweeps)
        assert torch.equal(grid.numbers != 0, weight != 0) and torch.equal(grid.scales, first.scales)
        assert int(grid.numbers.abs().max()) <= (7 if bits == 4 else 127)
        losses.append(lost(grid, weight, seen))
    assert losses[2] <= losses[1] < 0.95 * losses[0]
    assert torch.equal(settled(weight, first, seen, bits, 0, 0).numbers, first.numbers)
    monkeypatch.setattr("optimum_dsa.pruning.unstructured.grid.WIDTH", 32)
    other = settled(weight, first, seen, bits, 0, 3)
    assert lost(other, weight, seen) == pytest.approx(losses[2], rel=1e-2)
    assert torch.equal(on_grid(weight, seen, bits, group), settled(weight, first, seen, bits).weights())


def test_without_correlations_there_is_nothing_to_make_up_for():
    weight, seen = sparse(20, 64, 1), LayerStatistics(64, with_gram=True)
    seen.update_(torch.eye(64).repeat(3, 1))
    assert torch.equal(fed_back(weight, seen, 4, 32, "absmax").weights(), to_grid(weight, 4, 32, "absmax").weights())


def test_the_numbers_of_a_run_do_not_depend_on_how_many_columns_are_done_at_once(monkeypatch):
    weight, seen = sparse(20, 300, 2), statistics_of(300)
    one = fed_back(weight, seen, 4, 32)
    monkeypatch.setattr("optimum_dsa.pruning.unstructured.grid.WIDTH", 32)
    assert float((fed_back(weight, seen, 4, 32).numbers != one.numbers).float().mean()) < 1e-3


def test_a_grid_of_the_dtype_and_the_weights_that_inputs_give():
    weight, seen = sparse(20, 64, 3, torch.bfloat16), statistics_of(64, gram=False)
    assert on_grid(weight, None, 4, 32, feedback=False).dtype == torch.bfloat16
    with_inputs, without = (on_grid(weight, of, 4, feedback=False).float() - weight.float() for of in (seen, None))
    assert with_inputs[:, -16:].square().sum() < without[:, -16:].square().sum()


@pytest.mark.parametrize("exchanged", [False, True])
def test_what_stays_on_a_grid_keeps_scales_and_zeros(exchanged):
    grid = to_grid(sparse(30, 80, 4), 4, 32)
    first = grid.weights().view(3, 10, 80)
    first = first.mT.contiguous() if exchanged else first
    stays = StayOnGrid(first, 4)
    assert torch.equal(stays(first), first) and torch.equal(stays(first + 1e-6), first)
    moved = stays(first + torch.randn(first.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(moved == 0, first == 0) and not torch.equal(moved, first)
    rows = (moved.mT if exchanged else moved).reshape(30, 80)
    numbers = rows / grid.scales.repeat_interleave(32, dim=1)[:, :80]
    assert torch.equal(numbers, numbers.round()) and float(numbers.abs().max()) == 7
    with pytest.raises(ValueError, match="lies on no grid of 4 bits"):
        StayOnGrid(first * torch.rand(first.shape), 4)


# -- in a pruned model


def is_on_grid(model, bits):
    walk = walk_blocks(model, find_architecture(model), None)
    return all(grid_of(walked.tensor(weight), bits) is not None for walked in walk for weight in walked.weights)


@pytest.mark.parametrize(
    "method,pattern,values",
    [
        ("wanda", None, ValuesConfig("int4", 32)),
        ("wanda", "2:4", ValuesConfig("int8", 0, "absmax", feedback=False)),
        ("sparsegpt", "2:4", "int4"),
        ("magnitude", None, ValuesConfig("int8", feedback=False)),
    ],
)
def test_zeros_and_budget_are_those_that_were_asked_for(method, pattern, values):
    model, plain = tiny_llama(), tiny_llama()
    asked = {"sparsity": 0.5, "method": method, "allocation": "uniform", "pattern": pattern}
    report = prune(model, tokens(), DSAConfig(**asked, values=values))
    assert report.sparsity == prune(plain, tokens(), DSAConfig(**asked)).sparsity == 0.5
    bits = 8 if "int8" in str(values) else 4
    assert is_on_grid(model, bits) and not is_on_grid(plain, bits)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_compressed_loading
def test_stored_loaded_and_verified(make, dtype, tmp_path):
    pruner = DSAPruner(make().to(dtype))
    pruner.prune(tokens(), DSAConfig(0.6, "wanda", "uniform", values="int4"))
    assert is_on_grid(pruner.model, 4) and pruner.verify().holds
    pruner.save_pretrained(tmp_path / "small", compressed=True)
    pruner.save_pretrained(tmp_path / "bitmask", encoding="bitmask")
    headers = packed_headers(tmp_path / "small" / find_shards(tmp_path / "small").files[0])
    whole = [name for name, header in headers.items() if isinstance(header, WholeHeader)]
    assert len(whole) >= 8 and all(headers[name].bits == 4 for name in whole)
    before = state(pruner.model)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=dtype), before)
    again = DSAPruner.from_pretrained(tmp_path / "small")
    assert same_state(again.model, before) and again.verify().holds
    sizes = convert(tmp_path / "bitmask", tmp_path / "again", "quantised")
    assert sizes[1] < sizes[0] and same_state(DSAPruner.from_pretrained(tmp_path / "again").model, before)
    convert(tmp_path / "small", tmp_path / "dense", "dense")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype), before)


def test_verify_knows_what_lies_on_no_grid(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform", values="int8"))
    weight = pruner.model.model.layers[1].mlp.up_proj.weight
    weight.data[weight != 0] *= 1 + torch.rand(int((weight != 0).sum()))
    (problem,) = pruner.verify().problems
    assert problem == "model.layers.1.mlp.up_proj.weight does not lie on a grid of 8 bits"


def test_what_lies_on_no_grid_is_not_rounded_to_be_stored(tmp_path, caplog):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6, "wanda", "uniform"))
    pruner.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="lies on a grid of 8 or 4 bits.*values='int8'"):
        convert(tmp_path / "dense", tmp_path / "small", "quantised")
    assert not (tmp_path / "small").exists()
    pruner.save_pretrained(tmp_path / "small", encoding="quantised")
    assert "No matrix lies on a grid" in caplog.text
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert said["encoding"] == "bitmask_whole"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("apart", [False, True])
def test_training_stays_on_the_grid_and_comes_nearer(make, apart):
    model = make()
    how = ReconstructConfig(16, 3e-3, apart=apart)
    report = prune(
        model,
        tokens(32),
        DSAConfig(0.5, "wanda", "uniform", reconstruct=how, values=ValuesConfig("int4", feedback=False)),
    )
    assert is_on_grid(model, 4) and report.sparsity == 0.5
    assert all(one.after <= one.before for one in report.reconstruction.values())
    assert any(one.after < one.before for one in report.reconstruction.values())


def test_a_pruned_model_is_put_on_a_grid_with_its_own_allocation(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6, "wanda", "owl"))
    pruner.save_pretrained(tmp_path)
    zeros = {name: value == 0 for name, value in state(pruner.model).items()}
    other = DSAPruner.from_pretrained(tmp_path)
    other.prune(tokens(), DSAConfig(0.6, "magnitude", str(tmp_path), values="int4"))
    assert is_on_grid(other.model, 4) and other.verify().holds
    assert all(torch.equal(value == 0, zeros[name]) for name, value in state(other.model).items())


@pytest.mark.parametrize(
    "values,match",
    [
        ({"name": "int2"}, "int8' or 'int4'"),
        ({"name": "int4", "group": 48}, "group=48"),
        ({"name": "int4", "scales": "best"}, "absmax"),
        ({"group": 32}, "without values none does"),
        ({"feedback": False}, "without values none does"),
    ],
)
def test_what_cannot_be_is_refused(values, match):
    with pytest.raises(ValueError, match=match):
        DSAConfig(0.5, values=values)
    assert DSAConfig(0.5).values == ValuesConfig() and DSAConfig(0.5, values="int4").values.bits == 4
    config = DSAConfig(0.5, values=ValuesConfig("int8", 0, "absmax", False))
    assert DSAConfig.from_dict(config.to_dict()) == config


@needs_compressed_loading
def test_what_is_stored_on_a_grid_runs_packed(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6, "wanda", "uniform", values="int4"))
    with torch.no_grad():
        expected = pruner.model(tokens()).logits
    pruner.save_pretrained(tmp_path / "small", encoding="packed")
    convert(tmp_path / "small", tmp_path / "quantised", "quantised")
    convert(tmp_path / "quantised", tmp_path / "packed", "packed")
    for folder in ("small", "packed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert model.model.layers[0].mlp.up_proj.values.dtype == torch.uint8
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        assert DSAPruner.from_pretrained(tmp_path / folder).verify().holds
