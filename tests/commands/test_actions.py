"""An option that is given twice: lists add up, and two values of one thing are refused."""

import pytest

from ..test_commands import run
from ..test_docs import command_parsers


COMMANDS = command_parsers()
REQUIRED = {
    name: [
        word
        for action in parser.complete()._actions
        if action.required
        for word in (([action.option_strings[-1]] if action.option_strings else []) + ["x"])
    ]
    for name, parser in COMMANDS.items()
}


def parse(name, *words):
    return COMMANDS[name].parse_args([*REQUIRED[name], *words])


def options(kind):
    """Command and action of every optional option of a kind."""
    for name, parser in COMMANDS.items():
        for action in parser._actions:
            if action.option_strings and not action.required and kind(action):
                yield pytest.param(name, action, id=f"{name} {action.option_strings[-1]}")


def refused(capsys, name, *words):
    with pytest.raises(SystemExit) as ended:
        parse(name, *words)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and len(errors.splitlines()) == 1
    return errors


@pytest.mark.parametrize("name,action", options(lambda action: action.nargs in ("+", "*")))
def test_a_list_that_is_given_twice_adds_up(name, action):
    flag, kind = action.option_strings[-1], action.type or str
    found = getattr(parse(name, flag, "1", "2", flag, "3"), action.dest)
    assert found == [kind(text) for text in "123"]


@pytest.mark.parametrize(
    "name,action",
    options(lambda action: action.nargs is None and not hasattr(action, "replaces") and action.dest != "config"),
)
def test_one_value_is_not_given_twice(capsys, name, action):
    flag = action.option_strings[-1]
    one, other = [*action.choices][:2] if action.choices else ("3", "4")
    kind = action.type or str
    assert f"{flag} is given twice, {kind(one)} and {kind(other)}" in refused(capsys, name, flag, one, flag, other)
    assert getattr(parse(name, flag, one, flag, one), action.dest) == kind(one)


@pytest.mark.parametrize(
    "words", [("--bos", "--no-bos"), ("--structures", "ffn", "--true-sequential", "--no-true-sequential")]
)
def test_a_switch_is_not_both_on_and_off(capsys, words):
    assert "is given twice otherwise" in refused(capsys, "prune", *words)


def test_what_is_missing_is_one_line(capsys):
    with pytest.raises(SystemExit):
        COMMANDS["prune"].parse_args([])
    errors = capsys.readouterr().err
    assert "required: model, -o/--output (see optimum-cli dsa prune --help)" in errors and errors.count("\n") == 1


def test_a_revision_of_a_folder_is_refused(monkeypatch, capsys, tmp_path):
    code, _, errors = run(monkeypatch, capsys, "verify", str(tmp_path), "--revision", "v9")
    assert code == 2 and "--revision v9 is of a Hub model" in errors and errors.count("\n") == 1
