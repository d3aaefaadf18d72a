"""Errors of the library as a shell sees them, and commands that are printed to be pasted."""

import re
import shlex
from argparse import ArgumentParser
from dataclasses import fields

import pytest

from optimum_dsa import DSAConfig, DSAPruner, RecoveryConfig, demo_model
from optimum_dsa.commands.dsa import DSACommand
from optimum_dsa.commands.options import CommandParser, as_given, in_options, taken
from optimum_dsa.common.settings import nested, options_of, rule_of, section_types

from .test_commands import run


CONFIGS = {"prune": DSAConfig, "plan": DSAConfig, "search": DSAConfig, "recover": RecoveryConfig}
# Options of prune that some setting does not go with, or that are wrong by themselves.
WRONG = [
    "--reconstruct -1",
    "--reconstruct 4 --rate 0",
    "--reconstruct 4 --one-pass",
    "--reconstruct 4 --span 2 --apart",
    "--reconstruct 4 --span 2 --device-map disk",
    "--span 2",
    "--apart",
    "--residual",
    "--targets dense",
    "--targets other",
    "--method sparsegpt --targets dense --one-pass",
    "--true-sequential --one-pass",
    "--permute ria",
    "--allocation auto --spread 0.1",
    "--allocation auto --granularity matrix",
    "--granularity row",
    "--pattern 2:4",
    "--pattern 2:8",
    "--pattern mixed:3 --min-sparsity 0.4 --max-sparsity 0.6",
    "--max-sparsity 0.3",
    "--num-samples 0",
    "--sequence-length 1",
    "--seed -1",
    "--batch-size 0",
    "--spread 2",
    "--damping -1",
    "--max-shard-size big",
    "--quality good --targets sparse",
    "--quality best --update refit",
]
OF_RECOVER = [
    "--steps 0",
    "--method elsa --patience 3",
    "--method elsa --keep-adapter",
    "--method full --rank 4",
    "--penalty 0.3",
    "--project-every 3",
    "--temperature 2",
    "--validation-windows 0",
    "--learning-rate -1",
    "--device-map disk",
]


def parser_of(name: str) -> CommandParser:
    info = next(info for info in DSACommand.SUBCOMMANDS if info.name == name)
    parser = CommandParser()
    info.subcommand_class.parse_args(parser)
    return parser.complete()


def fields_of(config: type) -> set[str]:
    """The names of all settings, in their sections and flat."""
    return {field.name for cls in (config, *section_types(config)) for field in fields(cls)} | options_of(
        config
    ).keys()


def check_shell(message: str, names: set[str]) -> None:
    """Nothing of it is Python: no field with its value, and none by a name that no shell knows."""
    said = re.sub(r"(?<!\w)'[^']*'", "", message)
    assert not re.search(r"\b[a-z_]+=", said), message
    assert not {name for name in names if "_" in name} & {*re.findall(r"\w+", said)}, message


@pytest.mark.parametrize(
    "name,options",
    [("prune", options) for options in WRONG]
    + [(name, options) for name in ("plan", "search") for options in WRONG[:4:2] + WRONG[4:8]]
    + [("recover", options) for options in OF_RECOVER],
)
def test_an_error_in_an_option_names_options(monkeypatch, capsys, tmp_path, text, name, options):
    monkeypatch.setattr(DSAPruner, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    work = [name, str(demo_model()), "--dataset", text, *options.split()]
    work += [] if name == "plan" else ["-o", str(tmp_path / "out")]
    work += ["--no-run"] if name == "plan" else []
    work += [] if name == "recover" else ["-s", "0.5"]
    code, output, errors = run(monkeypatch, capsys, *work)
    assert code == 2 and output == "" and len(errors.splitlines()) == 1, (output, errors)
    check_shell(errors.split("error: ")[1], fields_of(CONFIGS[name]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_that_breaks_its_rule_is_named_by_its_option(name):
    config, parser = CONFIGS[name], parser_of(name)
    known = {action.dest: action.option_strings for action in parser._actions}
    checked = 0
    for setting, field in options_of(config).items():
        rule = rule_of(field)
        if rule.kind is None or setting not in known:
            continue
        given = {"sparsity": 0.5} if config is DSAConfig else {}
        with pytest.raises(ValueError) as error:
            config(**nested(config, given | {setting: object()}))
        said = in_options(str(error.value), parser)
        assert any(said.startswith(f"{flag} is ") for flag in known[setting]) or setting in ("update", "reconstruct")
        checked += 1
    assert checked > 15


@pytest.mark.parametrize(
    "said,want",
    [
        ("use num_samples=4, or sequential=True", "use --num-samples 4, or no --no-sequential"),
        ("a smaller num_samples or sequence_length.", "a smaller --num-samples or --sequence-length."),
        ("exclude=['a b', 'c']; bos=False; bos=True", "--exclude 'a b' c; --no-bos; --bos"),
        ("sequential=False, residual=False", "--no-sequential, no --residual"),
        ("rate=None, config.data.seed=3, not 4", "no --rate, --seed 3, not 4"),
        ("update.name='refit' and steps=3", "--update refit and --reconstruct 3"),
        ("steps is a whole number", "--reconstruct is a whole number"),
        # what is no setting, what is English, and what is the user's own
        ("tokens of a seed; the method is good", "tokens of a seed; the method is good"),
        ("No file '/x/seed=3 num_samples=4.txt'", "No file '/x/seed=3 num_samples=4.txt'"),
        ("/x/seed=3/a, y.num_samples.txt", "/x/seed=3/a, y.num_samples.txt"),
        ("No 'num_sample'. Did you mean 'num_samples'?", "No 'num_sample'. Did you mean 'num_samples'?"),
        ("the model's seed=1 and the text's", "the model's --seed 1 and the text's"),
        ("reads={'gram'}, my_seed=3", "reads={'gram'}, my_seed=3"),
    ],
)
def test_what_is_said_of_settings_is_said_of_options(said, want):
    assert in_options(said, parser_of("prune")) == want


def test_a_setting_that_a_command_lacks_is_left_as_it_is():
    assert in_options("use sequence_length=4, exclude=['a']", parser_of("evaluate")) == (
        "use --sequence-length 4, exclude=['a']"
    )
    assert in_options("use sequence_length=4", ArgumentParser(add_help=False)) == "use sequence_length=4"


def test_the_library_speaks_of_fields():
    with pytest.raises(ValueError, match="span=2 .* with reconstruct=0 none is; .* such as reconstruct=64"):
        DSAConfig(0.5, reconstruct={"span": 2})


def test_what_was_given_is_given_again_and_means_the_same():
    given = (
        "m -o o -s 0.5 --exclude a 'b c' --one-pass --no-bos --num-samples 4 --targets dense --residual --rate 1e-3"
    )
    parser = parser_of("prune")
    args = parser.parse_args(shlex.split(given))
    said = as_given(args, parser, taken(parser, without=("output",)))
    again = parser.parse_args(shlex.split(f"m -o o{said}"))
    assert vars(again) == vars(args)
    assert as_given(parser.parse_args(["m", "-o", "o"]), parser, taken(parser, without=("output",))) == ""


def test_the_prune_that_a_search_prints_is_what_it_judged(monkeypatch, capsys, tmp_path, text):
    found = tmp_path / "found"
    monkeypatch.setattr("optimum_dsa.pruner.DSAPruner.search", lambda *args, **_: Found())
    how = ["--dataset", text, "--num-samples", "4", "--sequence-length", "32", "--no-bos", "--one-pass", "--seed", "3"]
    how += ["--method", "sparsegpt", "--damping", "0.1", "--exclude", "layers.0", "--dtype", "float32"]
    work = ["search", str(demo_model()), "-o", str(found), "-s", "0.5", *how, "--budget", "2k tokens", "--seeds", "1"]
    code, output, errors = run(monkeypatch, capsys, *work)
    assert code == 0, errors
    line = output.splitlines()[-1].split("next: optimum-cli dsa ")[1]
    parser = parser_of("prune")
    printed = parser.parse_args(shlex.split(line)[1:])
    asked = parser.parse_args(["m", "-o", "OUT", "-s", "0.5", *how, "--allocation", str(found)])
    asked.model = str(demo_model())
    assert line.startswith("prune ") and vars(printed) == vars(asked)


class Found:
    """What the command needs of a result."""

    def __str__(self):
        return "found"

    def __init__(self):
        from types import SimpleNamespace

        self.finalists = [SimpleNamespace(loss=1.0)]

    def to_dict(self):
        return {}
