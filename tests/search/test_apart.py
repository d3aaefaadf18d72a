"""Validation that calibration has seen is none."""

import logging

import pytest
import torch

from optimum_dsa import Calibration
from optimum_dsa.search.apart import check_apart

from ..tiny import tokens


def calibration(windows):
    return Calibration({"input_ids": windows}, "x")


def test_texts_that_are_apart_pass_in_silence(caplog):
    check_apart(calibration(tokens()), tokens(8, 16, seed=5))
    check_apart(calibration(tokens(40, 16)), tokens(8, 32, seed=5))
    check_apart(None, tokens())
    check_apart(Calibration({"pixel_values": torch.zeros(2, 3)}, "x"), tokens())
    assert not caplog.records


@pytest.mark.parametrize("shared", [1, 5, 8])
def test_shared_windows_are_refused_with_their_number_and_the_way_out(shared):
    known, own = tokens(8, 16, seed=1), tokens(8, 16, seed=2)
    validation = torch.cat([own[shared:], known[:shared].flip(0)])
    with pytest.raises(ValueError, match=f"{shared} of 8 validation windows are calibration windows as well.*or none"):
        check_apart(calibration(known), validation)


def test_windows_of_two_lengths_are_told_to_be_shared():
    text = tokens(1, 512, seed=3).view(-1)
    with pytest.raises(ValueError, match="32 of 32"):
        check_apart(calibration(text.view(8, 64)), text.view(32, 16))
    with pytest.raises(ValueError, match="8 of 8"):
        check_apart(calibration(text.view(32, 16)), text.view(8, 64))


def test_a_few_that_texts_repeat_are_warned_of(caplog):
    known, own = tokens(8, 16, seed=1), tokens(40, 16, seed=2)
    with caplog.at_level(logging.WARNING):
        check_apart(calibration(known), torch.cat([own[:39], known[:1]]))
    assert "1 of 40 validation windows are calibration windows as well" in caplog.text
