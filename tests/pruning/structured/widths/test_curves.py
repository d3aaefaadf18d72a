"""The whole error curve is what each refit leaves, and what silencing leaves, number by number."""

import pytest
import torch

from optimum_dsa.pruning.structured.refit import refit_columns
from optimum_dsa.pruning.structured.widths.curves import error_curve

from ..test_importance import SIZE, heads, numbers, parts, statistics


def gone_of(columns):
    gone = torch.zeros(SIZE, dtype=torch.bool)
    gone[columns.flatten()] = True
    return gone


def lost(inputs, change, mean=False):
    inputs = inputs - inputs.mean(0) if mean else inputs
    return (inputs @ change.t()).square().sum().double()


@pytest.mark.parametrize("columns", [heads(), torch.arange(SIZE)[:, None]], ids=["heads", "channels"])
@pytest.mark.parametrize("update", ["none", "bias", "refit"])
def test_it_is_the_error_of_every_number(columns, update):
    reader, maker, inputs = numbers()
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(1))
    curve = error_curve(parts(reader, maker, inputs, columns), order, update)
    assert curve.shape == (len(columns) + 1,) and curve[0] == 0 and (curve.diff() >= 0).all()
    for number in range(1, len(columns)):
        gone = gone_of(columns[order[:number]])
        new = reader.masked_fill(gone, 0)
        if update == "refit":
            new = refit_columns(reader, statistics(inputs), gone, 1e-6)
        torch.testing.assert_close(curve[number], lost(inputs, new - reader, update == "bias"), rtol=2e-3, atol=1e-3)


def test_what_no_structure_owns_stays_and_makes_up_for_the_rest():
    reader, maker, inputs = numbers()
    columns = heads()[:2]
    curve = error_curve(parts(reader, maker, inputs, columns), torch.tensor([1, 0]), "refit")
    gone = gone_of(columns)
    error = lost(inputs, refit_columns(reader, statistics(inputs), gone, 1e-6) - reader)
    torch.testing.assert_close(curve[2], error, rtol=2e-3, atol=1e-3)


def test_no_factor_is_said():
    reader, maker, inputs = numbers(tokens=3)
    with pytest.raises(ValueError, match="no Cholesky factor at damping 0; give a larger damping"):
        error_curve(parts(reader, maker, inputs, heads(), damping=0.0), torch.arange(4), "refit")
