"""A Hub on loopback, the folder of a small pruned model to push to it, and folders to be reported on."""

import json

import huggingface_hub.constants
import pytest

from optimum_dsa import Calibration, DSAConfig, DSAPruner, RecoveryConfig
from optimum_dsa.search.search import search
from optimum_dsa.sharing.outcome import read_all

from ..hub_server import HubServer
from ..tiny import tiny_llama, tokens


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the client in this process talks to, without the waits between its attempts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer() as server:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        moved = template.replace(huggingface_hub.constants.ENDPOINT, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", moved)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small pruned model, not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6, allocation="owl"))
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def evaluation(perplexity, dataset="test.txt"):
    """What `evaluate --json` of version 0.1 printed."""
    facts = {"model": "x", "dataset": dataset, "windows": 4, "sequence_length": 16, "perplexity": perplexity}
    return json.dumps(facts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pruned models with evaluations, and a search."""
    home = tmp_path_factory.mktemp("home")
    for name, perplexity in (("owl", 12.5), ("uniform", 14.25)):
        pruner = DSAPruner(tiny_llama())
        pruner.prune(tokens(), DSAConfig(0.6, allocation=name, granularity="matrix" if name == "owl" else "block"))
        if name == "owl":
            pruner.recover(tokens(12, 16), RecoveryConfig(steps=4, eval_steps=2, batch_size=4, validation_windows=4))
        pruner.save_pretrained(home / f"by-{name}")
        (home / f"by-{name}" / "evaluation.json").write_text(evaluation(perplexity))
    data = Calibration({"input_ids": tokens()}, "x")
    search(tiny_llama(), data, tokens(8, 16, seed=5), DSAConfig(0.6), strategy="named", folder=home / "found")
    return home


@pytest.fixture(scope="module")
def outcomes(folders):
    return read_all([folders / "by-owl", folders / "by-uniform", folders / "found"])


# -- what is read
