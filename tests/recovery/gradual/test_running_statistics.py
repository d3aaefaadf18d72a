"""Statistics collected in training prune as the text that was trained on would."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, default_data_collator

from optimum_dsa import (
    DSACallback,
    DSAConfig,
    PruningSchedule,
    RunningStatistics,
    SparseLoraConfig,
    find_architecture,
    prune,
)

from ...tiny import tiny_llama, tokens
from ..adapters.test_peft_method import same_zeros, zeros
from .test_callback import removed, trainer_for


@pytest.mark.parametrize("method,allocation", [("wanda", "owl"), ("sparsegpt", "uniform"), ("magnitude", "er")])
def test_at_rest_they_prune_as_the_text_that_was_seen(tmp_path, method, allocation):
    model, plain, seen = tiny_llama(), tiny_llama(), []

    def collate(samples):
        batch = default_data_collator(samples)
        seen.append(batch["input_ids"])
        return batch

    config = DSAConfig(0.6, method, allocation, sequential=False)
    callback = DSACallback(config, RunningStatistics(decay=1.0), PruningSchedule(start=3))
    trainer = trainer_for(model, tmp_path, 4, callback, learning_rate=1e-12, weight_decay=0.0)
    trainer.data_collator = collate
    trainer.train()
    prune(plain, torch.cat(seen[:3]), config)
    assert same_zeros(model, zeros(plain))
    expected = {"wanda": 3 * 4 * 12, "sparsegpt": 3 * 4 * 12, "magnitude": 0}[method]
    assert callback.report.calibration["source"] == "training" and callback.report.calibration["tokens"] == expected


def test_what_was_seen_long_ago_is_forgotten():
    model = tiny_llama()
    running = RunningStatistics(decay=0.5)
    running.watch(model, find_architecture(model))
    name = "model.layers.0.mlp.up_proj.weight"
    batch, sums = torch.randint(64, (2, 8)), []
    model.train()
    for _ in range(3):
        model(batch)
        sums.append(running.statistics[name].squared_sum.clone())
        running.step()
    torch.testing.assert_close(sums[2], 1.75 * sums[0])
    model.eval()
    model(batch)
    torch.testing.assert_close(running.statistics[name].squared_sum, 0.5 * sums[2])  # evaluation does not count
    running.release()
    model.train()
    model(batch)
    torch.testing.assert_close(running.statistics[name].squared_sum, 0.5 * sums[2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_block_that_runs_again_for_its_gradients_is_seen_once(adapted, reentrant):
    from peft import get_peft_model

    seen = []
    for checkpointing in (False, True):
        model = tiny_llama()
        inner = model
        if adapted:
            model = get_peft_model(model, SparseLoraConfig(r=2, target_modules="all-linear"))
            model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        running = RunningStatistics(decay=1.0)
        running.watch(inner, find_architecture(inner, include=["lm_head"]))
        model.train()
        for seed in range(2):
            data = tokens(4, 12, seed)
            model(input_ids=data, labels=data).loss.backward()
        seen.append(running.statistics)
    assert {found.tokens for found in seen[0].values()} == {2 * 4 * 12}
    for name, found in seen[0].items():
        assert seen[1][name].tokens == found.tokens, name
        torch.testing.assert_close(seen[1][name].squared_sum, found.squared_sum)


def gradual():
    return DSACallback(
        DSAConfig(0.6, allocation="owl"), RunningStatistics(), PruningSchedule(1, 7, 2), reallocate="always"
    )


def test_gradients_of_a_text_are_not_among_them(tmp_path):
    callback = DSACallback(DSAConfig(0.6, "pruner_zero", "uniform"), RunningStatistics(), PruningSchedule(start=1))
    with pytest.raises(ValueError, match="method='pruner_zero' reads gradients of calibration text"):
        trainer_for(tiny_llama(), tmp_path, 2, callback).train()


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    whole = tiny_llama()
    trainer_for(whole, tmp_path, 9, gradual(), **arguments).train()
    zero, size = removed(whole)
    assert zero == round(0.6 * size)
    resumed = tiny_llama(seed=3)
    trainer_for(resumed, tmp_path, 9, gradual(), **arguments).train(str(tmp_path / "checkpoint-4"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_from_a_checkpoint_without_them_pruning_waits_for_a_step(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(tiny_llama(), tmp_path, 4, **arguments).train()
    callback = DSACallback(DSAConfig(0.6), RunningStatistics(), PruningSchedule(start=2))
    model = tiny_llama()
    trainer_for(model, tmp_path, 6, callback, **arguments).train(str(tmp_path / "checkpoint-4"))
    zero, size = removed(model)
    assert zero == round(0.6 * size) and callback.report.calibration["tokens"] == 4 * 12


def test_a_file_of_them_that_was_cut_off_is_named(tmp_path):
    running = RunningStatistics()
    running.watch(tiny_llama(), find_architecture(tiny_llama()))
    running.save(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="dsa_statistics.safetensors is damaged.*remove it"):
        running.load(tmp_path)


def test_they_see_the_weights_behind_adapters(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(
        tiny_llama(), SparseLoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
    )
    trainer_for(model, tmp_path, 9, gradual()).train()
    zero, size = removed(model.merge_and_unload())
    assert zero == round(0.6 * size)


def test_what_they_cannot_see_is_refused():
    with pytest.raises(ValueError, match=r"decay is in \[0, 1\], got 2"):
        RunningStatistics(2)
    with pytest.raises(ValueError, match="start=1 or later"):
        DSACallback(DSAConfig(0.5), RunningStatistics())
    model = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=64, num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot see what .*experts.* multiplies"):
        RunningStatistics().watch(model, find_architecture(model))
