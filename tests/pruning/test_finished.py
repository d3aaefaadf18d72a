"""A prune that was interrupted and goes on: the same bytes, and only as what it was."""

import logging
import shutil

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, ReconstructConfig, UpdateConfig, find_architecture, prune
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.pruning import prune as module
from optimum_dsa.pruning.finished import FinishedBlocks, finished_in
from optimum_dsa.pruning.prune import run_steps
from optimum_dsa.pruning.steps import RemoveWeights

from ..tiny import same_state, state, tiny_llama, tokens


class Cut(Exception):
    """The process is gone."""


def cut_after(count, monkeypatch):
    """Have a prune end when it has finished so many blocks, and left half of the next."""
    real = FinishedBlocks.add

    def add(self, number, walked, notes):
        if number == count:
            (self.folder / f"block-{number:04}.safetensors.part").write_bytes(b"half")
            raise Cut
        real(self, number, walked, notes)

    monkeypatch.setattr(FinishedBlocks, "add", add)


def outcome(report):
    return {name: value for name, value in report.to_dict().items() if name != "seconds"}


def cut_and_resumed(make, inputs, config, folder, count, monkeypatch):
    """A model that was pruned in two runs, and its report."""
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(count, patch)
        prune(make(), inputs, config, folder)
    assert finished_in(folder) == count
    model = make()
    return model, prune(model, inputs, config, folder, resume=True)


CONFIGS = {
    "wanda": {"allocation": "dsa"},
    "one pass": {"allocation": "dsa", "sequential": False},
    "data-free": {"method": "magnitude", "allocation": "er"},
    "dense targets": {
        "method": "sparsegpt",
        "allocation": "owl",
        "update": UpdateConfig(targets="dense", true_sequential=True, residual=True),
    },
    "excluded": {"exclude": ["layers.1", "o_proj"], "method": "sparsegpt", "granularity": "block:kind"},
    "reconstruct": {"reconstruct": 4, "update": UpdateConfig("sparsegpt", targets="dense")},
    "head": {"include": ["lm_head"], "update": UpdateConfig("refit")},
    "permuted": {"pattern": "mixed:8", "permute": "ria", "allocation": "owl"},
    "trained": {"reconstruct": 4},
    "permuted and trained": {"pattern": "mixed:8", "permute": "ria", "reconstruct": 4, "allocation": "owl"},
    "trained in pairs": {"reconstruct": ReconstructConfig(4, span=2)},
}


@pytest.mark.parametrize(
    "name,count", [("wanda", 0), ("wanda", 2), *((name, 1) for name in CONFIGS), ("head", 3), ("trained in pairs", 2)]
)
def test_a_prune_that_was_cut_goes_on_to_the_same_end(name, count, tmp_path, monkeypatch):
    config = DSAConfig(0.6, **CONFIGS[name])
    inputs = None if name == "data-free" else tokens()
    whole = tiny_llama()
    expected = outcome(prune(whole, inputs, config))
    resumed, report = cut_and_resumed(tiny_llama, inputs, config, tmp_path / "b", count, monkeypatch)
    assert same_state(resumed, state(whole)) and outcome(report) == expected


@pytest.mark.parametrize("family", ["gpt2", "t5", "gemma4", "qwen3_moe"])
@pytest.mark.parametrize("sequential", [True, False])
def test_whatever_the_blocks_are_they_go_on(family, sequential, tiny, inputs, tmp_path, monkeypatch):
    config = DSAConfig(0.5, "sparsegpt", "uniform", sequential=sequential)
    whole = tiny(family)
    expected = outcome(prune(whole, inputs(family), config))
    count = len(find_architecture(whole).blocks) - 1
    resumed, report = cut_and_resumed(lambda: tiny(family), inputs(family), config, tmp_path, count, monkeypatch)
    assert same_state(resumed, state(whole)) and outcome(report) == expected


def test_what_was_raised_and_what_no_token_reached_is_in_the_report_as_if_nothing_had_been_cut(
    tiny, tmp_path, monkeypatch
):
    inputs = tokens(1, 4, vocabulary=3)
    config = DSAConfig(0.5, "sparsegpt", "uniform", update=UpdateConfig(damping=0))
    expected = outcome(prune(tiny("mixtral"), inputs, config))
    _, report = cut_and_resumed(lambda: tiny("mixtral"), inputs, config, tmp_path, 1, monkeypatch)
    assert outcome(report) == expected
    assert any(".0." in name for name in report.unseen) and any(".0." in name for name in report.damping)


def test_a_finished_block_is_not_asked_again_and_the_allocation_not_computed(tmp_path, monkeypatch):
    config, model = DSAConfig(0.6), tiny_llama()
    prune(model, tokens(), config, tmp_path)
    asked = []
    real = RemoveWeights.__call__
    monkeypatch.setattr(
        RemoveWeights, "__call__", lambda self, walked: asked.append(walked.name) or real(self, walked)
    )
    monkeypatch.setattr(module, "allocate", lambda *_: pytest.fail("computed"))
    (tmp_path / "block-0002.safetensors").unlink()
    again = tiny_llama()
    prune(again, tokens(), config, tmp_path, resume=True)
    assert asked == ["model.layers.2"] and same_state(again, state(model))
    prune(tiny_llama(), tokens(), config, tmp_path, resume=True)
    assert asked == ["model.layers.2"] and finished_in(tmp_path) == 3


# -- every tensor of a block, and what steps say of it


class Everything:
    """Changes norms as well, and notes it."""

    reads = frozenset({"inputs"})

    def __init__(self):
        self.notes = {}

    def __call__(self, walked):
        for number, value in enumerate(walked.state().values()):
            value.add_(0.5 + number)
        walked.changes.update(walked.state())
        self.notes[walked.name] = {"loss": 0.1 + len(self.notes)}


class Silent:
    reads, notes = frozenset(), {}

    def __call__(self, walked): ...


def test_all_of_a_block_comes_back_and_what_any_step_noted(tmp_path):
    config, calibration = DSAConfig(0.5), Calibration({"input_ids": tokens()}, "tensor")
    architecture = find_architecture(tiny_llama())
    names = [block.name for block in architecture.blocks]

    def run(model, resume):
        finished = FinishedBlocks.open(tmp_path, resume, {"a": (1,)}, names)
        finished.begin(whole.allocation)
        steps = [Silent(), Everything()]
        run_steps(model, architecture, calibration, config, steps, lambda _: None, finished)
        return steps[1].notes

    whole = prune(tiny_llama(), tokens(), config)
    model, again = tiny_llama(), tiny_llama()
    notes = run(model, False)
    (tmp_path / "block-0002.safetensors").unlink()
    assert list(run(again, True)) == list(notes) and same_state(again, state(model))
    assert not torch.equal(again.model.layers[0].input_layernorm.weight, torch.ones(32))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_goes_on_where_its_weights_are(where, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    config = DSAConfig(0.6, "sparsegpt", include=["lm_head", "embed_tokens"])
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    expected = outcome(prune(whole, tokens(), config))

    def load():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "m", device_map={"": where}, offload_folder=tmp_path / "weights"
        )

    resumed, report = cut_and_resumed(load, tokens(), config, tmp_path / "b", 2, monkeypatch)
    assert outcome(report) == expected
    assert finished_in(tmp_path / "b") == 4
    resumed.save_pretrained(tmp_path / "saved")
    assert same_state(LlamaForCausalLM.from_pretrained(tmp_path / "saved"), state(whole))


# -- as what it was, or not at all


DENSE = UpdateConfig("sparsegpt", targets="dense")


def other_model():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-4
    return model


@pytest.mark.parametrize(
    "message,model,inputs,changes",
    [
        ("was made with sparsity=0.6, not 0.5", tiny_llama, tokens(), {"sparsity": 0.5}),
        ("was made with method='wanda', not 'sparsegpt'", tiny_llama, tokens(), {"method": "sparsegpt"}),
        ("was made with targets='sparse', not 'dense'", tiny_llama, tokens(), {"update": DENSE}),
        ("was made with another model", other_model, tokens(), {}),
        ("was made with another calibration", tiny_llama, tokens(seed=9), {}),
    ],
    ids=lambda value: value.split("with ")[1] if isinstance(value, str) else "",
)
def test_it_goes_on_with_the_model_the_text_and_the_settings_that_it_began_with_alone(
    message, model, inputs, changes, tmp_path
):
    config = {"sparsity": 0.6, "update": UpdateConfig("sparsegpt")}
    config |= {"update": UpdateConfig()} if "method" in changes else {}
    prune(tiny_llama(), tokens(), DSAConfig(**config), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = model()
    dense = state(model)
    with pytest.raises(ValueError, match=f"{message}.*(resume it with the same|remove .* to begin anew)"):
        prune(model, inputs, DSAConfig(**config | changes), tmp_path, resume=True)
    assert same_state(model, dense) and before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    prune(tiny_llama(), tokens(), DSAConfig(**config, batch_size=2), tmp_path, resume=True)


def test_a_given_allocation_is_known_by_what_it_holds(tmp_path):
    found = prune(tiny_llama(), tokens(), DSAConfig(0.6)).allocation
    other = prune(tiny_llama(), tokens(), DSAConfig(0.6, allocation="owl")).allocation
    path = tmp_path / "a.json"
    found.save(path)
    config = DSAConfig(0.6, allocation=str(path))
    prune(tiny_llama(), tokens(), config, tmp_path / "b")
    path.rename(tmp_path / "moved.json")
    other.save(path)
    with pytest.raises(ValueError, match="was made with another allocation"):
        prune(tiny_llama(), tokens(), config, tmp_path / "b", resume=True)
    prune(tiny_llama(), tokens(), DSAConfig(0.6, allocation=str(tmp_path / "moved.json")), tmp_path / "b", resume=True)


def test_what_an_earlier_run_left_is_not_replaced_unasked(tmp_path):
    prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path / "b")
    with pytest.raises(FileExistsError, match="holds block-0000.safetensors of another run, .*; resume that run"):
        prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path / "b")
    with pytest.raises(ValueError, match="Resuming needs a folder of checkpoints"):
        prune(tiny_llama(), tokens(), DSAConfig(0.6), resume=True)


def test_to_go_on_where_there_is_nothing_is_said(tmp_path, caplog):
    prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path / "b", resume=True)
    assert "holds no interrupted prune to go on with; a new one begins" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "optimum_dsa"):
        prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path / "b", resume=True)
    assert not caplog.records


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage,why",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), ""),
        (lambda path: path.write_bytes(b""), ""),
        (flip, "its SHA-256 is another"),
        (lambda path: shutil.copy(path.with_name("block-0000.safetensors"), path), "it holds 'model.layers.0'"),
    ],
    ids=["cut", "empty", "a bit", "another block"],
)
def test_a_block_that_is_not_whole_is_pruned_again(damage, why, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model, again = tiny_llama(), tiny_llama()
    prune(model, tokens(), DSAConfig(0.6), tmp_path)
    damage(tmp_path / "block-0001.safetensors")
    prune(again, tokens(), DSAConfig(0.6), tmp_path, resume=True)
    assert same_state(again, state(model))
    assert f"block-0001.safetensors is not whole ({why}" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "format_version": 2, "allocation": {}}', "\xff"])
def test_a_folder_that_does_not_say_what_was_pruned_is_refused_and_stays(text, tmp_path):
    prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path)
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"run.json does not say what was pruned .*; remove .* to begin anew"):
        prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds block-0000.safetensors and no run.json"):
        prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path, resume=True)
    assert finished_in(tmp_path) == 3


@pytest.mark.parametrize("name", ["thesis.tex", "block-1.safetensors", "model.safetensors"])
def test_a_foreign_file_is_refused_and_stays(name, tmp_path):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(FileExistsError, match=f"holds {name}, which no prune wrote; move it away"):
        prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_said_with_the_way_on_and_what_is_there_stays(tmp_path, monkeypatch):
    from optimum_dsa.pruning import finished as module

    real = module.write_tensors

    def full(values, path, metadata):
        if "block-0002" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(values, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tensors", full)
        with pytest.raises(OSError, match=r"block-0002.safetensors could not be written to .*No space left.*--resume"):
            prune(tiny_llama(), tokens(), DSAConfig(0.6), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "block-0000.safetensors", "block-0001.safetensors", "run.json"
    }  # fmt: skip
    model, whole = tiny_llama(), tiny_llama()
    prune(model, tokens(), DSAConfig(0.6), tmp_path, resume=True)
    prune(whole, tokens(), DSAConfig(0.6))
    assert same_state(model, state(whole))


def test_statistics_that_are_there_already_tell_nobody_what_they_are_of(tmp_path):
    with pytest.raises(ValueError, match="reads text or tokens, not statistics"):
        prune(tiny_llama(), CollectedStatistics({}, "elsewhere"), DSAConfig(0.6, allocation="uniform"), tmp_path)
