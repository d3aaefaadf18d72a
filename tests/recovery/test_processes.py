"""Recoveries in two processes, whole models or shares: what one process comes to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from optimum_dsa import DSAPruner, RecoveryConfig, RunningStatistics, demo_model
from optimum_dsa.commands.embedded import demo_texts
from optimum_dsa.recovery.adapters.modes import MODES
from optimum_dsa.recovery.gradual.sharding import refuse_launched
from optimum_dsa.recovery.processes import check_divided, check_ties, environment_kept, from_first, fsdp_settings
from optimum_dsa.recovery.recoveries import RECOVERIES

from . import in_two
from .adapters.test_peft_method import sparse_llama
from .test_recover import regular


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process comes to, and a folder with its checkpoints in the middle of the way."""
    top = tmp_path_factory.mktemp("processes")
    found = {}
    for name in in_two.CASES:
        found[name] = in_two.outcome(name, folder=top / f"one-{name}" if name in in_two.CARRIED else None)
    for name in in_two.CARRIED:
        shutil.rmtree(top / f"one-{name}" / "checkpoint-4")
    for name, sharding in in_two.GOING_ON:
        shutil.copytree(top / f"one-{name}", top / f"one-{name}-{sharding}")
    settings = {"method": "wanda", "allocation": "uniform"}
    found["scheduled"] = in_two.pruned_in_training(top / "plain", False, **settings)
    found["running"] = in_two.pruned_in_training(top / "plain2", False, RunningStatistics(), **settings)
    pruner = DSAPruner.from_pretrained(str(demo_model()))
    pruner.prune(None, in_two.DSAConfig(0.7, "magnitude", "uniform"))
    pruner.save_pretrained(top / "pruned")
    (top / "train.txt").write_text("\n".join(demo_texts("calibration"))[:20_000])
    return top, found


@pytest.fixture(scope="module")
def two(one):
    """What two processes come to."""
    # The one before that was tried, 5.15, reads what the optimizer knew to a device "cpu:0", which PyTorch does not.
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("processes on the CPU go on from a checkpoint with transformers 5.24")
    top, _ = one
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    command = [sys.executable, *launcher, str(ROOT / "tests" / "recovery" / "in_two.py"), str(top)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((top / "found.json").read_text()), done.stdout


def same(found, expected):
    assert found["kind"] == expected["kind"] and found["zeros"] == expected["zeros"] > 0
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    assert found["weights"] == pytest.approx(expected["weights"], rel=1e-5)
    assert found["kept"] == expected["kept"]


@pytest.mark.contract
def test_two_processes_end_where_one_does_with_all_zeros(one, two):
    assert {setting.get("method", "sparse-lora") for setting in in_two.CASES.values()} == set(RECOVERIES)
    assert set(MODES) < set(in_two.CASES)
    found, (_, expected) = two[0], one
    for name in in_two.CASES:
        assert expected[name]["kept"] == (name != "elsa")
        runs = {key: run for key, run in found.items() if key.startswith(f"{name}, ")}
        assert len(runs) >= (3 if name in in_two.CARRIED else 1)
        for key, run in runs.items():
            same(run, expected[name])
            if " on with " not in key:  # what began in one process has the mean loss of its second half
                assert run["trained"] == pytest.approx(expected[name]["trained"], abs=1e-3)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("name", in_two.CARRIED)
def test_what_two_processes_began_one_brings_to_the_end_of_an_undisturbed_run(one, two, name, sharding):
    top, expected = one
    folder = top / f"two-{sharding}-{name}"
    assert (folder / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file() == (sharding == "fsdp")
    shutil.rmtree(folder / "checkpoint-4")
    same(in_two.outcome(name, folder=folder, resume=True), expected[name])


@pytest.mark.parametrize("name", ["scheduled", "running"])
def test_a_callback_prunes_shares_to_the_same_budget(one, two, name):
    found, expected = two[0][name], one[1][name]
    assert found["zeros"] == expected["zeros"] > 0
    assert found["described"] == expected["described"]  # of each block, to one weight
    for fact in ("achieved", "logged", "weights"):
        assert found[fact] == pytest.approx(expected[fact], rel=1e-5)


def test_the_command_of_two_processes_writes_once(one, two):
    found, output = two
    assert found["command"] == 0 and output.count("saved to") == output.count("validation perplexity") == 1
    DSAPruner.from_pretrained(str(one[0] / "out")).verify()
    assert not [path.name for path in one[0].iterdir() if "dsa" in path.name]


def test_work_that_processes_cannot_divide_is_refused_before_it_begins(monkeypatch):
    check_divided(RecoveryConfig(batch_size=3))
    with pytest.raises(ValueError, match="sharding='fsdp' divides the model over processes, and there is one"):
        check_divided(RecoveryConfig(sharding="fsdp"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_divided(RecoveryConfig(batch_size=3))  # some clusters set it, and start one
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_divided(RecoveryConfig(batch_size=4, sharding="fsdp"), 4)
    with pytest.raises(ValueError, match="batch_size=3 is divided over the processes, and 2 of them do not divide it"):
        DSAPruner.from_pretrained(sparse_llama()).recover(regular(), RecoveryConfig(batch_size=3))
    with pytest.raises(ValueError, match="There are 3 windows to train on and 4 in a batch"):
        check_divided(RecoveryConfig(batch_size=4), 3)


@pytest.mark.parametrize("name,said", [("DEEPSPEED", "ZeRO, any stage"), ("FSDP", "start recover with torchrun")])
def test_engines_of_accelerates_own_configuration_are_refused(monkeypatch, name, said):
    refuse_launched()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=said):
        DSAPruner.from_pretrained(sparse_llama()).recover(regular(), RecoveryConfig())


def test_what_is_sharded_is_a_block_and_ties_that_would_be_parted_are_refused(tiny):
    check_ties(in_two.tiny_llama(tie_word_embeddings=True))
    assert fsdp_settings(tiny("t5"))["transformer_layer_cls_to_wrap"] == ["T5Block"]
    for family, name in (("bert", "cls.predictions.bias"), ("t5", "encoder.embed_tokens.weight")):
        with pytest.raises(ValueError, match=f"{name} is tied to another parameter than the embedding to its head"):
            check_ties(tiny(family))


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with environment_kept():
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert os.environ["FSDP_VERSION"] == "1" and "ACCELERATE_USE_FSDP" not in os.environ


def test_one_process_asks_nobody():
    assert from_first(lambda: 3) == 3
    with pytest.raises(ValueError, match="no"):
        from_first(lambda: int("no"))
    assert not torch.distributed.is_initialized()
