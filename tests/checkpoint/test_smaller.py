"""A smaller model as a checkpoint: saved with what went, loaded, verified, and pruned further."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig, RecoveryConfig, schema, verify
from optimum_dsa.checkpoint.description import read_description, report_from
from optimum_dsa.common.schema import violations
from optimum_dsa.pruning.structured.prune import StructuredReport

from ..tiny import tiny_llama, tokens


CUT = DSAStructuredConfig(0.3, ("ffn", "kv_group"))
SPARSE = DSAConfig(0.5, allocation="uniform")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smaller") / "model"
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), CUT)
    pruner.save_pretrained(folder)
    return pruner, folder


def test_what_is_saved_is_a_plain_model_with_its_report(smaller):
    pruner, folder = smaller
    loaded = DSAPruner.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        outputs = [model(tokens()).logits for model in (pruner.model, loaded.model, plain)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    found, made = loaded.report.structured, pruner.report.structured
    assert isinstance(made, StructuredReport) and (found.config, found.gone) == (CUT, made.gone)
    data = read_description(folder)
    assert list(violations(data, schema())) == [] and data["structured"]["removed"] == made.removed
    assert loaded.report.removed == 0 and loaded.report.parameters == made.parameters - made.removed


def test_widths_are_counted_in_the_weights(smaller):
    pruner, folder = smaller
    found = DSAPruner.from_pretrained(folder).verify()
    assert found.holds and "ffn: 24 of 48 stay" in str(found) and found.widths["model.layers.0:ffn"] == (24, 48)
    assert "not proven: which structures went, by wanda_sp" in str(found)
    dense = verify(tiny_llama(), pruner.report)
    assert "model.layers.0:ffn has 48 of its 48 structures, described are 24" in dense.problems
    other = verify(tiny_llama(intermediate_size=25), pruner.report)
    assert any("has 25 of its 48" in problem for problem in other.problems)


def test_under_another_head_they_have_its_names(smaller):
    pruner, folder = smaller
    body = DSAPruner(AutoModel.from_pretrained(folder))
    found = body.verify()
    assert found.holds and found.widths["layers.0:ffn"] == (24, 48)


@pytest.mark.parametrize("loaded", [False, True])
def test_weights_are_pruned_of_what_is_left(smaller, loaded, tmp_path):
    """On the same pruner, and out of the folder; the file says both."""
    pruner = DSAPruner.from_pretrained(smaller[1])
    if not loaded:
        pruner = DSAPruner(tiny_llama())
        pruner.prune(tokens(), CUT)
    report = pruner.prune(tokens(), SPARSE)
    assert report.sparsity == 0.5 and report.structured.config == CUT
    assert "structures were cut out before" in str(report)
    pruner.save_pretrained(tmp_path / "both")
    found = DSAPruner.from_pretrained(tmp_path / "both")
    assert found.report.config == SPARSE and found.report.structured.config == CUT
    assert found.verify().holds and "ffn: 24 of 48 stay; " in str(found.verify())


def test_cuts_follow_each_other(smaller):
    pruner = DSAPruner.from_pretrained(smaller[1])
    report = pruner.prune(tokens(), DSAStructuredConfig(0.1, importance="flap"))
    assert [one.config for one in report.earlier] == [CUT]
    assert pruner.verify().holds and pruner.verify().widths["model.layers.0:ffn"] == (
        report.kept["model.layers.0:ffn"],
        48,
    )


def test_structures_of_a_sparse_model_are_cut_with_its_zeros(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), SPARSE)
    with pytest.raises(ValueError, match="cut first and prune weights then, or use update='none'"):
        pruner.prune(tokens(), CUT)
    assert pruner.report.structured is None and pruner.verify().holds
    pruner.prune(tokens(), DSAStructuredConfig(0.2, update="none"))
    assert pruner.verify().holds and 0.4 < pruner.report.sparsity < 0.6
    pruner.save_pretrained(tmp_path / "cut")
    assert DSAPruner.from_pretrained(tmp_path / "cut").verify().holds


@pytest.mark.parametrize("method", ["sparse-lora", "full"])
def test_it_is_trained_towards_the_dense_model(smaller, method, tmp_path):
    pruner = DSAPruner.from_pretrained(smaller[1])
    config = RecoveryConfig(method=method, steps=2, validation_windows=4, distillation=0.5)
    pruner.recover(tokens(24), config, teacher=tiny_llama())
    pruner.save_pretrained(tmp_path / method)
    found = DSAPruner.from_pretrained(tmp_path / method)
    assert found.verify().holds and found.report.structured.config == CUT
    assert found.report.removed == 0
    with torch.no_grad():
        assert not torch.equal(found.model(tokens()).logits, smaller[0].model(tokens()).logits)


def test_an_adapter_belongs_to_the_widths_that_it_was_trained_on(smaller, tmp_path):
    pruner = DSAPruner.from_pretrained(smaller[1])
    pruner.recover(tokens(24), RecoveryConfig(steps=1, validation_windows=4, merge=False))
    pruner.save_pretrained(tmp_path / "adapter")
    assert DSAPruner.from_pretrained(tmp_path / "adapter").report.structured.config == CUT
    other = DSAPruner(tiny_llama())
    other.prune(tokens(), DSAStructuredConfig(0.1))
    other.save_pretrained(smaller[1].parent / "other")
    pruner._stored = str(smaller[1].parent / "other")
    with pytest.raises(ValueError, match="does not hold the zeros and widths"):
        pruner.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    "config,options,message",
    [
        (CUT, {"resume": True}, "needs the folder of checkpoints"),
        (
            DSAStructuredConfig(0.5, ("block",)),
            {"checkpoints": "blocks"},
            "goes at once, without finished blocks to keep, and checkpoints='blocks'",
        ),
        (DSAStructuredConfig(0.0, max_loss="5%"), {"resume": True}, "max_loss='5%' tries cuts .* and resume=True"),
        (DSAStructuredConfig(0.3, learner="projected_gates"), {"resume": True}, "needs the folder of checkpoints"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_text_is_read(config, options, message):
    with pytest.raises(ValueError, match=message):
        DSAPruner(tiny_llama()).prune("no-such-file.txt", config, **options)


@pytest.mark.parametrize("layout", ["per_layer", "padded"])
def test_models_whose_blocks_differ_are_saved_and_verified(layout, tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAStructuredConfig(0.31, layout=layout))
    assert pruner.verify().holds and bool(pruner.report.structured.padding) == (layout == "padded")
    pruner.save_pretrained(tmp_path / "model")
    loaded = DSAPruner.from_pretrained(tmp_path / "model")
    assert type(loaded.model) is type(pruner.model) and loaded.verify().holds
    assert torch.equal(loaded.model(tokens()).logits, pruner.model(tokens()).logits)
    assert loaded.report.structured.padding == pruner.report.structured.padding


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda cut: cut["config"].update(importance=3), "structured.config.importance"),
        (lambda cut: cut["config"].update(importance="nobody"), "describes what cannot be"),
        (lambda cut: cut["units"]["model.layers.0:ffn"].update(gone="0-99"), "describes what cannot be"),
        (lambda cut: cut["units"]["model.layers.0:ffn"].pop("kept"), "kept"),
        (lambda cut: cut.pop("units"), "units"),
    ],
)
def test_a_section_that_breaks_its_schema_is_refused(smaller, change, message, tmp_path):
    data = json.loads((smaller[1] / "dsa_config.json").read_text())
    change(data["structured"])
    (tmp_path / "dsa_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        report_from(read_description(tmp_path))
