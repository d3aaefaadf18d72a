import pytest
import torch

from optimum_dsa.model.factor import damped, factor_of_inverse


def moment(tokens=40, columns=12):
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    return inputs.t() @ inputs


def test_the_factor_is_that_of_the_inverse():
    found = factor_of_inverse(moment())
    assert torch.equal(found, found.triu())
    assert torch.allclose(found.t() @ found @ moment(), torch.eye(12), atol=1e-5)


def test_a_matrix_without_an_inverse_has_none():
    assert factor_of_inverse(torch.zeros(3, 3)) is None
    assert factor_of_inverse(-torch.eye(3)) is None


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_damping_adds_to_the_diagonal_of_a_copy(damping):
    given = moment()
    given[3] = given[:, 3] = 0  # an input that never fired
    before = given.clone()
    found = damped(given, damping)
    assert torch.equal(given, before)
    filled = before.diagonal().clone()
    filled[3] = 1
    assert torch.allclose(found.diagonal(), filled + damping * filled.mean())
    assert torch.equal(found - found.diagonal().diag(), before - before.diagonal().diag())
