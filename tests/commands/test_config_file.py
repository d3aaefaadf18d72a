"""Options in a file, YAML or JSON, in every command."""

import json

import pytest

from optimum_dsa import DSAConfig, RecoveryConfig
from optimum_dsa.commands.base import asked_source
from optimum_dsa.commands.config_file import WITHOUT
from optimum_dsa.commands.evaluate import whole_or_auto
from optimum_dsa.commands.options import evaluate_options
from optimum_dsa.commands.prune import asked_config
from optimum_dsa.common.settings_file import read_settings, settings_text

from ..test_commands import run
from ..test_docs import command_parsers


NAMES = sorted(command_parsers())


def parse(name, *arguments):
    return command_parsers()[name].parse_args(arguments)


def write(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    "text,value",
    [
        ("2:4", "2:4"),
        ("no", "no"),
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("010", 10),
        ("-5", -5),
        (".5", 0.5),
        ("true", True),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'0.5'", "0.5"),
        ("[a, 1]", ["a", 1]),
        ("0x10", "0x10"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(tmp_path, text, value):
    found = read_settings(write(tmp_path, f"name: {text}\n"))
    assert found == {"name": value} and type(found["name"]) is type(value)


@pytest.mark.parametrize(
    "value", ["2:4", "no", "y", "1e-3", "010", "", "~", "a: b", "é\n", 1e-5, 0.1, 3, True, None, ["2:4", "x"], 10**15]
)
def test_what_is_written_is_read_again(tmp_path, value):
    assert read_settings(write(tmp_path, settings_text({"name": value}))) == {"name": value}


@pytest.mark.parametrize(
    "text,message",
    [
        ("a: 1\na: 2\n", "'a' stands there twice"),
        ("a: [1\n", "is not YAML"),
        ("- a\n", "holds no settings by name"),
        ("a: &x 1\nb: *x\n", "write the value where"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("1: 2\n", "holds no settings by name"),
    ],
)
def test_what_is_no_file_of_settings_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_settings(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def values_of(parser, number=3):
    """A value for every option and argument of a command that a file may hold; another for another number."""
    given = {}
    for action in parser._actions:
        if action.dest in (*WITHOUT, "func", "no_checkpoints"):  # the last goes without --checkpoints
            continue
        if action.nargs == 0 or type(action).__name__ == "OnOff":
            given[action.dest] = not action.default
        elif action.choices:
            given[action.dest] = list(action.choices)[-1 if number == 3 else 0]
        else:
            value = {int: number, whole_or_auto: number, float: number / 8}.get(action.type, f"{number}:4")
            several = action.nargs in ("+", "*") or action.dest == "dataset"
            given[action.dest] = [value, value] if several else value
    return given


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_every_option_of_every_command(tmp_path, name, form):
    """Whatever an option is called, required or not, its value in the file is that on the command line."""
    given = values_of(command_parsers()[name])
    text = json.dumps(given) if form == "json" else settings_text(given)
    found = vars(parse(name, "--config", write(tmp_path, text, f"run.{form}")))
    assert {dest: found[dest] for dest in given} == given


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize("name", NAMES)
def test_every_option_on_the_command_line_wins_over_the_file(tmp_path, name, form):
    parser = command_parsers()[name]
    in_file, wanted, front, options, said = values_of(parser), values_of(parser, 5), [], [], set()
    for action in parser._actions:
        dest = action.dest
        if dest not in wanted or dest in said:  # what one option turns on another turns off, and one is given
            continue
        said.add(dest)
        if type(action).__name__ == "OnOff":
            wanted[dest], in_file[dest] = False, True
            options.append(next(flag for flag in action.option_strings if flag.startswith("--no-")))
        elif action.nargs == 0:
            wanted[dest], in_file[dest] = action.const, not action.const
            options.append(action.option_strings[-1])
        else:
            words = list(map(str, wanted[dest] if isinstance(wanted[dest], list) else [wanted[dest]]))
            if not action.option_strings:
                front += words
            elif dest == "dataset":
                options += [word for each in words for word in ("--dataset", each)]
            else:
                options += [action.option_strings[-1], *words]
    text = json.dumps(in_file) if form == "json" else settings_text(in_file)
    found = vars(parse(name, *front, *options, "--config", write(tmp_path, text, f"run.{form}")))
    assert {dest: found[dest] for dest in wanted} == wanted


@pytest.mark.parametrize(
    "text,option", [("no-checkpoints: true", "--checkpoints=x"), ("checkpoints: x", "--no-checkpoints")]
)
def test_an_option_wins_over_one_of_the_file_that_excludes_it(tmp_path, text, option):
    args = parse("prune", "m", "-o", "o", "--config", write(tmp_path, text), option)
    assert (args.checkpoints, args.no_checkpoints) == ((None, True) if "no" in option else ("x", False))


@pytest.mark.parametrize("name", ["prune", "recover"])
def test_the_next_line_has_what_the_file_said(tmp_path, name):
    """`evaluate` of what was written is told of options in a file as of those on the command line."""
    asked = ["--no-bos", "--device", "cuda:1", "--device-map", "disk", "--trust-remote-code"]
    file = write(tmp_path, "bos: false\ndevice: cuda:1\ndevice_map: disk\ntrust_remote_code: true\n")
    ends = []
    for options in (asked, ["--config", file]):
        parser = command_parsers()[name]
        ends.append(evaluate_options(parser.parse_args(["m", "-o", "o", "--dataset", "t", *options]), parser))
    assert ends[0] == ends[1] and all(word in ends[0].split() for word in asked)
    parser = command_parsers()[name]  # what is as without the file is not said
    args = parser.parse_args(["m", "-o", "o", "--dataset", "t", "--config", file, "--device", "auto"])
    assert "--device " not in evaluate_options(args, parser)


def test_options_on_the_command_line_win(tmp_path):
    file = write(tmp_path, "model: m\noutput: o\nsparsity: 0.6\ndataset: [a.txt, b.txt]\nnum-samples: 4\nbos: true\n")
    args = parse("prune", "--config", file)
    assert (args.model, args.output, asked_source(args)) == ("m", "o", {"a.txt": 1.0, "b.txt": 1.0})
    assert (asked_config(args).sparsity, asked_config(args).data.num_samples) == (0.6, 4)
    args = parse("prune", "other", "-s", "0.5", "--config", file, "--dataset", "c.txt", "--no-bos")
    assert (args.model, args.output, asked_source(args)) == ("other", "o", "c.txt")
    assert (asked_config(args).sparsity, asked_config(args).data.bos) == (0.5, False)


def test_sections_saved_configurations_and_recoveries(tmp_path):
    nested = write(tmp_path, "sparsity: 0.6\nupdate: {name: sparsegpt, damping: 0.1}\ndata:\n  num_samples: 4\n")
    config = asked_config(parse("prune", "m", "-o", "o", "--config", nested))
    assert (config.update.name, config.update.damping, config.data.num_samples) == ("sparsegpt", 0.1, 4)
    saved = DSAConfig(0.7, "wanda", "owl", spread=0.1, exclude=("lm_head",), max_sparsity=0.9)
    saved.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "dsa_config.json"):
        assert asked_config(parse("prune", "m", "-o", "o", "--config", str(place))) == saved
        assert asked_config(parse("plan", "m", "--config", str(place), "-s", "0.5")).sparsity == 0.5
    described = {"format_version": 3, "config": saved.to_dict(), "recovery": {"config": {"steps": 7, "rank": 4}}}
    (tmp_path / "dsa_config.json").write_text(json.dumps(described))
    args = parse("recover", "m", "-o", "o", "--dataset", "t", "--config", str(tmp_path))
    assert (args.steps, args.rank) == (7, 4)


def test_a_search_says_what_of_a_saved_configuration_it_finds_itself(tmp_path, caplog):
    DSAConfig(0.7, allocation="owl", exclude=("lm_head",)).save_pretrained(tmp_path)
    args = parse("search", "m", "-o", "o", "--config", str(tmp_path))
    assert args.exclude == ["lm_head"] and "search does without allocation of the file, 'owl'" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("prune", "sparsty: 0.5", "run.yaml: optimum-cli dsa prune has no option 'sparsty'. Did you mean 'sparsity'"),
        ("prune", "sequential: maybe", "sequential is true or false, got 'maybe'"),
        ("prune", "data: {num_sample: 3}", "has no option 'num_sample'. Did you mean 'num_samples'"),
        ("prune", "num_samples: many", "num_samples is a whole number, got 'many'"),
        ("prune", "spread: wide", "spread is a number, got 'wide'"),
        ("evaluate", "windows: papers", "windows is one of each, paper, got 'papers'"),
        ("evaluate", "tasks: {a: b}", "tasks is a single value, got {'a': 'b'}"),
        ("search", "allocation: owl", "search has no option 'allocation'"),
        ("env", "sparsity: 0.5", "env has no option 'sparsity'"),
        ("verify", "{", "is not YAML"),
        ("prune", "{checkpoints: x, no-checkpoints: true}", "checkpoints and no_checkpoints do not go together"),
        ("push", '{"config": {}}', "says nothing of this command's options"),
    ],
)
def test_what_a_file_cannot_say_is_one_line(monkeypatch, capsys, tmp_path, name, text, message):
    code, output, errors = run(monkeypatch, capsys, name, "--config", write(tmp_path, text))
    assert (code, output) == (2, "") and message in errors and len(errors.splitlines()) == 1
    assert errors.startswith(f"optimum-cli dsa {name}: error: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_file_says_what_the_options_said(monkeypatch, capsys, tmp_path, name):
    """The file that a command prints makes the same command, and prints itself again."""
    code, first, errors = run(monkeypatch, capsys, name, "--print-config", "-q")
    assert (code, errors) == (0, "")
    code, again, errors = run(monkeypatch, capsys, name, "--print-config", "--config", write(tmp_path, first))
    assert (code, errors, again) == (0, "", first)


def test_a_printed_file_has_what_a_quality_chose_and_all_settings(monkeypatch, capsys, tmp_path):
    options = ["m", "-o", "o", "-s", "0.6", "--quality", "good", "--num-samples", "5", "--one-pass"]
    code, printed, errors = run(monkeypatch, capsys, "prune", *options[:-1], "--print-config")
    assert code == 0, errors
    args = parse("prune", "--config", write(tmp_path, printed))
    assert asked_config(args) == DSAConfig.preset("good", 0.6, num_samples=5)
    assert (args.model, args.output, args.quality) == ("m", "o", None) and args.dataset == ["wikitext2"]
    code, printed, _ = run(monkeypatch, capsys, "recover", "--print-config", "--method", "full", "--keep-adapter")
    settings = read_settings(write(tmp_path, printed))
    assert settings["steps"] == RecoveryConfig().steps and settings["merge"] is False


@pytest.mark.parametrize(
    "text,message",
    [
        ("num_samples: 4\nnum-samples: 5", "'num_samples' stands there twice"),
        ("data: {num_samples: 4}\nnum_samples: 5", "'num_samples' stands there twice"),
        ("update: {damping: 0.1}\ndamping: 0.2", "'damping' stands there twice"),
        ("sequential: false\none_pass: true", "'sequential' stands there twice"),
        ("dataset: {a: 1}\nweights: [1]", "'weights' stands there twice"),
        ('{"sparsity": 0.5, "sparsity": 0.6}', "'sparsity' stands there twice"),
        ('{"data": {"seed": 1, "seed": 2}}', "'seed' stands there twice"),
    ],
)
def test_nothing_is_said_twice_in_any_form(tmp_path, capsys, text, message):
    form = "json" if text.startswith("{") else "yaml"
    with pytest.raises(SystemExit) as ended:
        parse("prune", "m", "-o", "o", "--config", write(tmp_path, text, f"run.{form}"))
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "text,found",
    [
        ("one_pass: true", {"sequential": False}),
        ("one-pass: false", {"sequential": True}),
        ("no_sequential: true", {"sequential": False}),
        ("no_bos: true", {"bos": False}),
        ("quiet: true", {"quiet": True}),
        ("json: true", {"json": True}),
        ("overrides: {mlp: 0.6, q_proj: 0.4}", {"overrides": ["mlp=0.6", "q_proj=0.4"]}),
        ("dataset: {a: 3, b: 1}", {"dataset": ["a", "b"], "weights": [3.0, 1.0]}),
    ],
)
def test_a_file_has_every_name_of_an_option_and_pairs_as_objects(tmp_path, text, found):
    args = parse("prune", "m", "-o", "o", "--config", write(tmp_path, text))
    assert {name: getattr(args, name) for name in found} == found


def test_a_printed_file_has_no_secret(monkeypatch, capsys, tmp_path):
    code, output, _ = run(
        monkeypatch, capsys, "push", str(tmp_path), "me/model", "--token", "hf_secret", "--print-config"
    )
    assert code == 0 and "hf_secret" not in output and "token" not in output
