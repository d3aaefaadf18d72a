"""Readers of what others wrote, fed with real files made wrong; `python -m tests.fuzz --help` feeds them more."""

from optimum_dsa.common.registry import UnknownNameError


# What the public door catches and tells in one line; anything else is a defect of the reader.
NAMED = (ValueError, OSError, UnknownNameError)
