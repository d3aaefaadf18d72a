"""What lies beside a model's weights goes along; what does not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from optimum_dsa import DSAConfig, DSAPruner, RecoveryConfig, convert, demo_model
from optimum_dsa.checkpoint import base_files
from optimum_dsa.checkpoint.base_files import find_base_files
from optimum_dsa.checkpoint.description import read_description
from optimum_dsa.checkpoint.load import local_folder
from optimum_dsa.common.manifest import read_manifest
from optimum_dsa.model.adapters import has_adapters

from ..sharing.conftest import hub  # noqa: F401 - a fixture
from ..test_commands import run
from ..tiny import bos_tokenizer, tiny_llama, tokens


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
KEPT = {
    "preprocessor_config.json": '{"image_processor_type": "ViTImageProcessor"}',
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "modules.json": json.dumps(MODULES),
    "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": '{"max_seq_length": 64}',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": "{}",
    "2_Dense/pytorch_model.bin": "weights of a module that no transformers class has",
    "LICENSE": "Do as you like.",
    "LICENSE.txt": "Do as you like.",
    "NOTICE": "Ours.",
    "voices/default.npz": "a table",
    "tokenizer.model": "a vocabulary of another program",
    "configuration_own.py": "",
}
LEFT = {
    "pytorch_model.bin": base_files.WEIGHTS,
    "pytorch_model.bin.index.json": base_files.WEIGHTS,
    "consolidated.safetensors": base_files.WEIGHTS,
    "model.fp16.safetensors": base_files.WEIGHTS,
    "model-q4.gguf": base_files.WEIGHTS,
    "original/consolidated.00.pth": base_files.WEIGHTS,
    "optimizer.pt": base_files.TRACE,
    "trainer_state.json": base_files.TRACE,
    "runs/today/events.out.tfevents.1": base_files.TRACE,
    "evaluation.json": base_files.MEASURED,
}
FOLDERS = ("checkpoint-10/", "onnx/")  # whole models of their own
NOT_NAMED = (".gitattributes", ".cache/huggingface/x", "README.md", "model.safetensors", "config.json")


def fill(folder: Path) -> Path:
    """Write a tiny Llama with everything that may lie beside one."""
    tiny_llama().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(demo_model()) / name).read_bytes())
    others = dict.fromkeys((*LEFT, ".gitattributes", ".cache/huggingface/x", "README.md"), "x")
    others |= {"evaluation.json": '{"models": [], "versions": {}}'}
    for place in FOLDERS:
        others |= {f"{place}config.json": "{}", f"{place}model.onnx": "x", f"{place}tokenizer.json": "{}"}
    for name, content in {**KEPT, **others}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def base(tmp_path):
    return fill(tmp_path / "base")


def pruned(source, **options) -> DSAPruner:
    pruner = DSAPruner.from_pretrained(source, **options)
    pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform"))
    return pruner


def check_kept(out: Path) -> None:
    for name, content in KEPT.items():
        assert (out / name).read_text() == content, name
    assert KEPT.keys() <= read_manifest(out).keys()
    assert not any((out / name).exists() for name in (*LEFT, *FOLDERS, ".gitattributes", "README.md"))


@pytest.mark.parametrize("compressed", [False, True])
def test_what_the_base_has_goes_along_and_the_rest_is_named(base, tmp_path, caplog, compressed):
    pruner = pruned(base)
    for name, why in {**LEFT, **dict.fromkeys(FOLDERS, base_files.ANOTHER)}.items():
        # before anything is written; measurements of another model are nothing that this one could have
        assert (f"{name} ({why})" in caplog.text) == (why != base_files.MEASURED)
    assert not any(f"{name} (" in caplog.text for name in NOT_NAMED)
    pruner.save_pretrained(tmp_path / "out", compressed=compressed)
    check_kept(tmp_path / "out")
    said = read_description(tmp_path / "out")["base_files"]
    assert KEPT.keys() <= set(said["kept"])
    assert said["left"] == {**LEFT, **dict.fromkeys(FOLDERS, base_files.ANOTHER)}
    assert DSAPruner.from_pretrained(tmp_path / "out").verify().holds


def test_they_go_on_from_output_to_output(base, tmp_path):
    pruned(base).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("of the first model")
    manifest = json.loads((tmp_path / "out" / "dsa_manifest.json").read_text())
    manifest["files"]["report.html"] = {"size": 1, "sha256": ""}  # as `report` records it
    (tmp_path / "out" / "dsa_manifest.json").write_text(json.dumps(manifest))
    pruner = DSAPruner.from_pretrained(tmp_path / "out")
    pruner.recover(tokens(12), RecoveryConfig(steps=1, batch_size=4, validation_windows=4, method="full"))
    pruner.save_pretrained(tmp_path / "better")
    check_kept(tmp_path / "better")
    assert not (tmp_path / "better" / "report.html").exists()
    first, second = (read_description(tmp_path / name)["base_files"] for name in ("out", "better"))
    assert first == second  # what was left behind at first is missing still


def test_a_user_file_in_an_output_is_still_refused(base, tmp_path):
    pruner = pruned(base)
    pruner.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "NOTICE").write_text("Theirs.")
    with pytest.raises(FileExistsError, match="NOTICE, which was changed"):
        pruner.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE").read_text() == "Theirs."


def test_the_output_may_be_the_base(base, tmp_path):
    pruned(base).save_pretrained(tmp_path / "out")
    pruned(tmp_path / "out").save_pretrained(tmp_path / "out")
    check_kept(tmp_path / "out")


def test_a_loaded_model_is_known_by_its_folder(base, tmp_path):
    from transformers import AutoModelForCausalLM

    pruner = DSAPruner(AutoModelForCausalLM.from_pretrained(base))
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    check_kept(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()  # though none was loaded


def test_another_tokenizer_replaces_all_of_the_bases(base, tmp_path):
    (base / "added_tokens.json").write_text("{}")
    pruned(base, tokenizer=bos_tokenizer()).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert not (tmp_path / "out" / "added_tokens.json").exists()
    assert "<bos>" in (tmp_path / "out" / "tokenizer.json").read_text()
    assert (tmp_path / "out" / "NOTICE").is_file()


def test_a_tokenizer_that_does_not_load_is_said_and_kept(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.json").write_text("[]")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizerOfNobody"}')
    pruner = DSAPruner.from_pretrained(tmp_path / "base")
    assert "The tokenizer of" in caplog.text and "WARNING" in caplog.text
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"tokenizer_class": "TokenizerOfNobody"}'


def test_no_tokenizer_is_no_warning(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path / "base")
    DSAPruner.from_pretrained(tmp_path / "base")
    assert "WARNING" not in caplog.text


def test_a_link_out_of_the_folder_stays_behind(base, tmp_path):
    (tmp_path / "key").write_text("secret")
    (base / "notes.md").symlink_to(tmp_path / "key")
    found = find_base_files(str(base))
    assert "notes.md" not in found.kept and found.left["notes.md"] == base_files.LINK


def test_what_is_too_large_stays_behind(base, monkeypatch):
    monkeypatch.setattr(base_files, "LARGEST", 100)
    (base / "data.jsonl").write_text("x" * 101)
    assert find_base_files(str(base)).left["data.jsonl"] == base_files.LARGE


@pytest.mark.parametrize("content", ["{", "[7, {}]", '[{"path": 7}]', "7", "{}"])
def test_a_damaged_list_of_modules_is_one_file_more(base, content):
    (base / "modules.json").write_text(content)
    if content == "{":
        with pytest.raises(ValueError, match="is not JSON"):
            find_base_files(str(base))
        return
    assert "2_Dense/" in find_base_files(str(base)).left  # which nothing names any more


def test_a_file_that_is_gone_at_the_end_is_said(base, tmp_path, caplog):
    pruner = pruned(base)
    (base / "NOTICE").unlink()
    pruner.save_pretrained(tmp_path / "out")
    assert "NOTICE was there before the work" in caplog.text
    assert "NOTICE" not in read_description(tmp_path / "out")["base_files"]["kept"]


def test_a_model_made_in_memory_has_nothing_beside_it(tmp_path, caplog):
    pruner = pruned(tiny_llama())
    pruner.save_pretrained(tmp_path / "out")
    assert "base_files" not in read_description(tmp_path / "out")
    assert "WARNING" not in caplog.text


def test_of_a_hub_model_they_are_downloaded_and_public(base, hub, tmp_path, monkeypatch):  # noqa: F811
    put_on(hub, base, "me/tiny", monkeypatch, tmp_path)
    pruned("me/tiny").save_pretrained(tmp_path / "out")
    check_kept(tmp_path / "out")
    said = read_description(tmp_path / "out")["base_files"]
    assert set(said["public"]) == set(said["kept"]) >= KEPT.keys()
    assert said["left"] == {**LEFT, **dict.fromkeys(FOLDERS, base_files.ANOTHER)}
    asked = {path for method, path in hub.log if "/resolve/" in path}
    assert not any(name in path for path in asked for name in ("optimizer", ".gguf", "fp16", "checkpoint-10"))


def test_convert_of_a_hub_model_brings_them(base, hub, tmp_path, monkeypatch):  # noqa: F811
    put_on(hub, base, "me/tiny", monkeypatch, tmp_path)
    folder = local_folder("me/tiny")
    assert all((folder / name).is_file() for name in KEPT)


def put_on(hub, folder, name, monkeypatch, tmp_path) -> None:  # noqa: F811
    """Put every file of `folder` into a repository, and use an empty cache."""
    from huggingface_hub import HfApi

    from ..hub_server import TOKEN

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    api = HfApi(token=TOKEN, endpoint=hub.url)
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[".cache/*"])


def test_the_command_names_what_stays(base, tmp_path, monkeypatch, capsys, caplog):
    arguments = ["prune", str(base), "-o", str(tmp_path / "out"), "-s", "0.5", "--method", "magnitude", "--json"]
    code, output, errors = run(monkeypatch, capsys, *arguments, "--allocation", "uniform")
    assert code == 0, errors
    assert json.loads(output)["base_files"]["left"]["model-q4.gguf"] == base_files.WEIGHTS
    check_kept(tmp_path / "out")


def test_weights_of_a_second_kind_are_no_files_of_the_first(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "pytorch_model.bin").write_text("x")
    found = find_base_files(str(tmp_path))
    assert found.left == {"pytorch_model.bin": base_files.WEIGHTS}
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert find_base_files(str(tmp_path)).left == {}


def test_convert_takes_the_modules_behind_a_model_along(base, tmp_path):
    pruned(base).save_pretrained(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "small", "compressed")
    check_kept(tmp_path / "small")


def test_a_shard_of_another_name_in_the_index_is_no_other_form(tmp_path, caplog):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    weights, extra = model.state_dict(), {"model.layers.3.mtp.weight": torch.ones(4, 4)}
    (tmp_path / "base" / "model.safetensors").unlink()
    files = {"model-00001-of-00001.safetensors": weights, "model-extra.safetensors": extra}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / "base" / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in files.items() for key in tensors}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    for source, target in (("base", "one"), ("one", "two")):
        pruner = DSAPruner.from_pretrained(tmp_path / source)
        pruner.prune(None, DSAConfig(0.5 if target == "one" else 0.6, "magnitude", "uniform"))
        pruner.save_pretrained(tmp_path / target)
        assert files_of(tmp_path / target)["left"] == {}
        assert files_of(tmp_path / target)["not_pruned"] == {"model.layers.3": 16}
    assert "stay behind" not in caplog.text


def test_an_adapter_beside_a_model_is_attached_and_not_left_beside_the_result(tmp_path, caplog):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "both")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "both")
    pruner = DSAPruner.from_pretrained(tmp_path / "both")
    assert has_adapters(pruner.model) and "a model and an adapter beside it" in caplog.text
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    assert set(files_of(tmp_path / "out")["left"]) == {"adapter_config.json", "adapter_model.safetensors"}


def files_of(folder):
    return json.loads((folder / "dsa_config.json").read_text())["base_files"]
