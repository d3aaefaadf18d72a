"""Training under a budget in two processes, which see different text and end with the same zeros."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[3]

# A Trainer as `torchrun` starts it; argument: the folder, in which each process leaves what it ends with.
PROGRAM = """
import hashlib, json, pathlib, sys
import torch
torch.set_num_threads(1)
from transformers import Trainer, TrainingArguments
from optimum_dsa import find_architecture
from optimum_dsa.checkpoint.origin import report_of
from optimum_dsa import RecoveryConfig
from optimum_dsa.recovery.elsa.budget import with_budget
from optimum_dsa.recovery.elsa.callback import ElsaCallback
from tests.tiny import tiny_llama, tokens

folder = pathlib.Path(sys.argv[1])
model = tiny_llama()
config = RecoveryConfig(method="elsa", sparsity=0.7, steps=6)
report = with_budget(model, report_of(model), config)
training = TrainingArguments(
    str(folder / "trainer"), max_steps=6, per_device_train_batch_size=2, learning_rate=0.01, save_strategy="no",
    logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
)
rows = [{"input_ids": row, "labels": row} for row in tokens(48)]
trainer = Trainer(model, training, train_dataset=rows)
ElsaCallback(report, every=2).attach(trainer)
trainer.train()
matrices = [weight.tensor(model) for weight in find_architecture(model).weights]
content = b"".join(matrix.contiguous().numpy().tobytes() for matrix in matrices)
left = {
    "zeros": [int((matrix == 0).sum()) for matrix in matrices],
    "weights": hashlib.sha256(content).hexdigest(),
    "processes": training.world_size,
    "budget": report.allocation.counts(),
}
(folder / f"{training.process_index}.json").write_text(json.dumps(left))
"""


@pytest.mark.contract
def test_two_processes_end_with_one_model_and_the_budget(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    command = [sys.executable, *launcher, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert first == second and first["processes"] == 2
    assert sum(first["zeros"]) == sum(first["budget"].values()) > 0
