import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import Allocation, DataConfig, DSAConfig, DSAPruner
from optimum_dsa.commands.embedded import demo_model, demo_texts

from .tiny import same_state, state, tiny_llama, tokens


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model, pruned with text and saved."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    pruner = DSAPruner.from_pretrained(demo_model())
    config = DSAConfig(0.6, allocation="owl", data=DataConfig(num_samples=8, sequence_length=64, seed=3))
    report = pruner.prune(demo_texts("calibration")[:2], config)
    pruner.save_pretrained(folder)
    return pruner, report, folder


def test_a_saved_model_is_an_ordinary_checkpoint(pruned):
    pruner, _, folder = pruned
    code = f"""
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
        out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3)
        zeros = sum(int((m.weight == 0).sum()) for n, m in model.named_modules() if n.endswith("_proj"))
        print(zeros, out.shape[0], "optimum_dsa" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(pruned[1].removed), "1", "False"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same_state(pruner.model, state(loaded))
    assert AutoTokenizer.from_pretrained(folder)("x = 1").input_ids == pruner.tokenizer("x = 1").input_ids


def test_dsa_config_says_everything_that_made_the_model(pruned):
    _, report, folder = pruned
    data = json.loads((folder / "dsa_config.json").read_text())
    assert data["format_version"] == 3
    assert data["base_model"] == {"name": demo_model().name, "revision": None}
    assert data["config"]["allocation"] == "owl"
    expected = {"source": "2 texts", "samples": 8, "length": 64, "tokens": 512, "seed": 3, "bos": False}
    assert data["calibration"] == expected
    assert data["achieved"]["removed"] == report.removed
    assert data["achieved"]["units"] == report.achieved
    assert {"torch", "transformers", "optimum-dsa", "python"} <= data["versions"].keys()
    assert DSAConfig.from_pretrained(folder) == report.config
    assert Allocation.load(folder) == report.allocation
    assert str(folder.parent) not in (folder / "dsa_config.json").read_text()


def test_the_allocation_of_a_pruned_model_can_be_used_again(pruned):
    _, report, folder = pruned
    again = DSAPruner.from_pretrained(demo_model())
    assert (
        again.prune(None, DSAConfig(0.6, "magnitude", str(folder))).allocation.sparsity == report.allocation.sparsity
    )


def test_saving_needs_something_pruned_and_a_place_of_its_own(tmp_path, pruned):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="call prune"):
        DSAPruner(tiny_llama()).save_pretrained(tmp_path / "new")
    with pytest.raises(FileExistsError, match="not written by optimum-dsa"):
        pruned[0].save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_during_save_leaves_the_old_model(tmp_path, pruned):
    _, _, folder = pruned
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = f"""
        import os, signal
        import transformers
        from optimum_dsa import DSAConfig, DSAPruner
        pruner = DSAPruner.from_pretrained({str(folder)!r})
        pruner.prune(None, DSAConfig(0.8, "magnitude", "uniform"))
        write = pruner.model.save_pretrained
        def die(*args, **kwargs):
            write(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        pruner.model.save_pretrained = die
        pruner.save_pretrained({str(folder)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_in_memory_and_a_tokenizer_can_be_given():
    model, tokenizer = tiny_llama(), AutoTokenizer.from_pretrained(demo_model())
    assert DSAPruner.from_pretrained(model, tokenizer).tokenizer is tokenizer
    assert DSAPruner.from_pretrained(model, str(demo_model())).tokenizer.vocab_size == tokenizer.vocab_size
    assert DSAPruner.from_pretrained(model).tokenizer is None
    with pytest.raises(ValueError, match="takes no loading options, got dtype"):
        DSAPruner.from_pretrained(model, dtype=torch.float32)


def test_a_refused_model_is_refused_before_any_text_is_read(tmp_path):
    pruner = DSAPruner(tiny_llama(), AutoTokenizer.from_pretrained(demo_model()))
    with pytest.raises(ValueError, match="Nothing in LlamaForCausalLM is named 'router'"):
        pruner.prune(str(tmp_path / "missing.txt"), DSAConfig(0.5, exclude=["router"]))


def test_allocation_and_pruning_agree_on_text():
    pruner = DSAPruner.from_pretrained(demo_model())
    config = DSAConfig(0.6, data=DataConfig(num_samples=4, sequence_length=32))
    texts = demo_texts("calibration")[:1]
    assert pruner.allocate(texts, config) == pruner.prune(texts, config).allocation


def test_checkpoints_written_by_a_pruner_are_readable_by_all(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.5))
    pruner.save_pretrained(tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def hub(folder, tmp_path):
    """A cache of the Hub as it is after a download of `folder` as me/pruned; what to pass to load from it."""
    repository = tmp_path / "cache" / "models--me--pruned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    return {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_a_pruned_model_comes_back_with_its_report_and_masks(pruned, tmp_path, form, where):
    pruner, report, _ = pruned
    folder = tmp_path / form
    pruner.save_pretrained(folder, compressed=form == "compressed")
    options = hub(folder, tmp_path) if where == "Hub" else {}
    again = DSAPruner.from_pretrained("me/pruned" if where == "Hub" else folder, **options)
    assert again.report.config == report.config and again.report.allocation == report.allocation
    assert again.report.to_dict() == report.to_dict()
    assert same_state(again.model, state(pruner.model))
    masks = dict(again.masks())
    assert sum(int((~mask).sum()) for mask in masks.values()) == report.removed
    for name, mask in pruner.masks():
        assert mask.dtype == torch.bool and torch.equal(masks[name], mask)
    assert again.verify().holds
    assert again.tokenizer("x = 1").input_ids == pruner.tokenizer("x = 1").input_ids


@pytest.mark.parametrize("device_map", [None, {"": "disk"}])
def test_pruning_goes_on_where_it_stopped(pruned, tmp_path, device_map):
    pruned[0].save_pretrained(tmp_path / "first", compressed=True)
    again = DSAPruner.from_pretrained(tmp_path / "first", device_map=device_map, offload_folder=str(tmp_path / "o"))
    before = dict(again.masks())
    report = again.prune(None, DSAConfig(0.8, "magnitude", "uniform"))
    assert report.sparsity == pytest.approx(0.8, abs=1e-4) and again.verify().holds
    assert not any(bool((mask & ~before[name]).any()) for name, mask in again.masks())
    for form in (False, True):
        again.save_pretrained(tmp_path / "second", compressed=form)
        data = json.loads((tmp_path / "second" / "dsa_config.json").read_text())
        assert data["base_model"]["name"] == demo_model().name and data["config"]["sparsity"] == 0.8
        assert DSAPruner.from_pretrained(tmp_path / "second").verify().holds


def test_an_edited_description_is_told_and_a_broken_one_refused(pruned, tmp_path, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(pruned[2], folder)
    data = json.loads((folder / "dsa_config.json").read_text())
    data["config"]["data"]["seed"] = 9
    (folder / "dsa_config.json").write_text(json.dumps(data))
    assert DSAPruner.from_pretrained(folder).report.config.data.seed == 9
    assert "was changed after it was written" in caplog.text
    del data["achieved"]["units"]
    (folder / "dsa_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="achieved.units is missing"):
        DSAPruner.from_pretrained(folder)


def test_a_configuration_alone_does_not_make_a_pruned_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    DSAConfig(0.5).save_pretrained(tmp_path)
    pruner = DSAPruner.from_pretrained(tmp_path)
    assert pruner.report is None
    for use in (pruner.verify, lambda: next(pruner.masks())):
        with pytest.raises(ValueError, match="Nothing was pruned yet"):
            use()


def test_a_recovered_model_keeps_its_masks(pruned, tmp_path, caplog):
    """What recovery does to a loaded model: weights move, zeros stay; it is saved and still what it says."""
    pruned[0].save_pretrained(tmp_path / "out", compressed=True)
    pruner = DSAPruner.from_pretrained(tmp_path / "out")
    masks = dict(pruner.masks())
    for name, keep in masks.items():
        pruner.model.get_parameter(name).data.add_(keep * 1e-3)
    pruner.save_pretrained(tmp_path / "recovered")
    again = DSAPruner.from_pretrained(tmp_path / "recovered")
    assert again.verify().holds and not same_state(again.model, state(pruned[0].model))
    assert "any more" not in caplog.text
    again.model.get_parameter(next(iter(masks))).data.add_(1e-3)
    again.save_pretrained(tmp_path / "recovered")
    assert "The model is not what its report says any more: model.layers.0 has" in caplog.text


def test_nothing_foreign_is_in_the_configuration_of_a_dense_checkpoint(pruned, tmp_path):
    pruned[0].model.save_pretrained(tmp_path / "plain")
    assert (pruned[2] / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert not list(pruned[2].glob("dsa_model*"))
