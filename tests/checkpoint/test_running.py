"""A checkpoint runs in every form, whatever it is stored as, and computes the same."""

import json

import pytest
import torch

from optimum_dsa import FORMS, DSAConfig, DSAPruner, ValuesConfig, demo_model, load_as
from optimum_dsa.checkpoint.convert import convert
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.packed.pack_model import packed_layers

from ..test_commands import run
from ..tiny import needs_compressed_loading, tiny_llama, tokens


pytestmark = [pytest.mark.contract, needs_compressed_loading]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One pruned model: dense, compressed, and to be run packed."""
    home = tmp_path_factory.mktemp("running")
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(home / "dense")
    for form in ("compressed", "packed"):
        convert(home / "dense", home / form, form)
    return home, pruner.model


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("stored", ["dense", "compressed", "packed"])
def test_every_form_of_every_checkpoint_computes_the_same(folders, stored, form):
    home, model = folders
    loaded = load_as(str(home / stored), form)
    assert len(packed_layers(loaded)) == (0 if form == "dense" else 21)
    near = {"rtol": 1e-5, "atol": 1e-6} if "int" not in form else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, **near)


def test_numbers_of_4_bits_do_not_become_larger_ones(tmp_path):
    pruner = DSAPruner(tiny_llama())
    values = ValuesConfig("int4", scales="absmax", feedback=False)
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform", values=values))
    pruner.save_pretrained(tmp_path, compressed=True)
    loaded = load_as(str(tmp_path), "packed-int8")
    assert {loaded.get_submodule(name).values.dtype for name in packed_layers(loaded)} == {torch.uint8}


def test_what_cannot_be_held_so_is_refused(folders):
    with pytest.raises(ValueError, match="has no matrix that can be packed: of one that is nobody else's, 25% are"):
        load_as(str(demo_model()), "packed")
    with pytest.raises(UnknownNameError, match="Unknown form 'paked'. Did you mean 'packed'"):
        load_as(str(folders[0] / "dense"), "paked")


def test_bench_measures_forms_in_one_run(folders, monkeypatch, capsys):
    monkeypatch.setattr("optimum_dsa.evaluation.reading.PROBE", 2**16)
    monkeypatch.setattr("optimum_dsa.evaluation.reading._CACHE", 2**16)
    model, against = (str(folders[0] / name) for name in ("compressed", "dense"))
    options = ["--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--forms", "packed,dense"]
    code, output, errors = run(monkeypatch, capsys, "bench", model, "--against", against, *options, "--json")
    assert code == 0, errors
    rows = list(json.loads(output)["speeds"].values())
    assert [(row["model"], row["form"]) for row in rows] == [(model, "packed"), (model, "dense"), (against, "")]
    assert [row["packed_bytes"] is not None for row in rows] == [True, False, False]
    assert rows[0]["read_bytes"] < rows[1]["read_bytes"] == rows[2]["read_bytes"]
    code, output, errors = run(monkeypatch, capsys, "bench", model, "--forms", "paked")
    assert code == 2 and "Unknown form 'paked'" in errors
