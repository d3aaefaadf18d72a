"""An allocation that is pushed without a model, and taken from the Hub by whoever prunes."""

import json

import pytest

from optimum_dsa import Allocation, DSAConfig, DSAPruner, prune

from ..hub_server import TOKEN
from ..test_commands import run
from ..tiny import tiny_llama, tokens
from .common import card, push


GIVEN = Allocation({f"model.layers.{number}": share for number, share in enumerate((0.3, 0.6, 0.6))},
                   {f"model.layers.{number}": 7680 for number in range(3)}, "found")  # fmt: skip


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of its own for the client in this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_file_is_pushed_alone_and_pruned_with(hub, cache, tmp_path, monkeypatch, capsys):
    GIVEN.save(tmp_path / "mine.json")
    said = run(monkeypatch, capsys, "push", str(tmp_path / "mine.json"), "me/found", "--token", TOKEN)
    assert said[:2] == (0, f"pushed to {hub.url}/me/found\n")
    content = hub.content("me/found")
    assert content.keys() == {"allocation.json", "README.md"} and str(tmp_path) not in str(content)
    assert Allocation.from_dict(json.loads(content["allocation.json"])) == GIVEN
    text = str(card(hub, "me/found"))
    assert "--sparsity 0.5000 --allocation me/found" in text and "| model.layers.0 | 30.00% |" in text
    expected = prune(tiny_llama(), tokens(), DSAConfig(0.5, allocation=GIVEN))
    for name in ("me/found", "me/found@main"):
        pruner = DSAPruner(tiny_llama())
        assert pruner.prune(tokens(), DSAConfig(0.5, allocation=name)).achieved == expected.achieved
    pruner.save_pretrained(tmp_path / "pruned")
    # no file leans on a repository that may change: what was taken is written out
    written = json.loads((tmp_path / "pruned" / "dsa_config.json").read_text())
    assert written["config"]["allocation"]["sparsity"] == pytest.approx(GIVEN.sparsity)
    assert DSAPruner.from_pretrained(tmp_path / "pruned").verify().holds


def test_the_allocation_of_a_model_on_the_hub_is_taken_too(hub, cache, folder):
    push(folder, "me/tiny")
    expected = DSAPruner.from_pretrained(folder).report.allocation
    assert Allocation.load("me/tiny") == expected
    report = prune(tiny_llama(seed=3), tokens(), DSAConfig(0.6, allocation="me/tiny"))
    assert report.allocation.sparsity == expected.sparsity


def test_beside_a_model_its_card_stays(hub, folder, tmp_path):
    push(folder, "me/tiny")
    before = hub.content("me/tiny")
    GIVEN.save(tmp_path / "mine.json")
    push(tmp_path / "mine.json", "me/tiny")
    after = hub.content("me/tiny")
    assert after.keys() == before.keys() | {"allocation.json"} and after["README.md"] == before["README.md"]


def test_the_folder_of_a_search_is_an_allocation(hub, tmp_path):
    (tmp_path / "found").mkdir()
    GIVEN.save(tmp_path / "found" / "allocation.json")
    (tmp_path / "found" / "notes.txt").write_text("mine")
    push(tmp_path / "found", "me/found")
    assert hub.content("me/found").keys() == {"allocation.json", "README.md"}


@pytest.mark.parametrize("name", ["me/none", "me/empty", "me/found@none"])
def test_what_the_hub_does_not_have_is_said_before_work(hub, cache, name, tmp_path):
    GIVEN.save(tmp_path / "mine.json")
    push(tmp_path / "mine.json", "me/found")
    hub.repositories["me/empty"] = type(hub.repositories["me/found"])(private=False)
    with pytest.raises(FileNotFoundError, match=f"The allocation '{name}' is no file or folder here"):
        prune(tiny_llama(), tokens(), DSAConfig(0.5, allocation=name))


def test_what_is_no_allocation_is_not_pushed(hub, tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no allocation"):
        push(tmp_path / "other.json", "me/found")
    assert not hub.repositories
