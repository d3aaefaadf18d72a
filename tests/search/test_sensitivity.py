"""Error curves of all matrices."""

import json

import pytest
import torch

from optimum_dsa import (
    Calibration,
    DSAConfig,
    DSAPruner,
    Sensitivity,
    UpdateConfig,
    plot_sensitivity,
    sensitivity,
)

from ..tiny import same_state, state, tiny_llama, tokens


CALIBRATION = Calibration({"input_ids": tokens()}, "x")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_curves_rise_and_the_model_is_not_changed(method):
    model = tiny_llama()
    before = state(model)
    found = sensitivity(model, CALIBRATION, DSAConfig(0.5, method), (0.3, 0.6, 0.9))
    assert same_state(model, before)
    assert found.errors.keys() == found.sizes.keys() and len(found.errors) == 7 * len(model.model.layers)
    for errors in found.errors.values():
        assert 0 < errors[0] < errors[1] < errors[2] < 1


def test_targets_make_no_difference_where_nothing_is_pruned():
    whole = UpdateConfig(targets="dense", true_sequential=True, residual=True)
    plain, dense = (
        sensitivity(tiny_llama(), CALIBRATION, DSAConfig(0.5, "sparsegpt", update=update), (0.5,))
        for update in (UpdateConfig(), whole)
    )
    assert plain.errors == dense.errors


def test_an_update_loses_less_than_none():
    plain, updated = (
        sensitivity(tiny_llama(), CALIBRATION, DSAConfig(0.5, method), (0.6,)).errors
        for method in ("wanda", "wanda+refit")
    )
    assert all(updated[name][0] <= plain[name][0] * 1.02 for name in plain)


def test_blocks_and_kinds_are_means():
    sizes = {"layers.0.q.weight": 10, "layers.0.up.weight": 30, "layers.1.q.weight": 10, "layers.1.up.weight": 30}
    errors = dict(zip(sizes, [(0.1, 0.4), (0.2, 0.8), (0.3, 0.5), (0.4, 0.9)]))
    found = Sensitivity(DSAConfig(0.5), (0.5, 0.7), errors, sizes)
    assert found.by_block() == {
        "layers.0": pytest.approx([0.175, 0.7]), "layers.1": pytest.approx([0.375, 0.8])
    }  # fmt: skip
    assert found.by_kind() == {"q": pytest.approx([0.2, 0.45]), "up": pytest.approx([0.3, 0.85])}


def test_it_is_saved_and_drawn(tmp_path):
    found = sensitivity(tiny_llama(), None, DSAConfig(0.5, "magnitude"))
    found.save(tmp_path / "sensitivity.json")
    data = json.loads((tmp_path / "sensitivity.json").read_text())
    assert data["levels"] == list(found.levels) and data["method"]["method"] == "magnitude"
    assert data["matrices"] == {name: list(errors) for name, errors in found.errors.items()}
    blocks, kinds = plot_sensitivity(found).axes
    assert len(blocks.lines) == len(found.by_block()) and len(kinds.lines) == len(found.by_kind()) == 7
    assert blocks.lines[0].get_ydata().tolist() == pytest.approx(next(iter(found.by_block().values())))


@pytest.mark.parametrize("levels", [(), (0.0,), (0.5, 1.0)])
def test_levels_are_sparsities(levels):
    with pytest.raises(ValueError, match="in \\(0, 1\\)"):
        sensitivity(tiny_llama(), CALIBRATION, DSAConfig(0.5), levels)


def test_a_method_that_reads_inputs_needs_text():
    with pytest.raises(ValueError, match="needs calibration text"):
        sensitivity(tiny_llama(), None, DSAConfig(0.5))


def test_of_a_pattern_with_groups_whole_n_go():
    found = sensitivity(tiny_llama(), CALIBRATION, DSAConfig(0.5, pattern="mixed:4"), (0.5, 0.55))
    assert all(errors[0] == errors[1] for errors in found.errors.values())
    with pytest.raises(ValueError, match="mixed:4"):
        sensitivity(tiny_llama(), CALIBRATION, DSAConfig(0.5, pattern="2:4", allocation="uniform"))


def test_a_model_keeps_its_type_of_numbers():
    model = tiny_llama().to(torch.bfloat16)
    found = sensitivity(model, CALIBRATION, DSAConfig(0.5, "sparsegpt"), (0.5,))
    assert all(0 < errors[0] < 1 for errors in found.errors.values())


def test_a_model_that_is_pruned_already_has_no_curves():
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    message = "is pruned already: 60.00% of its prunable weights are zero, and .*Give it the dense model"
    with pytest.raises(ValueError, match=message):
        sensitivity(pruner.model, None, DSAConfig(0.5, "magnitude"))
    with pytest.raises(ValueError, match=message):  # before any text is read
        pruner.sensitivity("missing.txt", DSAConfig(0.5))
