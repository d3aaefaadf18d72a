"""No command loses a file of its user's, or saves what is not there: each test is a way in which one did."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, RecoveryConfig, convert
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.common.lock import OutputBusyError
from optimum_dsa.common.manifest import MANIFEST
from optimum_dsa.common.output import OutputError, OutputFolder
from optimum_dsa.recovery.trainer import DivergedError

from .recovery.adapters.test_peft_method import same_zeros, sparse_llama, zeros
from .recovery.test_recover import regular, small
from .test_commands import run
from .tiny import tiny_llama, tokens


def pruned_llama(sparsity=0.6):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(sparsity, "magnitude", "uniform"))
    return pruner


def written(folder):
    """Inode, size and time of writing of each file: reading one may move its atime, and loses nothing."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "train.txt"
    path.write_text("\n".join(demo_texts("calibration"))[:20_000])
    return str(path)


def test_a_saved_configuration_does_not_give_its_folder_away(tmp_path):
    DSAConfig(0.5).save_pretrained(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds dsa_config.json, which was not written by optimum-dsa"):
        pruned_llama().save_pretrained(tmp_path)
    assert (tmp_path / "notes" / "thesis.tex").read_text() == "x"


def test_a_configuration_is_not_saved_over_the_description_of_a_model(tmp_path):
    pruned_llama().save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="is not a saved DSAConfig alone"):
        DSAConfig(0.5).save_pretrained(tmp_path / "out")
    DSAConfig(0.5).save_pretrained(tmp_path / "config")
    DSAConfig(0.6).save_pretrained(tmp_path / "config")
    assert DSAConfig.from_pretrained(tmp_path / "config").sparsity == 0.6


@pytest.mark.parametrize("form", ["compressed", "dense"])
def test_a_conversion_takes_every_other_file_along(tmp_path, form):
    pruned_llama().save_pretrained(tmp_path / "out", compressed=form == "dense")
    others = {
        "additional_chat_templates/a.jinja": "a",
        "training_args.bin": "b",
        ".notes": "c",
        "pytorch_model.bin": "d",
    }
    for name, content in others.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(content)
    convert(tmp_path / "out", tmp_path / "new", form)
    assert {name for name in others if (tmp_path / "new" / name).exists()} == set(list(others)[:2])
    convert(tmp_path / "out", tmp_path / "out", form)
    assert {name: (tmp_path / "out" / name).read_text() for name in others} == others
    with pytest.raises(FileExistsError, match="which was not written by optimum-dsa"):  # they are nobody else's now
        pruned_llama().save_pretrained(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "out", {"compressed": "dense", "dense": "compressed"}[form])
    convert(tmp_path / "out", tmp_path / "out", form)
    assert {name: (tmp_path / "out" / name).read_text() for name in others} == others
    stem = {"compressed": "dsa_model", "dense": "model"}[form]
    assert all(path.name.startswith(stem) for path in (tmp_path / "out").glob("*.safetensors"))


def test_weights_that_were_not_written_here_are_not_converted_away(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="which was not written by optimum-dsa"):
        convert(tmp_path / "out", tmp_path / "out", "compressed")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_recovery_leaves_a_folder_that_looks_like_its_own(monkeypatch, capsys, tmp_path, text):
    sparse, out = tmp_path / "sparse", tmp_path / "out"
    prune = ["prune", str(demo_model()), "-o", str(sparse), "-s", "0.7", "--method", "magnitude"]
    assert run(monkeypatch, capsys, *prune, "--allocation", "uniform")[0] == 0
    mine = tmp_path / "out-checkpoints" / "checkpoint-1"
    mine.mkdir(parents=True)
    (mine / "weights").write_text("x")
    recover = ["recover", str(sparse), "-o", str(out), "--dataset", text, "--steps", "2", "--batch-size", "2"]
    recover += ["--sequence-length", "16", "--rank", "2", "--validation-windows", "2", "--save-steps", "1"]
    code, _, errors = run(monkeypatch, capsys, *recover)
    assert code == 0, errors
    assert (mine / "weights").read_text() == "x"
    code, _, errors = run(monkeypatch, capsys, *recover, "--checkpoints", str(mine.parent))
    assert code == 2 and "holds checkpoint-1 of another run" in errors and (mine / "weights").read_text() == "x"


def test_an_adapter_does_not_replace_the_weights_under_it(monkeypatch, capsys, tmp_path, text):
    pruner = DSAPruner.from_pretrained(demo_model())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    before = written(tmp_path / "out")
    out = str(tmp_path / "out")
    code, _, errors = run(monkeypatch, capsys, "recover", out, "-o", f"{out}/", "--keep-adapter", "--dataset", text)
    assert code == 2 and "needs another --output" in errors
    again = DSAPruner.from_pretrained(out)
    again.recover(text, small(merge=False, data=DataConfig(sequence_length=16), steps=1, validation_windows=2))
    with pytest.raises(ValueError, match="holds the pruned model under the adapter"):
        again.save_pretrained(out)
    assert written(tmp_path / "out") == before


def test_an_adapter_is_saved_only_beside_the_zeros_that_it_needs(tmp_path):
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    pruner = DSAPruner.from_pretrained(str(tmp_path / "dense"))
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    before = zeros(pruner.model)
    pruner.recover(regular(), small(merge=False, steps=1))
    with pytest.raises(ValueError, match="without the pruned weights that it belongs to; save the pruned model"):
        pruner.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]

    pruner = DSAPruner.from_pretrained(str(tmp_path / "dense"))
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "pruned")
    pruner.recover(regular(), small(merge=False, steps=1))
    with pytest.raises(ValueError, match="An adapter has no zeros to leave out"):
        pruner.save_pretrained(tmp_path / "adapter", compressed=True)
    pruner.save_pretrained(tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "pruned")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert same_zeros(loaded.merge_and_unload(), before)
    DSAPruner.from_pretrained(str(tmp_path / "dense"))  # stays what it was


def test_a_base_that_was_pruned_again_is_no_base(tmp_path):
    pruner = pruned_llama()
    pruner.save_pretrained(tmp_path / "pruned")
    pruner.recover(regular(), small(merge=False, steps=1))
    other = pruned_llama(0.3)
    other.save_pretrained(tmp_path / "pruned")
    with pytest.raises(ValueError, match="does not hold the zeros and widths that the model under the adapter has"):
        pruner.save_pretrained(tmp_path / "adapter")


def test_a_search_leaves_an_allocation_that_was_made_by_hand(monkeypatch, capsys, tmp_path, text):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "allocation.json").write_text("made by hand")
    search = ["search", str(demo_model()), "-o", str(tmp_path / "found"), "-s", "0.6", "--dataset", text]
    code, _, errors = run(monkeypatch, capsys, *search, "--num-samples", "4", "--sequence-length", "16")
    assert code == 2 and "holds allocation.json, which was not written by optimum-dsa" in errors
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["allocation.json"]
    assert (tmp_path / "found" / "allocation.json").read_text() == "made by hand"


def test_a_search_is_resumed_by_one_process_only(tmp_path):
    pruner = DSAPruner(tiny_llama())
    options = {"strategy": "named", "budget": "2k tokens", "output": tmp_path / "found"}
    data, config = tokens(8), DSAConfig(0.5, data=DataConfig(num_samples=4, sequence_length=16))
    whole = pruner.search(data[:4], config, validation=data[4:], **options)
    trace = (tmp_path / "found" / "trace.jsonl").read_bytes()
    with OutputFolder(tmp_path / "found", ["allocation.json"]), pytest.raises(OutputBusyError):
        pruner.search(data[:4], config, validation=data[4:], resume=True, **options)
    assert (tmp_path / "found" / "trace.jsonl").read_bytes() == trace
    again = pruner.search(data[:4], config, validation=data[4:], resume=True, **options)
    assert again.best == whole.best


def test_the_second_of_two_saves_is_refused_and_the_first_is_whole(tmp_path):
    first, second = pruned_llama(0.6), pruned_llama(0.3)

    def both_at_once(*_, **__):
        with pytest.raises(OutputBusyError):
            second.save_pretrained(tmp_path / "out")

    first.tokenizer = type("Tokenizer", (), {"save_pretrained": both_at_once})()
    first.save_pretrained(tmp_path / "out")
    assert DSAPruner.from_pretrained(str(tmp_path / "out")).verify().holds
    second.save_pretrained(tmp_path / "out")
    assert DSAPruner.from_pretrained(str(tmp_path / "out")).report.sparsity == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("command", ["prune", "recover", "search", "convert", "report", "demo"])
def test_an_output_that_cannot_be_written_is_an_error_before_work(monkeypatch, capsys, tmp_path, text, command):
    def work(*_, **__):
        raise AssertionError("work was done")

    pruned_llama().save_pretrained(tmp_path / "sparse")
    monkeypatch.setattr("optimum_dsa.checkpoint.opened.load_model", work)
    monkeypatch.setattr("optimum_dsa.checkpoint.convert.convert_weights", work)
    (tmp_path / "file").write_text("x")
    out = str(tmp_path / "file" / "out")
    arguments = {
        "prune": [str(tmp_path / "sparse"), "-o", out, "-s", "0.5", "--dataset", text],
        "recover": [str(tmp_path / "sparse"), "-o", out, "--dataset", text],
        "search": [str(demo_model()), "-o", out, "-s", "0.5", "--dataset", text, "--sequence-length", "16"],
        "convert": [str(tmp_path / "sparse"), out, "--to", "compressed"],
        "report": [str(tmp_path / "sparse"), "-o", out],
        "demo": ["-o", out],
    }
    code, output, errors = run(monkeypatch, capsys, command, *arguments[command])
    assert code == 2 and "out cannot be written" in errors and output == ""
    assert (tmp_path / "file").read_text() == "x"


def test_results_do_not_replace_another_file(monkeypatch, capsys, tmp_path, text):
    (tmp_path / "thesis.json").write_text('{"chapters": 3}')
    evaluate = ["evaluate", str(demo_model()), "--dataset", text, "--sequence-length", "16", "--num-samples", "2"]
    code, output, errors = run(monkeypatch, capsys, *evaluate, "--output", str(tmp_path / "thesis.json"))
    assert code == 2 and "holds no results of optimum-dsa" in errors and output == ""
    assert (tmp_path / "thesis.json").read_text() == '{"chapters": 3}'
    for _ in range(2):  # its own are replaced, and known to the folder that they lie in
        assert run(monkeypatch, capsys, *evaluate, "--output", str(tmp_path / "results.json"))[0] == 0
    pruned_llama().save_pretrained(tmp_path / "out")
    assert run(monkeypatch, capsys, *evaluate, "--output", str(tmp_path / "out" / "results.json"))[0] == 0
    assert "results.json" in json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    pruned_llama().save_pretrained(tmp_path / "out")


def test_a_result_that_the_disk_does_not_take_is_saved_elsewhere(monkeypatch, tmp_path):
    pruner = pruned_llama()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    save = pruner.model.save_pretrained

    def full(folder, **options):
        if folder.is_relative_to(tmp_path / ".out.dsa-work"):
            raise OSError(28, "No space left on device")
        save(folder, **options)

    monkeypatch.setattr(pruner.model, "save_pretrained", full)
    lost = pytest.raises(OutputError, match="No space left on device.*The result is whole in")
    with lost as caught, OutputFolder(tmp_path / "out") as output:
        pruner.save_pretrained(output)
    safe = str(caught.value).split("is whole in ")[1].rstrip(".")
    assert DSAPruner.from_pretrained(safe).verify().holds and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["sparse-lora", "full"])
def test_a_training_that_diverged_is_an_error_and_not_a_model(method):
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"Training diverged: .* take a learning rate below 1e\+30"):
        pruner.recover(regular(), small(method=method, learning_rate=1e30))
    if method == "sparse-lora":
        assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())


def test_numbers_that_could_not_be_read_again_are_not_written(tmp_path):
    pruner = pruned_llama()
    pruner.recover(regular(), RecoveryConfig(steps=1, batch_size=4, rank=2, validation_windows=4))
    pruner._training["perplexity"]["after"] = float("nan")
    with pytest.raises(ValueError, match="cannot be described, so nothing was written: recovery.perplexity.after"):
        pruner.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
