"""allocation="auto": named allocations tried for real, on windows that do not calibrate."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from optimum_dsa import ALLOCATIONS, Allocation, DataConfig, DSAConfig, DSAPruner, allocate, find_architecture, prune
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.search import ready_made
from optimum_dsa.search.ready_made import settle
from optimum_dsa.search.search import search
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import page as model_page

from ..tiny import same_state, state, tiny_llama, tokens


AUTO = DSAConfig(0.6, "sparsegpt", "auto")


@pytest.fixture(scope="module")
def settled():
    model = tiny_llama()
    before = state(model)
    found = settle(model, tokens(20, 16), AUTO)
    assert same_state(model, before)
    return found


def test_all_named_allocations_are_compared_and_the_best_is_taken(settled):
    assert settled.compared.keys() <= set(ALLOCATIONS)
    assert {"uniform", "owl", "atp"} <= settled.compared.keys() and len(settled.compared) > 6
    assert list(settled.compared.values()) == sorted(settled.compared.values())
    assert settled.config.allocation == next(iter(settled.compared))
    assert settled.config == DSAConfig(0.6, "sparsegpt", settled.config.allocation)
    assert settled.compared_on == {"windows": 4, "length": 16}


@pytest.mark.parametrize("settings", [{}, {"pattern": "row"}, {"pattern": "mixed:8"}, {"method": "sparsegpt"}])
def test_of_a_sparse_model_what_is_compared_is_what_prune_would_make(settings, monkeypatch):
    tried = {}

    def noted(*args, **options):
        result = search(*args, **options, named=("atp", "dlp"))
        for trial in result.trace.trials:
            if trial.request.kind == "sequential":
                tried[trial.request.candidate.function] = trial.counts
        return result

    monkeypatch.setattr(ready_made, "search", noted)
    model, text = tiny_llama(), tokens(20, 16)
    with torch.no_grad():  # far more than their share in one matrix, and in a part of another
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[2].self_attn.q_proj.weight[::2] = 0
    before = state(model)
    config = DSAConfig(**{"sparsity": 0.5, "method": "wanda", "allocation": "auto", **settings})
    settle(model, text, config)
    assert same_state(model, before) and len(tried) > 1
    for name, counts in tried.items():
        pruned = copy.deepcopy(model)
        prune(pruned, text[:16], replace(config, allocation=name))
        weights = find_architecture(pruned).weights
        zeros = [int((weight.tensor(pruned) == 0).sum()) for weight in weights]
        if config.resolved.pattern.in_groups:  # of which more goes than their N where more was zero before
            full = {weight.name for weight in find_architecture(model).weights if (weight.tensor(model) == 0).any()}
            kept = [at for at, weight in enumerate(weights) if weight.name not in full]
            assert len(kept) > 10
            zeros, counts = ([each[at] for at in kept] for each in (zeros, counts))
        assert zeros == list(counts), name


def test_windows_that_decide_do_not_calibrate(monkeypatch):
    seen = {}

    def noted(model, calibration, validation, *args, **options):
        seen.update(calibration=calibration.inputs["input_ids"], validation=validation)
        return search(model, calibration, validation, *args, **options)

    monkeypatch.setattr(ready_made, "search", noted)
    text = tokens(20, 16)
    found = settle(tiny_llama(), text, DSAConfig(0.6, "magnitude", "auto"))
    assert torch.equal(torch.cat([seen["calibration"], seen["validation"]]), text)
    assert len(seen["validation"]) == 4
    assert torch.equal(found.calibration.inputs["input_ids"], text[:16])


def test_what_is_saved_holds_a_name_and_what_was_compared(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "optimum_dsa")
    monkeypatch.setattr(ready_made, "search", partial(search, named=("owl", "atp")))  # two of them are enough to say
    pruner = DSAPruner.from_pretrained(demo_model())
    config = DSAConfig(0.6, "magnitude", "auto", data=DataConfig(num_samples=4, sequence_length=32))
    report = pruner.prune(demo_texts("calibration")[:2], config)
    assert report.config.allocation in ALLOCATIONS and report.allocation.name == report.config.allocation
    assert "allocations compared by their validation loss after the prune: " in str(report)
    best, second = list(report.compared)[:2]
    lead = f"{best} is {1 - report.compared[best] / report.compared[second]:.1%} below {second}"
    on = "judged on 1 windows of 32 tokens that do not calibrate"
    assert "1 windows of 32 tokens that do not calibrate" in str(report) and lead in str(report)
    assert f"allocations is pruned with, and {on}" in caplog.text and lead in caplog.text
    pruner.save_pretrained(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "dsa_config.json").read_text())
    assert data["config"]["allocation"] == report.config.allocation == next(iter(data["compared"]))
    assert '"auto"' not in json.dumps(data)
    assert data["compared_on"] == {"windows": 1, "length": 32}
    page = model_page([Outcome.read(tmp_path / "out")], {})
    assert "Allocations compared" in page and lead in page
    again = DSAPruner.from_pretrained(tmp_path / "out")
    assert again.report.compared == report.compared and again.verify().holds
    assert Allocation.load(tmp_path / "out") == report.allocation


def test_the_model_is_that_of_the_name_that_was_chosen(settled):
    chosen, named = DSAPruner(tiny_llama()), tiny_llama()
    text = tokens(20, 16)
    report = chosen.prune(text, AUTO)
    assert report.config == settled.config
    prune(named, text[:16], settled.config)
    assert same_state(chosen.model, state(named))


@pytest.mark.parametrize("function", [prune, allocate])
def test_without_the_facade_the_way_out_is_named(function):
    with pytest.raises(ValueError, match="which DSAPruner.prune does; .* or name one of dsa, owl"):
        function(tiny_llama(), tokens(), AUTO)


def test_what_is_yet_to_be_chosen_is_never_saved(tmp_path):
    with pytest.raises(ValueError, match="DSAPruner.prune"):
        AUTO.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes,named", [({"spread": 0.1}, "spread=0.1"), ({"granularity": "matrix"}, "granularity='matrix'")]
)
def test_what_named_allocations_do_not_have_is_refused(changes, named):
    with pytest.raises(ValueError, match=f"leave out {named}, or name"):
        DSAConfig(0.6, allocation="auto", **changes)


@pytest.mark.parametrize(
    "source,match",
    [(None, "compares prunes on text"), (tokens(1, 16), "two at least"), ({"mask": tokens(4, 16)}, "input_ids")],
)
def test_without_text_to_judge_by_it_is_refused(source, match):
    with pytest.raises(ValueError, match=match):
        settle(tiny_llama(), source, AUTO)
