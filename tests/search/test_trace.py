"""What was tried, on disk and back."""

import json

import pytest
import torch

from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import Request, SearchTrace, Trial


def loss(number, value, start, stop, counts, tokens=None, kind="loss"):
    tokens = (stop - start) * 10 if tokens is None else tokens
    return Trial(number, Request(kind, Candidate(), start, stop), value, None, tokens, 0.5, counts)


TRIALS = [
    Trial(0, Request("anchor", Candidate("dense", counts=(0, 0))), counts=(0, 0)),
    Trial(1, Request("slopes", Candidate("x", counts=(1, 2)), 2, 6), 0.5, (0.1, -0.2), 64, 0.25, (1, 2)),
    Trial(2, Request("loss", Candidate("er"), 0, 2), error="cannot be met"),
    Trial(3, Request("sequential", Candidate("owl", 0.1), 0, 8), 0.5, None, 64, 0.25, (3, 4), None, 12.5),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.request.kind)
def test_a_trial_survives_json_and_writes_no_empty_facts(trial):
    assert Trial.from_json(trial.to_json()) == trial
    optional = {"slopes", "counts", "error", "perplexity"} & json.loads(trial.to_json()).keys()
    assert optional == {
        name for name in ("slopes", "counts", "error", "perplexity") if getattr(trial, name) is not None
    }


def test_the_rows_of_a_request():
    assert TRIALS[1].request.rows == range(2, 6)
    assert TRIALS[0].request.rows == range(0, 0) and json.loads(TRIALS[0].to_json())["rows"] == [0, 0]


def test_what_is_written_is_read_line_by_line(tmp_path):
    path = tmp_path / "deep" / "trace.jsonl"
    trace = SearchTrace.open(path, {"seed": 3, "shape": (4, 2)})
    for number, trial in enumerate(TRIALS, 2):
        trace.append(trial)
        assert len(path.read_text().splitlines()) == number  # flushed as it comes
    trace.close()
    trace.close()
    again = SearchTrace.load(path)
    assert again.trials == trace.trials == TRIALS and again.settings == {"seed": 3, "shape": [4, 2]}


def test_a_trace_goes_on_where_it_was_and_loses_half_a_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    trace = SearchTrace.open(path, {"seed": 3})
    trace.append(TRIALS[1])
    trace.close()
    whole = path.read_text()
    path.write_text(whole + TRIALS[3].to_json()[:30])
    assert SearchTrace.load(path).trials == [TRIALS[1]]
    assert path.read_text() != whole  # to look changes nothing
    trace = SearchTrace.open(path, {"seed": 3}, resume=True)
    assert trace.trials == [TRIALS[1]] and path.read_text() == whole
    trace.append(TRIALS[2])
    trace.close()
    assert SearchTrace.load(path).trials == TRIALS[1:3]


@pytest.mark.parametrize(
    ("number", "line", "said"),
    [
        (1, "{}", "line 1: its first line holds no settings; take another folder"),
        (2, "{]", "line 2: .*; remove it and what is behind it to go on from there, or take another folder"),
        (3, '{"number": 1}', "line 3: it lacks 'kind'; remove it"),
        (3, "\udcff", "line 3: .*decode.*; remove it"),
    ],
)
def test_damage_is_named_by_its_line_with_the_way_out_and_nothing_is_changed(number, line, said, tmp_path):
    path = tmp_path / "trace.jsonl"
    trace = SearchTrace.open(path, {"seed": 3})
    for trial in TRIALS[:3]:
        trace.append(trial)
    trace.close()
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_bytes("\n".join([*lines, "half a li"]).encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"trace.jsonl is no search trace: {said}"):
        SearchTrace.open(path, {"seed": 3}, resume=True)
    assert path.read_bytes() == before
    if number > 1:  # what the message says goes on
        path.write_bytes(b"".join(before.splitlines(keepends=True)[: number - 1]))
        again = SearchTrace.open(path, {"seed": 3}, resume=True)
        again.close()
        assert again.trials == list(TRIALS[: number - 2])


def test_a_trace_of_half_a_line_begins_anew(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"settings": {"se')
    assert SearchTrace.load(path).trials == [] and path.exists()
    SearchTrace.open(path, {"seed": 3}, resume=True).close()
    assert json.loads(path.read_text()) == {"settings": {"seed": 3}}


def test_a_trace_of_other_settings_or_that_is_not_to_be_resumed_is_left_alone(tmp_path):
    path = tmp_path / "trace.jsonl"
    SearchTrace.open(path, {"seed": 3}).close()
    before = path.read_text()
    with pytest.raises(FileExistsError, match="resume it, or choose another folder"):
        SearchTrace.open(path, {"seed": 3})
    for other in ({"seed": 4}, {"seed": 3, "length": 2}, {}):
        with pytest.raises(ValueError, match="was made with"):
            SearchTrace.open(path, other, resume=True)
    assert path.read_text() == before


@pytest.mark.parametrize("prints", [None, 3, [], "x", {"model": 1}, {"text": "a"}])
def test_a_trace_without_the_fingerprints_that_are_asked_for_is_left_alone(prints, tmp_path):
    path = tmp_path / "trace.jsonl"
    SearchTrace.open(path, {"seed": 3, "sha256": prints}).close()
    with pytest.raises(ValueError, match="does not say with which model|was made with another model"):
        SearchTrace.open(path, {"seed": 3, "sha256": {"model": "a"}}, resume=True)
    SearchTrace.open(path, {"seed": 3}, resume=True).close()  # who does not ask, is told nothing


def test_without_a_file_trials_are_kept_in_memory():
    trace = SearchTrace.open(None, {"seed": 3})
    trace.append(TRIALS[1])
    trace.close()
    assert trace.trials == [TRIALS[1]] and trace.path is None


def curve(*trials):
    trace = SearchTrace()
    trace.trials = list(trials)
    return trace.best_so_far()


def test_the_curve_counts_those_that_met_all_windows_each_by_its_mean():
    """b looks best on the first window, a is on all four."""
    found = curve(
        loss(0, 3.0, 0, 1, "a"), loss(1, 1.0, 0, 1, "b"), loss(2, 9.0, 0, 1, "c"),
        loss(3, 1.0, 1, 4, "a"), loss(4, 2.0, 1, 4, "b"),
    )  # fmt: skip
    assert found == ([60, 90], [(3 + 3 * 1) / 4, (3 + 3 * 1) / 4])
    assert curve(loss(0, 3.0, 0, 4, "a"), loss(1, 2.0, 0, 4, "b")) == ([40, 80], [3.0, 2.0])
    assert curve(loss(0, 3.0, 0, 4, "a"), loss(1, 3.0, 0, 4, "b"), loss(2, 1.0, 0, 4, "c")) == ([40, 120], [3.0, 1.0])


def test_the_curve_starts_over_where_a_candidate_meets_its_first_windows_again():
    """At another anchor the same allocation has another loss."""
    found = curve(loss(0, 5.0, 0, 2, "a"), loss(1, 5.0, 2, 4, "a"), loss(2, 1.0, 0, 2, "a"), loss(3, 1.0, 2, 4, "a"))
    assert found == ([40, 80], [5.0, 1.0])


def test_windows_that_an_allocation_meets_under_two_names_count_once():
    """Two candidates of a race may give one allocation: a is on all four windows once, not on seven."""
    found = curve(
        loss(0, 5.0, 0, 1, "a"), loss(1, 5.0, 0, 1, "a", 0), loss(2, 1.0, 1, 4, "a"), loss(3, 1.0, 1, 4, "a", 0)
    )  # fmt: skip
    assert found == ([40], [(5 + 3 * 1) / 4])


def test_a_pass_for_slopes_does_not_join_a_race():
    found = curve(loss(0, 5.0, 0, 1, "a"), loss(1, 3.0, 1, 3, "a", kind="slopes"), loss(2, 1.0, 1, 4, "a"))
    assert found[1] == [(5 + 3 * 1) / 4]


def test_passes_for_slopes_count_where_they_see_enough_windows_and_nothing_else_does():
    trials = [loss(0, 5.0, 0, 4, "a"), loss(1, 4.0, 8, 12, "b", kind="slopes"), loss(2, 1.0, 0, 3, "c", kind="slopes")]
    assert curve(*trials) == ([40, 80, 110], [5.0, 4.0, 4.0])
    assert curve(loss(0, 5.0, 0, 4, "a"), loss(1, 1.0, 0, 4, "b", kind="sequential")) == ([40, 80], [5.0, 5.0])
    assert curve(loss(0, 5.0, 0, 4, "a"), loss(1, None, 0, 4, "b", 0)) == ([40], [5.0])
    assert curve() == ([], []) and curve(TRIALS[0], TRIALS[2]) == ([], [])


def test_a_trial_survives_json():
    request = Request("slopes", Candidate("owl", 0.1, "block", (("q_proj", 0.1),)), 2, 6)
    trial = Trial(3, request, 0.5, (0.1, 0.2), 64, 0.25, (3, 4))
    assert Trial.from_json(trial.to_json()) == trial
    assert torch.isfinite(torch.tensor(trial.loss))
