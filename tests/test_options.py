"""Options and output of commands: every setting has one, and what is printed is what was asked for."""

import io
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from optimum.commands.base import CommandInfo

from optimum_dsa import (
    ALLOCATIONS,
    METHODS,
    PERMUTATIONS,
    UPDATES,
    DSAConfig,
    DSAPruner,
    DSAStructuredConfig,
    RecoveryConfig,
    demo_model,
    environment,
)
from optimum_dsa.commands.base import LeafCommand
from optimum_dsa.commands.dsa import DSACommand
from optimum_dsa.commands.options import CommandParser, add_settings, asked_settings
from optimum_dsa.common.settings import options_of, section

from .test_commands import command, run
from .tiny import tiny_llama


# Every option of the first version; scripts have them.
FIRST = {
    "prune": "-o --output -s --sparsity --method --allocation --spread --pattern --update --granularity --exclude "
    "--include --blocks --skip-unprunable --config --dataset --split --text-column --num-samples --sequence-length "
    "--seed --batch-size --one-pass --device --dtype --device-map --offload-folder --revision --trust-remote-code "
    "--max-shard-size --compressed",
    "search": "-o --output -s --sparsity --method --strategy --budget --resume --min-sparsity --max-sparsity --seeds "
    "--report-to --dataset --split --text-column --num-samples --sequence-length --seed --batch-size --validation "
    "--device --dtype --device-map --offload-folder --revision --trust-remote-code",
    "recover": "-o --output --method --mode --steps --learning-rate --weight-decay --batch-size --accumulation --rank "
    "--alpha --ranks --keep-adapter --teacher --distillation --temperature --bf16 --gradient-checkpointing --dataset "
    "--validation --validation-windows --split --text-column --sequence-length --seed --eval-steps --patience "
    "--save-steps --checkpoints --resume --device --dtype --device-map --offload-folder --revision "
    "--trust-remote-code",
    "plan": "-s --sparsity --quality --method --config --dataset --num-samples --no-run --device --dtype --device-map",
    "evaluate": "--dataset --split --text-column --sequence-length --num-samples --seed --tasks --include-path "
    "--num-fewshot --limit --batch-size --output --json --device --dtype --device-map --offload-folder --revision "
    "--trust-remote-code",
    "report": "--compare -o --output",
    "generate": "--prompt --max-new-tokens --temperature --top-p --seed --chat --no-chat --tokenizer --device --dtype",
    "bench": "--against --prompt --new-tokens --batch-size --rounds --threads --seed --output --device --dtype",
    "verify": "--device --dtype --device-map --offload-folder --revision --trust-remote-code",
    "convert": "--to --revision",
    "quantize": "--bits --group --scales --revision",
    "push": "--private --revision --create-pr --commit-message --token",
    "demo": "-o --output -s --sparsity --method",
    "env": "",
}


def test_progress_bars_honour_the_switch_and_errors_are_one_line(tmp_path, text):
    code, output, errors = command("prune", str(demo_model()), "-o", str(tmp_path / "out"), "-s", "1.5")
    assert code == 2 and output == "" and len(errors.splitlines()) == 1
    assert errors.startswith("optimum-cli dsa prune: error: --sparsity is the share")


def test_a_terminal_that_cannot_show_a_sign_shows_another(monkeypatch):
    class Command(LeafCommand):
        COMMAND = CommandInfo("draw", "")

        def execute(self):
            print("50 % ██ done")

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    Command(ArgumentParser().add_subparsers()).run()
    assert written.getvalue().split() == [b"50", b"%", b"??", b"done"]


@pytest.mark.contract
def test_help_teaches_every_name(monkeypatch, capsys):
    _, output, _ = run(monkeypatch, capsys, "prune", "--help")
    for name in (*METHODS, *ALLOCATIONS, *PERMUTATIONS, *UPDATES):
        assert name in output
    assert "examples:" in output
    for name in ("prune", "evaluate", "demo", "env"):
        assert name in run(monkeypatch, capsys, "--help")[1]


@pytest.mark.parametrize("info", DSACommand.SUBCOMMANDS, ids=lambda info: info.name)
def test_no_option_went_away_and_every_command_can_be_quiet(info):
    parser = ArgumentParser()
    info.subcommand_class.parse_args(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {*FIRST[info.name].split(), "--json", "-q", "--quiet", "-v", "--verbose"} <= options


@pytest.mark.parametrize(
    "name,config",
    [
        ("prune", DSAConfig),
        ("prune", DSAStructuredConfig),
        ("plan", DSAConfig),
        ("search", DSAConfig),
        ("search", DSAStructuredConfig),
        ("recover", RecoveryConfig),
    ],
)
def test_every_setting_is_an_option_with_a_help(name, config):
    parser = ArgumentParser()
    info = next(info for info in DSACommand.SUBCOMMANDS if info.name == name)
    info.subcommand_class.parse_args(parser)
    helps = {action.dest: action.help for action in parser._actions}
    without = {"search": {"allocation", "spread"}}.get(name, set())
    of_one = {DSAConfig: {"granularity", "overrides"}, DSAStructuredConfig: {"unstable", "budgets"}}
    without |= of_one.get(config, set()) if name == "search" else set()
    if (name, config) == ("search", DSAStructuredConfig):
        without |= {"learner", "learn_steps", "learn_rate", "learn_prompt", "max_loss"}
    without |= {"image_column"} if name not in ("prune", "plan") else set()
    without |= {"packing"} if name in ("search", "recover") else set()
    assert options_of(config).keys() - helps.keys() == without
    for setting in options_of(config).keys() - without:
        assert helps[setting] and not re.search(r"[`*]|: $", helps[setting]), setting


def test_a_new_setting_is_an_option_by_being_a_field():
    @dataclass(frozen=True)
    class Part:
        """A section.

        Args:
            width (`int`, defaults to 3): How wide `it` is.
        """

        width: "int" = 3

    @dataclass(frozen=True)
    class Config:
        """A configuration.

        Args:
            share (`float`, *optional*): Up to 100 % of all. By default none.
            names (`tuple[str, ...]`): Names.
            sequential (`bool`, defaults to `True`): Whether one comes after the other.
            part (`Part`): Of it.
        """

        share: "float | None" = None
        names: "tuple[str, ...]" = ()
        sequential: "bool" = True
        part: Part = section(Part)

    sys.modules["optimum_dsa.made_up"] = SimpleNamespace(Config=Config)
    try:
        parser = CommandParser()
        group = parser.add_argument_group("parts")
        add_settings(parser, [(group, ("part",))], "made_up.Config", parser.add_argument_group("rest"))
        assert len(parser._actions) == 1  # nothing is imported before it is used
        args = parser.parse_args(["--share", "0.5", "--names", "a", "b", "--one-pass", "--width", "4"])
    finally:
        del sys.modules["optimum_dsa.made_up"]
    assert asked_settings(args, Config) == {"share": 0.5, "names": ["a", "b"], "sequential": False, "width": 4}
    assert asked_settings(parser.parse_args([]), Config) == {}
    text = " ".join(parser.format_help().split())
    assert "up to 100 % of all. By default none" in text and "how wide it is (default: 3)" in text
    assert text.index("parts:") < text.index("how wide") < text.index("rest:")


def test_json_is_all_that_is_printed(monkeypatch, capsys):
    code, output, errors = run(monkeypatch, capsys, "env", "--json")
    assert (code, errors) == (0, "") and json.loads(output).items() >= environment().items()


def test_quiet_prints_nothing_and_verbose_says_what_is_done(monkeypatch, capsys, tmp_path):
    work = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform"]
    assert run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(tmp_path / "out"), *work, "-q") == (
        0,
        "",
        "",
    )
    code, output, errors = run(monkeypatch, capsys, "verify", str(tmp_path / "out"), "--json")
    assert (code, errors) == (0, "") and json.loads(output)["holds"] is True
    code, output, errors = run(monkeypatch, capsys, "verify", str(tmp_path / "out"), "-q", "--json")
    assert code == 0 and json.loads(output)["prunable"] == 1_843_200
    assert run(monkeypatch, capsys, "env", "-q", "-v")[0] == 2


def test_a_log_file_has_no_bars(tmp_path, text):
    arguments = [str(demo_model()), "--dataset", text, "--sequence-length", "64"]
    executable = os.path.join(os.path.dirname(sys.executable), "optimum-cli")
    done = subprocess.run([executable, "dsa", "evaluate", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "\r" not in done.stderr and "|" not in done.stderr


@pytest.mark.parametrize(
    "line", ["verify {model}", "prune {model} -o {out} -s 0.6 --method magnitude --allocation atp"]
)
def test_a_reader_that_goes_away_stops_no_work(tmp_path, line):
    """As in `optimum-cli dsa verify model | head -1`, or a pager that is left."""
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "model")
    words = line.format(model=tmp_path / "model", out=tmp_path / "out") + " --allocation atp" * ("prune" in line)
    code = "from optimum.commands.optimum_cli import main; main()"
    shell = f"{sys.executable} -c '{code}' dsa {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "roken pipe" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "prune" not in line or (tmp_path / "out" / "dsa_config.json").is_file()
