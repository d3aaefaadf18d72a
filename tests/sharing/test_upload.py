import json
import sys

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from optimum_dsa import Allocation, DataConfig, DSAConfig, DSAPruner, RecoveryConfig
from optimum_dsa.checkpoint.description import checksum, is_unchanged
from optimum_dsa.commands.embedded import demo_model
from optimum_dsa.sharing.push import PushError
from optimum_dsa.sharing.upload import collect

from ..hub_server import TOKEN
from ..tiny import same_state, state, tiny_llama, tokens
from .common import FILES, PLOTS, card, change, push


def test_nothing_of_this_computer_goes_along(hub, tmp_path, monkeypatch):
    home = tmp_path / "home-of-jane"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    DSAPruner(tiny_llama()).allocate(tokens(), DSAConfig(0.6, allocation="owl")).save(home / "mine.json")
    (home / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    pruner = DSAPruner.from_pretrained(demo_model())
    settings = DSAConfig(0.6, "wanda", "owl", data=DataConfig(num_samples=4, sequence_length=32))
    pruner.prune(str(home / "text.txt"), settings)
    pruner.model.config._name_or_path = str(home / "base")
    pruner.save_pretrained(home / "model")
    change(home / "model", "dsa_config.json", config__allocation=str(home / "mine.json"))
    change(home / "model", "dsa_config.json", calibration__source=str(home / "text.txt"))
    change(home / "model", "config.json", _name_or_path=str(home / "base"))
    change(home / "model", "tokenizer_config.json", vocab_file=str(home / "vocab.json"))
    secret = {"model": str(home / "model"), "dataset": str(home / "test.txt"), "perplexity": 3.0, "host": "jane-pc"}
    (home / "model" / "evaluation.json").write_text(json.dumps(secret))
    for name in (".env", "notes.md", "optimizer.pt", "report.html", "tokenizer.json.swp~"):
        (home / "model" / name).write_text("hf_secret")
    push(home / "model")
    content = hub.content("me/tiny")
    assert content.keys() == FILES | PLOTS | {"tokenizer.json", "tokenizer_config.json"}
    for name, data in content.items():
        for private in ("home-of-jane", str(tmp_path), "hf_secret", "jane-pc"):
            assert private.encode() not in data, (name, private)
    facts = json.loads(content["dsa_config.json"])
    assert facts["calibration"]["source"] == "text.txt"
    assert DSAConfig.from_dict(facts["config"]).allocation == Allocation.load(home / "model")
    assert "test.txt" in card(hub).text


def test_a_description_is_signed_again_only_if_nobody_had_edited_it(folder):
    content = collect(folder).files["dsa_config.json"]
    assert content == folder / "dsa_config.json"
    change(folder, "dsa_config.json", format_version=1, calibration__source="/home/jane/text.txt")
    facts = json.loads((folder / "dsa_config.json").read_text())
    first = {name: value for name, value in facts.items() if name != "checksum"}
    (folder / "dsa_config.json").write_text(json.dumps(first))  # the first version had no checksum
    sent = json.loads(collect(folder).files["dsa_config.json"])
    assert sent["calibration"]["source"] == "text.txt"
    assert sent["format_version"] == 1 and "checksum" not in sent  # nothing vouched for it, and nothing does now
    written = {**facts, "format_version": 2}
    (folder / "dsa_config.json").write_text(json.dumps(written))
    assert not is_unchanged(json.loads(collect(folder).files["dsa_config.json"]))
    (folder / "dsa_config.json").write_text(json.dumps({**written, "checksum": checksum(written)}))
    sent = json.loads(collect(folder).files["dsa_config.json"])
    assert is_unchanged(sent) and sent["calibration"]["source"] == "text.txt"


def test_a_compressed_model_goes_as_it_is_and_says_what_it_needs(hub, tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6))
    pruner.push_to_hub("me/tiny", token=TOKEN)
    pruner.save_pretrained(tmp_path / "model", compressed=True)
    push(tmp_path / "model")
    content = hub.content("me/tiny")
    assert "model.safetensors" not in content
    assert sum(name.endswith(".safetensors") for name in content) >= 1
    text = card(hub).text
    assert "import optimum_dsa" in text and "leave the zeros out" in text and "as large as" not in text
    for name, data in content.items():
        if "/" not in name:
            (tmp_path / name).write_bytes(data)
    assert same_state(DSAPruner.from_pretrained(tmp_path).model, state(pruner.model))


def test_what_is_left_out_is_told(folder):
    (folder / "notes.md").write_text("x")
    assert collect(folder).left_out == ("notes.md",)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        collect(folder)


def test_weights_that_were_cut_off_are_not_sent(hub, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        push(folder)
    assert not hub.repositories


def test_a_card_of_the_users_own_is_taken_as_it_is(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    push(folder)
    assert hub.content("me/tiny")["README.md"] == b"# Mine\n"


def test_without_matplotlib_the_card_has_no_pictures(hub, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    push(folder)
    assert hub.content("me/tiny").keys() == FILES and "![" not in card(hub).text


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter that `recover` trained, beside that of the pruned model under it; not to be written."""
    folder = tmp_path_factory.mktemp("recovered")
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.6, allocation="owl"))
    pruner.save_pretrained(folder / "pruned")
    config = RecoveryConfig(steps=2, batch_size=4, rank=2, validation_windows=4, merge=False, learning_rate=0.05)
    pruner.recover(tokens(16), config)
    pruner.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_an_adapter_has_no_card_of_pefts_and_loads_with_the_model_under_it(adapter):
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "dsa_config.json", "dsa_manifest.json",
    ]  # fmt: skip
    before = {path.name: path.read_bytes() for path in (adapter.parent / "pruned").iterdir()}
    pruner = DSAPruner.from_pretrained(adapter)
    assert pruner.verify().holds and pruner.recovery is None
    assert dict(pruner.masks()).keys() == dict(DSAPruner.from_pretrained(adapter.parent / "pruned").masks()).keys()
    for away in ({"device_map": {"": "disk"}, "offload_folder": adapter.parent / "offload"},):
        with pytest.raises(ValueError, match="whose base has to be in memory"):
            DSAPruner.from_pretrained(adapter, **away)
    assert {path.name: path.read_bytes() for path in (adapter.parent / "pruned").iterdir()} == before
    with pytest.raises(ValueError, match="has an adapter already; merge it first"):
        pruner.recover(tokens(16), RecoveryConfig(steps=1, validation_windows=4))


def test_an_adapter_is_not_sent_without_the_weights_under_it(hub, adapter, folder):
    with pytest.raises(ValueError, match="holds an adapter, which has no zeros without its base.*--base USER/NAME"):
        push(adapter, "me/adapter")
    with pytest.raises(PushError, match="there is no such repository"):
        push(adapter, "me/adapter", base="me/none")
    push(folder, "me/other")  # pruned from other weights
    change(folder, "dsa_config.json", seconds=1.5)
    HfApi(endpoint=hub.url, token=TOKEN).create_repo("me/empty")
    for base in ("me/empty", "me/other"):
        if base == "me/other":
            facts = json.loads((adapter / "dsa_config.json").read_text())
            unit = next(iter(facts["achieved"]["units"]))
            other = {**facts, "achieved": {**facts["achieved"], "units": {**facts["achieved"]["units"], unit: 0.5}}}
            api = HfApi(endpoint=hub.url, token=TOKEN)
            content = json.dumps(other).encode()
            api.upload_file(path_or_fileobj=content, path_in_repo="dsa_config.json", repo_id=base)
        with pytest.raises(ValueError, match=f"{base} is not the pruned model that the adapter belongs to"):
            push(adapter, "me/adapter", base=base)
    assert "me/adapter" not in hub.repositories
    with pytest.raises(ValueError, match="holds a whole model, which is pushed without a base"):
        push(folder, base="me/tiny")


def test_an_adapter_goes_with_its_own_card_onto_a_base_in_a_repository(hub, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    push(adapter.parent / "pruned", "me/pruned")
    push(adapter, "me/adapter", base="me/pruned")
    content = hub.content("me/adapter")
    expected = {"adapter_config.json", "adapter_model.safetensors", "dsa_config.json", "README.md"}
    assert content.keys() == expected | PLOTS
    assert json.loads(content["adapter_config.json"])["base_model_name_or_path"] == "me/pruned"
    assert not any(str(adapter.parent).encode() in data for data in content.values())
    data, text = card(hub, "me/adapter").data, card(hub, "me/adapter").text
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "me/pruned", "adapter")
    assert "[More Information Needed]" not in text and "60.00% of its prunable weights" in text
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in text
    assert 'AutoModelForCausalLM.from_pretrained("me/pruned"' in text and "trained for 2 steps" in text
    hub_model, local = DSAPruner.from_pretrained("me/adapter", token=TOKEN), DSAPruner.from_pretrained(adapter)
    assert same_state(hub_model.model, state(local.model))


def embedder(folder):
    """A tiny model with what belongs to it, and what is of whoever keeps the folder."""
    tiny_llama().save_pretrained(folder)
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}, {"path": "2_Dense"}]
    own = {
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "2_Dense/pytorch_model.bin": "x",
        "preprocessor_config.json": "{}",
        "LICENSE": "x",
        "NOTICE.txt": "x",
        **dict.fromkeys(("USE_POLICY.md", "requirements.txt", "vocab.bpe"), "x"),
    }
    for name, content in {**own, "notes.txt": "of mine", "voices/one.npz": "x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return own.keys()


def test_what_belongs_to_the_base_is_sent_and_notes_are_not(hub, tmp_path, caplog):
    own = embedder(tmp_path / "base")
    (tmp_path / "base" / "optimizer-of-jane.pt").write_text("x")
    pruner = DSAPruner.from_pretrained(tmp_path / "base")
    pruner.prune(tokens(), DSAConfig(0.6))
    pruner.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").is_file()
    push(tmp_path / "model")
    assert hub.content("me/tiny").keys() == FILES | PLOTS | own
    assert "not sent: notes.txt, voices/one.npz." in caplog.text
    facts = json.loads(hub.content("me/tiny")["dsa_config.json"])
    assert set(facts["base_files"]["kept"]) == set(own) and is_unchanged(facts)
    assert b"jane" not in hub.content("me/tiny")["dsa_config.json"]
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("changed by somebody")
    assert "1_Pooling/config.json" in collect(tmp_path / "model").left_out


def test_what_a_base_on_the_hub_has_is_sent_whatever_it_is(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    own = embedder(tmp_path / "base")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("me/base")
    api.upload_folder(repo_id="me/base", folder_path=tmp_path / "base")
    pruner = DSAPruner.from_pretrained("me/base")
    pruner.prune(tokens(), DSAConfig(0.6))
    pruner.push_to_hub("me/tiny", token=TOKEN)
    assert hub.content("me/tiny").keys() == FILES | PLOTS | own | {"notes.txt", "voices/one.npz"}
