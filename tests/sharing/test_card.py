import json

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
