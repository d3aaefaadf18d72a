"""What commands touch of argparse beyond its documentation; apart from `common/fences.py`, which needs torch."""

from __future__ import annotations

from argparse import Action, ArgumentParser

from ..common.fence_rows import FENCES


def actions_of(parser: ArgumentParser) -> list[Action]:
    """The options and positional arguments of a parser, in the order in which they were added."""
    try:
        return list(parser._actions)
    except AttributeError:
        raise FENCES["parser"].missing() from None


def exclusive_of(parser: ArgumentParser) -> list[list[Action]]:
    """The options of a parser that go without each other, group by group."""
    try:
        return [list(group._group_actions) for group in parser._mutually_exclusive_groups]
    except AttributeError:
        raise FENCES["parser"].missing() from None
