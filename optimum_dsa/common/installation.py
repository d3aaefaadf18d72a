"""How this package is installed, said in one place: errors, model cards and help take it from here."""

from __future__ import annotations

import shlex


# What pip is given: a checkout's folder. No index has this package; once one has, its name there goes in here, and the
# lines in README and docs, which a test holds against this.
TARGET = "."


def install_line(*extras: str) -> str:
    """The command that installs this package: `python -m pip install '.[plots]'`."""
    target = f"{TARGET}[{','.join(extras)}]" if extras else TARGET
    return f"python -m pip install {shlex.quote(target)}"


def how_to_install(*extras: str) -> str:
    """The command and where it is run, for the middle of a sentence."""
    return f"`{install_line(*extras)}`{_place('checkout')}"


def how_to_upgrade() -> str:
    """As `how_to_install`, where a newer version is needed."""
    if TARGET == ".":
        return f"`{install_line()}`{_place('newer checkout')}"
    return f"`{install_line().replace('install', 'install --upgrade', 1)}`"


def _place(what: str) -> str:
    return f" in a {what} of optimum-dsa, or with its wheel for the dot" if TARGET == "." else ""
