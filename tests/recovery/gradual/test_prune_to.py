import pytest

from optimum_dsa import DSAConfig, find_architecture, prune
from optimum_dsa.pruning.zeros import count_zeros
from optimum_dsa.recovery.gradual.prune_to import prune_to

from ...tiny import tiny_llama, tokens


def zeros(model):
    return sum(count_zeros(model, find_architecture(model)).values())


def test_a_model_that_is_sparse_enough_is_left_alone():
    model = tiny_llama()
    prune(model, tokens(), DSAConfig(0.6))
    before = zeros(model)
    report, proposed = prune_to(model, None, DSAConfig(0.8, "magnitude", "uniform"), 0.4)
    assert report is None and zeros(model) == before
    assert list(proposed.values()) == pytest.approx([0.8] * 3, abs=1e-3)


def test_a_proposal_that_is_given_is_followed_as_far_as_zeros_allow():
    model = tiny_llama()
    config = DSAConfig(0.6, "magnitude", "uniform")
    names = [block.name for block in find_architecture(model).blocks]
    report, _ = prune_to(model, None, config, 0.6, dict(zip(names, (0.5, 0.6, 0.7))))
    assert list(report.achieved.values())[0] < list(report.achieved.values())[-1]
    config = DSAConfig(0.75, "magnitude", "uniform")
    report, _ = prune_to(model, None, config, 0.75, dict(zip(names, (0.9, 0.75, 0.6))))
    achieved = list(report.achieved.values())
    assert report.removed == zeros(model) and report.sparsity == pytest.approx(0.75, abs=1e-4)
    assert achieved[-1] >= 0.7 - 1e-3 and achieved[0] > achieved[-1]


def test_zeros_that_lie_unevenly_over_rows_count():
    model = tiny_llama()
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform"))  # over whole matrices: rows differ
    report, _ = prune_to(model, tokens(), DSAConfig(0.65, allocation="uniform"), 0.65)
    assert report.removed == round(0.65 * sum(report.allocation.sizes.values())) == zeros(model)


def test_zeros_that_lie_unevenly_over_matrices_count():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    report, _ = prune_to(model, None, DSAConfig(0.2, "magnitude", "uniform"), 0.2)
    assert report.sparsity == pytest.approx(0.2, abs=1e-4) and not model.model.layers[0].mlp.up_proj.weight.any()


@pytest.mark.parametrize("granularity", ["block", "matrix"])
def test_overrides_hold_at_the_end_and_on_the_way(granularity):
    model = tiny_llama()
    config = DSAConfig(0.6, "magnitude", "uniform", granularity=granularity, overrides=("up_proj=0.8", "q_proj=0.2"))
    _, proposed = prune_to(model, None, config, 0.3)
    report, _ = prune_to(model, None, config, 0.6, proposed)
    assert report.config == config and report.sparsity == pytest.approx(0.6, abs=1e-3)
    for weight in find_architecture(model).weights:
        share = (weight.tensor(model) == 0).float().mean().item()
        for name, expected in {"up_proj": 0.8, "q_proj": 0.2}.items():
            assert name not in weight.name or share == pytest.approx(expected, abs=0.01)
