"""What JSON calls a number, narrowed to what can be reckoned with."""

from __future__ import annotations

import sys
from typing import Any


LARGEST_WHOLE = 2**53  # beyond it, a share of a whole number is none: a float does not hold all of them


def is_number(value: Any) -> bool:
    """Whether `value` is finite and a float can hold it: JSON's whole numbers have any number of digits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max  # false of NaN


def is_real(value: Any) -> bool:
    """Whether `value` is a number, or what a measurement that broke down gives: an infinity or NaN."""
    return is_number(value) or isinstance(value, float)


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number from 0 to `LARGEST_WHOLE`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_WHOLE


def short(value: Any) -> str:
    """`value` as an error shows it."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."
