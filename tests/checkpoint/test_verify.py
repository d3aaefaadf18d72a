"""A pruned model is what it says, or `verify` says where it is not."""

import json
import shutil
from dataclasses import replace

import pytest
from torch import arange

from optimum_dsa import Allocation, DSAConfig, DSAPruner, convert, prune, verify
from optimum_dsa.checkpoint.description import read_description, write_description
from optimum_dsa.checkpoint.encodings import BITMASK
from optimum_dsa.checkpoint.shards import find_shards
from optimum_dsa.commands.embedded import demo_model
from optimum_dsa.pruning.configuration import CONFIG_NAME

from ..conftest import FAMILIES
from ..tiny import needs_compressed_loading, tiny_llama, tokens


CONFIGS = {
    "wanda": DSAConfig(0.6),
    "matrix": DSAConfig(0.55, "magnitude", "er", pattern="matrix", granularity="matrix"),
    "group": DSAConfig(0.5, "magnitude", "uniform", pattern="group:16"),
    "2:4": DSAConfig(0.5, allocation="uniform", pattern="2:4"),
    "mixed": DSAConfig(0.6, allocation="owl", pattern="mixed:8"),
    "sparsegpt": DSAConfig(0.7, "sparsegpt", "owl"),
    "sparsegpt 2:4": DSAConfig(0.5, "sparsegpt", "uniform", pattern="2:4"),
    "alps": DSAConfig(0.7, "alps", "owl"),
    "swap 2:4": DSAConfig(0.5, "wanda+swap", "uniform", pattern="2:4"),
    "head": DSAConfig(0.5, "magnitude", "uniform", include=("lm_head",), exclude=("down_proj",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_pruning_holds_and_a_revived_weight_does_not(name):
    model = tiny_llama().bfloat16()
    report = prune(model, tokens(), CONFIGS[name])
    found = verify(model, report)
    assert found.holds and found.removed == report.removed, found
    assert str(found).startswith("holds: ") and f"{found.removed:,} of {found.prunable:,}" in str(found)
    weight = model.model.layers[1].self_attn.q_proj.weight.data
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 1e-3
    found = verify(model, report)
    assert not found.holds and "layers.1" in found.problems[0] and "1 fewer" in found.problems[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_holds(family, tiny):
    model = tiny(family)
    report = prune(model, None, DSAConfig(0.6, "magnitude", "uniform", skip_unprunable=True))
    assert verify(model, report).holds


@pytest.mark.parametrize("name", ["wanda", "2:4", "mixed", "group", "sparsegpt 2:4"])
def test_zeros_in_the_wrong_places_break_the_pattern(name):
    model = tiny_llama()
    report = prune(model, tokens(), CONFIGS[name])
    weight = model.model.layers[0].mlp.up_proj.weight.data
    # as many zeros as before, all of them in the first rows; for groups of columns, in the first columns
    zeros = int((weight == 0).sum())
    moved = weight.t() if name == "group" else weight
    moved.copy_(weight.new_ones(moved.numel()).index_fill_(0, arange(zeros), 0).view_as(moved))
    (problem,) = verify(model, report).problems
    assert problem.startswith("model.layers.0.mlp.up_proj.weight does not have the pattern")


def test_more_zeros_than_described_are_told_too():
    model = tiny_llama()
    report = prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    model.model.layers[2].mlp.up_proj.weight.data[0] = 0
    (problem,) = verify(model, report).problems
    assert "model.layers.2" in problem and "more than" in problem


def test_another_model_has_other_units():
    report = prune(tiny_llama(), None, DSAConfig(0.5, "magnitude", "uniform"))
    (problem,) = verify(tiny_llama(num_hidden_layers=2), report).problems
    assert "other units or sizes than described, such as model.layers.2: none weights" in problem
    (problem,) = verify(tiny_llama(intermediate_size=40), report).problems
    assert "model.layers.0" in problem
    found = verify(tiny_llama(), replace(report, config=replace(report.config, exclude=("no_such_name",))))
    assert "cannot be pruned as described" in found.problems[0]


def test_a_report_that_contradicts_itself():
    model = tiny_llama()
    report = prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    wrong = verify(model, replace(report, config=replace(report.config, sparsity=0.6)))
    assert "and a sparsity of 0.6 removes" in wrong.problems[0]
    unit = next(iter(report.achieved))
    wrong = verify(model, replace(report, achieved={**report.achieved, unit: report.achieved[unit] + 1e-5}))
    assert "is no whole number" in wrong.problems[0]
    wrong = verify(model, replace(report, achieved={**report.achieved, unit: 0.25}))
    assert "fewer were removed" in wrong.problems[0]
    wrong = verify(model, replace(report, achieved={unit: 0.5}))
    assert "given for different units" in wrong.problems[0]
    assert [problem.split(" more than ")[1] for problem in wrong.problems[1:]] == ["the 0 described"] * 2
    allocation = Allocation({**report.allocation.sparsity, unit: 0.25}, report.allocation.sizes)
    assert not verify(model, replace(report, allocation=allocation)).holds


@pytest.mark.parametrize("over", [1, -1])
def test_a_budget_that_n_of_m_cannot_be_blamed_for_is_a_problem(over):
    """Rounding to levels misses a budget by half of the coarsest step of a unit, and not by one weight more."""
    model = tiny_llama()
    report = prune(model, tokens(), DSAConfig(0.5, allocation="owl", pattern="mixed:8"))
    sizes = report.allocation.sizes
    total, step = sum(sizes.values()), max(sizes.values()) // 8

    def asking(count):
        return replace(report, config=replace(report.config, sparsity=count / total))

    assert verify(model, asking(total // 2 + over * step // 2)).holds
    (problem,) = verify(model, asking(total // 2 + over * (step // 2 + 1))).problems
    assert f"removes {total // 2:,} of {total:,} weights, and a sparsity of" in problem


@pytest.mark.parametrize("over", [1, -1])
def test_other_patterns_meet_their_budget_to_one_weight(over):
    model = tiny_llama()
    report = prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    total = sum(report.allocation.sizes.values())
    wrong = replace(report, config=replace(report.config, sparsity=(total // 2 + over) / total))
    (problem,) = verify(model, wrong).problems
    assert f"removes {total // 2 + over:,}" in problem


def test_every_unit_that_differs_is_told_with_both_numbers():
    model = tiny_llama()
    report = prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    size = next(iter(report.allocation.sizes.values()))
    for index, way in ((0, "fewer"), (2, "more")):
        weight = model.model.layers[index].mlp.up_proj.weight.data
        weight[(weight == 0) if way == "fewer" else slice(None)] = 1e-3 if way == "fewer" else 0
    found = verify(model, report)
    first, last = (problem for problem in found.problems if "described" in problem)
    zeros = [sum(int((p == 0).sum()) for p in model.model.layers[i].parameters() if p.dim() == 2) for i in (0, 2)]
    described = size // 2
    differ = [f"{described - zeros[0]:,} fewer", f"{zeros[1] - described:,} more"]
    told = [f"{zeros[i]:,} zeros, {differ[i]} than the {described:,} described" for i in (0, 1)]
    assert (first, last) == (f"model.layers.0 has {told[0]}", f"model.layers.2 has {told[1]}")
    assert found.removed == sum(zeros) + described and found.prunable == 3 * size
    assert f"counted: {found.removed:,} of {found.prunable:,}" in str(found)
    assert str(found).count("wrong: ") == len(found.problems)


def test_fewer_removed_than_allocated_is_a_contradiction_where_a_pattern_counts_weights():
    model = tiny_llama()
    report = prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    unit, size = next(iter(report.allocation.sizes.items()))
    less, more = (
        verify(model, replace(report, achieved={**report.achieved, unit: (size // 2 + by) / size})).problems
        for by in (-1, 1)
    )
    assert any("were allocated, and fewer were removed" in problem for problem in less)
    assert not any("fewer were removed" in problem for problem in more)


# -- on disk, by the command


@pytest.fixture
def folders(tmp_path):
    pruner = DSAPruner(tiny_llama().bfloat16())
    pruner.prune(tokens(), DSAConfig(0.6, allocation="owl"))
    pruner.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    convert(tmp_path / "dense", tmp_path / "compressed", "compressed")
    return tmp_path


def run(capsys, *arguments):
    from ..test_docs import commands

    args = commands().parse_args(["dsa", *map(str, arguments)])
    code = 0
    try:
        args.func(args).run()
    except SystemExit as exit:
        code = exit.code or 0
    return code, *capsys.readouterr()


@needs_compressed_loading
def test_a_model_that_runs_packed_is_verified_without_a_word_about_places(folders, capsys, caplog):
    convert(folders / "compressed", folders / "packed", "packed")
    code, output, errors = run(capsys, "verify", folders / "packed")
    assert code == 0 and output == run(capsys, "verify", folders / "compressed")[1]
    assert "disk" not in errors + caplog.text


@pytest.mark.parametrize("form", ["dense", pytest.param("compressed", marks=needs_compressed_loading)])
def test_the_exit_code_tells(folders, form, capsys):
    code, output, errors = run(capsys, "verify", folders / form)
    assert (code, [line.split(":")[0] for line in output.splitlines()]) == (0, ["holds", "not proven"]), (
        output + errors
    )
    pruner = DSAPruner.from_pretrained(folders / form)
    weight = pruner.model.model.layers[0].mlp.gate_proj.weight.data
    weight[tuple((weight == 0).nonzero()[0])] = 0.5
    pruner.save_pretrained(folders / form, compressed=form == "compressed")
    code, output, errors = run(capsys, "verify", folders / form)
    assert code == 1 and errors.count("error") == 0
    assert "wrong: model.layers.0 has" in output and "1 fewer than" in output


@pytest.mark.parametrize(
    "part,name,value",
    [
        ("config", "sparsity", 0.5),
        ("config", "seed", 7),
        ("config", "pattern", "2:4"),
        ("config", "sparsity", "much"),
        ("achieved", "removed", 3),
        ("base_model", "name", "some/other"),
    ],
)
def test_an_edited_config_is_caught(folders, capsys, part, name, value):
    data = json.loads((folders / "dense" / CONFIG_NAME).read_text())
    data[part][name] = value
    (folders / "dense" / CONFIG_NAME).write_text(json.dumps(data))
    code, output, _ = run(capsys, "verify", folders / "dense")
    assert code == 1 and "wrong: " in output


def test_a_wrong_budget_is_caught_even_with_a_new_checksum(folders, capsys):
    data = read_description(folders / "dense")
    data["config"]["sparsity"] = 0.5
    write_description(folders / "dense", data)
    code, output, _ = run(capsys, "verify", folders / "dense")
    assert code == 1 and "and a sparsity of 0.5 removes" in output


def test_what_cannot_be_checked_is_bad_usage(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "plain")
    for folder, message in [(tmp_path / "plain", "so nothing can be checked"), (tmp_path / "none", "none")]:
        code, output, errors = run(capsys, "verify", folder)
        assert code == 2 and output == "" and message in errors.splitlines()[-1]


@needs_compressed_loading
def test_a_model_of_the_hub(folders, tmp_path, capsys, monkeypatch):
    repository = tmp_path / "hub" / "models--me--pruned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folders / "compressed", repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, output, errors = run(capsys, "verify", "me/pruned")
    assert code == 0, output + errors
    assert run(capsys, "convert", "me/pruned", tmp_path / "out", "--to", "dense")[0] == 0
    assert run(capsys, "verify", tmp_path / "out")[0] == 0
    for command in (["verify", "me/other"], ["convert", "me/other", tmp_path / "x", "--to", "dense"]):
        code, output, errors = run(capsys, *command)
        assert code == 2 and output == "" and "me/other" in errors


@needs_compressed_loading
def test_a_model_pruned_by_the_command_can_be_compressed_at_once(tmp_path, capsys):
    options = ["-s", "0.6", "--method", "magnitude", "--allocation", "uniform", "--compressed"]
    code, _, errors = run(capsys, "prune", demo_model(), "-o", tmp_path / "out", *options)
    assert code == 0, errors
    assert find_shards(tmp_path / "out").encoding is BITMASK
    assert run(capsys, "verify", tmp_path / "out")[0] == 0


def test_convert_by_the_command(folders, capsys):
    code, output, _ = run(capsys, "convert", folders / "compressed", folders / "again", "--to", "dense")
    assert code == 0 and "bytes of weights before" in output
    assert run(capsys, "verify", folders / "again")[0] == 0
    code, _, errors = run(capsys, "convert", folders / "dense", folders / "again", "--to", "dense")
    assert code == 2 and "is dense already" in errors
    code, _, errors = run(capsys, "convert", folders / "no" / "such" / "folder", folders / "again", "--to", "dense")
    assert code == 2 and "neither a folder nor" in errors
