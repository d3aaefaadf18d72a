import torch

from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.allocation import Unit
from optimum_dsa.pruning.unstructured.metrics import magnitude, wanda


def unit(metric=magnitude):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 3, generator=generator), torch.randn(4, 5, generator=generator).bfloat16()]
    statistics = [LayerStatistics(3), LayerStatistics(5)]
    for each in statistics:
        each.update_(torch.randn(9, each.in_features, generator=generator))
    return Unit("block", 0.5, weights, statistics, metric)


def test_scores_are_those_of_the_metric_with_each_weights_own_statistics():
    for metric in (magnitude, wanda):
        seen = unit(metric)
        expected = [metric(w, s) for w, s in zip(seen.weights, seen.statistics)]
        assert all(torch.equal(a, b) for a, b in zip(seen.scores(), expected))
        flat = seen.flat_scores()
        assert flat.dtype == torch.float32 and torch.equal(flat, torch.cat([scores.flatten() for scores in expected]))


def test_a_split_vector_has_the_shapes_of_the_weights_and_is_no_copy():
    seen = unit()
    flat = seen.flat_scores()
    first, second = seen.split(flat)
    assert (first.shape, second.shape) == ((2, 3), (4, 5)) and torch.equal(second.flatten(), flat[6:])
    first.zero_()
    assert not flat[:6].any() and flat[6:].any()
