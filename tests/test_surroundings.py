"""What a machine or a user has set does not reach the tests: some of them are run among all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .surroundings import FOREIGN, calm


ROOT = Path(__file__).resolve().parents[1]
HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_TOKEN": "hf_of_somebody_else",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "debug",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",
    "ACCELERATE_USE_FSDP": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "LC_ALL": "C",
    "COLUMNS": "40",
    "NO_COLOR": "1",
    "FORCE_COLOR": "1",
    "MPLBACKEND": "none such",
    "PYTHONWARNINGS": "default",
}
# One of each kind that something of it broke: pushing, text from the Hub, words of a command, a cache, training.
SOME = (
    "tests/sharing/test_push.py::test_a_second_push_changes_nothing",
    "tests/sharing/test_card.py::test_the_card_names_the_base_model_and_carries_its_licence",
    "tests/test_data.py::test_a_short_name_stands_for_a_repository_and_its_column",
    "tests/test_options.py::test_help_teaches_every_name",
    "tests/test_commands.py::test_bad_usage_is_one_clear_line_and_exit_code_2",
    "tests/evaluation/test_metric.py",
    "tests/recovery/test_recover.py::test_without_peft_all_weights_can_be_trained_and_adapters_say_what_to_install",
)


def test_its_import_clears_it_away():
    code = "import json, os; from tests import surroundings as s; print(json.dumps([dict(os.environ), s.HOME]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | HOSTILE, cwd=ROOT, capture_output=True, text=True, check=True
    )
    left, home = json.loads(done.stdout)
    assert {name: value for name, value in left.items() if name.startswith(FOREIGN)} == {"HF_HOME": home}
    assert not Path(home).exists()  # it went with the process


def test_what_is_not_foreign_stays():
    plain = {"PATH": "/bin", "HOME": "/home/me", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "LANG": "C"}
    assert calm(plain | {"HF_TOKEN": "x", "RANK": "0"}, "here") == plain | {
        "HF_HOME": "here",
        "MPLCONFIGDIR": "here",
        "XDG_CACHE_HOME": "here",
    }


def test_some_tests_pass_where_everything_is_set_against_them(tmp_path):
    """With a home that not even root can write, a temporary folder with spaces, and files for their owner only."""
    (tmp_path / "file").touch()
    (tmp_path / "t m p").mkdir()
    nowhere = str(tmp_path / "file" / "home")
    places = {"HOME": nowhere, "HF_HOME": nowhere, "HF_HUB_CACHE": nowhere, "XDG_CACHE_HOME": nowhere}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *SOME],
        env=plain | HOSTILE | places | {"TMPDIR": str(tmp_path / "t m p")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        umask=0o077,
        timeout=600,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
