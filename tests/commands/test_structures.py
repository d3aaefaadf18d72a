"""`optimum-cli dsa prune --structures`: a smaller model from the command line, and what other commands make of it."""

import json
import shlex
import shutil

import pytest
from transformers import AutoModelForCausalLM

from optimum_dsa import Allocation, DSAPruner, DSAStructuredConfig, demo_model
from optimum_dsa.common.settings import options_of
from optimum_dsa.sharing.account import account
from optimum_dsa.sharing.outcome import Outcome

from ..test_commands import command, run
from ..tiny import bos_tokenizer, tiny_llama


SHORT = ["--num-samples", "4", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def smaller(tmp_path_factory, text):
    """A folder that the command wrote in a process of its own."""
    out = tmp_path_factory.mktemp("cli") / "smaller"
    options = ["-s", "0.2", "--structures", "ffn,kv_group", "--dataset", text, *SHORT]
    code, output, errors = command("prune", str(demo_model()), "-o", str(out), *options)
    assert code == 0 and errors.startswith("Of kv_group nothing goes: ") and len(errors.splitlines()) == 1
    went, saved = output.splitlines()
    assert went.endswith("kv_group: 4 of 4 stay, ffn: 256 of 352 stay")
    assert f"next: optimum-cli dsa evaluate {out} --dataset FILE, or optimum-cli dsa bench {out} --against " in saved
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from optimum_dsa import demo_texts

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(demo_texts("calibration")))
    return str(path)


def test_weights_on_the_disk_are_cut_there(monkeypatch, capsys, smaller, text, tmp_path):
    options = ["-s", "0.2", "--structures", "ffn,kv_group", "--dataset", text, *SHORT, "--device-map", "disk"]
    code, output, _ = run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(tmp_path / "out"), *options)
    assert code == 0 and "kv_group: 4 of 4 stay, ffn: 256 of 352 stay" in output
    assert (tmp_path / "out/model.safetensors").read_bytes() == (smaller / "model.safetensors").read_bytes()


def test_what_is_written_is_a_plain_model_that_verifies(monkeypatch, capsys, smaller):
    assert AutoModelForCausalLM.from_pretrained(smaller).config.intermediate_size == 256
    code, output, _ = run(monkeypatch, capsys, "verify", str(smaller))
    assert code == 0 and output.startswith("holds: kv_group: 4 of 4 stay, ffn: 256 of 352 stay; 0 of ")
    code, output, _ = run(monkeypatch, capsys, "verify", str(smaller), "--json")
    assert code == 0 and json.loads(output)["widths"]["model.layers.9:ffn"] == [256, 352]


def test_the_other_commands_take_it(monkeypatch, capsys, smaller, text, tmp_path):
    """Trained towards the dense model, measured, timed, and shown; it stays as small as it is."""
    better = str(tmp_path / "better")
    options = ["--dataset", text, "--steps", "2", "--sequence-length", "32", "--validation-windows", "2"]
    code, _, errors = run(
        monkeypatch, capsys, "recover", str(smaller), "-o", better, *options, "--teacher", str(demo_model())
    )
    assert code == 0, errors
    assert DSAPruner.from_pretrained(better).verify().widths["model.layers.0:ffn"] == (256, 352)
    code, output, _ = run(monkeypatch, capsys, "evaluate", better, "--dataset", text, *SHORT, "--json")
    assert code == 0 and json.loads(output)["models"][0]["sparsity"] == 0
    options = ["--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--json"]
    code, output, _ = run(monkeypatch, capsys, "bench", better, "--against", str(demo_model()), *options)
    assert code == 0 and "1739392" in output and "2108032" in output
    code, output, errors = run(monkeypatch, capsys, "report", better, "-o", str(tmp_path / "page"))
    assert code == 0, errors
    assert "256 of 352" in output and (tmp_path / "page" / "widths.png").is_file()


def test_weights_are_pruned_then(monkeypatch, capsys, smaller, text, tmp_path):
    out = str(tmp_path / "both")
    options = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform"]
    code, output, errors = run(monkeypatch, capsys, "prune", str(smaller), "-o", out, *options)
    assert code == 0, errors
    assert "structures were cut out before: 368,640 of 2,108,032 parameters went" in output
    code, output, _ = run(monkeypatch, capsys, "verify", out)
    assert code == 0 and "ffn: 256 of 352 stay; 737,280 of 1,474,560 prunable weights are zero" in output
    code, _, errors = run(
        monkeypatch, capsys, "prune", out, "-o", str(tmp_path / "no"), "-s", "0.1", "--structures", "ffn",
        "--dataset", text, *SHORT
    )  # fmt: skip
    assert code == 2 and "are zero, and it would fill them; cut first and prune weights then" in errors


def test_a_description_that_says_other_widths_is_named(monkeypatch, capsys, smaller, tmp_path):
    folder = shutil.copytree(smaller, tmp_path / "edited")
    described = json.loads((folder / "dsa_config.json").read_text())
    unit = described["structured"]["units"]["model.layers.3:ffn"]
    unit["kept"] += 1
    (folder / "dsa_config.json").write_text(json.dumps(described))
    code, output, _ = run(monkeypatch, capsys, "verify", str(folder))
    assert code == 1
    assert "model.layers.3:ffn has 256 of its 353 structures, described are 257" in output
    assert "model.layers.3:ffn keeps 257 of 352 structures, and other ones are said to be gone" in output


@pytest.mark.parametrize(
    "options,message",
    [
        ("-s 0.1 --structures ffn --method wanda", "--method is of pruned weights, and --structures cuts"),
        ("-s 0.1 --structures ffn --quality good", "--quality is of pruned weights"),
        ("-s 0.1 --structures ffn --compressed", "--compressed is of pruned weights"),
        ("-s 0.1 --structures block --resume", "without finished blocks to keep, and --resume asks"),
        ("-s 0.1 --structures ffn --importance taylor --device-map disk", "--importance taylor takes gradients of"),
        ("-s 0.1 --structures fnn", "'fnn' is none. Did you mean 'ffn'?"),
        ("-s 0.1 --structures ffn --importance flapp", "Did you mean 'flap'"),
        ("--structures ffn", "say how much to cut out, for example --sparsity 0.2"),
        ("-s 0.1 --importance flap", "--importance is for --structures, which was not given"),
    ],
)
def test_what_does_not_go_together_is_one_line_before_work(monkeypatch, capsys, tmp_path, options, message):
    arguments = ["prune", "nowhere", "-o", str(tmp_path / "out"), *options.split()]
    code, output, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and output == "" and message in errors and len(errors.splitlines()) == 1, errors


def test_a_printed_file_says_the_same(monkeypatch, capsys, tmp_path):
    """With every setting of a cut, and none of pruned weights."""
    options = ["-s", "0.1", "--structures", "ffn", "kv_group", "--no-true-sequential", "--exclude", "a,b"]
    code, printed, _ = run(monkeypatch, capsys, "prune", "model", "-o", "out", *options, "--print-config")
    assert code == 0 and "true_sequential: false" in printed and "structures:" in printed
    names = {line.split(":")[0] for line in printed.splitlines()}
    assert options_of(DSAStructuredConfig).keys() <= names and "method" not in names
    (tmp_path / "options.yaml").write_text(printed)
    arguments = ["prune", "--config", str(tmp_path / "options.yaml"), "--print-config"]
    assert run(monkeypatch, capsys, *arguments) == (0, printed, "")


def test_a_smaller_model_is_a_file_of_options(monkeypatch, capsys, smaller, tmp_path):
    arguments = ["prune", "model", "-o", "out", "--config", str(smaller), "--print-config"]
    code, printed, errors = run(monkeypatch, capsys, *arguments)
    assert (code, errors) == (0, "") and "num_samples: 4" in printed and "importance: wanda_sp" in printed
    code, _, errors = run(monkeypatch, capsys, "plan", "model", "--config", str(smaller))
    assert code == 2 and "that of a model whose structures were cut, and says nothing of weights" in errors


def test_a_smaller_model_s_widths_are_another_s(monkeypatch, capsys, smaller, text, tmp_path):
    """Whether or not weights of what was left were pruned, whose zeros have an allocation of their own."""
    sparse, out = str(tmp_path / "sparse"), str(tmp_path / "out")
    weights = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform"]
    assert run(monkeypatch, capsys, "prune", str(smaller), "-o", sparse, *weights)[0] == 0
    for folder in (str(smaller), sparse):
        asked = ["-s", "0.2", "--structures", "ffn,kv_group", "--layout", "per_layer", "--allocation", folder]
        code, _, errors = run(
            monkeypatch, capsys, "prune", str(demo_model()), "-o", out, *asked, "--dataset", text, *SHORT
        )
        assert code == 0, errors
        assert DSAPruner.from_pretrained(out).verify().widths == DSAPruner.from_pretrained(smaller).verify().widths


def test_widths_are_searched_for_and_pruned_with(monkeypatch, capsys, text, tmp_path):
    """The line that a search ends with makes the model that it found."""
    found, out = tmp_path / "found", tmp_path / "out"
    asked = ["-s", "0.2", "--structures", "ffn", "--importance", "obs", "--dataset", text, *SHORT]
    code, output, errors = run(
        monkeypatch, capsys, "search", str(demo_model()), "-o", str(found), *asked,
        "--strategy", "level_switch", "--budget", "3k tokens",
    )  # fmt: skip
    assert code == 0, errors
    line = next(line for line in output.splitlines() if "next:" in line)
    command = shlex.split(line.partition("dsa ")[2].replace("-o OUT", f"-o {out}"))
    assert "--layout" in command and "per_layer" in command
    code, _, errors = run(monkeypatch, capsys, *command)
    assert code == 0, errors
    verified = DSAPruner.from_pretrained(out).verify()
    goes = {unit: 1 - stay / before for unit, (stay, before) in verified.widths.items()}
    assert verified.holds and goes == pytest.approx(Allocation.load(found).sparsity, abs=1 / 352)
    assert len(set(goes.values())) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "uniform"], "A search gives blocks widths of their own"),
        (["--strategy", "curves"], "is of single weights; for structures use"),
        (["--method", "wanda"], "--method is of pruned weights"),
    ],
)
def test_searches_of_structures_that_cannot_be_are_one_line(monkeypatch, capsys, tmp_path, options, message):
    asked = ["-o", str(tmp_path / "found"), "-s", "0.2", "--structures", "ffn", *options]
    code, _, errors = run(monkeypatch, capsys, "search", str(demo_model()), *asked)
    assert code == 2 and message in errors and not (tmp_path / "found").exists()


def test_a_tolerance_is_found_said_and_recorded(monkeypatch, capsys, tmp_path):
    out, model, text = tmp_path / "out", tmp_path / "model", tmp_path / "numbers.txt"
    tiny_llama().save_pretrained(model)
    bos_tokenizer().save_pretrained(model)
    text.write_text(" ".join(str(number % 89) for number in range(400)))
    options = ["--structures", "ffn", "--max-loss", "40%", "--dataset", str(text), *SHORT]
    code, output, errors = run(monkeypatch, capsys, "prune", str(model), "-o", str(out), *options)
    assert code == 0, errors
    assert "found for a perplexity at most 40.0% higher: " in output
    facts = json.loads((out / "dsa_config.json").read_text())["structured"]
    assert facts["tolerance"]["max_loss"] == 0.4 and facts["config"]["max_loss"] is None
    assert facts["config"]["sparsity"] > 0 and facts["sparsity"] <= facts["config"]["sparsity"]
    assert facts["tolerance"]["found"] <= 1.4 * facts["tolerance"]["dense"]
    told = account(Outcome.read(out))[0]
    assert "parameters were cut out, as many as a rise of perplexity by 40.0% allowed in trials" in told


@pytest.mark.parametrize(
    "options, message",
    [
        ("--structures ffn", "for example --sparsity 0.2, or by how much perplexity may rise: --max-loss 5%"),
        ("--structures ffn -s 0.2 --max-loss 5%", "-s says how much goes, and --max-loss 5% finds it; give one"),
        ("--structures ffn --max-loss much", "--max-loss is a share by which the perplexity may rise"),
        ("-s 0.2 --max-loss 5%", "--max-loss is for --structures, which was not given"),
    ],
)
def test_how_much_goes_is_said_in_one_way(monkeypatch, capsys, tmp_path, options, message):
    arguments = ["prune", str(demo_model()), "-o", str(tmp_path / "out"), *options.split()]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and message in errors
