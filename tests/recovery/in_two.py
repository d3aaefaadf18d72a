"""Recoveries of tiny models, alone or as one of the processes that torchrun starts; arguments: folder, what to do."""

import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from optimum_dsa import (  # noqa: E402
    DSACallback,
    DSAConfig,
    DSAPruner,
    PruningSchedule,
    RecoveryConfig,
    RunningStatistics,
    find_architecture,
)
from optimum_dsa.common.devices import shard_on_cpu  # noqa: E402
from optimum_dsa.common.launched import process_count  # noqa: E402
from optimum_dsa.model.sharded import is_sharded, twin  # noqa: E402
from optimum_dsa.recovery.processes import environment_kept, is_first, wait_for_all  # noqa: E402
from tests.recovery.adapters.test_peft_method import sparse_llama  # noqa: E402
from tests.recovery.test_recover import regular  # noqa: E402
from tests.tiny import tiny_llama, tokens  # noqa: E402


# name -> settings; every row of RECOVERIES and of MODES is among them
CASES = {
    "full": {"method": "full", "learning_rate": 0.01},
    "teacher": {"method": "full", "learning_rate": 0.01, "distillation": 0.5},
    "elsa": {"method": "elsa", "learning_rate": 0.01, "project_every": 2},
    "mask": {"mode": "mask", "learning_rate": 0.02},
    "scale": {"mode": "scale", "learning_rate": 0.1},
    "spp": {"mode": "spp", "learning_rate": 0.1},
    "grouped": {"mode": "grouped", "learning_rate": 0.02},
}
# what goes on in other processes than it began in
CARRIED = ("full", "elsa", "mask")
GOING_ON = [("full", "none"), *((name, "fsdp") for name in CARRIED)]


def outcome(name, sharding="none", folder=None, resume=False):
    """What a recovery of four steps comes to: losses, weights by name, and where they are zero."""
    model = sparse_llama(sparsity=0.6, tie_word_embeddings=name == "teacher", num_hidden_layers=2)
    before = zeros(model)
    common = {"steps": 4, "batch_size": 4, "eval_steps": 4, "validation_windows": 8, "sharding": sharding}
    config = RecoveryConfig(**common, **CASES[name], **({"save_steps": 2} if folder else {}))
    pruner = DSAPruner.from_pretrained(model)
    teacher = tiny_llama(num_hidden_layers=2) if config.distillation else None
    # 22 - 8 windows: no multiple of the batch, and an epoch is over within the steps
    result = pruner.recover(regular(22), config, None, teacher, folder, resume)
    after = zeros(pruner.model)
    return {
        "trained": [entry["loss"] for entry in result.history],
        "losses": [entry["eval_loss"] for entry in result.history],
        "after": result.after,
        "kept": all(torch.equal(after[name], mask) for name, mask in before.items()),
        "zeros": sum(int(mask.sum()) for mask in after.values()),
        "kind": type(pruner.model).__name__,
        "weights": float(sum(value.double().abs().sum() for value in pruner.model.state_dict().values())),
    }


def zeros(model):
    return {weight.name: weight.tensor(model) == 0 for weight in find_architecture(model).weights}


def pruned_in_training(folder, sharding, statistics=None, **settings):
    """What a plain Trainer comes to that prunes in two moments of six steps, and the report beside its checkpoint."""
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=2)
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4 // process_count(),
        learning_rate=0.01,
        save_steps=6,
        logging_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.1,
        **({"fsdp": True, "fsdp_config": {"version": 2}} if sharding else {}),
    )
    if sharding:
        shard_on_cpu()
    rows = [{"input_ids": row, "labels": row} for row in tokens(48)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    schedule = PruningSchedule(start=1, end=4, every=3, initial=0.3)
    data = statistics or tokens(8)
    callback = DSACallback(DSAConfig(0.6, **settings), data, schedule).attach(trainer)
    trainer.train()
    assert is_sharded(trainer.model) == bool(sharding)
    whole = twin(trainer.model, gathered=True)
    wait_for_all()
    described = json.loads((folder / "checkpoint-6" / "dsa_config.json").read_text())
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "zeros": sum(int(mask.sum()) for mask in zeros(whole).values()),
        "logged": logged,
        "achieved": callback.report.sparsity,
        "described": described["achieved"],
        "weights": float(sum(value.double().abs().sum() for value in whole.state_dict().values())),
    }


def command(folder):
    """The exit code of the command, run here."""
    from optimum.commands.optimum_cli import main

    options = (
        "--steps 2 --rank 4 --batch-size 4 --sequence-length 32 --validation-windows 4 --sharding fsdp --save-steps 1"
    )
    given = ["recover", folder / "pruned", "-o", folder / "out", "--dataset", folder / "train.txt", *options.split()]
    sys.argv = ["optimum-cli", "dsa", *map(str, given)]
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    top, found = Path(sys.argv[1]), {}
    for name in CASES:
        for sharding in ("none", "fsdp") if name in CARRIED else ("fsdp",):
            folder = top / f"two-{sharding}-{name}" if name in CARRIED else None
            found[f"{name}, {sharding}"] = outcome(name, sharding, folder)
    for name, sharding in GOING_ON:
        found[f"{name}, on with {sharding}"] = outcome(name, sharding, top / f"one-{name}-{sharding}", resume=True)
    settings = {"method": "wanda", "allocation": "uniform"}
    with environment_kept():  # in which accelerate writes that FSDP is on
        found["scheduled"] = pruned_in_training(top / "scheduled", True, **settings)
        found["running"] = pruned_in_training(top / "running", True, RunningStatistics(), **settings)
    found["command"] = command(top)
    if is_first():
        (top / "found.json").write_text(json.dumps(found))
