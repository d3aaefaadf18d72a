import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate.tracking import GeneralTracker
from transformers import LlamaForCausalLM

from optimum_dsa import (
    UPDATES,
    Calibration,
    DataConfig,
    DSAConfig,
    DSAPruner,
    allocate,
    perplexity,
    prune,
)
from optimum_dsa.pruning.allocation import measured_in_one_walk
from optimum_dsa.search.finals import FinalRound
from optimum_dsa.search.problem import Budget
from optimum_dsa.search.realise import realise
from optimum_dsa.search.resolver import Resolver
from optimum_dsa.search.result import rank_correlation, robustness_table
from optimum_dsa.search.search import _problem, search
from optimum_dsa.search.space import Candidate, SearchSpace
from optimum_dsa.search.strategies import STRATEGIES
from optimum_dsa.search.trace import NO_ROOM, Request, SearchTrace

from ..tiny import same_state, state, tiny_llama, tokens
from .searching import CALIBRATION, CONFIG, VALIDATION, outcome, run


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_stays_within_its_budget_and_never_loses_to_uniform(strategy):
    model = tiny_llama()
    before = state(model)
    result = run(strategy, "8k tokens", model)
    assert same_state(model, before)
    losses = [row.loss for row in result.finalists]
    assert losses == sorted(losses)
    uniform = allocate(model, CALIBRATION, DSAConfig(0.7, allocation="uniform")).counts()
    assert uniform in [row.allocation.counts() for row in result.finalists]
    assert 0 < result.budget.spent_tokens <= 8000
    report = prune(model, CALIBRATION, DSAConfig(0.7, allocation=result.best))
    total = sum(report.allocation.sizes.values())
    assert report.removed == round(0.7 * total)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("limit", [1_000, 2_500, 20_000])
def test_a_budget_of_tokens_is_kept_whatever_the_strategy(strategy, limit):
    result = run(strategy, f"{limit} tokens")
    spent = result.budget
    assert 0 < spent.spent_tokens <= limit
    assert spent.spent_tokens == sum(trial.tokens for trial in result.trace.trials)
    assert sum(t.tokens for t in result.trace.trials if t.request.kind == "sequential") <= spent.spent_tokens - (
        spent.strategy_tokens
    )
    refused = [trial for trial in result.trace.trials if trial.error == NO_ROOM]
    assert all(trial.tokens == 0 and trial.loss is None for trial in refused)


@pytest.mark.parametrize("limit", [1_000, 2_500])
@pytest.mark.parametrize("strategy", ["auto", "curves", "descent", "evolution", "level_switch", "random"])
def test_little_of_a_small_budget_is_left_by_what_could_go_on(strategy, limit):
    """Less than a seventh: a window for each finalist, or a finalist for whom there is no other allocation."""
    result = run(strategy, f"{limit} tokens")
    assert limit * 6 / 7 <= result.budget.spent_tokens <= limit
    assert f"the budget was {limit:,} tokens, {result.budget.share:.0%} of it used" in str(result)
    assert result.to_dict()["budget_used"] == round(result.budget.spent_tokens / limit, 4)


@pytest.mark.parametrize("strategy", ["named", "auto", "level_switch"])
def test_a_budget_of_evaluations_is_kept(strategy):
    assert 0 < run(strategy, "17 evaluations").budget.spent_evaluations <= 17


def test_a_budget_that_holds_nothing_is_exceeded_by_the_smallest_last_round_alone_and_says_so():
    result = run("auto", "10 tokens")
    assert result.budget.spent_tokens == 16  # uniform on a window after the prune
    assert "the budget had room for 1 of 8 validation windows after the prune" in str(result)
    assert "the budget was 10 tokens, and the finalists came on top" in str(result)


@pytest.mark.parametrize("lines", [2, 5, 9, 14, -12, -8, -7, -6, -2])
def test_a_search_at_the_end_of_its_budget_goes_on_to_the_same_end(lines, tmp_path):
    whole = run("auto", "1500 tokens", folder=tmp_path / "s")
    assert any(trial.error == NO_ROOM for trial in whole.trace.trials)
    path = tmp_path / "s" / "trace.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    assert outcome(run("auto", "1500 tokens", folder=tmp_path / "s", resume=True)) == outcome(whole)


def perplexity_after(config):
    """What `prune` itself makes of a config: perplexity on the validation windows, and the share removed."""
    model = tiny_llama()
    report = prune(model, CALIBRATION, config)
    return perplexity(model, VALIDATION), report.removed / sum(report.allocation.sizes.values())


@pytest.mark.parametrize("pattern", ["mixed:4", "mixed:8", "group:8"])
@pytest.mark.parametrize("strategy", ["named", "auto"])
def test_with_every_pattern_a_finalist_is_what_prune_gives(strategy, pattern):
    config = DSAConfig(0.55, pattern=pattern)
    result = run(strategy, "8k tokens", config=config, named=["owl", "atp", "dsa"])
    for row in result.finalists:
        found, removed = perplexity_after(replace(config, allocation=row.allocation))
        assert row.perplexity == pytest.approx(found, rel=1e-5) and row.removed.overall == pytest.approx(removed)
        if row.candidate.counts is None and row.candidate.spread is None and not row.candidate.offsets:
            found, _ = perplexity_after(replace(config, allocation=row.candidate.function))
            assert row.perplexity == pytest.approx(found, rel=1e-5)  # also under the name that it has
    if pattern.startswith("mixed"):
        width = int(pattern.removeprefix("mixed:"))
        sizes = list(realise(tiny_llama(), CALIBRATION, config).sizes.values())
        judged = [trial.counts for trial in result.trace.trials if trial.counts is not None]
        assert all(count * width % size == 0 for counts in judged for count, size in zip(counts, sizes))


def test_a_pattern_without_anything_to_allocate_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("optimum_dsa.search.search.check_apart", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr("optimum_dsa.pruner.load_calibration", lambda *_: pytest.fail("text was read"))
    config = DSAConfig(0.5, pattern="2:4", allocation="uniform")
    with pytest.raises(ValueError, match="use pattern='mixed:4'"):
        run(config=config)
    with pytest.raises(ValueError, match="use pattern='mixed:4'"):
        DSAPruner(tiny_llama()).search("text.txt", config)


@pytest.mark.parametrize("loaded", [False, True], ids=["in memory", "loaded"])
def test_a_model_that_is_pruned_already_is_refused_before_any_text_is_read(loaded, tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    if loaded:
        pruner.save_pretrained(tmp_path / "pruned")
        pruner = DSAPruner.from_pretrained(tmp_path / "pruned")
    with pytest.raises(ValueError, match="is pruned already: 50.00% of its prunable weights are zero, and a search"):
        pruner.search("missing.txt", CONFIG, output=tmp_path / "found")
    assert not (tmp_path / "found").exists()


def test_validation_that_is_calibration_is_refused():
    with pytest.raises(ValueError, match="6 of 6 validation windows are calibration windows"):
        search(tiny_llama(), CALIBRATION, CALIBRATION.inputs["input_ids"], CONFIG)


def test_the_same_seed_gives_the_same_search():
    assert outcome(run()) == outcome(run())


def test_an_impossible_candidate_is_a_trial_with_an_error(tmp_path):
    def strategy(problem):
        trials = yield [Request("loss", Candidate("er", spread=None), 0, 2), Request("loss", Candidate(), 0, 2)]
        assert [trial.error is None for trial in trials] == [False, True]
        assert trials[0].loss is None and trials[0].tokens == 0 and "cannot be met" in trials[0].error
        return [Candidate("er"), Candidate()]

    STRATEGIES.add("broken", strategy)
    original = Resolver.counts

    def counts(self, candidate):
        if candidate.function == "er":
            raise ValueError("the budget cannot be met")
        return original(self, candidate)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Resolver, "counts", counts)
            result = run("broken", folder=tmp_path / "s")
    finally:
        del STRATEGIES["broken"]
    assert len(result.finalists) == 1
    assert SearchTrace.load(tmp_path / "s" / "trace.jsonl").trials[0].error == "the budget cannot be met"


@pytest.mark.parametrize("name", sorted({*measured_in_one_walk()} - {"global"}))
def test_a_named_allocator_resolves_to_what_allocate_gives(name):
    model = tiny_llama()
    resolver = Resolver(model, realise(model, CALIBRATION, CONFIG), CALIBRATION, CONFIG)
    exact = allocate(model, CALIBRATION, DSAConfig(0.7, allocation=name))
    found = resolver.allocation(resolver.counts(Candidate(name)), name)
    assert sum(found.counts().values()) == sum(exact.counts().values())
    if found.sizes.keys() == exact.sizes.keys():
        assert found.sparsity == exact.sparsity


def test_samples_children_and_mutants_are_valid_and_survive_json():
    space, rng = (
        SearchSpace(kinds=("self_attn.q_proj", "mlp.up_proj"), granularities=("block", "matrix")),
        random.Random(0),
    )
    model = tiny_llama()
    resolver = Resolver(model, realise(model, CALIBRATION, CONFIG), CALIBRATION, CONFIG)
    population = [space.sample(rng) for _ in range(10)] + [Candidate(name) for name in measured_in_one_walk()]
    for _ in range(100):
        child = space.mutate(space.cross(rng.choice(population), rng.choice(population), rng), rng)
        assert Candidate.from_dict(json.loads(json.dumps(child.to_dict()))) == child
        if not any(word in child.function for word in ("rank", "slogdet", "determinant")):
            assert sum(resolver.counts(child)) == round(0.7 * sum(resolver.sizes.values()))
        population.append(child)
    assert len(set(population)) > 60


def test_an_operation_that_a_user_registers_joins_the_space():
    from optimum_dsa.pruning.allocation import REDUCTION

    REDUCTION.add("loudest", lambda x: x.max())
    try:
        assert "loudest" in SearchSpace().reduction
    finally:
        del REDUCTION["loudest"]
    assert "loudest" not in SearchSpace().reduction


@pytest.mark.contract
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_model_on_disk_is_searched_as_one_in_memory(method, tmp_path):
    config = DSAConfig(0.7, method)
    tiny_llama().save_pretrained(tmp_path / "model")
    expected = run("auto", model=LlamaForCausalLM.from_pretrained(tmp_path / "model"), config=config)
    offloaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "weights"
    )
    found = run("auto", model=offloaded, config=config)
    assert [row.allocation for row in found.finalists] == [row.allocation for row in expected.finalists]
    assert [row.loss for row in found.finalists] == pytest.approx([row.loss for row in expected.finalists])


def test_finalists_say_how_well_one_shot_masks_would_have_ranked_them():
    result = run("named", "20k tokens")
    assert all(row.proxy > 0 and row.perplexity > 1 for row in result.finalists)
    assert -1 <= result.proxy_correlation <= 1
    assert f"{result.proxy_correlation:.2f}" in str(result)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [5, 3, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [0, 0, 9]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_several_seeds_are_compared_in_a_table():
    results = [run("named", config=DSAConfig(0.7, data=DataConfig(seed=seed))) for seed in (3, 4)]
    table = robustness_table(results).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["3", "4", "mean", "±"]
    losses = [result.finalists[0].loss for result in results]
    assert float(table[3].split()[1]) == pytest.approx(sum(losses) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "budget,finalists,until,rungs",
    [
        (Budget(tokens=40_000), 3, 1 - 4 * (8 + 8) * 16 / 40_000, (8,)),  # each is looked at twice, on all windows
        (Budget(tokens=40_000), 0, 1 - (8 + 8) * 16 / 40_000, (8,)),
        (Budget(tokens=1_200), 4, 0.5, (1, 4)),  # a quarter of it is not to be spent by one generation
        (Budget(evaluations=100), 4, 0.9, (8,)),
        (Budget(seconds=60.0), 4, 0.9, (8,)),
    ],
)
def test_a_strategy_leaves_what_the_finalists_will_take(budget, finalists, until, rungs):
    resolver = SimpleNamespace(kinds={"a": "mlp.up_proj", "b": "mlp.up_proj"})
    problem, final = _problem(resolver, VALIDATION, budget, ("owl",), CONFIG, None, finalists, "auto")
    assert final == FinalRound(finalists, 8, rungs[-1])
    assert problem.until == pytest.approx(until)
    assert (problem.windows, problem.length, problem.rungs) == (8, 16, rungs)
    assert problem.space.kinds == ("mlp.up_proj",) and problem.budget is budget


@pytest.mark.parametrize("strategy,proxies,met", [("named", 8, True), ("descent", 8, False), ("curves", 0, True)])
def test_room_is_kept_for_proxies_where_races_do_not_meet_them(strategy, proxies, met):
    resolver = SimpleNamespace(kinds={})
    problem, final = _problem(resolver, VALIDATION, Budget(tokens=40_000), (), CONFIG, None, 4, strategy)
    assert final == FinalRound(4, 8, proxies, met)
    assert problem.until == pytest.approx(1 - 5 * (8 + 8 * (not met)) * 16 / 40_000)


def test_offsets_per_kind_are_searched_where_kinds_are_few():
    for number, known in ((16, 16), (17, 0)):
        resolver = SimpleNamespace(kinds={f"{block}.k{kind}": f"k{kind}" for block in "ab" for kind in range(number)})
        problem, _ = _problem(resolver, VALIDATION, Budget(tokens=10**6), (), CONFIG, None, 4, "auto")
        assert len(problem.space.kinds) == known
        problem, _ = _problem(resolver, VALIDATION, Budget(), (), CONFIG, SearchSpace(spreads=(0, 1)), 4, "auto")
        assert problem.space.spreads == (0, 1)


def test_a_seed_is_the_source_of_all_draws():
    resolver = SimpleNamespace(kinds={})
    problems = [
        _problem(resolver, VALIDATION, Budget(), (), DSAConfig(0.7, data=DataConfig(seed=3)), None, 4, "auto")[0]
        for _ in "ab"
    ]
    draws = [problem.rng.random() for problem in problems]
    assert draws == [random.Random(3).random()] * 2


@pytest.mark.parametrize("finalists", [1, 2])
def test_as_many_finalists_as_asked_for_and_uniform_besides(finalists):
    result = run("named", "20k tokens", finalists=finalists, named=["owl", "atp", "dlp"])
    functions = [row.candidate.function for row in result.finalists]
    assert len(functions) in (finalists, finalists + 1) and "uniform" in functions
    tried = {trial.request.candidate.function for trial in result.trace.trials if trial.request.kind == "loss"}
    assert tried == {"uniform", "owl", "atp", "dlp"}
    final = [trial for trial in result.trace.trials if trial.request.kind == "sequential"]
    assert len(final) == len(functions) and {trial.request.rows for trial in final} == {range(8)}
    by_name = {str(trial.request.candidate): trial for trial in final}
    for row in result.finalists:
        assert (row.loss, row.perplexity) == (by_name[str(row.candidate)].loss, by_name[str(row.candidate)].perplexity)
    dense = next(trial for trial in result.trace.trials if trial.request.candidate.function == "dense")
    assert dense.request.kind == "anchor" and not any(dense.counts)
    assert result.baselines.keys() == {"uniform", "owl"} and result.baselines["owl"].name == "owl"


def test_names_are_not_measured_for_a_strategy_that_tries_none(monkeypatch):
    seen = []
    original = Resolver.__init__

    def init(self, model, architecture, calibration, config, named=None, *rest):
        seen.append(tuple(named))
        original(self, model, architecture, calibration, config, named, *rest)

    monkeypatch.setattr(Resolver, "__init__", init)
    run("random", "1k tokens")
    run("named", "1k tokens")
    run("named", "1k tokens", named=["uniform", "owl"])
    assert seen == [(), tuple(name for name in measured_in_one_walk() if name != "uniform"), ("owl",)]


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, main_process_only = "recorder", False, True

    def __init__(self):
        self.logged, self.finished = [], False
        super().__init__()

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_trials_are_reported_as_they_come():
    recorder = Recorder()
    result = run("named", report_to=recorder)
    losses = [trial.loss for trial in result.trace.trials if trial.request.kind == "loss"]
    assert [values["loss"] for _, values in recorder.logged] == losses
    best = [values["best"] for _, values in recorder.logged]
    assert best == sorted(best, reverse=True) and recorder.finished
    assert recorder.configuration["strategy"] == "named"


def test_a_tracker_that_is_not_there_is_an_error_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="Cannot report to 'swanlab'"):
        run("named", report_to="swanlab", folder=tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("strategy", ["evolution", "random", "level_switch", "auto"])
def test_a_search_with_nothing_left_to_try_ends(strategy):
    """At 0 % every candidate is the same."""
    calibration = Calibration({"input_ids": tokens()}, "x")
    result = search(
        tiny_llama(), calibration, tokens(8, 16, seed=5), DSAConfig(0.0), strategy=strategy, budget="1M tokens"
    )
    assert result.budget.share < 1
    assert result.finalists[0].loss == pytest.approx(0, abs=1e-3)


def test_what_an_update_chooses_is_what_is_searched_for():
    """An update that is registered may choose; then the metric only says where a search begins."""

    def smallest(weight, statistics, choice):
        gone = weight.abs().flatten().argsort()[: choice.count]
        return weight.flatten().index_fill(0, gone, 0).view_as(weight)

    UPDATES.add("smallest", smallest, chooses=True)
    try:
        config = DSAConfig(0.5, "wanda", pattern="matrix", update="smallest")
        calibration, validation = tokens(8, 16), tokens(8, 16, seed=9)
        found = DSAPruner(tiny_llama()).search(calibration, config, budget="3000 tokens", validation=validation)
        pruner = DSAPruner(tiny_llama())
        pruner.prune(calibration, replace(config, allocation=found.best))
    finally:
        del UPDATES["smallest"]
    assert found.finalists[0].perplexity == pytest.approx(perplexity(pruner.model, validation), rel=1e-4)
