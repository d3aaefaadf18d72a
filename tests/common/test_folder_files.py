"""No file of a folder that leads out of it is sent, copied, or saved again."""

import contextlib
import os
from pathlib import Path

import pytest

from optimum_dsa import DSAConfig, DSAPruner, convert
from optimum_dsa.commands.embedded import demo_model
from optimum_dsa.common.folder_files import own_file, own_files
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import write_report
from optimum_dsa.sharing.upload import collect

from ..tiny import tiny_llama


SENT = [
    "README.md", "LICENSE", "vocab.txt", "tokenizer.json", "chat_template.jinja", "modeling_own.py", "config.json",
    "dsa_config.json", "generation_config.json", "model.safetensors", "additional_chat_templates/tool.jinja",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of the folder of a pruned model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved, tmp_path):
    (tmp_path / "model").mkdir()
    for name, content in saved.items():
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


@pytest.fixture
def secret(tmp_path):
    """What lies beside the folder and is nobody's business."""
    path = tmp_path / "id_rsa"
    path.write_text("PRIVATE KEY")
    return path


def link(folder, name, target):
    """`name` in `folder` as a link to the file `target`; what was there goes to the target first, so that it fits."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        target = target.with_name(f"moved-{path.name}")
        path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", SENT)
def test_a_link_out_of_the_folder_is_not_sent(folder, secret, name):
    link(folder, name, secret)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        collect(folder)


def test_it_is_refused_before_anything_is_sent(folder, secret, monkeypatch):
    from optimum_dsa.sharing.push import push_folder

    monkeypatch.setattr("optimum_dsa.sharing.push.HfApi", lambda **options: pytest.fail("the Hub was asked"))
    link(folder, "LICENSE", secret)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        push_folder(folder, "me/tiny")


def test_a_chain_of_links_is_followed_to_its_end(folder, secret):
    (folder / "notes").symlink_to(secret)
    (folder / "LICENSE").symlink_to(folder / "notes")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        collect(folder)


def test_a_linked_folder_is_not_entered(folder, tmp_path):
    elsewhere = tmp_path / "templates"
    elsewhere.mkdir()
    (elsewhere / "tool.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        collect(folder)
    (folder / "additional_chat_templates").unlink()
    (folder / "wandb").symlink_to(elsewhere)
    assert collect(folder).left_out == ("wandb",)


def test_a_link_to_what_stays_here_is_not_a_way_to_send_it(folder):
    (folder / ".env").write_text("TOKEN=x")
    (folder / "vocab.txt").symlink_to(folder / ".env")
    with pytest.raises(ValueError, match=r"is a link to \.env, which does not go to the Hub"):
        collect(folder)


def test_links_within_the_folder_are_files(folder):
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "LICENSE.txt").symlink_to("LICENSE")
    assert {"LICENSE", "LICENSE.txt"} < collect(folder).files.keys()


def test_links_of_the_hubs_cache_are_files(folder, tmp_path):
    repository = tmp_path / "cache" / "models--me--tiny"
    snapshot = repository / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shared = tmp_path / "cache" / "blobs" / "ab"
    shared.mkdir(parents=True)
    for path in folder.iterdir():
        blob = repository / "blobs" / path.name
        if path.suffix == ".safetensors":  # several repositories may share a file
            path.rename(shared / path.name)
            blob.symlink_to(shared / path.name)
        else:
            path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert "model.safetensors" in collect(snapshot).files


def test_neither_a_pipe_nor_a_link_to_nothing_is_waited_for(folder):
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="is no file"):
        collect(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "LICENSE").symlink_to(folder / "nothing")
    with pytest.raises(ValueError, match="is no file"):
        collect(folder)


def test_an_evaluation_elsewhere_is_none_of_this_model(folder, tmp_path):
    (tmp_path / "other.json").write_text('{"dataset": "secret.txt", "perplexity": 3.5}')
    (folder / "evaluation.json").symlink_to(tmp_path / "other.json")
    assert Outcome.read(folder).evaluations == ()


@pytest.mark.parametrize("name", ["search.json", "trace.jsonl", "allocation.json", "dsa_config.json"])
def test_a_report_reads_no_link_out(folder, secret, name):
    link(folder, name, secret)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        Outcome.read(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_convert_copies_no_link_out(folder, secret, tmp_path, name):
    link(folder, name, secret)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        convert(folder, tmp_path / "out", "compressed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json", "config.json"])
def test_what_is_saved_again_is_not_read_through_a_link_out(tmp_path, secret, name):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(demo_model()).iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    link(copy, name, secret)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        DSAPruner.from_pretrained(copy)


def test_every_entry_is_told_once_and_in_order(tmp_path):
    for name in ("b/2", "b/1", "a", "c/d/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert [name for name, _ in own_files(tmp_path)] == ["a", "b/1", "b/2", "c/d/3", "link"]
    assert own_file(tmp_path / "link" / "d" / "3", tmp_path).name == "3"


def test_a_report_is_not_written_through_a_link_out(folder, secret):
    pytest.importorskip("matplotlib")
    for name in ("heatmap.png", "report.html"):
        (folder / name).symlink_to(secret)
    with contextlib.suppress(ValueError, OSError):
        write_report(folder)
    assert secret.read_text() == "PRIVATE KEY"
