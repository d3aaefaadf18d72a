import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import Allocation, DSAConfig, DSAPruner
from optimum_dsa.demo import demo_model, demo_texts

from .common import same_state, state, tiny_llama, tokens


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model, pruned with text and saved."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    pruner = DSAPruner.from_pretrained(demo_model())
    config = DSAConfig(0.6, allocation="owl", num_samples=8, sequence_length=64, seed=3)
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
    assert data["format_version"] == 2
    assert data["base_model"] == {"name": demo_model().name, "revision": None}
    assert data["config"]["allocation"] == "owl"
    assert data["calibration"] == {"source": "2 texts", "samples": 8, "length": 64, "tokens": 512, "seed": 3}
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
    config = DSAConfig(0.6, num_samples=4, sequence_length=32)
    texts = demo_texts("calibration")[:1]
    assert pruner.allocate(texts, config) == pruner.prune(texts, config).allocation


def test_checkpoints_written_by_a_pruner_are_readable_by_all(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.5))
    pruner.save_pretrained(tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
