"""One checkpoint for a Trainer that shards a model, and for one that does not; see also test_processes.py."""

import json

import pytest
import torch

from optimum_dsa.recovery.layouts import SHARDED, WEIGHTS, WHOLE, readable

from ..tiny import tiny_llama, tokens


def trained(tie=False):
    """A model, its optimizer in two groups as a Trainer's, which has made a step."""
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=tie)
    parameters = list(model.parameters())
    groups = [{"params": parameters[1:], "weight_decay": 0.1}, {"params": parameters[:1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("tie", [False, True])
def test_there_and_back_is_the_same_optimizer_and_the_same_weights(tmp_path, tie):
    model, optimizer = trained(tie)
    first = tmp_path / "checkpoint-1"
    model.save_pretrained(first)
    torch.save(optimizer.state_dict(), first / WHOLE)
    (first / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    with readable(first, model, optimizer, sharded=False) as folder:
        assert folder == first
    with readable(first, model, optimizer, sharded=True) as folder:
        assert (folder / "config.json").read_text() == (first / "config.json").read_text()
        known = torch.load(folder / SHARDED, weights_only=True)
        assert known["param_groups"][1]["params"] == ["model.embed_tokens.weight"]
        assert known["state"].keys() == {name for name, _ in model.named_parameters()}
        weights = torch.load(folder / WEIGHTS, weights_only=True)
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        with readable(folder, model, optimizer, sharded=False) as again:
            assert not (again / WEIGHTS).exists()
            found, expected = torch.load(again / WHOLE, weights_only=True), optimizer.state_dict()
            assert found["param_groups"] == expected["param_groups"]
            assert found["state"].keys() == expected["state"].keys()
            for number, entry in expected["state"].items():
                assert all(torch.equal(value, found["state"][number][name]) for name, value in entry.items())
    assert not folder.exists() and (first / WHOLE).is_file()


def test_the_best_model_of_another_layout_is_not_lost(tmp_path):
    model, optimizer = trained()
    (tmp_path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": "checkpoint-1"}))
    reading = readable(tmp_path, model, optimizer, sharded=True)
    with pytest.raises(ValueError, match="with patience on whole models.*go on without sharding"), reading:
        pass
