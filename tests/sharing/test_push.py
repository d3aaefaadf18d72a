import json
import os
import runpy
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import DSAConfig, DSAPruner, read_results
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.packed.pack_model import packed_layers
from optimum_dsa.sharing.push import PushError

from ..hub_server import TOKEN, HubServer
from ..test_commands import run
from ..tiny import needs_compressed_loading, same_state, state, tiny_llama, tokens
from .common import FILES, PLOTS, change, push, snapshot


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


@pytest.mark.contract
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


@needs_compressed_loading
def test_a_packed_model_is_pushed_and_loaded_packed(hub, tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    before = state(pruner.model)
    packed = pruner.pack().packed
    pruner.push_to_hub("me/packed", token=TOKEN)
    assert packed_layers(pruner.model) == packed and "dsa_model.safetensors.index.json" in hub.content("me/packed")
    again = DSAPruner.from_pretrained("me/packed")
    assert packed_layers(again.model) == packed and again.verify().holds
    again.unpack()
    assert same_state(again.model, before)


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


@pytest.mark.contract
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
    assert push(folder) == f"{hub.url}/me/tiny"


@pytest.mark.contract
def test_a_dropped_connection_is_made_again_or_told_and_the_same_command_goes_on(hub, folder):
    hub.fail("POST", "/objects/batch", None)
    if Version(huggingface_hub.__version__) < Version("1.22"):  # older ones do not try again
        with pytest.raises(PushError, match="the Hub cannot be reached.*the same command goes on"):
            push(folder)
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


@pytest.mark.contract
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


def test_weights_in_folders_of_the_repository_are_not_ours_to_delete(hub, folder):
    """Another format, or an adapter beside the model: no loader of the model takes them for its own."""
    push(folder)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    for name in ("onnx/model.safetensors", "adapter/model.safetensors.index.json", "old.safetensors", "notes.txt"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="me/tiny")
    change(folder, "dsa_config.json", seconds=1.5)
    push(folder)
    names = hub.content("me/tiny").keys()
    assert {"onnx/model.safetensors", "adapter/model.safetensors.index.json", "notes.txt"} <= names
    assert "old.safetensors" not in names and "model.safetensors" in names


def test_the_example_prunes_measures_and_pushes_and_goes_on_after_a_failure(hub, tmp_path, monkeypatch, capsys):
    for name, part in (("train.txt", "calibration"), ("test.txt", "test")):
        (tmp_path / name).write_text("\n".join(demo_texts(part))[:6_000])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = [demo_model(), "me/example", "--calibration", tmp_path / "train.txt", "--test", tmp_path / "test.txt"]
    arguments += ["-o", tmp_path / "out", "--length", 32, "--samples", 4]
    monkeypatch.setattr(sys, "argv", ["prune_and_push.py", *map(str, arguments)])
    example = Path(__file__).resolve().parents[2] / "examples" / "prune_and_push.py"
    hub.fail("POST", "/commit/", 409)
    with pytest.raises(PushError, match="the same"):
        runpy.run_path(str(example), run_name="__main__")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    runpy.run_path(str(example), run_name="__main__")
    assert f"pushed to {hub.url}/me/example" in capsys.readouterr().out
    content = hub.content("me/example")
    assert content["model.safetensors"] == weights
    (measured,) = read_results(tmp_path / "out" / "evaluation.json")
    assert f"{measured.perplexity:.2f} ± ".encode() in content["README.md"]
