import pytest

from optimum_dsa import Allocation, find_architecture
from optimum_dsa.pruning.allocation.layout import WHOLE, by_block, grid, place, short_names

from ...conftest import FAMILIES


@pytest.mark.parametrize(
    "unit,block,kind",
    [
        ("model.layers.3", "model.layers.3", WHOLE),
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj[7]", "model.layers.0", "mlp.experts.gate_up_proj"),
        ("layers.10.experts.12.w1.weight", "layers.10", "experts.*.w1"),
        ("model.layers.3:kv_group", "model.layers.3", "kv_group"),
        ("0.weight", "0", WHOLE),
        ("lm_head.weight", "lm_head", "lm_head"),
    ],
)
def test_a_name_says_where_a_unit_sits(unit, block, kind):
    assert (place(unit).block, place(unit).kind) == (block, kind)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_names_of_every_architecture_are_read(name, tiny):
    found = find_architecture(tiny(name), skip_unprunable=True)
    for block in found.blocks:
        assert place(block.name).block == block.name and place(block.name).kind == WHOLE
        for weight in block.weights:
            assert place(weight.name).block == block.name and place(weight.name).kind != WHOLE, weight.name


def test_blocks_are_weighted_by_size_and_kinds_are_put_together():
    shares = {"h.0.a": 0.5, "h.0.x.0.b": 0.2, "h.0.x.1.b": 0.4, "h.1.a": 1.0}
    allocation = Allocation(shares, {"h.0.a": 2, "h.0.x.0.b": 1, "h.0.x.1.b": 1, "h.1.a": 5})
    assert by_block(allocation) == pytest.approx({"h.0": 0.4, "h.1": 1.0})
    blocks, kinds, cells = grid(allocation)
    assert (blocks, kinds) == (["h.0", "h.1"], ["a", "x.*.b"])
    assert cells == pytest.approx({("h.0", "a"): 0.5, ("h.0", "x.*.b"): 0.3, ("h.1", "a"): 1.0})


def test_without_sizes_all_units_count_alike():
    assert by_block(Allocation.from_dict({"h.0.a": 0.2, "h.0.b": 0.4})) == pytest.approx({"h.0": 0.3})


def test_short_names_stay_apart():
    assert short_names(["self.q", "cross.q", "mlp.up"]) == {"self.q": "self.q", "cross.q": "cross.q", "mlp.up": "up"}
    assert short_names(["output.dense", "attention.output.dense"]) == {
        "output.dense": "output.dense",
        "attention.output.dense": "attention.output.dense",
    }
