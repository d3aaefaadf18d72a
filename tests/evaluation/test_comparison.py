import math
import re
from dataclasses import replace

import pytest
import torch

from optimum_dsa import Measurement, Protocol
from optimum_dsa.evaluation.comparison import comparison_table, paired_difference, shown_tasks
from optimum_dsa.evaluation.measurement import TaskProtocol


TEXT = Protocol("test.txt", 64, 32, "each", False, "float32", "0123456789abcdef")


def measured(name, losses, protocol=TEXT):
    """The measurement that these losses make."""
    value = math.exp(losses.mean())
    return Measurement(name, 0.5, 100, value, value * losses.std().item() / 8, protocol, tuple(losses.tolist()))


def noise(seed, scale):
    return scale * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_error_of_a_difference_is_that_of_resampled_windows():
    hard = 3 + noise(0, 0.5)
    first, other = hard, hard + 0.05 + noise(1, 0.02)
    difference, error = paired_difference(measured("first", first), measured("other", other))
    assert difference == pytest.approx(math.exp(other.mean()) - math.exp(first.mean()))
    drawn = torch.randint(64, (20_000, 64), generator=torch.Generator().manual_seed(2))
    resampled = other[drawn].mean(1).exp() - first[drawn].mean(1).exp()
    assert error == pytest.approx(resampled.std().item(), rel=0.05)
    # what is hard for both cancels: each alone is known ten times worse
    assert error < measured("other", other).perplexity_error / 10


def test_differences_are_between_rows_that_met_the_same_windows():
    first = measured("first", 3 + noise(0, 0.5))
    assert paired_difference(first, first) == (0, 0)
    for other in (
        measured("other", 3 + noise(0, 0.5), replace(TEXT, fingerprint="another")),
        measured("other", 3 + noise(0, 0.5), replace(TEXT, bos=True)),
        replace(first, losses=()),
        replace(first, protocol=None),
    ):
        assert paired_difference(first, other) is None
    old = replace(TEXT, fingerprint=None)
    assert paired_difference(replace(first, protocol=old), replace(first, protocol=old)) is None


def test_a_broken_model_does_not_break_the_table():
    broken = replace(measured("broken", noise(0, 1)), losses=(math.inf,) * 64, perplexity=math.exp(700))
    assert "broken" in comparison_table([measured("first", noise(1, 1)), broken])


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 512},
        {"windows": 3},
        {"cut": "paper"},
        {"bos": True},
        {"dtype": "bfloat16"},
        {"fingerprint": "another"},
        {"dataset": "other.txt"},
        {"cut": None, "bos": None, "dtype": None, "fingerprint": None},
    ],
)
def test_rows_of_two_protocols_stand_in_two_tables(change):
    one, other = TEXT, replace(TEXT, **change)
    rows = [measured("a", noise(0, 1), one), measured("b", noise(1, 1), other), measured("c", noise(2, 1), one)]
    first, second = (part.splitlines() for part in comparison_table(rows).split("\n\n"))
    assert first[0] == f"perplexity on {one}" and second[0] == f"perplexity on {other}"
    assert [line.split()[0] for line in first[3:]] == ["a", "c"] and first[1].startswith("difference to a")
    assert [line.split()[0] for line in second[1:]] == ["model", "b"] and "difference" not in second[1]


def test_tasks_that_were_limited_do_not_stand_beside_whole_ones():
    score = {"a": {"acc": {"value": 0.5, "error": None}}}
    rows = [Measurement("x", 0, 9, tasks=score, task_protocol=TaskProtocol(limit=limit)) for limit in (None, 10)]
    assert comparison_table(rows).split("\n\n")[1].startswith("tasks: the first 10 questions")


def test_a_table_shows_what_there_is():
    score = {"acc": {"value": 0.5, "error": 0.01}}
    results = [
        Measurement("dense", 0.0, 100, 10.0, 0.25, Protocol("x", 3, 8), (), {"a": score, "b": score}),
        Measurement("pruned", 0.5, 100, None, None, Protocol("x", 3, 8), tasks={"a": score}),
    ]
    how, head, dense, pruned = comparison_table(results).splitlines()
    assert how == "perplexity on x, 3 windows of 8 tokens"
    assert head.split() == ["model", "sparsity", "perplexity", "a", "(acc)", "b", "(acc)", "mean"]
    assert "10.000 ± 0.250" in dense and dense.endswith("  0.5000 ± 0.0071")
    assert pruned.split() == ["pruned", "0.5000", "0.5000", "±", "0.0100"]


def scored(**values):
    """Task -> accuracy and error, and a normalised one that is another."""
    return {name: {"acc": {"value": value, "error": 0.03}, "acc_norm": {"value": 0.9, "error": 0.1}}
            for name, value in values.items()}  # fmt: skip


def test_a_group_is_shown_by_its_own_metric_and_counts_once():
    tasks = scored(a=0.2, b=0.4, c=0.5, d=0.7) | {"both": {"acc": {"value": 0.3, "error": 0.021}}}
    row = Measurement("x", 0.5, 9, tasks=tasks, groups={"both": ("a", "b")})
    head, line = comparison_table([row]).splitlines()
    assert re.split(" {2,}", head)[2:] == ["a (acc)", "b (acc)", "c (acc_norm)", "d (acc_norm)", "both (acc)", "mean"]
    # of the two that are in no group; with the errors of two that are independent
    assert line.endswith(f"0.9000 ± {0.1 / math.sqrt(2):.4f}")
    assert Measurement.from_dict(row.to_dict()).groups == row.groups


def test_of_a_group_of_many_the_group_alone_has_a_column():
    names = [f"subject_{number}" for number in range(20)]
    tasks = scored(**dict.fromkeys([*names, "fields", "all", "other"], 0.5))
    row = Measurement("x", 0.5, 9, tasks=tasks, groups={"all": tuple(names), "fields": tuple(names[:3])})
    assert shown_tasks([row]) == ["all", "other"]
