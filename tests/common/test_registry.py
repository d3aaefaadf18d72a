import pytest

from optimum_dsa.common.registry import Registry, UnknownNameError


@pytest.fixture
def registry():
    registry = Registry("reduction")

    @registry.register(reference="https://example.org", matrix=True)
    def variance(x):
        return x

    registry.add("mean", max)
    return registry


def test_an_operation_is_known_by_its_own_name_with_its_facts(registry):
    assert registry["variance"].__name__ == "variance"
    assert registry.references == {"variance": "https://example.org", "mean": None}
    assert registry.fact("variance", "matrix") is True
    assert registry.fact("mean", "matrix", False) is False


def test_an_unknown_name_is_answered_with_the_near_one(registry):
    with pytest.raises(
        UnknownNameError, match="^Unknown reduction 'varianse'. Did you mean 'variance'\\? Known: mean"
    ):
        registry["varianse"]


def test_a_name_is_taken_once_and_free_again_after_deletion(registry):
    with pytest.raises(ValueError, match="already registered"):
        registry.add("mean", min)
    del registry["mean"]
    registry.add("mean", min)
    assert registry["mean"] is min
