"""`--dataset` and `--weights`: one source, or several with their shares."""

import pytest

from optimum_dsa.commands.base import asked_source

from ..test_docs import command_parsers


REQUIRED = {
    "prune": ["m", "-o", "o"],
    "plan": ["m"],
    "search": ["m", "-o", "o"],
    "report": ["m"],
    "recover": ["m", "-o", "o"],
    "evaluate": ["m"],
}


def source(name, *options):
    return asked_source(command_parsers()[name].parse_args([*REQUIRED[name], *options]))


@pytest.mark.parametrize("name", REQUIRED)
def test_sources_of_every_command(name):
    assert source(name, "--dataset", "a.txt") == "a.txt"
    assert source(name, "--dataset", "a.txt", "--dataset", "b") == {"a.txt": 1.0, "b": 1.0}
    assert source(name, "--dataset", "a=1.txt", "--dataset", "b", "--weights", "3", "0.5") == {
        "a=1.txt": 3.0,
        "b": 0.5,
    }
    for options, message in (
        (["--dataset", "a", "--weights", "1", "2"], "--weights has 2 numbers for 1 of --dataset"),
        (["--dataset", "a", "--dataset", "a"], "--dataset names a more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            source(name, *options)


def test_what_is_read_where_nothing_is_named():
    assert source("prune") == source("report") == "wikitext2" and source("evaluate") is None
