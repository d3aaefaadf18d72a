"""`recover` trains, keeps every zero, and says what it did."""

import json
import re
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from optimum_dsa import (
    DataConfig,
    DSAConfig,
    DSAPruner,
    PruningReport,
    RecoveryConfig,
    find_architecture,
    perplexity,
)
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.common.installation import how_to_install
from optimum_dsa.recovery.texts import read_windows
from optimum_dsa.recovery.trainer import RecoveryTrainer, divergence

from ..test_commands import run
from ..tiny import bos_tokenizer, tiny_llama, tokens
from .adapters.test_peft_method import same_zeros, sparse_llama, zeros


def regular(samples=64, length=16):
    """Text that can be learnt: counting in circles."""
    start = torch.arange(samples)[:, None] * 7
    return (start + torch.arange(length)) % 97


def small(**changes):
    settings = {"steps": 6, "batch_size": 4, "eval_steps": 3, "validation_windows": 8}
    rank = {} if "method" in changes else {"rank": 4}  # of adapters alone
    return RecoveryConfig(**{**settings, **rank, **changes})


@pytest.mark.contract
@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "mask"},
        {"mode": "scale", "ranks": "uniform", "learning_rate": 0.3},
        {"mode": "spp", "accumulation": 2, "learning_rate": 0.3},
        {"method": "full", "learning_rate": 0.01},
        {"mode": "mask", "bf16": True, "gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_perplexity_falls_and_zeros_stay(changes):
    model = sparse_llama(sparsity=0.6)
    before = zeros(model)
    pruner = DSAPruner.from_pretrained(model)
    result = pruner.recover(regular(), small(**{"steps": 12, "learning_rate": 0.02, **changes}))
    assert result.after < 0.92 * result.before and result.steps == 12
    assert type(pruner.model) is type(model) and same_zeros(pruner.model, before)
    assert pruner.report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert all(p.grad is None and p.requires_grad for p in pruner.model.parameters()) and not pruner.model.training
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [3, 6, 9, 12]
    assert f"{result.before:.3f} ± {result.before_error:.3f} -> {result.after:.3f} ± " in str(result)


def test_a_tied_head_that_was_pruned_is_worth_the_same_before_and_after_the_merge():
    pruner = DSAPruner.from_pretrained(tiny_llama(tie_word_embeddings=True))
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform", include=["lm_head", "embed_tokens"]))
    before = zeros(pruner.model)
    held_out = regular(80)[64:]
    pruner.recover(regular(), small(steps=12, learning_rate=0.02, merge=False), held_out)
    adapted = perplexity(pruner.model, held_out)
    merged = pruner.model.merge_and_unload()
    assert perplexity(merged, held_out) == pytest.approx(adapted, rel=1e-4)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight and same_zeros(merged, before)


@pytest.mark.parametrize("bos,there", [(None, True), (False, False)])
def test_sequences_start_with_what_the_tokenizer_adds(bos, there):
    pruner = DSAPruner(tiny_llama(), bos_tokenizer())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    text = [" ".join(str((start + step) % 90) for step in range(40)) for start in range(60)]
    asked = small(data=DataConfig(sequence_length=8, bos=bos))
    windows, held_out, data = read_windows(pruner.model, pruner.tokenizer, text, None, asked)
    for part in (windows, held_out):
        assert part.shape[1] == 8 and (part[:, 0] == 0).all() == (part == 0).any() == there
    assert data["bos"] is there
    with pytest.raises(ValueError, match="bos is true or false, got 'yes'"):
        DataConfig(bos="yes")


@pytest.mark.parametrize("method", ["sparse-lora", "full"])
def test_bfloat16_models_stay_bfloat16(method):
    model = sparse_llama(sparsity=0.6).to(torch.bfloat16)
    before = zeros(model)
    pruner = DSAPruner.from_pretrained(model)
    pruner.recover(regular(), small(method=method))
    assert {p.dtype for p in pruner.model.parameters()} == {torch.bfloat16}
    assert same_zeros(pruner.model, before)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"method": "full", "rank": 8}, "rank=8 is for adapters"),
        ({"method": "elsa", "mode": "spp"}, "mode='spp' is for adapters"),
        ({"method": "full", "merge": False}, "merge=False is for adapters"),
        ({"penalty": 0.5}, "penalty=0.5 is for methods that choose zeros"),
        ({"method": "full", "shape": "linear"}, "shape='linear' is for methods that choose zeros"),
        ({"temperature": 2.0}, "temperature=2.0 is for distillation, which is 0"),
    ],
)
def test_what_a_method_would_pass_over_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecoveryConfig(**changes)


def test_a_dense_model_is_not_recovered(tmp_path):
    dense = tiny_llama()
    dense.model.layers[0].mlp.up_proj.weight.data[0, :3] = 0  # no weight is zero by design
    with pytest.raises(ValueError, match="was not pruned: no dsa_config.json says so, and 0.01% of its prunable"):
        DSAPruner.from_pretrained(dense).recover(regular(), small(steps=1))
    pruner = DSAPruner.from_pretrained(tiny_llama())
    pruner.prune(None, DSAConfig(0.005, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "hardly")
    assert DSAPruner.from_pretrained(tmp_path / "hardly").recover(regular(), small(steps=1)).steps == 1


def test_training_stops_early_and_keeps_the_best():
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    # what is trained on has nothing to do with what is validated on: the first measurement is the best
    config = small(steps=60, eval_steps=2, patience=2, learning_rate=0.05, data=DataConfig(seed=1))
    result = pruner.recover(tokens(64, 16), config, validation=regular(8))
    losses = {entry["step"]: entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    assert result.steps < 60 and result.steps == max(losses)
    assert torch.tensor(result.after).log().item() == pytest.approx(min(losses.values()), rel=1e-3)


@pytest.mark.contract
def test_distillation_brings_predictions_nearer_to_the_parents():
    parent, data = tiny_llama(), tokens(64, 16)
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.7))

    def distance():
        with torch.no_grad():
            return divergence(pruner.model(data[:16]).logits, parent(data[:16]).logits).item()

    before = distance()
    pruner.recover(data, small(steps=20, distillation=1.0, learning_rate=0.01), teacher=parent)
    assert distance() < 0.8 * before


def test_divergence_is_the_mean_over_tokens():
    logits, expected = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    student, teacher = (2.0**-1 * x for x in (logits, expected))
    by_hand = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean() * 4
    assert divergence(logits, expected, 2.0) == pytest.approx(by_hand.item(), rel=1e-5)
    assert divergence(logits, logits).abs() < 1e-6


def test_merged_models_and_adapters_are_saved_with_their_history(tmp_path):
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    pruner.prune(None, DSAConfig(0.65, "magnitude", "uniform"))
    pruner._base = {"name": "dense/parent", "revision": None}
    pruner.save_pretrained(tmp_path / "pruned")
    before = zeros(pruner.model)
    again = DSAPruner.from_pretrained(str(tmp_path / "pruned"))
    result = again.recover(regular(), small(merge=False))
    assert isinstance(again.model, PeftModel) and again.report.config.method == "magnitude"
    again.save_pretrained(tmp_path / "adapter")
    again.model = again.model.merge_and_unload()
    again.save_pretrained(tmp_path / "merged")
    for folder in ("adapter", "merged"):
        content = json.loads((tmp_path / folder / "dsa_config.json").read_text())
        dense = json.loads((tmp_path / "pruned" / "dsa_config.json").read_text())["base_model"]
        assert content["base_model"] == dense
        assert content["recovery"] == json.loads(json.dumps(result.to_dict()))
        assert RecoveryConfig.from_dict(content["recovery"]["config"]) == result.config
        assert PruningReport.from_dict(content).sparsity == pruner.report.sparsity
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert folder == "adapter" or same_zeros(loaded, before)


def test_a_sparse_model_from_elsewhere_is_recovered_as_well(tmp_path):
    sparse_llama(sparsity=0.6).save_pretrained(tmp_path / "sparse")
    pruner = DSAPruner.from_pretrained(str(tmp_path / "sparse"))
    pruner.recover(regular(), small(steps=1))
    assert pruner.report.allocation.name == "measured"
    assert pruner.report.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"method": "sparse_lora"}, "Did you mean 'sparse-lora'"),
        ({"mode": "masked"}, "Did you mean 'mask'"),
        ({"steps": 0}, "steps is a whole number of at least 1, got 0"),
        ({"distillation": 1.5}, r"distillation is a number, in \[0, 1\], got 1.5"),
        ({"data": {"sequence_length": 1}}, "sequence_length is a whole number of at least 2"),
    ],
)
def test_what_is_no_recovery_is_refused(changes, message):
    with pytest.raises((ValueError, KeyError), match=message):
        RecoveryConfig(**changes)
    with pytest.raises(ValueError, match="Did you mean 'steps'"):
        RecoveryConfig.from_dict({"step": 3})


@pytest.mark.parametrize(
    "train,changes,options,message",
    [
        (regular(8), {}, {}, "holds 8 windows of 16 tokens, and 8 of them would be for validation"),
        (regular(), {"distillation": 0.5}, {}, "give the dense model as teacher"),
        (regular(), {}, {"teacher": tiny_llama()}, "give the dense model as teacher"),
        (regular(), {"distillation": 1.0}, {"teacher": tiny_llama(vocab_size=50)}, "it must be the dense parent"),
        (regular(), {"save_steps": 2}, {}, "Resuming needs a folder of checkpoints"),
        (["text"], {}, {}, "Text needs a tokenizer"),
    ],
)
def test_what_cannot_be_trained_is_refused(train, changes, options, message):
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    with pytest.raises(ValueError, match=message):
        pruner.recover(train, small(**changes), **options)
    assert all(parameter.requires_grad for parameter in pruner.model.parameters())


def test_text_that_is_trained_on_is_none_for_validation(tmp_path, caplog):
    text, link = tmp_path / "text.txt", tmp_path / "same.txt"
    text.write_text("x")
    link.symlink_to(text)
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    for train, validation, message in (
        (str(text), text, "text.txt is given for training and for validation"),
        (text, link, "text.txt is given for training and for validation"),
        ("wikitext2", "wikitext2", "wikitext2 is given for training and for validation"),
        (regular(), regular().int(), "8 of 8 validation windows are training windows as well: what was trained on"),
        (regular(), regular(70)[60:], "4 of 8 validation windows are training windows as well"),
    ):
        with pytest.raises(ValueError, match=f"{message}.* Give another text for validation, or none"):
            pruner.recover(train, small(), validation)
    few = torch.cat([regular()[:1], tokens(30, 16)])
    read_windows(pruner.model, None, regular(), few, small(validation_windows=31))
    assert "1 of 31 validation windows are training windows as well" in caplog.text


@pytest.mark.parametrize("command", ["recover", "search"])
def test_commands_know_one_file_by_two_names_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "same.txt").symlink_to(tmp_path / "text.txt")
    work = [command, str(tmp_path / "none"), "-o", str(tmp_path / "out"), "--dataset", str(tmp_path / "text.txt")]
    work += ["-s", "0.5"] if command == "search" else []
    code, output, errors = run(monkeypatch, capsys, *work, "--validation", str(tmp_path / "same.txt"))
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert "same.txt is the text of --dataset" in errors and "leave --validation out" in errors


def test_without_peft_all_weights_can_be_trained_and_adapters_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    with pytest.raises(ValueError, match=re.escape(how_to_install("peft"))):
        pruner.recover(regular(), small(steps=1))


def test_the_command_recovers_saves_and_resumes(monkeypatch, capsys, tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("\n".join(demo_texts("calibration"))[:20_000])
    pruned, out = str(tmp_path / "pruned"), str(tmp_path / "out")
    prune = ["prune", str(demo_model()), "-o", pruned, "-s", "0.7", "--method", "magnitude", "--allocation", "uniform"]
    assert run(monkeypatch, capsys, *prune)[0] == 0
    options = ["--steps", "4", "--batch-size", "4", "--sequence-length", "32", "--rank", "4", "--eval-steps", "2"]
    options += ["--validation-windows", "4"]
    recover = ["recover", pruned, "-o", out, "--dataset", str(text), *options]
    code, output, errors = run(monkeypatch, capsys, *recover, "--save-steps", "2")
    assert code == 0, errors
    assert "validation perplexity" in output and "sparsity 0.7000 as before" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned", "train.txt"]
    adapter = ["--keep-adapter", "--mode", "spp", "--teacher", str(demo_model()), "--save-steps", "2"]
    kept = ["--checkpoints", str(tmp_path / "kept")]
    code, _, errors = run(monkeypatch, capsys, *recover, *adapter, *kept, "--resume")
    assert code == 0, errors
    assert (tmp_path / "out" / "adapter_config.json").is_file() and (tmp_path / "kept" / "checkpoint-4").is_dir()
    code, output, errors = run(monkeypatch, capsys, "verify", out)
    assert code == 0 and "holds: " in output, errors
    code, output, errors = run(monkeypatch, capsys, "evaluate", out, "--dataset", str(text), "--sequence-length", "32")
    assert code == 0 and "0.7000" in output, errors
    again = ["prune", out, "-o", str(tmp_path / "again"), "-s", "0.8", "--dataset", str(text)]
    code, _, errors = run(monkeypatch, capsys, *again)
    assert code == 2 and "holds an adapter on a pruned model, which would be lost; merge it" in errors
    code, _, errors = run(monkeypatch, capsys, *recover, "--mode", "spq")
    assert code == 2 and "Did you mean 'spp'" in errors


def test_an_interrupted_command_says_what_it_leaves_and_goes_on(monkeypatch, capsys, tmp_path):
    text, pruned = tmp_path / "train.txt", str(tmp_path / "pruned")
    text.write_text("\n".join(demo_texts("calibration"))[:20_000])
    options = ["-s", "0.7", "--method", "magnitude", "--allocation", "uniform"]
    assert run(monkeypatch, capsys, "prune", str(demo_model()), "-o", pruned, *options)[0] == 0
    recover = ["recover", pruned, "-o", str(tmp_path / "out"), "--dataset", str(text), "--steps", "4", "--rank", "4"]
    recover += ["--batch-size", "4", "--sequence-length", "32", "--validation-windows", "4", "--save-steps", "2"]
    step, done = RecoveryTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        done.append(1)
        if len(done) == 4:
            (folder,) = tmp_path.glob(".out.dsa-work/checkpoints/checkpoint-2")
            (folder.parent / "checkpoint-4").mkdir()  # as if it had come in the middle of saving
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "training_step", interrupted)
    code, _, errors = run(monkeypatch, capsys, *recover)
    assert code == 130 and "the same command with --resume goes on" in errors
    code, output, errors = run(monkeypatch, capsys, *recover, "--resume")
    assert code == 0, errors
    assert len(done) == 4 + 2 and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["full", "sparse-lora"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3"])
def test_other_architectures_keep_their_zeros(tiny, family, method):
    pruner = DSAPruner.from_pretrained(tiny(family))
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    weights = find_architecture(pruner.model).weights
    before = {weight.name: weight.tensor(pruner.model) == 0 for weight in weights}
    values = {weight.name: weight.tensor(pruner.model).clone() for weight in weights}
    pruner.recover(tokens(24, 12, vocabulary=80), small(method=method, learning_rate=0.01))
    for weight in weights:  # experts that share one parameter are among them
        assert torch.equal(weight.tensor(pruner.model) == 0, before[weight.name]), weight.name
        if method == "full" and weight.expert is None:
            assert not torch.equal(weight.tensor(pruner.model), values[weight.name]), weight.name
