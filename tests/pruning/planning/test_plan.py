"""What a plan says of itself: it is the sum of its parts, grows with what is asked for, and a remedy really helps."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa import UPDATES, DSAConfig, UpdateConfig, find_architecture
from optimum_dsa.common.machine import memory_available, own_memory, shown_bytes, shown_seconds
from optimum_dsa.pruning.planning.memory import KEPT, WORKING, Text, in_dtype
from optimum_dsa.pruning.planning.plan import plan_for
from optimum_dsa.pruning.planning.remedies import Asked, first_remedy
from optimum_dsa.pruning.planning.shape import BlockShape, InputShape, ModelShape, shape_of
from optimum_dsa.pruning.planning.work import OPERATIONS, operations, speed, time_block

from ...tiny import tiny_llama


GB = 10**9
DENSE = UpdateConfig(targets="dense", true_sequential=True, residual=True)
CONFIGS = {
    "wanda": DSAConfig(0.5),
    "uniform": DSAConfig(0.5, allocation="uniform"),
    "magnitude": DSAConfig(0.5, "magnitude", "uniform"),
    "lsa": DSAConfig(0.5, allocation="lsa"),
    "sparsegpt": DSAConfig(0.5, "sparsegpt"),
    "alps": DSAConfig(0.5, "alps"),
    "alps dense": DSAConfig(0.5, "alps", update=DENSE),
    "trained": DSAConfig(0.5, "alps", update=DENSE, reconstruct=8),
    "wanda trained": DSAConfig(0.5, reconstruct=8),
    "trained in a row": DSAConfig(0.5, "alps", update=DENSE, reconstruct={"steps": 8, "span": 3}),
    "distilled": DSAConfig(0.5, reconstruct={"distill": 8}),
    "swap": DSAConfig(0.5, "wanda+swap"),
}


TEXT = Text(128, 2048, 8)


def llama(layers: int = 32, hidden: int = 4096, inner: int = 14336, small: int = 1024) -> ModelShape:
    """The sizes of Llama-3-8B, or a model like it."""
    inputs = (
        InputShape(hidden, (hidden, small, small)),
        InputShape(hidden, (hidden,)),
        InputShape(hidden, (inner, inner)),
        InputShape(inner, (hidden,)),
    )
    size = hidden * (2 * hidden + 2 * small) + 3 * hidden * inner
    block = BlockShape(size + 2 * hidden, inputs, hidden)
    return ModelShape((block,) * layers, 2 * 128256 * hidden + hidden, 1, 2, 2048)


def change(config: DSAConfig, **data) -> DSAConfig:
    batch = data.pop("batch_size", config.batch_size)
    return replace(config, data=replace(config.data, **data), batch_size=batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_total_is_the_sum_of_the_parts_and_the_largest_phase(name):
    plan = plan_for(llama(), CONFIGS[name], libraries=GB)
    assert plan.total == sum(plan.parts.values()) == max(sum(parts.values()) for parts in plan.phases.values())
    assert plan.parts["weights"] == llama().parameters * 2 and plan.total > 16 * GB
    found = plan.to_dict()
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values()) and found["fits"] is True
    assert all(part in str(plan) for part in plan.parts) and shown_bytes(plan.total) in plan.line


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"magnitude"}))
@pytest.mark.parametrize("field", ["num_samples", "sequence_length", "batch_size"])
def test_it_grows_with_text_and_batch(name, field):
    few, many = (plan_for(llama(), change(CONFIGS[name], **{field: 16 * 4**step})) for step in range(2))
    assert few.total <= many.total
    # the phase that is the largest may be one that a batch is not part of, and training has its own
    assert sum(few.phases["collecting"].values()) < sum(many.phases["collecting"].values())


def test_gradients_of_a_loss_are_of_all_weights_and_those_of_a_block_of_one():
    shape = llama()
    whole, one, none = (plan_for(shape, DSAConfig(0.5, name, "uniform")) for name in ("gblm", "wanda++", "wanda"))
    size = sum(block.size for block in shape.blocks)
    assert 4 * size < whole.parts["gradients"] < 4.1 * size and "gradients" not in none.phases["collecting"]
    assert 4 * size / 32 < one.phases["collecting"]["gradients"] < 6 * size / 32
    both = plan_for(shape, DSAConfig(0.5, "magnitude", "owl", allocation_metric="gblm"))
    assert both.phases["allocating"]["gradients"] == whole.parts["gradients"]
    learnt = plan_for(shape, DSAConfig(0.5, allocation="besa"))
    assert learnt.phases["allocating"]["masks"] > 24 * size / 32


def test_allocations_that_run_the_model_take_passes_of_it():
    text = [
        operations(llama(), DSAConfig(0.5, allocation=name), TEXT)[0] for name in ("owl", "als", "neuronal", "besa")
    ]
    owl, als, neuronal, besa = text
    assert als < owl < neuronal < 10 * owl and owl < besa


def test_what_reads_no_text_needs_none():
    few, many = (plan_for(llama(), change(CONFIGS["magnitude"], num_samples=number)) for number in (1, 1000))
    assert few.phases == many.phases and "activations" not in few.parts


def test_better_weights_need_more_memory_and_more_time():
    order = [CONFIGS[name] for name in ("magnitude", "uniform", "sparsegpt", "alps", "alps dense", "trained")]
    plans = [plan_for(llama(), config) for config in order]
    assert sorted(plan.total for plan in plans) == [plan.total for plan in plans]
    work = [sum(operations(llama(), config, plan.text)) for config, plan in zip(order, plans)]
    assert sorted(work) == work


def test_weights_on_the_disk_and_short_numbers_take_less():
    plain = plan_for(llama(), CONFIGS["wanda"])
    assert plan_for(llama(), CONFIGS["wanda"], offloaded=True).total < plain.total - 10 * GB
    assert plan_for(in_dtype(llama(), 4), CONFIGS["wanda"]).total > plain.total + 10 * GB
    # Finished blocks are shards of the result.
    assert plan_for(llama(), CONFIGS["wanda"], offloaded=True).disk == {"result": plain.disk["result"]}


def test_activations_on_the_disk_are_counted_there():
    for name in ("wanda", "alps dense", "trained"):
        plain = plan_for(llama(), CONFIGS[name])
        found = plan_for(llama(), replace(CONFIGS[name], activations="disk"))
        kept = 128 * 2048 * 4096 * 2
        assert found.disk["activations"] == kept * (1 if name == "wanda" else 3) and "activations" not in plain.disk
        assert found.phases["collecting"]["activations"] == 2 * 8 * 2048 * 4096 * 2 < kept
        assert found.total < plain.total - kept * 0.8


def test_ranks_divide_the_text_and_devices_the_weights():
    plain = plan_for(llama(), CONFIGS["wanda"])
    ranks, devices = plan_for(llama(), CONFIGS["wanda"], ranks=4), plan_for(llama(), CONFIGS["wanda"], devices=4)
    assert ranks.parts["activations"] == plain.parts["activations"] // 4 and ranks.text == plain.text
    assert ranks.parts["weights"] == plain.parts["weights"]
    assert plain.parts["weights"] / 4 <= devices.parts["weights"] < plain.parts["weights"] / 3
    assert devices.parts["activations"] == plain.parts["activations"] and devices.ranks == 1
    both = plan_for(llama(), CONFIGS["wanda"], ranks=4, devices=2, available=80 * GB)
    assert "of 80 GB on each of 4 ranks with 2 devices" in both.line and "of each of 4 ranks with 2" in str(both)
    assert {**both.to_dict(), "ranks": 1, "devices": 1}.keys() == plain.to_dict().keys()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("available", [60, 25, 21, 18, 12, 8, 4, 1])
def test_a_remedy_fits_by_the_plan_s_own_arithmetic(name, available):
    plan = plan_for(llama(), CONFIGS[name], available=available * GB)
    assert plan.fits == (plan.total <= available * GB) == (plan.remedy is None)
    if plan.fits:
        return
    fits = _after(plan.remedy.options, CONFIGS[name]).total
    assert fits == plan.remedy.total < plan.total
    assert plan.remedy.fits == (fits <= available * GB)
    for option in plan.remedy.options:
        assert option in plan.line and option in str(plan)


def _after(options, config):
    """The plan once its remedy's options are given."""
    shape, offloaded = llama(), False
    for option in options:
        flag, value = option.split()
        if flag == "--device-map":
            offloaded = True
        elif flag == "--dtype":
            shape = in_dtype(shape, 2)
        elif flag == "--activations":
            config = replace(config, activations=value)
        elif flag == "--targets":
            config = replace(config, update=replace(config.update, targets=value, residual=False))
        elif flag == "--distill":
            config = replace(config, reconstruct=replace(config.reconstruct, distill=0))
        elif flag == "--span":
            config = replace(config, reconstruct=replace(config.reconstruct, span=int(value)))
        else:
            config = change(config, **{flag[2:].replace("-", "_"): int(value)})
    return plan_for(shape, config, offloaded=offloaded)


def test_a_single_change_that_suffices_comes_first_and_one_that_alters_nothing_before_others():
    asked = Asked(llama(), CONFIGS["wanda"], plan_for(llama(), CONFIGS["wanda"]).text)
    sizes = lambda asked: 100 * asked.text.batch + 10 * asked.text.samples  # noqa: E731
    assert first_remedy(asked, 1700, sizes).options == ("--batch-size 4",)
    assert first_remedy(asked, 900, sizes).options == ("--num-samples 8",)
    both = first_remedy(asked, 300, sizes)
    assert both.options == ("--batch-size 1", "--num-samples 16") and both.fits
    assert not first_remedy(asked, 100, sizes).fits


def test_nothing_that_helps_is_said():
    plan = plan_for(llama(), CONFIGS["alps"], available=10**6)
    assert not plan.fits and not plan.remedy.fits and "still too much" in plan.way_out


def test_a_disk_that_is_full_is_said():
    plan = plan_for(llama(), CONFIGS["wanda"], available=100 * GB, disk_available=GB)
    assert not plan.fits and plan.remedy is None and "The disk has 1 GB" in plan.way_out


def test_shapes_are_those_of_the_model_and_inputs_are_shared_as_it_runs():
    with torch.device("meta"):
        model = tiny_llama()
    shape = shape_of(model, find_architecture(model), torch.bfloat16)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (len(shape.blocks), shape.hidden, shape.itemsize, shape.length, shape.stacks) == (3, 32, 2, 64, 1)
    want = (InputShape(32, (32, 16, 16)), InputShape(32, (32,)), InputShape(32, (48, 48)), InputShape(48, (32,)))
    assert all(block.inputs == want for block in shape.blocks)
    assert shape.blocks[0].size == sum(w.size for w in find_architecture(model).blocks[0].weights)


def test_the_tables_speak_of_updates_that_are_there():
    assert WORKING.keys() == OPERATIONS.keys() and KEPT.keys() <= WORKING.keys() <= UPDATES.keys()


@pytest.mark.parametrize("name", ["uniform", "wanda", "alps dense", "trained"])
def test_a_block_is_timed_and_the_rest_extrapolated(name):
    with torch.device("meta"):
        model = tiny_llama()
    shape = shape_of(model, find_architecture(model), torch.float32)
    model = tiny_llama(num_hidden_layers=2)
    config = change(CONFIGS[name], num_samples=4, sequence_length=32)
    seconds = time_block(model, config, plan_for(shape, config).text)
    assert seconds.size == shape.blocks[1].size and seconds.fixed > 0 and seconds.token > 0
    total = seconds.total(shape, plan_for(shape, config).text)
    assert total == pytest.approx(3 * (seconds.fixed + 128 * seconds.token) + seconds.seeking)
    assert (seconds.seeking > 0) == (config.reconstruct.steps > 0 and config.reconstruct.rate is None)


def test_the_machine_is_asked():
    assert own_memory() > 50 * 2**20 and memory_available() > 0
    assert speed("cpu", torch.float32) > 1e7
    shown = [shown_bytes(number) for number in (12, 1500, 123_456_789, 1.5e9, 2e13)]
    assert shown == ["12 B", "1.5 KB", "123 MB", "1.5 GB", "20 TB"]
    assert [shown_seconds(number) for number in (1.23, 45, 600, 7200, 10**6)] == [
        "1.2 s",
        "45 s",
        "10 min",
        "2 h",
        "12 days",
    ]
