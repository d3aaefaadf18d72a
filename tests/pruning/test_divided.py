"""Prunes in several processes: the bits of one, whoever does what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_dsa import DSAConfig, DSAStructuredConfig
from optimum_dsa.common.ranks import ALONE, Ranks
from optimum_dsa.pruning.divided import check_divisible

from .. import over_ranks


ROOT = Path(__file__).resolve().parents[2]


def launch(processes, folder):
    """What every process of a run leaves in `folder`."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone")
    command = [sys.executable, *launcher, str(ROOT / "tests" / "over_ranks.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}-of-{processes}.json").read_text()) for rank in range(processes)]


@pytest.mark.contract
def test_two_and_three_processes_end_with_the_bits_of_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives each process: more of them add in another order
    try:
        expected = {name: over_ranks.outcome(name, ALONE) for name in over_ranks.CASES}
        over_ranks.tiny_llama().save_pretrained(tmp_path / "dense")
        spread = over_ranks.spread(tmp_path, ALONE)
    finally:
        torch.set_num_threads(threads)
    assert spread["places"] == ["cpu", "disk"]
    assert len({found["weights"] for found in expected.values()}) == len(expected)
    for processes in (2, 3):
        several = launch(processes, tmp_path)
        for found in several:
            for name, outcome in expected.items():
                assert found[name] == outcome, (processes, name)
            assert found["spread"] == spread
            assert found["resumed"] == expected["experts, sparsegpt"]
            # The error of one ends all, each with its words.
            assert all("out of order" in said for said in found["failed"])
            prefix = f"on rank {processes - 1} of {processes}: "
            assert all(said.startswith(prefix) != (found is several[-1]) for said in found["failed"])
            assert "The calibration data of rank 1" in found["others"]
        for block in sorted((tmp_path / "blocks").glob("block-*"))[1:]:
            block.unlink()  # as if it had been killed behind the first block; the others go on as three


@pytest.mark.parametrize(
    "config,said",
    [
        (DSAConfig(0.5, reconstruct=4), "reconstruct=4 works in one process"),
        (DSAConfig(0.5, allocation="uniform", pattern="2:4", permute="ria"), "permute='ria' works in one process"),
        (DSAStructuredConfig(0.2), "Structures are cut out in one process"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(config, said):
    check_divisible(config, ALONE)
    with pytest.raises(ValueError, match=said):
        check_divisible(config, Ranks(1, 2))
