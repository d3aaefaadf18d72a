import json

from optimum_dsa import RecoveryConfig, RecoveryResult
from optimum_dsa.evaluation.measurement import Measurement, Protocol, TaskProtocol
from optimum_dsa.evaluation.results import save_results
from optimum_dsa.sharing.page import write_report

from .common import card, change, push


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
    assert "Perplexity on wikitext2, 8 windows of 16 tokens, with its standard error; lower is better." in text
    assert "| tiny | 9.50 |" in text and "The dense model, `base`, was not measured." in text
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


def test_training_after_pruning_is_told(hub, folder):
    recovery = {
        "kind": "recover", "steps": 7, "config": {"method": "sparse-lora", "mode": "mask"},
        "data": {"train": "/home/me/secret.txt"},
        "perplexity": {"before": 20.5, "after": 15.25}, "history": [], "seconds": 1.0,
    }  # fmt: skip
    change(folder, "dsa_config.json", recovery=recovery)
    push(folder)
    text = card(hub).text
    assert "trained for 7 steps (`sparse-lora`), with every zero kept" in text and "20.500 before and 15.250" in text
    assert "secret" not in text and b"/home/me" not in hub.content("me/tiny")["dsa_config.json"]


def test_a_recovered_model_lists_both_commands_all_settings_and_standard_errors(hub, folder):
    config = RecoveryConfig(steps=7, bf16=True, merge=False, rank=4, distillation=0.5)
    result = RecoveryResult(config, 20.5, 15.25, 7, [], {"train": "train.txt", "windows": 8}, 1.0, 0.5, 0.25)
    change(folder, "dsa_config.json", recovery=result.to_dict())
    push(folder)
    text = card(hub).text
    lines = [line for line in text.splitlines() if line.startswith("optimum-cli dsa")]
    assert lines[0].startswith("optimum-cli dsa prune") and lines[1] == (
        "optimum-cli dsa recover OUT -o BETTER --dataset train.txt --steps 7 --rank 4 --keep-adapter "
        "--distillation 0.5 --bf16 --teacher DENSE_MODEL"
    )
    for name in ("`weight_decay`", "accumulation", "temperature", "seed", "text train"):
        assert f"| {name} |" in text, name
    assert "20.500 ± 0.500 before and 15.250 ± 0.250 after" in text


def test_tasks_and_the_dense_model_are_in_the_card(hub, folder):
    protocol, how = Protocol("test.txt", 3, 16, fingerprint="f"), TaskProtocol(5)
    tasks = {"boolq": {"acc": {"value": 0.5, "error": 0.02}}}
    size = json.loads((folder / "dsa_config.json").read_text())["achieved"]["prunable"]
    dense = Measurement("dense", 0.0, size, 9.0, 0.1, protocol, (2.0, 2.2, 2.4), tasks, how)
    pruned = Measurement(folder.name, 0.6, size, 12.0, 0.2, protocol, (2.3, 2.5, 2.8), tasks, how)
    save_results(folder / "results.json", [dense, pruned])
    push(folder)
    text, found = card(hub).text, card(hub).data.eval_results
    assert "| dense | 9.00 ± 0.10 | – |" in text and "| tiny | 12.00 ± 0.20 | +" in text
    assert "| tiny | 0.5000 ± 0.0200 |" in text and "5 examples in front" in text
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in found] == [
        ("test.txt", "perplexity", 12.0),
        ("boolq", "acc", 0.5),
    ]


def test_what_of_the_base_is_not_there_is_named_to_those_who_may_know(hub, folder, tmp_path):
    left, parts = {"model-q4.gguf": "weights in another form", "a|b.bin": "x"}, {"model.layers.92": 1024, "mtp": 8}
    said = {"kept": [], "public": [], "left": left, "not_pruned": parts, "not_kept": {"blk.9": 7}}
    change(folder, "dsa_config.json", base_files=said)
    push(folder)
    assert "does not know them: 1,032 weights in model.layers.92, mtp." in card(hub).text
    assert "not here, as the model's class does not know them: 7 weights in blk.9." in card(hub).text
    assert "gguf" not in card(hub).text  # the base was in a folder, whose names are nobody's business
    base = {"name": "org/base", "revision": "0123456789abcdef0123456789abcdef01234567"}
    change(folder, "dsa_config.json", base_model=base)
    push(folder)
    assert "not here: model-q4.gguf (weights in another form), a" in card(hub).text.replace("\\", "")
    write_report(folder, output=tmp_path / "page")
    assert "model-q4.gguf (weights in another form)" in (tmp_path / "page" / "report.html").read_text()
