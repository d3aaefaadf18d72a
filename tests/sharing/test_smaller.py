"""What report, page, card and push say of a model out of which structures were cut, and of its zeros."""

import json
import shlex

import pytest

from optimum_dsa import Allocation, DataConfig, DSAConfig, DSAPruner, DSAStructuredConfig, write_report
from optimum_dsa.commands.options import CommandParser
from optimum_dsa.commands.prune import PruneCommand, asked_structures
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import figures, page
from optimum_dsa.sharing.provenance import commands, papers

from ..tiny import masking_tokenizer, tiny_llama, tokens
from .common import card, change, push


CUT = DSAStructuredConfig(0.3, ("ffn", "kv_group"), data=DataConfig(num_samples=4, sequence_length=16, seed=3))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """The folders of a smaller model, and of one whose weights were pruned then."""
    home = tmp_path_factory.mktemp("smaller")
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), CUT)
    pruner.save_pretrained(home / "cut")
    pruner.prune(tokens(), DSAConfig(0.5, allocation="uniform"))
    pruner.save_pretrained(home / "both")
    return home


def test_the_terminal_has_parameters_and_widths(smaller):
    output = write_report(smaller / "cut", output=smaller / "page")
    assert "29,472" in output and "22,560" in output and "24 of 48" in output and "removed" not in output
    assert (smaller / "page" / "widths.png").stat().st_size > 1000
    output = write_report(smaller / "both", compare=[smaller / "cut"], output=smaller / "pages")
    assert "50.00%" in output and output.count("24 of 48") == 6
    assert {path.name for path in (smaller / "pages").glob("widths*.png")} == {"widths.png", "widths-2.png"}


def test_zeros_that_fill_blocks_up_are_no_pruned_weights(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAStructuredConfig(0.3, layout="padded", allocation="global"))
    pruner.save_pretrained(tmp_path / "padded")
    assert pruner.report.removed and Outcome.read(tmp_path / "padded").is_only_cut
    assert not any("zeros" in part for part in pruner.verify().unproven)


@pytest.mark.parametrize("name", ["cut", "both"])
def test_the_page_says_what_went(smaller, name):
    outcome = Outcome.read(smaller / name)
    found = page([outcome], figures([outcome]))
    assert "with 23.5 % of its parameters cut out" in found and "23.45% of 29,472 were cut out" in found
    assert ("of its weights are zero" in found or "50 % of what is left removed" in found) is (name == "both")
    assert "the least important by wanda_sp first" in found and "fitted anew, by least squares" in found
    assert "Nothing says how the zeros came about" not in found
    assert ("Structures were chosen by" in found) is (name == "cut")


@pytest.mark.parametrize("name", ["cut", "both"])
def test_the_card_says_what_went(hub, smaller, name):
    push(smaller / name)
    found = card(hub)
    text = found.text
    assert "**6,912 of its 29,472 parameters cut out** (23.45%; `kv_group: 2 of 2 stay, ffn: 24 of 48 stay`)" in text
    assert "- `importance wanda_sp`: https://arxiv.org/abs/2312.11983" in text and "plots/widths.png" in text
    assert "plots/widths.png" in hub.content("me/tiny") and "| model.layers.2 | 2 of 2 | 24 of 48 |" in text
    both = name == "both"
    assert ("sparse" in found.data.tags) is both and "structured" in found.data.tags
    assert ("**50.00% of its prunable weights set to zero**" in text) is both
    assert ("plots/allocation.png" in hub.content("me/tiny")) is both
    assert ("## What sparsity gives" in text) is both and "optimum-cli dsa bench measures" in text


def test_widths_are_counted_before_anything_is_sent(hub, smaller, tmp_path):
    for file in (smaller / "cut").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "dsa_config.json").read_text())
    change(tmp_path, "dsa_config.json", structured={**data["structured"], "units": {**_one_more(data)}})
    with pytest.raises(ValueError, match="contradicts itself: model.layers.0:ffn keeps 25 of 48"):
        push(tmp_path)


def _one_more(data):
    units = data["structured"]["units"]
    return units | {"model.layers.0:ffn": units["model.layers.0:ffn"] | {"kept": 25}}


def test_the_commands_in_a_card_make_it_again(smaller, monkeypatch):
    """Parsed as a shell would, they are the settings that the file has."""
    cut, both = (Outcome.read(smaller / name).facts for name in ("cut", "both"))
    (line,) = commands(cut, found=True).splitlines()
    parser = CommandParser()
    PruneCommand.parse_args(parser)
    args = parser.parse_args(shlex.split(line)[3:])
    assert (args.model, args.output) == ("BASE_MODEL", "OUT") and asked_structures(args, parser) == CUT
    first, second = commands(both, found=False).splitlines()
    assert first.startswith("optimum-cli dsa prune BASE_MODEL -o SMALLER ")
    assert second.startswith("optimum-cli dsa prune SMALLER -o OUT --sparsity 0.5 --allocation uniform")


def test_an_allocation_that_was_given_is_taken_from_the_file():
    """Of the last cut, that is; parts that had a say are cited."""
    config = DSAStructuredConfig(0.2, layout="per_layer", allocation=Allocation({"a:ffn": 0.2}, {"a:ffn": 48}))
    cut = {"config": config.to_dict(), "calibration": None}
    line = commands({"structured": cut, "base_model": {"name": "me/model"}}, found=True)
    assert shlex.split(line)[3:] == shlex.split(
        "me/model -o OUT --sparsity 0.2 --structures ffn --layout per_layer --config dsa_config.json"
    )
    named = {"importance": "flap", "allocation": "stability", "learner": "hard_concrete"}
    assert papers({}, cuts=[named]).keys() == {
        "importance flap",
        "allocation of structures stability",
        "learner hard_concrete",
    }


def test_text_has_its_name(tmp_path):
    file = tmp_path / "calibration.txt"
    file.write_text("\n".join(" ".join(map(str, range(9))) for _ in range(40)))
    pruner = DSAPruner(tiny_llama(), masking_tokenizer())
    pruner.prune(str(file), DSAStructuredConfig(0.2, data=DataConfig(num_samples=2, sequence_length=8)))
    pruner.save_pretrained(tmp_path / "model")
    assert "--dataset calibration.txt" in commands(Outcome.read(tmp_path / "model").facts, found=True)
