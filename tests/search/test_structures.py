"""A search over the widths of units of structures: the same engine, budgets, traces and finalists."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa import Calibration, DSAPruner
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.allocation import ALLOCATIONS, measured_in_one_walk
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.slicing import cut_out
from optimum_dsa.pruning.structured.widths import dense
from optimum_dsa.pruning.structured.widths.latency import _Stopwatch
from optimum_dsa.pruning.structured.widths.shares import shares
from optimum_dsa.search.realise.structures import StructureWidths
from optimum_dsa.search.search import search
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.structures import StructureResolver

from ..pruning.structured.families import deeper
from ..pruning.structured.widths.test_latency import steady  # noqa: F401 - a fixture
from ..tiny import same_state, state, tiny_llama, tokens
from .searching import outcome


BOTH = DSAStructuredConfig(0.3, ("ffn", "kv_group"), "obs", layout="per_layer")
CALIBRATION, VALIDATION = Calibration({"input_ids": tokens()}, "x"), tokens(8, 16, seed=5)


def llama():
    """With weights that matter, or every allocation would lose alike."""
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def run(strategy="level_switch", budget="6k tokens", model=None, config=BOTH, **options):
    return search(
        model or llama(), CALIBRATION, VALIDATION, config, strategy=strategy, budget=budget, finalists=2, **options
    )


@pytest.mark.parametrize("strategy", ["random", "evolution", "level_switch", "descent", "ramp", "auto"])
def test_what_is_found_is_no_worse_than_uniform_and_is_pruned(strategy):
    model = llama()
    before = state(model)
    result = run(strategy, model=model)
    assert same_state(model, before) and not any(parameter.grad is not None for parameter in model.parameters())
    losses = [row.loss for row in result.finalists]
    assert losses == sorted(losses) and "uniform" in {str(row.candidate) for row in result.finalists}
    assert 0 < result.budget.spent_tokens <= 6000
    assert list(result.best.sizes.values()) == [2, 48] * 3
    report = prune_structures(model, CALIBRATION, replace(BOTH, allocation=result.best))
    assert report.allocation.counts() == result.best.counts()
    assert 0.3 * report.prunable - max(report.costs.values()) < report.removed <= 0.3 * report.prunable


def test_names_of_structures_are_tried_and_error_curves_held_against_the_prune():
    pytest.importorskip("scipy")
    result = run("named", config=replace(BOTH, importance="taylor"))
    tried = {trial.request.candidate.function for trial in result.trace.trials}
    assert {"uniform", "stability", "milp", "global", "owl"} <= tried
    assert any(note.startswith("rank correlation of error curves with the prune: ") for note in result.notes)
    assert not run("random").notes


def test_more_tokens_find_less_loss_than_all_names():
    named, switched = run("named"), run("level_switch", "40k tokens")
    assert switched.finalists[0].loss < named.finalists[0].loss


def test_a_search_that_goes_on_ends_as_one_that_was_never_interrupted(tmp_path):
    whole = run("evolution", folder=tmp_path / "a")
    lines = (tmp_path / "a/trace.jsonl").read_text().splitlines()
    assert len(lines) > 8
    (tmp_path / "b").mkdir()
    (tmp_path / "b/trace.jsonl").write_text("\n".join(lines[:8]) + "\n")
    again = run("evolution", folder=tmp_path / "b", resume=True)
    assert outcome(again) == outcome(whole)
    config = replace(BOTH, allocation=str(tmp_path / "a"))
    assert prune_structures(llama(), CALIBRATION, config).allocation.counts() == whole.best.counts()


def test_a_search_by_time_that_goes_on_has_the_times_that_it_began_with(tmp_path, steady, monkeypatch):  # noqa: F811
    config = replace(BOTH, cost="latency", update="none", importance="magnitude")
    whole = run("evolution", config=config, folder=tmp_path / "a")
    lines = (tmp_path / "a/trace.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/latency.json").write_bytes((tmp_path / "a/latency.json").read_bytes())
    with pytest.raises(FileExistsError, match="latency.json is of another search; resume it, or choose another"):
        run("evolution", config=config, folder=tmp_path / "b")
    assert not (tmp_path / "b/trace.jsonl").exists()
    (tmp_path / "b/trace.jsonl").write_text("\n".join(lines[:8]) + "\n")
    monkeypatch.setattr(_Stopwatch, "_seconds", None)  # nothing is timed
    again = run("evolution", config=config, folder=tmp_path / "b", resume=True)
    assert outcome(again) == outcome(whole)


def test_finalists_lose_what_the_pruned_model_loses():
    result = run("named", config=replace(BOTH, targets="dense", residual=True))
    best, model = result.finalists[0], llama()
    dense = model(VALIDATION).logits.log_softmax(-1)
    prune_structures(model, CALIBRATION, replace(result.config, allocation=best.allocation))
    with torch.no_grad():
        lost = (dense.exp() * (dense - model(VALIDATION).logits.log_softmax(-1))).sum(-1).mean()
    assert best.loss == pytest.approx(float(lost), rel=2e-2)


EXPERTS = replace(BOTH, structures=("kv_group", "expert"), importance="wanda_sp")


def mixture():
    """With experts that matter, and other ones in every block."""
    model = deeper("Qwen3Moe", 3)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.down_proj.data *= 4 / (number + 1)
    return model


@pytest.mark.parametrize("strategy", ["named", "level_switch"])
def test_experts_are_searched_for_beside_heads(strategy):
    model = mixture()
    before = state(model)
    result = run(strategy, "8k tokens", model, EXPERTS)
    assert same_state(model, before) and "forward" not in vars(model.model.layers[0].mlp.gate)
    tried = {trial.request.candidate.function for trial in result.trace.trials}
    assert strategy != "named" or {"uniform", "stability", "owl", "atp"} <= tried
    errors = {trial.error for trial in result.trace.trials} - {None, "the budget has no room for it"}
    assert not tried & {"milp", "er"} and all(error.startswith("allocation='global' makes one") for error in errors)
    best, dense = result.finalists[0], model(VALIDATION).logits.log_softmax(-1)
    assert best.loss <= min(row.loss for row in result.finalists if str(row.candidate) == "uniform")
    report = prune_structures(model, CALIBRATION, replace(result.config, allocation=result.best))
    assert report.allocation.counts() == result.best.counts()
    assert any(count for unit, count in result.best.counts().items() if unit.endswith(":expert"))
    with torch.no_grad():
        lost = (dense.exp() * (dense - model(VALIDATION).logits.log_softmax(-1))).sum(-1).mean()
    assert best.loss == pytest.approx(float(lost), rel=2e-2)


def test_a_model_as_if_experts_were_gone_is_the_one_without_them():
    realised, model = StructureWidths(mixture(), None, CALIBRATION, replace(EXPERTS, update="none")), mixture()
    numbers = {unit: 3 if unit.endswith(":expert") and "layers.1" in unit else 0 for unit in realised.units}
    counts = {unit: number * realised.cost[unit] for unit, number in numbers.items()}
    whole = realised.model(VALIDATION).logits
    for unit, number in numbers.items():
        if number:
            order = dense_order(realised, unit)
            cut_out(model, realised.units[unit], order[:number])
    with torch.no_grad():
        for context in (realised.at(counts), realised.pruned(counts)):
            with context:
                torch.testing.assert_close(realised.model(VALIDATION).logits, model(VALIDATION).logits)
        realised.move_anchor(counts)  # what is gone there goes first
        with realised.at(counts):
            torch.testing.assert_close(realised.model(VALIDATION).logits, model(VALIDATION).logits)
    assert torch.equal(realised.model(VALIDATION).logits, whole)


def dense_order(realised, unit):
    return realised.dense.importances[unit].argsort(stable=True)


def test_named_allocations_that_look_at_matrices_look_in_one_walk(monkeypatch):
    names, walks = [name for name in measured_in_one_walk() if ALLOCATIONS[name].reads != "scores"], []
    assert {"alphapruning", "er"} <= set(names)
    realised = StructureWidths(llama(), None, CALIBRATION, BOTH)
    alone = {name: shares(realised.dense.under(replace(BOTH, allocation=name))) for name in names}
    realised.dense.known.clear()
    monkeypatch.setattr(
        dense, "walk_blocks", lambda *args, **options: walks.append(1) or walk_blocks(*args, **options)
    )
    resolver = StructureResolver(realised, BOTH, [*names, "stability", "owl"])
    assert {name: resolver._propose(name, None) for name in names} == alone and len(walks) == 1


def test_counts_between_structures_become_whole_ones_within_the_budget():
    realised = StructureWidths(llama(), None, CALIBRATION, BOTH)
    resolver = StructureResolver(realised, BOTH)
    uniform = resolver.counts(Candidate())
    moved = list(uniform)
    moved[1], moved[3] = moved[1] + 50, moved[3] - 50
    for counts in (uniform, tuple(moved)):
        found = resolver.removed(Candidate("x", counts=counts))
        assert sum(found) <= realised.dense.asked and not any(
            number % cost for number, cost in zip(found, realised.cost.values())
        )
        assert resolver.allocation(counts, "x").counts() == resolver.allocation(found, "x").counts()
    assert resolver.removed(Candidate("x", counts=uniform)) == uniform
    assert resolver.removed(Candidate("x", counts=(0,) * 6)) == (0,) * 6
    kinds = resolver.counts(Candidate(offsets=(("ffn", -0.2), ("kv_group", 0.4))))
    assert kinds[1] < uniform[1] and kinds[0] > uniform[0] == 0


@pytest.mark.parametrize(
    "changes, options, said",
    [
        ({"layout": "uniform"}, {}, "A search gives blocks widths of their own, and layout='uniform' has one for all"),
        (
            {"structures": ("block",)},
            {},
            "A search is of channels, heads and experts .*, and 'block' is to go; leave it",
        ),
        (
            {"structures": ("expert",), "layout": "padded"},
            {},
            "gives blocks other numbers of experts, and experts leave no",
        ),
        ({"learner": "projected_gates"}, {}, "and learner='projected_gates'; leave it out"),
        ({"sparsity": 0.0, "max_loss": "5%"}, {}, "A search divides a share that is known, and max_loss='5%'"),
        ({}, {"strategy": "curves"}, "strategy 'curves' is of single weights; for structures use"),
        ({}, {"strategy": "exhaustive"}, "strategy 'exhaustive' is of single weights"),
        ({}, {"realisation": "masks"}, "realisation='masks' is of single weights"),
    ],
)
def test_what_is_of_single_weights_is_refused(changes, options, said):
    with pytest.raises(ValueError, match=said):
        run(config=replace(BOTH, **changes), **options)


def test_no_other_configuration_is_searched_for():
    with pytest.raises(TypeError, match="A search is for a DSAConfig or a DSAStructuredConfig, got dict"):
        run(config={})


def test_the_facade_searches(tmp_path):
    pruner = DSAPruner(llama())
    result = pruner.search(tokens(40), BOTH, "named", "2k tokens", validation=VALIDATION, output=tmp_path / "found")
    assert (tmp_path / "found/allocation.json").exists() and result.best.counts()
