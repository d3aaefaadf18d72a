"""A Trainer with `DSACallback` ends with the zeros that it should have, however it got there."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from optimum_dsa import DSACallback, DSAConfig, DSAPruner, PruningSchedule, SparseLoraConfig, prune
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.recovery.gradual.sharding import refuse_engine

from ...tiny import tiny_llama, tokens
from ..adapters.test_peft_method import same_zeros, sparse_llama, zeros


pytestmark = pytest.mark.contract

LENGTH = 12


def trainer_for(model, folder, steps=6, callback=None, seed=0, **arguments):
    """A Trainer on random tokens, with SGD-proof AdamW settings: momentum and decay."""
    data = [{"input_ids": row, "labels": row} for row in tokens(64, LENGTH, seed)]
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 0.01, "weight_decay": 0.1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 5,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(str(folder), **{**defaults, **arguments}), train_dataset=data)
    if callback is not None:
        callback.attach(trainer)
    return trainer


def removed(model):
    found = zeros(model).values()
    return sum(int(zero.sum()) for zero in found), sum(zero.numel() for zero in found)


def test_a_hundred_adamw_steps_keep_every_zero_and_change_everything_else(tmp_path):
    model = sparse_llama(sparsity=0.6)
    before, weight = zeros(model), model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer_for(model, tmp_path, 100, DSACallback()).train()
    assert same_zeros(model, before)
    after = model.model.layers[0].mlp.up_proj.weight
    assert (after != weight)[weight != 0].all()


def test_without_the_callback_zeros_are_lost(tmp_path):
    model = sparse_llama(sparsity=0.6)
    before = zeros(model)
    trainer_for(model, tmp_path, 2).train()
    assert not same_zeros(model, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"optim": "sgd", "optim_args": None},
    ],
    ids=["accumulation", "bf16 autocast", "checkpointing", "sgd"],
)
def test_zeros_hold_under(tmp_path, arguments):
    model = sparse_llama(sparsity=0.6)
    before = zeros(model)
    trainer_for(model, tmp_path, 6, DSACallback(), **arguments).train()
    assert same_zeros(model, before)


def test_zeros_hold_in_bfloat16_weights_and_no_other_appears(tmp_path):
    model = sparse_llama(sparsity=0.6).to(torch.bfloat16)
    before = zeros(model)
    trainer_for(model, tmp_path, 30, DSACallback(), learning_rate=0.05).train()
    assert same_zeros(model, before)


def test_gradients_of_pruned_weights_are_zero_before_they_are_clipped(tmp_path):
    model = sparse_llama(sparsity=0.6)
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, zero in zeros(model).items():
                seen.append(model.get_parameter(name).grad[zero].abs().sum().item())

    trainer = trainer_for(model, tmp_path, 2, DSACallback())
    trainer.add_callback(Look())
    trainer.train()
    assert seen and not any(seen)
    assert not model.model.layers[0].mlp.up_proj.weight._backward_hooks


@pytest.mark.parametrize("adapter", ["lora", "sparse"])
def test_peft_models_are_trained_and_their_base_stays(tmp_path, adapter):
    cls = {"lora": LoraConfig, "sparse": SparseLoraConfig}[adapter]
    model = get_peft_model(sparse_llama(sparsity=0.6), cls(r=2, target_modules="all-linear"))
    before = zeros(model)
    trainer_for(model, tmp_path, 4, DSACallback(), save_strategy="steps", save_steps=2).train()
    assert same_zeros(model, before)
    described = json.loads((tmp_path / "checkpoint-2" / "dsa_config.json").read_text())
    assert described["achieved"]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert list(described["allocation"]["sparsity"]) == [f"model.layers.{index}" for index in range(3)]


def test_resuming_from_the_middle_ends_with_the_same_weights(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole = sparse_llama(sparsity=0.6)
    before = zeros(whole)
    trainer_for(whole, tmp_path, 6, DSACallback(), **arguments).train()
    resumed = tiny_llama(seed=3)
    trainer_for(resumed, tmp_path, 6, DSACallback(), **arguments).train(str(tmp_path / "checkpoint-3"))
    assert same_zeros(resumed, before)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resuming_from_a_checkpoint_made_without_the_callback(tmp_path):
    model = sparse_llama(sparsity=0.6)
    arguments = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(model, tmp_path, 4, **arguments).train()
    assert removed(model)[0] == 0
    callback = DSACallback(DSAConfig(0.5, allocation="owl"), tokens(), PruningSchedule(end=1))
    trainer = trainer_for(
        tiny_llama(), tmp_path, 4, callback, restore_callback_states_from_checkpoint=True, **arguments
    )
    trainer.train(str(tmp_path / "checkpoint-2"))
    zero, size = removed(trainer.model)
    assert zero == round(0.5 * size) and callback.report.removed == zero


SCHEDULES = {
    "one shot": (DSAConfig(0.63, allocation="dsa"), PruningSchedule(start=3)),
    "rows": (DSAConfig(0.63, allocation="dsa"), PruningSchedule(end=8, every=2)),
    "matrices": (DSAConfig(0.71, "magnitude", "er"), PruningSchedule(1, 7, 1, initial=0.2)),
    "groups": (DSAConfig(0.6, "sparsegpt", "owl"), PruningSchedule(end=6, every=3, shape="linear")),
    "alps": (DSAConfig(0.6, "alps", "owl"), PruningSchedule(end=6, every=3)),
    "2:4": (DSAConfig(0.5, allocation="uniform", pattern="2:4"), PruningSchedule(start=2)),
}


@pytest.mark.parametrize("reallocate", ["always", "once", (4,)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradual_pruning_reaches_the_budget_to_one_weight(tmp_path, name, reallocate):
    config, schedule = SCHEDULES[name]
    model, seen = tiny_llama(), []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(zeros(model))

    callback = DSACallback(config, tokens(), schedule, reallocate)
    trainer = trainer_for(model, tmp_path, 10, callback)
    trainer.add_callback(Count())
    trainer.train()
    zero, size = removed(model)
    assert zero == round(config.sparsity * size) == callback.report.removed
    totals = [sum(int(zero.sum()) for zero in step.values()) for step in seen]
    for step, total in enumerate(totals):
        assert total == round(schedule.sparsity(step, config.sparsity) * size)
    for before, after in zip(seen, seen[1:]):
        assert all((after[name] >= before[name]).all() for name in before)  # no zero comes back


def test_a_resumed_schedule_ends_like_an_uninterrupted_one(tmp_path):
    def callback():
        return DSACallback(DSAConfig(0.6, allocation="owl"), tokens(), PruningSchedule(end=6, every=2), "once")

    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole = tiny_llama()
    trainer_for(whole, tmp_path, 8, callback(), **arguments).train()
    resumed = tiny_llama(seed=3)
    trainer_for(resumed, tmp_path, 8, callback(), **arguments).train(str(tmp_path / "checkpoint-3"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_peft_model_is_pruned_while_its_adapter_is_trained(tmp_path):
    model = get_peft_model(
        tiny_llama(), SparseLoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
    )
    callback = DSACallback(DSAConfig(0.6, granularity="matrix"), tokens(), PruningSchedule(end=4, every=2), "once")
    trainer_for(model, tmp_path, 6, callback).train()
    zero, size = removed(model.merge_and_unload())
    assert zero == round(0.6 * size)
    assert not [name for name in callback.report.achieved if "lora" in name or "base_layer" in name]


GUIDE = Path(__file__).parents[3] / "docs" / "source" / "guides" / "recovery.md"


def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    """With fewer steps; the text is read with the tokenizer beside the model."""
    text = GUIDE.read_text()
    blocks = [
        re.search(rf"^##+ {title}$.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
        for title in ("In a Trainer of your own", "Pruning while training")
    ]
    code = "\n".join(blocks).replace("DSACallback().attach(trainer)\ntrainer.train()\n", "") + "trainer.train()\n"
    code = code.replace("end=600", "end=4").replace("every=50", "every=2")
    monkeypatch.chdir(tmp_path)
    Path("calibration.txt").write_text("\n".join(demo_texts("calibration"))[:20_000])
    pruner = DSAPruner.from_pretrained(demo_model())
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    arguments = TrainingArguments("out", max_steps=6, report_to="none", disable_tqdm=True, use_cpu=True)
    pruner.model.config.max_position_embeddings = 32  # short windows
    exec(code, {"model": pruner.model, "arguments": arguments, "data": data})
    zero, size = removed(pruner.model)
    assert zero == round(0.7 * size)
    with pytest.raises(ValueError, match=r"give one to the Trainer \(processing_class=tokenizer\)"):
        trainer_for(tiny_llama(), tmp_path, 2, DSACallback(DSAConfig(0.5), "calibration.txt")).train()


def test_sparsity_and_allocation_reach_reporters_and_the_history(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = tiny_llama()
    trainer = trainer_for(model, tmp_path, 6, logging_steps=2)
    trainer.callback_handler.callbacks.insert(1, Reporter())  # where reporters of `report_to` are
    DSACallback(DSAConfig(0.6), tokens(), PruningSchedule(end=4, every=4)).attach(trainer)
    trainer.train()
    assert [round(entry["sparsity"], 6) for entry in seen[:3]] == [0, 0, pytest.approx(0.6, abs=1e-4)]
    assert "sparsity/model.layers.2" in seen[0] and "sparsity/model.layers.2" in seen[2]
    assert "sparsity/model.layers.2" not in seen[1]
    assert trainer.state.log_history[2]["sparsity"] == seen[2]["sparsity"]


def test_checkpoints_and_pushes_carry_the_config_of_the_pruned_model(tmp_path):
    config = DSAConfig(0.6, allocation="owl")
    callback = DSACallback(config, tokens())
    trainer = trainer_for(tiny_llama(), tmp_path, 4, callback, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert DSAConfig.from_pretrained(folder) == config
        described = json.loads((folder / "dsa_config.json").read_text())
        assert described["achieved"]["removed"] == callback.report.removed
        assert described["recovery"]["kind"] == "DSACallback"


@pytest.mark.parametrize(
    "build,arguments,message",
    [
        (lambda: DSACallback(DSAConfig(0.5), tokens(), PruningSchedule(end=6)), {}, "training ends after 6 steps"),
        (
            lambda: DSACallback(DSAConfig(0.5), tokens(), PruningSchedule(end=4)),
            {"load_best_model_at_end": True},
            "load_best_model_at_end would bring back",
        ),
        (lambda: DSACallback(DSAConfig(0.5)), {}, "needs calibration data"),
        (lambda: DSACallback(calibration=tokens()), {}, "give a DSAConfig with them"),
        (lambda: DSACallback(DSAConfig(0.5), reallocate="never"), {}, "'always', 'once' or steps"),
        (
            lambda: DSACallback(
                DSAConfig(0.5, allocation="uniform", pattern="2:4"), schedule=PruningSchedule(end=4)
            ),
            {},
            "no sparsities in between",
        ),
        (
            lambda: DSACallback(DSAConfig(0.5, allocation="uniform", pattern="2:4", permute="ria"), tokens()),
            {},
            "prune with it first and train then",
        ),
        (lambda: DSACallback(DSAConfig(0.5), schedule=PruningSchedule(end=4, initial=0.6)), {}, "above the 0.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(tmp_path, build, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer = trainer_for(tiny_llama(), tmp_path, 6)
        for name, value in arguments.items():
            setattr(trainer.args, name, value)
        build().attach(trainer).on_train_begin(
            trainer.args, started(trainer), trainer.control, model=trainer.model, processing_class=None
        )


def started(trainer):
    trainer.state.max_steps = trainer.args.max_steps
    return trainer.state


@pytest.mark.parametrize(
    "kind,name",
    [("FSDP", "FSDP 1 makes one flat tensor"), ("DEEPSPEED", r"DeepSpeed \(ZeRO, any stage\) keeps")],
)
def test_engines_that_no_mask_reaches_are_refused(monkeypatch, kind, name):
    model = tiny_llama()
    refuse_engine(model)
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=f"{name}.*train with DDP"):
        refuse_engine(model)


def test_calibration_is_shared_with_the_plain_pruner(tmp_path):
    model, plain = tiny_llama(), tiny_llama()
    prune(plain, tokens(), DSAConfig(0.6))
    trainer_for(model, tmp_path, 1, DSACallback(DSAConfig(0.6), tokens()), learning_rate=1e-9).train()
    assert same_zeros(model, zeros(plain))
