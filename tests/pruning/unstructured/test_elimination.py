"""The kernel of sparsegpt against its reference, in Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_dsa.pruning.unstructured.elimination import MOST_NEIGHBOURS, WIDEST, eliminate, elimination_on

from .test_updates import problem


ROOT = Path(__file__).resolve().parents[3]
CASES = {  # columns, first column, rows, neighbours, removed; without neighbours, and beside zeros, a mask is given
    "a mask": (64, 0, 40, 0, 0),
    "a run behind others, short": (50, 28, 33, 0, 0),
    "2:4": (64, 0, 33, 4, 2),
    "1:8": (64, 40, 7, 8, 7),
    "7:12": (60, 0, 32, 12, 5),
    "2:4 beside zeros": (64, 0, 33, 4, 2),
    "1:8 beside zeros": (64, 8, 20, 8, 7),
    "all stay": (16, 0, 5, 16, 0),
    "one column": (1, 3, 5, 0, 0),
}


def run_of(case, device="cpu"):
    """The arguments of `eliminate`: a part of a larger factor, and two dead inputs."""
    columns, first, rows, neighbours, removed = CASES[case]
    weight, statistics, _ = problem(rows, first + columns + 9)
    here = slice(first, first + columns)
    block = weight.t().contiguous()[here].clone()
    block[:, 0] = block[0, 0]  # equal scores
    dead = torch.zeros(columns, dtype=torch.bool)
    dead[columns // 2 :: 7] = True
    keep = (
        None
        if neighbours and "beside" not in case
        else torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5
    )
    factor = statistics.inverse_factor().factor
    tensors = (None if each is None else each.to(device) for each in (block, factor, dead, keep))
    block, factor, dead, keep = tensors
    return block, factor[here, here], dead, keep, neighbours, removed


def check_equal(kernel, case, device="cpu"):
    reference, *others = run_of(case, device)
    block = reference.clone()
    expected, errors = eliminate(reference, *others), kernel(block, *others)
    assert torch.equal(block == 0, reference == 0)
    torch.testing.assert_close(block, reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")
def test_the_kernel_does_what_the_reference_does():
    # Triton asks once whether to interpret, when it is imported, and PyTorch may have imported it already.
    done = subprocess.run(
        [sys.executable, "-m", __name__], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split("\n")[:-1] == list(CASES), done.stderr[-3000:]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3]])
def test_of_every_group_the_number_asked_for_goes_and_the_dead_first(case):
    block, upper, dead, keep, neighbours, removed = run_of(case)
    eliminate(block, upper, dead, keep, neighbours, removed)
    gone = (block == 0).unflatten(0, (-1, neighbours))
    older = torch.zeros_like(gone) if keep is None else ~keep.t().unflatten(0, (-1, neighbours))
    assert (gone.sum(1) == older.sum(1).clamp_min(removed)).all() and gone[older].all()
    first = dead.unflatten(0, (-1, neighbours))[:, :, None] & ~older
    room = (removed - older.sum(1)).clamp_min(0)
    assert ((gone & first).sum(1) == first.sum(1).minimum(room)).all()


def test_a_cpu_and_runs_that_the_kernel_does_not_hold_take_the_reference():
    assert elimination_on(torch.device("cpu"), 128) is eliminate
    for width, neighbours in ((WIDEST + 1, 0), (128, MOST_NEIGHBOURS + 1)):
        assert elimination_on(torch.device("cuda"), width, neighbours) is eliminate


if __name__ == "__main__":
    from optimum_dsa.pruning.unstructured.elimination_kernel import eliminate_in_one

    for case in CASES:
        check_equal(eliminate_in_one, case)
        print(case)
