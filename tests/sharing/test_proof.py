"""What is shown of a pruned model was counted, or is said not to be."""

import json

import pytest
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAPruner
from optimum_dsa.checkpoint.description import read_description, write_description
from optimum_dsa.pruning.configuration import CONFIG_NAME
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import page
from optimum_dsa.sharing.tables import terminal
from optimum_dsa.sharing.upload import collect, count

from ..checkpoint.test_verify import run
from .common import card, change, push


def forge(folder, part, name, value):
    """Set a fact, and sign the file as if it had always been so."""
    data = dict(read_description(folder))
    data[part] = {**data[part], name: value}
    write_description(folder, data)


def revive(folder):
    """One weight that was removed comes back."""
    weights = load_file(folder / "model.safetensors")
    matrix = weights["model.layers.1.mlp.up_proj.weight"]
    matrix[tuple((matrix == 0).nonzero()[0])] = 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


FORGED = [
    ("removed", 20_000, "achieved.removed is 20,000, and its units make 13,824"),
    ("prunable", 40_000, "achieved.prunable is 40,000"),
    ("sparsity", 0.75, "achieved.sparsity is 0.75"),
    ("sparsity_of_all_parameters", 0.5, "achieved.sparsity_of_all_parameters is 0.5"),
    ("parameters", 10_000_000, "achieved.sparsity_of_all_parameters is"),
]


@pytest.mark.parametrize("name,value,message", FORGED)
def test_totals_are_counted_and_not_believed(folder, capsys, name, value, message):
    forge(folder, "achieved", name, value)
    code, output, _ = run(capsys, "verify", folder)
    assert code == 1 and f"wrong: {message}" in output
    with pytest.raises(ValueError, match="contradicts itself: " + message):
        Outcome.read(folder)
    assert not DSAPruner.from_pretrained(folder).verify().holds


def test_parameters_are_counted_in_the_model(folder, capsys):
    achieved = read_description(folder)["achieved"]
    forge(folder, "achieved", "parameters", 10_000_000)
    forge(folder, "achieved", "sparsity_of_all_parameters", achieved["removed"] / 10_000_000)
    code, output, _ = run(capsys, "verify", folder)
    assert code == 1
    assert f"wrong: the model has {achieved['parameters']:,} parameters, described are 10,000,000" in output


def test_the_way_of_pruning_is_said_not_to_be_proven(folder, capsys):
    forge(folder, "config", "method", "sparsegpt")
    forge(folder, "calibration", "source", "secret-data")
    code, output, _ = run(capsys, "verify", folder)
    assert code == 0
    (line,) = [line for line in output.splitlines() if line.startswith("not proven: method sparsegpt")]
    assert "(secret-data)" in line and line.endswith("weights do not tell them")


def test_a_checksum_that_was_taken_away_is_missed(folder, capsys):
    data = json.loads((folder / CONFIG_NAME).read_text())
    del data["checksum"]
    (folder / CONFIG_NAME).write_text(json.dumps(data))
    code, output, _ = run(capsys, "verify", folder)
    assert code == 1 and "wrong: dsa_config.json has no checksum" in output
    assert "dsa_config.json has no checksum" in terminal([Outcome.read(folder)])


def test_nothing_vouches_for_a_file_of_the_first_version(folder, capsys):
    data = json.loads((folder / CONFIG_NAME).read_text())
    del data["format_version"]
    (folder / CONFIG_NAME).write_text(json.dumps(data))  # what its checksum says, no version 1 has meant
    code, output, _ = run(capsys, "verify", folder)
    assert code == 0 and "not proven: that dsa_config.json is as it was written: version 1 has no checksum" in output


# -- what is sent


def test_what_is_not_as_it_says_is_not_sent(hub, folder):
    revive(folder)
    with pytest.raises(ValueError, match="is not what its dsa_config.json says: model.layers.1 has .* 1 fewer than"):
        push(folder)
    assert hub.log == [] and hub.repositories == {}


def test_the_card_has_the_figures_that_were_counted(hub, folder):
    push(folder)
    text = card(hub).text
    assert "**60.00% of its prunable weights set to zero** (13,824 of 23,040; 46.91% of all" in text
    assert "were counted in these weights when this card was written" in text and "Not proven" in text
    found = count(collect(folder), folder)[0].outcome.counted
    for unit, zeros in found.zeros.items():
        assert f"| {unit} | {found.sizes[unit]:,} | {zeros / found.sizes[unit]:.2%} |" in text


def test_a_card_of_weights_that_cannot_be_counted_has_no_figure_of_them(hub, folder):
    change(
        folder, "config.json", architectures=["OwnForCausalLM"], model_type="own", auto_map={"AutoConfig": "own.Own"}
    )
    (folder / "own.py").write_text("raise SystemExit('code of a stranger ran')")
    push(folder)
    text = card(hub).text
    assert "The zeros were not counted when this card was written" in text and "is not verified" in text
    assert not any(figure in text for figure in ("60.00%", "13,824", "23,040", "| model.layers.0 |", "!["))
    repository = hub.repositories["me/tiny"]
    assert repository.messages[repository.branches["main"]] == "Pruned with wanda"
    assert not any(name.startswith("plots/") for name in hub.content("me/tiny"))


def test_an_edited_description_is_told_in_the_card(hub, folder):
    change(folder, CONFIG_NAME, base_model={"name": "org/base", "revision": None})
    push(folder)
    assert "dsa_config.json was changed after it was written" in card(hub).text


def test_a_report_says_that_it_did_not_count(folder):
    outcome = Outcome.read(folder)
    for text in (terminal([outcome]), page([outcome], {})):
        assert "were not counted or measured again; optimum-cli dsa verify counts the zeros." in text
        assert "was changed after it was written" not in text
    change(folder, CONFIG_NAME, seconds=1.5)
    assert "model: dsa_config.json was changed after it was written" in terminal([Outcome.read(folder)])
