"""Which rows of a matrix reach which inputs of others: told together in a few runs, they are those told one by one."""

import pytest
import torch
import transformers

from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.model.wiring import Wiring

from ..tiny import tokens


def wiring_of(model, batch):
    """The wiring of the first block."""
    return Wiring(next(walk_blocks(model, find_architecture(model), [batch])))


def one_by_one(wiring, name, group):
    """Which channels of an input each row of a weight reaches, (rows, channels) bool."""
    rows, (reader, *_) = torch.arange(wiring.weights[name].shape[0]), wiring.groups()[group]
    return torch.stack([wiring.reached({name: rows == row}, reader) for row in rows])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "falcon_new", "gemma4", "mixtral", "bert"])
@torch.no_grad()
def test_rows_that_are_told_by_their_digits_are_those_told_one_by_one(family, tiny, inputs):
    wiring, together = wiring_of(tiny(family), inputs(family)), 0
    for name in wiring.weights:
        if (found := wiring.touched(name)) is None:
            continue
        group, touched = found
        each = one_by_one(wiring, name, group)
        if touched.dtype == torch.bool:
            assert torch.equal(touched, each)
        else:
            assert (each.sum(0) == len(touched)).all()
            assert all(each[rows, torch.arange(each.shape[1])].all() for rows in touched)
            together += 1
    assert together or family == "mixtral"  # whose experts are of one parameter


@pytest.mark.parametrize(("kind", "name", "parts"), [("Llama", "gate_proj", 1), ("Phi3", "gate_up_proj", 2)])
@torch.no_grad()
def test_channels_cost_two_runs_for_every_digit_of_their_number(kind, name, parts, monkeypatch):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=1001)
    wiring = wiring_of(getattr(transformers, f"{kind}ForCausalLM")(config).eval(), {"input_ids": tokens(1, 8)})
    run, runs = wiring.run, []
    monkeypatch.setattr(wiring, "run", lambda changes: runs.append(changes) or run(changes))
    (weight,) = [weight for weight in wiring.weights if f".{name}." in weight]
    _, touched = wiring.touched(weight)
    assert torch.equal(touched, torch.arange(parts * 1001).reshape(parts, 1001))
    # one changes all rows, and of two parts the first digit of all rows tells that they are two
    assert len(runs) == 1 + 20 * parts + 2 * (parts - 1)
