"""A cut that was interrupted goes on behind its finished blocks, to the model and the report of one that was not."""

from dataclasses import replace

import pytest

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig, prune_structures
from optimum_dsa.pruning.finished import FinishedBlocks
from optimum_dsa.pruning.structured.widths import shares

from ...tiny import same_state, state, tiny_llama, tokens
from .families import FAMILIES, batch_of
from .test_offload import BOTH, CUTS, digests, on_disk


INSIDE = {family: config for family, config in CUTS.items() if set(config.structures) - {"block", "expert"}}
ENTIRE = DSAStructuredConfig(0.3, ("attention", "mlp"), layout="per_layer")


class Killed(BaseException):
    pass


def killed(patch, number):
    """Have a run end when it would keep block `number`."""
    add = FinishedBlocks.add

    def ends(self, block, *others):
        if block == number:
            raise Killed
        add(self, block, *others)

    patch.setattr(FinishedBlocks, "add", ends)


def facts(report):
    return replace(report, seconds=0)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("family,config", [*INSIDE.items(), ("Llama", ENTIRE)])
def test_the_model_and_the_report_are_those_of_a_run_that_was_not_ended(family, config, number, tmp_path, monkeypatch):
    model, batch = FAMILIES[family][0](), batch_of(family, 4)
    fresh, again = FAMILIES[family][0](), FAMILIES[family][0]()
    for other in (fresh, again):
        other.load_state_dict(model.state_dict())
    report = prune_structures(model, batch, config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed(patch, number)
        prune_structures(fresh, batch, config, tmp_path)
    assert len(list(tmp_path.glob("block-*.safetensors"))) == number
    assert facts(prune_structures(again, batch, config, tmp_path, resume=True)) == facts(report)
    assert same_state(again, state(model)) and type(again) is type(model)
    assert again.config.to_dict() == model.config.to_dict()


def test_how_many_go_from_where_is_not_asked_again(tmp_path, monkeypatch):
    config = replace(BOTH, allocation="stability")
    whole, asked = tiny_llama(), []
    prune_structures(whole, tokens(), config)
    row = shares.SHARES["stability"]
    monkeypatch.setitem(shares.SHARES, "stability", lambda dense: (asked.append(dense), row(dense))[1])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed(patch, 1)
        prune_structures(tiny_llama(), tokens(), config, tmp_path)
    resumed = tiny_llama()
    prune_structures(resumed, tokens(), config, tmp_path, resume=True)
    assert len(asked) == 1 and same_state(resumed, state(whole))


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_weights_on_the_disk_end_in_the_files_of_the_cut_in_memory(family, tmp_path, monkeypatch):
    model, batch, config = FAMILIES[family][0](), batch_of(family, 4), CUTS[family]
    model.save_pretrained(tmp_path / "dense")
    kind = type(model)
    pruner = DSAPruner(model)
    pruner.prune(batch, config)
    pruner.save_pretrained(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed(patch, 1)
        loaded = on_disk(kind, tmp_path / "dense", tmp_path / "first")
        DSAPruner(loaded).prune(batch, config, tmp_path / "blocks")
    pruner = DSAPruner(on_disk(kind, tmp_path / "dense", tmp_path / "second"))
    pruner.prune(batch, config, tmp_path / "blocks", resume=True)
    pruner.save_pretrained(tmp_path / "resumed")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_it_goes_on_with_the_same_cut_alone(tmp_path):
    prune_structures(tiny_llama(), tokens(), BOTH, tmp_path)
    with pytest.raises(FileExistsError, match="of another run"):
        prune_structures(tiny_llama(), tokens(), BOTH, tmp_path)
    with pytest.raises(ValueError, match="was made with importance='wanda_sp', not 'flap'"):
        prune_structures(tiny_llama(), tokens(), replace(BOTH, importance="flap"), tmp_path, resume=True)
    with pytest.raises(ValueError, match="model"):
        prune_structures(tiny_llama(seed=1), tokens(), BOTH, tmp_path, resume=True)
    with pytest.raises(ValueError, match="was made with"):
        DSAPruner(tiny_llama()).prune(tokens(), DSAConfig(0.3, method="magnitude"), tmp_path, resume=True)
