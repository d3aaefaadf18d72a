"""The dense model's stream beside the pruned one: X_dense·Xᵀ, against hooks on two plain models."""

import pytest
import torch

from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.calls import feed
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.unstructured.metrics import METRICS

from ..conftest import FAMILIES
from ..plain_walk import Inputs, check_equal, check_same_state, hooks, plain, split, state


READS = {"inputs", "gram", "cross_gram"}
RESIDUAL = READS | {"residual"}


class Rows(Inputs):
    """Weight name -> what a plain forward multiplies it with, (tokens, in_features)."""

    def add(self, name, inputs):
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self[name] = torch.cat([self[name], rows]) if name in self else rows


@torch.no_grad()
def rows_of(model, architecture, batch):
    found = Rows()
    with hooks(model, architecture, found):
        feed(model, batch)
    return found


def check_cross(statistics, dense, sparse):
    """Raise where X_dense·Xᵀ of a weight is not that of two plain models; the names of those that have none."""
    for name, found in statistics.items():
        if found.is_paired:
            expected = dense[name].t() @ sparse[name]
            torch.testing.assert_close(found.cross, expected, rtol=1e-3, atol=1e-3, msg=name)
    return {name for name, found in statistics.items() if not found.is_paired}


def is_expert(weight):
    return weight.expert is not None or ".experts." in weight.name


def halve(walked, weights):
    for weight in weights:
        walked.tensor(weight)[:, ::2] = 0
        walked.changed(weight)


@pytest.mark.contract
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_changes_nothing_has_no_drift(family, tiny, inputs):
    model, batch = tiny(family), inputs(family)
    found, before = find_architecture(model), state(model)
    expected = plain(model, found, batch)
    for walked in walk_blocks(model, found, split(batch, 3), reads=READS):
        check_equal(dict(walked.statistics), expected, gram=True)
        for weight in walked.weights:
            statistics = walked.statistics[weight.name]
            assert statistics.drift is None or not statistics.drift.any(), weight.name
            # only what no token need reach may have nothing to be paired with
            assert statistics.is_paired or is_expert(weight), weight.name
    check_same_state(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma4", "mixtral", "jetmoe", "bert", "t5", "whisper", "llava"])
def test_the_dense_stream_is_what_the_dense_model_gives(family, tiny, inputs):
    model, other, batch = tiny(family), tiny(family), inputs(family)
    found = find_architecture(model)
    dense, unpaired = rows_of(other, found, batch), set()
    for walked in walk_blocks(model, found, split(batch, 6), reads=READS):
        unpaired |= check_cross(walked.statistics, dense, rows_of(model, found, batch))
        halve(walked, walked.weights)
    assert unpaired <= {weight.name for weight in found.weights if is_expert(weight)} < {*dense}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_with_true_sequential_both_streams_are_where_they_belong(family, tiny, inputs):
    model, other, batch = tiny(family), tiny(family), inputs(family)
    found = find_architecture(model)
    dense = rows_of(other, found, batch)
    for walked in walk_blocks(model, found, split(batch, 6), reads=READS):
        for group in walked.groups(true_sequential=True):
            assert not check_cross(group.statistics, dense, rows_of(model, found, batch))
            halve(walked, group.weights)


def test_the_head_is_paired_too(tiny, inputs):
    model, other, batch = tiny("llama"), tiny("llama"), inputs("llama")
    found = find_architecture(model, include=["lm_head"])
    dense = rows_of(other, found, batch)
    for walked in walk_blocks(model, found, split(batch, 6), reads=READS):
        assert not check_cross(walked.statistics, dense, rows_of(model, found, batch))
        halve(walked, walked.weights)
    assert walked.statistics["lm_head.weight"].drift.any()


def test_padding_is_in_neither_stream(tiny, inputs):
    """Left, right and between the tokens."""
    model, other, batch = tiny("llama"), tiny("llama"), inputs("llama")
    found = find_architecture(model)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3], mask[1, -4:], mask[2, 5] = 0, 0, 0
    walks = [walk_blocks(each, found, [{**batch, "attention_mask": mask}], reads=READS) for each in (model, other)]
    next(walks[1])
    halve(first := next(walks[0]), first.weights)
    second = next(walks[0])
    statistics = second.statistics[second.weights[0].name]
    assert statistics.is_paired and statistics.tokens == int(mask.sum()) and statistics.drift.any()
    one = next(walks[1]).statistics[second.weights[0].name]
    assert not one.drift.any() and torch.equal(one.cross, one.gram)


def test_what_is_changed_besides_weights_does_not_reach_the_dense_stream(tiny, inputs):
    """A step may change norms and biases as well."""
    model, other, batch = tiny("llama"), tiny("llama"), inputs("llama")
    found = find_architecture(model)
    dense = rows_of(other, found, batch)
    for walked in walk_blocks(model, found, split(batch, 6), reads=READS):
        assert not check_cross(walked.statistics, dense, rows_of(model, found, batch))
        model.get_submodule(walked.name).input_layernorm.weight.data.mul_(1.5)


WRITERS = {
    "llama": {"o_proj", "down_proj"},
    "opt": {"out_proj", "fc2"},
    "gpt2": {"c_proj"},
    "bert": {"dense"},
    "t5": {"o", "wo"},
    "vit": {"o_proj", "fc2", "dense", "out_proj"},
    "gemma2": set(),  # a norm stands between
    "phi": set(),  # attention and MLP are added to each other first
    "mixtral": {"o_proj"},
}


@pytest.mark.parametrize("family", WRITERS)
def test_matrices_that_write_to_the_residual_stream_are_found_and_no_others(family, tiny, inputs):
    model = tiny(family)
    found, writers = find_architecture(model), set()
    for walked in walk_blocks(model, found, split(inputs(family), 3), reads=RESIDUAL):
        for weight in walked.weights:
            statistics = walked.statistics[weight.name]
            if statistics.lacks:
                assert statistics.lack.shape == weight.shape and not statistics.lack.any()
                writers.add(weight.module.rpartition(".")[2])
            assert statistics.lack is None or statistics.lacks
    assert writers <= WRITERS[family] and bool(writers) == bool(WRITERS[family])


@pytest.mark.parametrize("true_sequential", [False, True])
def test_what_the_residual_stream_lacks_is_what_two_plain_models_differ_by(true_sequential, tiny, inputs):
    model, other, batch = tiny("llama"), tiny("llama"), inputs("llama")
    found = find_architecture(model)

    @torch.no_grad()
    def streams(each):
        """Block and writer -> the stream before the addition, (tokens, hidden size): what the norms are given."""
        seen = {}
        for index, block in enumerate(each.model.layers):
            for norm, writer in (("input_layernorm", "o_proj"), ("post_attention_layernorm", "down_proj")):
                block.get_submodule(norm).register_forward_pre_hook(
                    lambda module, args, key=(index, writer): seen.__setitem__(key, args[0].flatten(0, 1))
                )
        feed(each, batch)
        for block in each.model.layers:
            block.input_layernorm._forward_pre_hooks.clear()
            block.post_attention_layernorm._forward_pre_hooks.clear()
        return seen

    dense = streams(other)
    for index, walked in enumerate(walk_blocks(model, found, split(batch, 6), reads=RESIDUAL)):
        for group in walked.groups(true_sequential):
            name = group.weights[0].module.rpartition(".")[2]
            if name in ("o_proj", "down_proj"):
                statistics = group.statistics[group.weights[0].name]
                if true_sequential or name == "o_proj":
                    sparse, rows = streams(model), rows_of(model, found, batch)
                    expected = (dense[index, name] - sparse[index, name]).t() @ rows[group.weights[0].name]
                    torch.testing.assert_close(statistics.lack, expected, rtol=1e-3, atol=1e-3)
                assert statistics.lacks and statistics.lack.any() == (
                    index > 0 or (true_sequential and name != "o_proj")
                )
            if true_sequential:
                halve(walked, group.weights)
        halve(walked, walked.weights)


@pytest.mark.parametrize("how", ["raises", "stops"])
def test_a_walk_cut_short_leaves_the_model_as_it_was(how, tiny, inputs):
    model, batch = tiny("mixtral"), inputs("mixtral")
    before = state(model)
    try:
        for walked in walk_blocks(model, find_architecture(model), [batch], reads=READS):
            next(walked.groups(true_sequential=True))
            if how == "raises":
                raise KeyboardInterrupt
            break
    except KeyboardInterrupt:
        pass
    check_same_state(model, before)


def test_a_walk_without_it_collects_none(tiny, inputs):
    model = tiny("llama")
    for walked in walk_blocks(model, find_architecture(model), [inputs("llama")], reads={"gram"}):
        for statistics in walked.statistics.values():
            assert statistics.drift is None and not statistics.is_paired
            with pytest.raises(ValueError, match="cross_gram"):
                _ = statistics.cross
    assert "cross_gram" not in {METRICS.fact(name, "reads", "inputs") for name in METRICS}


def test_a_walk_in_which_nothing_can_drift_is_refused(tiny, inputs):
    model = tiny("llama")
    walk = walk_blocks(model, find_architecture(model), [inputs("llama")], reads=READS, sequential=False)
    with pytest.raises(ValueError, match="walk with sequential=True"):
        next(walk)
