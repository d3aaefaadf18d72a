"""What an interrupted run left is gone on with by the same run alone, and what differs is named."""

import pytest

from optimum_dsa import DSAConfig
from optimum_dsa.common.same_run import FINGERPRINTS, MOST, check_same_run


def refusal(known: dict, now: dict) -> str:
    with pytest.raises(ValueError) as error:
        check_same_run("The run in x", known, now, "begin anew")
    return str(error.value)


def test_the_settings_that_differ_are_named_and_no_others():
    config = DSAConfig(0.6).to_dict()
    other = DSAConfig(0.6, "sparsegpt", data={"num_samples": 4, "seed": 2**53}).to_dict()
    known = {"strategy": "auto", "config": config, "calibration": {"samples": 128}}
    found = refusal(known, known | {"config": other, "calibration": {"samples": 4}})
    assert found == (
        "The run in x was made with config.data.num_samples=None, not 4, config.data.seed=0, not 9007199254740992, "
        "config.method='wanda', not 'sparsegpt', calibration.samples=128, not 4; resume it with the same settings, or "
        "begin anew."
    )
    check_same_run("The run in x", known, known, "begin anew")


@pytest.mark.parametrize("known,now", [({"a": {}}, {}), ({}, {"a": 1}), ({"a": {"b": 1}}, {"a": 1})])
def test_a_setting_that_one_side_lacks_differs(known, now):
    assert "a=" in refusal(known, now)


def test_many_differences_are_counted_and_long_ones_cut():
    known = {f"setting{number}": "x" * 1000 for number in range(MOST + 3)}
    found = refusal(known, {})
    assert f"setting{MOST - 1}=" in found and f"setting{MOST}=" not in found and " and 3 more; " in found
    assert len(found) < 400


def test_settings_come_before_fingerprints_which_tell_nothing_to_read():
    known = {"a": 1, FINGERPRINTS: {"model": "x"}}
    assert "a=1, not 2;" in refusal(known, {"a": 2, FINGERPRINTS: {"model": "y"}})
    assert "another model" in refusal(known, {"a": 1, FINGERPRINTS: {"model": "y"}})
