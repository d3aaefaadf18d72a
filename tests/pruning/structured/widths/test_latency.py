"""What a structure costs in time: a line through the times of its products, and the time of all of them."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optimum_dsa import find_architecture
from optimum_dsa.pruning.finished import FinishedBlocks
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.learners import learner
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.structure import WHOLE
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.widths.costs import COSTS
from optimum_dsa.pruning.structured.widths.latency import _Stopwatch

from ....tiny import same_state, state, tiny_llama, tokens
from ..families import FAMILIES, batch_of


LENGTH = 12
SHARED = {"structures": ("ffn", "kv_group"), "update": "none", "cost": "latency", "layout": "per_layer"}
BLOCKS = DSAStructuredConfig(0.3, **SHARED)
LEARNS = DSAStructuredConfig(0.3, **SHARED, learner="projected_gates", learn_steps=6, batch_size=2)


@pytest.fixture
def steady(monkeypatch):
    """A machine that takes a nanosecond for every floating point operation."""

    def seconds(self, run):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return 1e-9 * counter.get_total_flops()

    monkeypatch.setattr(_Stopwatch, "_seconds", seconds)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Falcon", "Mixtral"])
def test_on_a_steady_machine_time_is_operations(family, steady):
    model, batch = FAMILIES[family][0](), batch_of(family, length=LENGTH)
    architecture = find_architecture(model)
    found = find_structures(model, architecture, batch).structures
    units = {unit: each for unit, each in found.items() if each.kind not in WHOLE}
    flops, latency = (COSTS[name](model, architecture, units, LENGTH) for name in ("flops", "latency"))
    assert {unit: LENGTH * cost for unit, cost in flops.each.items()} == latency.each
    assert latency.total == pytest.approx(LENGTH * flops.total, rel=1e-6)


def test_a_share_of_the_time_goes(steady):
    config = DSAStructuredConfig(0.3, ("ffn", "kv_group"), "magnitude", "none", cost="latency", layout="per_layer")
    report = prune_structures(tiny_llama(), tokens(), config)
    assert 0.28 < report.shares["latency"] <= 0.3
    assert "latency" not in prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.3)).shares


def test_a_product_is_timed_once_and_wider_ones_take_longer():
    stop = _Stopwatch(tiny_llama(), 64)
    small, large = stop.product(32, 32), stop.product(2048, 2048)
    assert 0 < small < large and stop.product(32, 32) == small and torch.is_grad_enabled()


class Killed(BaseException):
    pass


def dies(*_):
    raise Killed


def stopped(self, run):
    raise AssertionError("timed anew")


@pytest.mark.parametrize("config, last", [(BLOCKS, (FinishedBlocks, "add")), (LEARNS, (learner, "place_of"))])
def test_a_run_that_goes_on_has_the_times_that_it_began_with(config, last, tmp_path, steady, monkeypatch):
    whole, again = tiny_llama(), tiny_llama()
    report = prune_structures(whole, tokens(), config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*last, dies)
        prune_structures(tiny_llama(), tokens(), config, tmp_path)
    monkeypatch.setattr(_Stopwatch, "_seconds", stopped)
    resumed = prune_structures(again, tokens(), config, tmp_path, resume=True)
    assert same_state(again, state(whole)) and resumed.shares == report.shares
    prune_structures(tiny_llama(), tokens(), config, tmp_path, resume=True)  # also where all is done
    with pytest.raises(AssertionError, match="timed anew"):
        prune_structures(tiny_llama(), tokens(), config, tmp_path / "other", resume=True)


def test_times_of_another_model_or_none_are_refused(tmp_path, steady):
    prune_structures(tiny_llama(), tokens(), LEARNS, tmp_path)
    with pytest.raises(ValueError, match="has the times of 48 structures of model.layers.0:ffn, and the model has 40"):
        prune_structures(tiny_llama(intermediate_size=40), tokens(), LEARNS, tmp_path, resume=True)
    table = tmp_path / "latency.json"
    data = json.loads(table.read_text())
    table.write_text(json.dumps(data | {"total": data["total"] + 1}))
    with pytest.raises(ValueError, match="projected_gates.pt was made with another table of times"):
        prune_structures(tiny_llama(), tokens(), LEARNS, tmp_path, resume=True)
    table.write_text('{"units": {"model.layers.0:ffn": 48}}')
    with pytest.raises(ValueError, match="latency.json says no times .*; begin anew in another folder"):
        prune_structures(tiny_llama(), tokens(), LEARNS, tmp_path, resume=True)
