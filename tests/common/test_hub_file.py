"""Files and commits of models on the Hub, from a cache that is filled by hand."""

import pytest

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.checkpoint.description import read_description
from optimum_dsa.common.hub_file import hub_commit, hub_file

from ..tiny import tiny_llama


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
