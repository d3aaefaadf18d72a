"""Heads that the blocks of a stack share a tensor of go alike from all of them, or not at all."""

import copy

import pytest
import torch

from optimum_dsa import DSAStructuredConfig, find_architecture, prune_structures
from optimum_dsa.pruning.structured.prune import dense_of
from optimum_dsa.pruning.structured.slicing import silence
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.tied import tied_gone

from ...tiny import same_state, state
from .families import FAMILIES, batch_of, deeper


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def found_in(model, exclude=()):
    return find_structures(model, find_architecture(model, exclude=exclude), batch_of("T5"))


def tied_in(found):
    groups = {}
    for unit, each in found.structures.items():
        if each.tied:
            groups.setdefault(each.tied, []).append(unit)
    return groups


def test_the_heads_of_each_stack_go_with_their_rows_of_its_bias():
    """Encoder and decoder each; and those of attention to the encoder, whose bias is all zeros, as many everywhere."""
    model = FAMILIES["T5"][0]()
    before = state(model)
    found = found_in(model)
    assert same_state(model, before)
    encoder, decoder, cross = tied_in(found).values()
    assert encoder == ["encoder.block.0:head", "encoder.block.1:head"]
    assert decoder == ["decoder.block.0:head", "decoder.block.1:head"]
    assert cross == ["decoder.block.0:head.1", "decoder.block.1:head.1"]
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack, group in (("encoder", encoder), ("decoder", decoder)):
        assert f"{stack}.{bias}" in {cut.tensor for cut in found.structures[group[0]].cuts}
    assert not any("relative_attention_bias" in name for name in found.left)


def test_a_model_without_some_is_a_plain_one_that_gives_what_it_gave(tmp_path):
    model, batch = deeper("T5", 3), batch_of("T5", 3)
    units, dense = found_in(model).structures, copy.deepcopy(model)
    report = prune_structures(model, batch, DSAStructuredConfig(0.2, ("head",), "random", "none"))
    assert model.config.num_heads == 3 and set(report.kept.values()) == {3}
    for units_of in tied_in(found_in(dense)).values():
        assert len({report.gone[unit] for unit in units_of}) == 1
    for unit, gone in report.gone.items():
        silence(dense, units[unit], torch.tensor(gone))
    expected = logits(dense, batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again).__module__.startswith("transformers.")
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False}
    written = [again.generate(batch["input_ids"], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*written)


def test_every_block_has_a_say_in_which_go():
    model, batch = FAMILIES["T5"][0](), batch_of("T5", 3)
    dense = dense_of(model, batch, DSAStructuredConfig(0.2, ("head",), "magnitude"))
    group = next(iter(tied_in(found_in(model)).values()))
    # Of a block whose numbers are large: it does not decide alone.
    dense.known["importances"] = {unit: torch.ones(4) for unit in dense.units}
    dense.known["importances"] |= {group[0]: 1e6 * torch.tensor([3.0, 2.9, 3.1, 3.2])}
    dense.known["importances"] |= {group[1]: torch.tensor([0.1, 3.0, 2.0, 1.0])}
    gone = tied_gone(dense, dict.fromkeys(dense.units, 1))
    assert gone[group[0]] == gone[group[1]] == [0]


@pytest.mark.parametrize("settings", [{"layout": "padded"}, {"learner": "projected_gates"}])
def test_where_blocks_may_differ_they_stay_and_it_is_said(settings):
    model = FAMILIES["T5"][0]()
    config = DSAStructuredConfig(0.1, ("head", "ffn"), **settings)
    if config.learner:
        with pytest.raises(ValueError, match="learner"):  # which is of models that predict the next token
            dense_of(model, batch_of("T5", 2), config)
        return
    dense = dense_of(model, batch_of("T5", 2), config)
    assert not any(each.tied for each in dense.units.values())
    for name in ("encoder.block.1.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.o.weight"):
        assert dense.left[name].startswith("its heads go alike from all blocks")


def test_where_one_block_keeps_them_all_do():
    found = found_in(FAMILIES["T5"][0](), exclude=["encoder.block.1.layer.0.SelfAttention.o"])
    assert [name.partition(":")[0] for name in tied_in(found)] == ["decoder.block", "decoder.block"]
    why = found.left["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert "blocks share a tensor with a row for each of 4 heads" in why
