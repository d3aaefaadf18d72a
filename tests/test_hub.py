import json
import os
import socket
import subprocess
import sys
import textwrap
import time

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import Allocation, DSAConfig, DSAPruner
from optimum_dsa.demo import demo_model
from optimum_dsa.description import is_unchanged
from optimum_dsa.hub import PushError, push_folder
from optimum_dsa.upload import collect

from .common import same_state, state, tiny_llama, tokens
from .hub_server import TOKEN, HubServer
from .test_commands import run


FILES = {"config.json", "generation_config.json", "model.safetensors", "dsa_config.json", "README.md"}
PLOTS = {"plots/allocation.png", "plots/heatmap.png"}


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the client in this process talks to, without the waits between its attempts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer() as server:
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


def change(folder, name, **facts):
    """Set facts in a JSON file of `folder`."""
    data = json.loads((folder / name).read_text())
    for key, value in facts.items():
        part = data
        *outer, last = key.split("__")
        for step in outer:
            part = part[step]
        part[last] = value
    (folder / name).write_text(json.dumps(data))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(folder, repository="me/tiny", **options):
    return push_folder(folder, repository, token=TOKEN, **options)


def card(server, repository="me/tiny"):
    return ModelCard(server.content(repository)["README.md"].decode())


# -- a whole way


def fresh_process(server, home, *arguments):
    """Output of a Python process of its own, which knows nothing but the server."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "cache"), "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_is_pushed_and_loaded_in_a_fresh_process(tmp_path):
    pruner = DSAPruner.from_pretrained(demo_model())
    report = pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "model")
    cli = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"
    load = """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from optimum_dsa import DSAPruner
        plain = AutoModelForCausalLM.from_pretrained("me/tiny")
        pruner = DSAPruner.from_pretrained("me/tiny")
        same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), pruner.model.parameters()))
        zeros = sum(int((m.weight == 0).sum()) for n, m in plain.named_modules() if n.endswith("_proj"))
        print(zeros, same, pruner.tokenizer("x = 1").input_ids)
    """
    with HubServer() as server:
        said = fresh_process(server, tmp_path, "-c", cli, "dsa", "push", str(tmp_path / "model"), "me/tiny")
        assert said == f"pushed to {server.url}/me/tiny\n"
        assert len(server.repositories["me/tiny"].commits) == 2  # the initial one, and ours
        content = server.content("me/tiny")
        assert content.keys() == FILES | PLOTS | {"tokenizer.json", "tokenizer_config.json"}
        assert content["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
        assert not (tmp_path / "cache" / "hub" / "models--me--tiny").exists()
        zeros, same, ids = fresh_process(server, tmp_path, "-c", textwrap.dedent(load)).split(maxsplit=2)
    assert (int(zeros), same) == (report.removed, "True")
    assert json.loads(ids) == AutoTokenizer.from_pretrained(demo_model())("x = 1").input_ids


def test_a_pruner_pushes_what_it_holds(hub, tmp_path):
    pruner = DSAPruner(tiny_llama())
    with pytest.raises(ValueError, match="call prune"):
        pruner.push_to_hub("me/tiny", token=TOKEN)
    pruner.prune(tokens(), DSAConfig(0.6))
    before = state(pruner.model)
    hub.fail("POST", "/commit/", 503, times=100)
    with pytest.raises(PushError, match="The model is as it was; save_pretrained keeps it, and the same call goes on"):
        pruner.push_to_hub("me/tiny", token=TOKEN)
    hub.faults.clear()
    assert pruner.push_to_hub("me/tiny", private=True, token=TOKEN) == f"{hub.url}/me/tiny"
    assert same_state(pruner.model, before)
    for name, content in hub.content("me/tiny").items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), before)


# -- what can fail


FAULTS = {
    "no token": ("POST", "/api/repos/create", 401, "the Hub does not accept the token; log in with 'hf auth login'"),
    "no right": ("POST", "/api/repos/create", 403, "the token may not write there"),
    "down": ("POST", "/api/repos/create", 500, "the Hub has a problem of its own; try again later \\(500"),
    "busy": ("POST", "/preupload/", 429, "too many requests"),
    "breaks in the upload": ("PUT", "/_lfs/", 503, "the Hub has a problem of its own"),
    "cut in the upload": ("PUT", "/_lfs/", None, "the Hub cannot be reached"),
    "cut in the commit": ("POST", "/commit/", None, "the Hub cannot be reached"),
    "conflict": ("POST", "/commit/", 409, "it is in conflict with what is there"),
    "changed": ("POST", "/commit/", 412, "it was changed at the same moment"),
    "refused": ("POST", "/commit/", 418, "the Hub does not accept it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_one_clear_sentence_and_the_same_push_goes_on(hub, folder, fault):
    method, path, status, reason = FAULTS[fault]
    before = snapshot(folder)
    hub.fail(method, path, status, times=1000)
    with pytest.raises(PushError, match=reason) as raised:
        push(folder)
    assert str(raised.value).startswith("Not pushed to me/tiny: ") and "\n" not in str(raised.value)
    assert str(raised.value).endswith(f"{folder} is whole, and the same command goes on.")
    assert TOKEN not in str(raised.value)
    assert snapshot(folder) == before
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())
    sent = len(hub.blobs)
    hub.faults.clear()
    hub.log.clear()
    push(folder)
    assert hub.content("me/tiny").keys() == FILES | PLOTS
    assert hub.content("me/tiny")["model.safetensors"] == before["model.safetensors"]
    assert len(hub.repositories["me/tiny"].commits) == 2
    uploads = [path for method, path in hub.log if method == "PUT"]
    assert len(uploads) == 3 - sent, "what had arrived was sent again"


def test_a_short_failure_is_not_even_noticed(hub, folder):
    hub.fail("PUT", "/_lfs/", 503, times=2)
    hub.fail("POST", "/objects/batch", None)
    assert push(folder) == f"{hub.url}/me/tiny"


def test_without_a_hub_there_is_an_error_and_no_wait(hub, folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(PushError, match="the Hub cannot be reached"):
        push(folder, endpoint=nobody)
    assert time.monotonic() - began < 10


def test_the_command_ends_with_one_line_and_code_2(hub, folder, monkeypatch, capsys, tmp_path):
    for arguments, message in (
        ((str(folder), "me/tiny", "--token", "hf_other"), "does not accept the token"),
        ((str(folder), "not/a/name"), "Repo id must be"),
        ((str(tmp_path), "me/tiny"), "holds no dsa_config.json; give the folder of a pruned model"),
    ):
        code, output, errors = run(monkeypatch, capsys, "push", *arguments)
        lines = [line for line in errors.splitlines() if "error:" in line]
        assert (code, output, len(lines)) == (2, "", 1) and message in lines[0]
    code, output, errors = run(monkeypatch, capsys, "push", str(folder), "me/tiny", "--token", TOKEN, "--private")
    assert (code, output) == (0, f"pushed to {hub.url}/me/tiny\n"), errors
    assert hub.repositories["me/tiny"].private


# -- where it goes


def test_a_second_push_changes_nothing(hub, folder):
    push(folder)
    before = hub.content("me/tiny")
    push(folder)
    assert hub.content("me/tiny") == before and len(hub.repositories["me/tiny"].commits) == 2


def test_name_branch_message_and_privacy_are_what_was_asked(hub, folder):
    assert push(folder, "tiny") == f"{hub.url}/tester/tiny"
    push(folder, "tester/tiny", revision="owl", commit_message="with OWL")
    repository = hub.repositories["tester/tiny"]
    assert not repository.private and repository.branches.keys() == {"main", "owl"}
    assert repository.messages[repository.branches["main"]] == "60.00% of the prunable weights removed with wanda"
    change(folder, "dsa_config.json", seconds=1.5)
    push(folder, "tester/tiny", revision="owl", commit_message="again")
    assert repository.messages[repository.branches["owl"]] == "again"
    push(folder, "me/private", private=True)
    assert hub.repositories["me/private"].private


def test_a_pull_request_leaves_main_alone(hub, folder):
    assert push(folder, create_pr=True) == f"{hub.url}/me/tiny/discussions/1"
    repository = hub.repositories["me/tiny"]
    assert hub.content("me/tiny") == {}
    (branch,) = set(repository.branches) - {"main"}
    assert hub.content("me/tiny", branch).keys() == FILES | PLOTS


def test_weights_of_an_earlier_push_go_and_other_files_stay(hub, folder):
    push(folder)
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.5))
    pruner.save_pretrained(folder, max_shard_size="20KB")
    (folder / "LICENSE").write_text("Apache-2.0")
    push(folder)
    names = hub.content("me/tiny").keys()
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    push_again = hub.repositories["me/tiny"]
    assert len(push_again.commits) == 3
    (folder / "LICENSE").unlink()
    change(folder, "dsa_config.json", seconds=1.5)
    push(folder)
    assert "LICENSE" in hub.content("me/tiny")


# -- what goes, and what does not


def test_nothing_of_this_computer_goes_along(hub, tmp_path, monkeypatch):
    home = tmp_path / "home-of-jane"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    DSAPruner(tiny_llama()).allocate(tokens(), DSAConfig(0.6, allocation="owl")).save(home / "mine.json")
    (home / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    pruner = DSAPruner.from_pretrained(demo_model())
    settings = DSAConfig(0.6, "wanda", "owl", num_samples=4, sequence_length=32)
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
    assert is_unchanged(sent) and sent["checksum"] and sent["calibration"]["source"] == "text.txt"
    (folder / "dsa_config.json").write_text(json.dumps({**facts, "format_version": sent["format_version"]}))
    assert not is_unchanged(json.loads(collect(folder).files["dsa_config.json"]))


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


def test_a_card_of_the_users_own_is_taken_as_it_is(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    push(folder)
    assert hub.content("me/tiny")["README.md"] == b"# Mine\n"


def test_without_matplotlib_the_card_has_no_pictures(hub, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    push(folder)
    assert hub.content("me/tiny").keys() == FILES and "![" not in card(hub).text


# -- the card


def test_the_card_names_the_base_model_and_carries_its_licence(hub, folder):
    hub.cards["org/base"] = {"license": "llama3.2", "language": ["en"], "tags": ["secret"]}
    base = {"name": "org/base", "revision": "0123456789abcdef0123456789abcdef01234567"}
    change(folder, "dsa_config.json", base_model=base, calibration__source="wikitext2")
    facts = {"dataset": "wikitext2", "windows": 8, "sequence_length": 16, "perplexity": 9.5, "model": "x"}
    (folder / "evaluation.json").write_text(json.dumps(facts))
    push(folder)
    data, text = card(hub).data, card(hub).text
    assert (data.base_model, data.base_model_relation, data.license) == ("org/base", "quantized", "llama3.2")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["en"])
    assert {"pruned", "sparse", "wanda", "optimum-dsa", "owl-allocation"} == set(data.tags)
    assert data.datasets == ["Salesforce/wikitext"]
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("Salesforce/wikitext", "perplexity", 9.5)
    assert "| wikitext2, 8 windows of 16 tokens | 9.500 |" in text
    assert "https://arxiv.org/abs/2306.11695" in text and "https://arxiv.org/abs/2310.05175" in text
    assert f"--revision {base['revision']}" in text and "--allocation owl" in text
    assert "neither faster nor smaller" in text and "![" in text
    for index in range(3):
        assert f"| model.layers.{index} |" in text


def test_a_local_base_model_is_no_repository(hub, folder):
    change(folder, "dsa_config.json", base_model={"name": "llama", "revision": None})
    push(folder)
    assert not {"base_model", "base_model_relation"} & card(hub).data.to_dict().keys()
    assert "`llama` with **60.00%" in card(hub).text
    assert ("GET", "/api/models/llama") not in hub.log


def test_an_unknown_base_model_costs_the_licence_only(hub, folder):
    change(folder, "dsa_config.json", base_model={"name": "org/gone", "revision": "main"})
    push(folder)
    assert card(hub).data.base_model == "org/gone" and card(hub).data.license is None
