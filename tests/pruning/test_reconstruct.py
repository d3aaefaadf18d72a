"""Block reconstruction: kept weights trained against the dense block, masks held."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_dsa import (
    DataConfig,
    DSAConfig,
    DSAPruner,
    ReconstructConfig,
    UpdateConfig,
    demo_model,
    demo_texts,
    find_architecture,
    load_calibration,
    perplexity,
    prune,
    verify,
    walk_blocks,
)
from optimum_dsa.model.calls import feed
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.pruning.reconstruct import FIRST, RATES, Reconstruct, seek
from optimum_dsa.pruning.source import micro_batch, step_size
from optimum_dsa.pruning.stretches import parts
from optimum_dsa.pruning.training import Reconstruction, told

from ..tiny import VOCABULARY, same_state, state, tiny_llama, tokens


def config(steps=6, method="wanda", sparsity=0.5, rate=1e-3, span=1, apart=False, **changes):
    how = ReconstructConfig(steps, rate, span, apart) if steps else 0
    return DSAConfig(sparsity, method, "uniform", reconstruct=how, **changes)


def zeros(model):
    return {name: value == 0 for name, value in model.named_parameters() if value.dim() == 2}


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()


def tiny_mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **experts)).eval()


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).eval()


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "experts": tiny_mixtral, "encoder-decoder": tiny_t5}


HOW = {"blocks": {}, "pairs": {"span": 2}, "parts": {"apart": True}}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_held_and_no_loss_rises(family, how):
    model = FAMILIES[family]()
    other = copy.deepcopy(model)
    # of one batch size, for a tie between two weights may be decided by rounding
    plain = prune(other, tokens(16)[:-1], config(0, batch_size=2))
    report = prune(model, tokens(16), config(batch_size=2, **HOW[how]))
    assert report.sparsity == plain.sparsity == 0.5 and verify(model, report).holds
    # the first block sees the same in both, and what the first mask was cannot depend on training
    first = find_architecture(model).blocks[0].name
    pruned, trained = zeros(other), zeros(model)
    assert all(torch.equal(pruned[name], trained[name]) for name in pruned if name.startswith(f"{first}."))
    for found in report.reconstruction.values():
        assert 0 < found.after <= found.before and (found.steps > 0) == (found.after < found.before)
    assert any(found.after < found.before for found in report.reconstruction.values())
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.parameters())


def test_the_loss_is_the_distance_to_the_dense_model_on_windows_that_are_held_out():
    """Of the first block, and of the second behind the trained first one, against plain forward passes."""
    model, dense = tiny_llama(), tiny_llama()
    text = tokens(32)
    report = prune(model, text, config())
    held_out = {"input_ids": text[-2:]}
    seen = {}

    def remember(which):
        return lambda module, args, output: seen.setdefault(which, []).append(output.detach())

    for which, one in (("own", model), ("dense", dense)):
        for index in range(2):
            one.model.layers[index].register_forward_hook(remember((which, index)))
        with torch.no_grad():
            feed(one, held_out)
    for index in range(2):
        own, target = seen["own", index][0], seen["dense", index][0]
        expected = ((own - target).square().sum() / target.square().sum()).item()
        assert report.reconstruction[f"model.layers.{index}"].after == pytest.approx(expected, rel=1e-4)


def lost(dense, model, index, text):
    """Share of the output of block `index` that a model loses, by plain forward passes."""
    seen = []
    for one in (dense, model):
        handle = one.model.layers[index].register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            one(input_ids=text)
        handle.remove()
    target, own = seen
    return ((own - target).square().sum() / target.square().sum()).item()


def test_blocks_of_a_span_are_trained_together_and_the_last_of_a_stack_alone():
    model, dense, text = tiny_llama(), tiny_llama(), tokens(32)
    report = prune(model, text, config(span=2))
    assert list(report.reconstruction) == ["model.layers.1", "model.layers.2"]
    for index in (1, 2):
        found = report.reconstruction[f"model.layers.{index}"]
        assert found.steps and found.after == pytest.approx(lost(dense, model, index, text[-2:]), rel=1e-4)
    norms = [layer.input_layernorm.weight for layer in model.model.layers]
    assert not any(torch.equal(norm, torch.ones(32)) for norm in norms)


def test_parts_of_a_block_come_nearer_to_what_the_block_is_to_give():
    model, dense, text = tiny_llama(), tiny_llama(), tokens(32)
    report = prune(model, text, config(apart=True))
    for index in range(3):
        found = report.reconstruction[f"model.layers.{index}"]
        assert found.after < found.before
        assert found.after == pytest.approx(lost(dense, model, index, text[-2:]), rel=1e-4)
    # what is in neither part stays
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(32))


def test_the_last_part_is_fitted_to_what_the_residual_stream_lacks_as_well():
    """Attention left as it was pruned, an MLP that could do all makes the block's output the dense one's."""
    text = tokens(16)
    model, seen = tiny_llama(), []

    def look(walked):
        if walked.replay.index == 0:
            attention, mlp = parts(walked)
            with torch.no_grad():
                whole, own = walked.replay.run(0), mlp.run(0, mlp.parameters)
                target = walked.replay.targets[0]
            seen.append((attention, mlp, whole, own, target))

    run_walk(model, text, look)
    ((attention, mlp, whole, own, target),) = seen
    torch.testing.assert_close(mlp.targets[0] - own, target - whole)
    assert attention.prefix.endswith("self_attn") and mlp.prefix.endswith("mlp")


def run_walk(model, text, look):
    architecture = find_architecture(model)
    for walked in walk_blocks(model, architecture, [{"input_ids": text}], reads={"inputs", "outputs"}):
        for weight in walked.weights:
            walked.tensor(weight)[::2] = 0
        look(walked)


def test_an_offloaded_model_has_one_block_at_a_time(tmp_path):
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match="span=2 trains blocks together"):
        prune(model, tokens(16), config(span=2))


def test_no_steps_change_nothing():
    one, other = tiny_llama(), tiny_llama()
    report = prune(one, tokens(), config(0))
    prune(other, tokens(), DSAConfig(0.5, "wanda", "uniform"))
    assert same_state(one, state(other)) and report.reconstruction == {}


def test_a_rate_that_only_hurts_leaves_every_block_as_it_was_pruned():
    one, other = tiny_llama(), tiny_llama()
    report = prune(one, tokens(16), config(rate=100.0, batch_size=2))
    prune(other, tokens(16)[:-1], config(0, batch_size=2))
    assert same_state(one, state(other))
    assert all(found.steps == 0 and found.after == found.before for found in report.reconstruction.values())


def test_nothing_is_trained_where_nothing_is_pruned():
    model, before = tiny_llama(), state(tiny_llama())
    report = prune(model, tokens(16), config(exclude=["model.layers.1.*"]))
    dense = {name: value for name, value in before.items() if name.startswith("model.layers.1.")}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in dense.items())
    assert "model.layers.1" not in report.reconstruction and "model.layers.2" in report.reconstruction


def test_an_excluded_matrix_stays_and_norms_and_biases_are_trained():
    model = tiny_gpt2()
    before = state(model)
    prune(model, tokens(16), config(exclude=["*.c_attn.weight"]))
    after = model.state_dict()
    assert torch.equal(after["transformer.h.0.attn.c_attn.weight"], before["transformer.h.0.attn.c_attn.weight"])
    for name in ("attn.c_attn.bias", "ln_1.weight", "mlp.c_proj.weight"):
        assert not torch.equal(after[f"transformer.h.0.{name}"], before[f"transformer.h.0.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_any_size_train_the_same(dtype):
    exact = 1e-3 if dtype == torch.float32 else 0.1
    reports = [prune(tiny_llama().to(dtype), tokens(36), config(batch_size=size)) for size in (1, 3, 8, 16)]
    for report in reports:
        assert report.sparsity == 0.5
        for block, found in report.reconstruction.items():
            assert found.after == pytest.approx(reports[0].reconstruction[block].after, rel=exact)


def test_windows_that_are_held_out_are_in_no_statistics():
    text = tokens(32)
    others = torch.cat([text[:-2], tokens(2, seed=1)])
    first = []
    for windows in (text, others):
        model = tiny_llama()
        prune(model, windows, config(rate=1e-9, method="sparsegpt"))
        first.append(zeros(model))
    assert all(torch.equal(mask, first[1][name]) for name, mask in first[0].items())


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7, 8, 31, 32, 128])
def test_a_step_is_made_of_whole_batches(samples):
    size = step_size(samples)
    assert size <= min(4, samples) and (size == 4 or samples < 8 * size)
    for batch_size in (1, 2, 3, 5, 8, 100):
        assert size % micro_batch(samples, batch_size) == 0 and micro_batch(samples, batch_size) <= batch_size


def test_a_pattern_is_kept(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(16), config(pattern="2:4"))
    pruner.save_pretrained(tmp_path)
    found = DSAPruner.from_pretrained(tmp_path)
    assert found.verify().holds
    assert found.report.reconstruction == pruner.report.reconstruction and len(found.report.reconstruction) == 3


def test_rates_are_tried_and_the_report_says_which_were_best():
    report = prune(tiny_llama(), tokens(16), config(rate=None))
    rates = {found.rate for found in report.reconstruction.values() if found.steps}
    assert rates <= set(RATES) and "blocks trained" in str(report)
    assert f"rate {', '.join(f'{rate:g}' for rate in sorted(rates))})" in str(report)


def test_blocks_that_came_no_nearer_are_said_to_be_what_they_were():
    one, other = Reconstruction(0.5, 0.5, 0.0, 0), Reconstruction(0.5, 0.3, 1e-3, 4)
    assert told({"a": one, "b": one}) == (
        "blocks trained: none of 2 came nearer to the dense one on windows held out, and each is what it was before "
        "(50.00% of their outputs lost)"
    )
    some = told({"a": one, "b": other})
    assert "50.00% of their outputs lost before, 40.00% after" in some
    assert some.endswith("(mean of 2; rate 0.001; 1 came no nearer to the dense one, and is what it was)")
    assert told({"b": other}).endswith("(mean of 1; rate 0.001)")
    # a rate at which nothing gets better
    report = prune(tiny_llama(), tokens(16), config(rate=1e6))
    assert told(report.reconstruction) in str(report) and "none of 3 came nearer" in str(report)


def test_it_helps_on_text_that_it_has_not_seen():
    """The model that is shipped."""
    losses, data = [], DataConfig(num_samples=16, sequence_length=64)
    for steps in (0, 16):
        pruner = DSAPruner.from_pretrained(demo_model(), dtype=torch.float32)
        pruner.prune(demo_texts("calibration"), config(steps, sparsity=0.6, rate=1e-3, data=data))
        text = load_calibration(demo_texts("validation"), pruner.model, pruner.tokenizer, data).inputs["input_ids"]
        losses.append(perplexity(pruner.model, text))
    assert losses[1] < 0.9 * losses[0]


def test_dense_targets_and_training_share_the_dense_blocks_pass():
    update = UpdateConfig(targets="dense", true_sequential=True, residual=True)
    model = tiny_llama()
    report = prune(model, tokens(16), config(method="alps", update=update))
    assert report.sparsity == 0.5 and len(report.reconstruction) == 3
    first = report.reconstruction["model.layers.0"]
    assert first.after <= first.before


@pytest.mark.parametrize("source", [tokens(1), CollectedStatistics({}, "elsewhere")])
def test_what_cannot_be_trained_on_is_refused_before_work(source):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match="reconstruct=6 trains.*num_samples of at least 2"):
        prune(model, source, config(method="magnitude"))
    assert same_state(model, before)


@pytest.mark.parametrize("changes", [{"rate": 1e-3}, {"span": 2}, {"apart": True}])
def test_how_to_train_is_said_of_a_training(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*with reconstruct=0 none is"):
        ReconstructConfig(**changes)
    with pytest.raises(ValueError, match="rate=0 trains nothing"):
        ReconstructConfig(4, rate=0)


def test_parts_and_spans_are_two_things():
    with pytest.raises(ValueError, match="span=2.*leave out one of both"):
        ReconstructConfig(4, span=2, apart=True)


def test_it_needs_the_pruned_blocks_outputs():
    with pytest.raises(ValueError, match="reconstruct=.*sequential=False.*leave out one of both"):
        config(sequential=False)


def test_a_number_is_its_steps():
    assert DSAConfig(0.5, reconstruct=64) == DSAConfig(0.5, reconstruct=ReconstructConfig(64))
    with pytest.raises(ValueError, match="steps is a whole number of at least 0, got 1.5"):
        DSAConfig(0.5, reconstruct=1.5)


def test_it_trains_inside_inference_mode():
    model, text = tiny_llama(), tokens(16)
    with torch.inference_mode():
        report = prune(model, text, config())
    assert any(found.steps for found in report.reconstruction.values())


def test_a_rate_is_sought_until_two_blocks_in_a_row_are_best_at_one():
    step = Reconstruct(ReconstructConfig(4))
    # a block in which none helped has no best, and the last one that had is where the next begins
    blocks, begins = [(1e-3, 4), (0.0, 0), (3e-3, 4), (3e-3, 2), (1e-3, 4)], [FIRST, 1e-3, 1e-3, 3e-3, 3e-3]
    for number, (rate, steps) in enumerate(blocks):
        assert step._rate() == (begins[number], number == 4)
        step.notes[f"block {number}"] = {"before": 0.1, "after": 0.05, "rate": rate, "steps": steps}
    assert step._rate() == (3e-3, True) and list(step.found) == [f"block {number}" for number in range(5)]
    given = Reconstruct(ReconstructConfig(4, rate=2e-4))
    given.notes["a"] = {"before": 0.1, "after": 0.1, "rate": 0.0, "steps": 0}
    assert given._rate() == (2e-4, True)


class Trainings:
    """Stands in for `Training`: a loss by rate, 1 before; notes what is tried."""

    def __init__(self, losses):
        self.losses, self.tried = losses, []
        self.found = Reconstruction(1.0, 1.0, 0.0, 0)

    def run(self, rate):
        self.tried.append(rate)
        if self.losses[rate] < self.found.after:
            self.found = Reconstruction(1.0, self.losses[rate], rate, 4)


@pytest.mark.parametrize(
    "losses, tried",
    [
        ((0.9, 0.8, 0.7, 0.8, 0.9), (1e-3, 3e-3, 3e-4)),
        ((0.9, 0.8, 0.7, 0.6, 0.5), (1e-3, 3e-3, 1e-2)),
        ((0.9, 0.8, 0.7, 0.6, 0.9), (1e-3, 3e-3, 1e-2)),
        ((0.5, 0.6, 0.7, 0.8, 0.9), (1e-3, 3e-3, 3e-4, 1e-4)),
        ((0.9, 0.6, 1.7, 1.8, 1.9), (1e-3, 3e-4, 1e-4)),
        ((2.0, 2.0, 2.0, 2.0, 2.0), (1e-3, 3e-4, 3e-3)),
        ((float("nan"),) * 5, (1e-3, 3e-4, 3e-3)),
    ],
)
def test_rates_are_tried_on_the_way_on_which_they_get_better(losses, tried):
    training = Trainings(dict(zip(RATES, losses)))
    training.run(FIRST)
    seek(training, RATES.index(FIRST))
    assert tuple(training.tried) == tried
    found = [loss for loss in losses if loss < 1]
    assert training.found.after == min(found, default=1.0)
