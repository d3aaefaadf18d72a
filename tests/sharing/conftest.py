"""A Hub on loopback, and the folder of a small pruned model to push to it."""

import huggingface_hub.constants
import pytest

from optimum_dsa import DSAConfig, DSAPruner

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
