"""Files and commits of models on the Hub, from a cache that is filled by hand."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, RecoveryConfig
from optimum_dsa.checkpoint.description import read_description
from optimum_dsa.common.hub_file import hub_commit, hub_file, model_name, snapshot_of
from optimum_dsa.sharing.outcome import Outcome

from ..tiny import tiny_llama, tokens


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Options that find the model "org/tiny" in a cache, and no network."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    tiny_llama().save_pretrained(folder / "snapshots" / COMMIT)
    return {"cache_dir": str(cache), "local_files_only": True}


def test_a_file_is_found_or_not(offline):
    assert hub_file("org/tiny", "config.json", **offline).is_file()
    assert hub_file("org/tiny", "dsa_config.json", **offline) is None
    assert hub_file("org/other", "config.json", **offline) is None
    with pytest.raises(OSError, match="a/b/c is neither a folder nor a model that the Hub gives"):
        hub_file("a/b/c", "config.json", **offline)


@pytest.mark.contract
def test_a_commit_is_known_of_a_model_on_the_hub_only(offline, tmp_path):
    assert hub_commit("org/tiny", **offline) == hub_commit("org/tiny", revision=COMMIT, **offline) == COMMIT
    assert hub_commit("org/other", **offline) is None
    assert hub_commit(str(tmp_path), **offline) is None


@pytest.mark.contract
@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_pruned_model_names_the_commit_of_its_base(offline, tmp_path, revision):
    pruner = DSAPruner.from_pretrained("org/tiny", revision=revision, **offline)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    base = read_description(tmp_path / "out" / "dsa_config.json")["base_model"]
    assert base == {"name": "org/tiny", "revision": COMMIT}


def test_a_model_that_was_trained_sparse_names_it_too(offline, tmp_path):
    pruner = DSAPruner.from_pretrained("org/tiny", **offline)
    config = RecoveryConfig(method="elsa", sparsity=0.5, steps=2, batch_size=4, validation_windows=4, project_every=1)
    pruner.recover(tokens(12), config)
    pruner.save_pretrained(tmp_path / "out")
    assert read_description(tmp_path / "out")["base_model"] == {"name": "org/tiny", "revision": COMMIT}


@pytest.mark.parametrize("link", [False, True])
def test_a_path_into_the_cache_names_the_model_and_not_the_commit(offline, tmp_path, link):
    path = Path(offline["cache_dir"], "models--org--tiny", "snapshots", COMMIT)
    if link:
        (tmp_path / "cache").symlink_to(offline["cache_dir"])
        path = tmp_path / "cache" / path.relative_to(offline["cache_dir"])
    for pruner in (DSAPruner.from_pretrained(path), DSAPruner(LlamaForCausalLM.from_pretrained(path))):
        pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
        pruner.save_pretrained(tmp_path / "out")
        assert read_description(tmp_path / "out")["base_model"] == {"name": "org/tiny", "revision": COMMIT}
    assert snapshot_of(path / "config.json") == ("org/tiny", COMMIT)
    assert (
        model_name(path) == "tiny" and model_name("org/tiny") == "org/tiny" and model_name(tmp_path) == tmp_path.name
    )
    assert pruner.measure(tokens()).model == "tiny"
    assert Outcome.read(path).name == "tiny"


@pytest.mark.parametrize("path", ["/a/snapshots/b", "/a/models--x--y/blobs/c", "/models--x--y/snapshots", "snapshots"])
def test_other_paths_are_no_snapshots(path):
    assert snapshot_of(path) is None


def test_a_snapshots_folder_above_the_cache_is_no_snapshot():
    path = Path("/data/snapshots/hub/models--gpt2/snapshots", COMMIT, "config.json")
    assert snapshot_of(path) == ("gpt2", COMMIT)
