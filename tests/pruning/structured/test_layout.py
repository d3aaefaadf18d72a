"""What a smaller model is: each layout of every family, in memory and in a fresh process."""

import copy
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.pruning.structured.layout import LAYOUTS
from optimum_dsa.pruning.structured.slicing import silence
from optimum_dsa.pruning.structured.structures import find_structures

from . import loads
from .families import EVERY, FAMILIES, batch_of


# Of two blocks, what goes of each kind: of its 2 groups or 4 heads, and of its 48 channels (or 128).
GONE = {"kv_group": (1, 0), "head": (1, 2), "ffn": (20, 9), "expert": (1, 2)}
AUTO = {"Bert": "AutoModelForMaskedLM", "ViT": "AutoModelForImageClassification"}
AUTO |= dict.fromkeys(["T5", "Bart"], "AutoModelForSeq2SeqLM")
AUTO |= dict.fromkeys(["Llava", "Qwen2_5_VL"], "AutoModelForImageTextToText")
# Made of several models: an encoder and a decoder, or a tower that sees and one that writes.
SEVERAL = ("T5", "Bart", "Llava", "Qwen2_5_VL")
# Where the size of a head is not derived of their number; a Llama with three heads of 8 in 32 is a Mistral.
SAYS_HEADS = ("Llama without groups", "Llama with one head of keys", "Phi", "ViT")


@cache
def units_of(family):
    make, kinds = EVERY[family]
    model = make()
    found = find_structures(model, find_architecture(model), batch_of(family)).structures
    return {unit: each for unit, each in found.items() if each.kind in kinds}


def counts_of(family, layout):
    """Unit -> how many go: other numbers in every block, or as many everywhere."""
    units = units_of(family)
    blocks = list(dict.fromkeys(each.block for each in units.values()))
    if layout == "uniform":
        stay = () if family in SAYS_HEADS else ("head",)
        return {unit: 0 if each.kind in stay else GONE[each.kind][0] for unit, each in units.items()}
    alike = ("expert",) if layout == "padded" else ()  # what is whole leaves no zeros
    return {
        unit: GONE[each.kind][0 if each.kind in alike else blocks.index(each.block) % 2]
        for unit, each in units.items()
    }


def made_smaller(family, layout):
    """A model in a layout, and what it is to say: the dense one with what went silenced."""
    dense, units, counts = FAMILIES[family][0](), units_of(family), counts_of(family, layout)
    model = copy.deepcopy(dense)
    kept = LAYOUTS[layout](model, units, counts)
    for unit, each in units.items():
        gone = torch.arange(len(each))[1 : 1 + counts[unit]]
        silence(dense, each, gone)
        kept.take(model, each, gone)
    kept.settle(model)
    return model, loads.said(dense, batch_of(family))


ROWS = [
    (family, layout)
    for family in FAMILIES
    for layout in LAYOUTS
    # that others stay plain is tried where they are pruned
    if not (layout == "per_layer" and family in SEVERAL) and (layout != "uniform" or family in SAYS_HEADS)
]
# One of each way to be made: the others differ in nothing that this package's being there changes.
IMPORTED = ("Llama", "Phi3", "GPT2", "Falcon", "Bert")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What was in memory of each family and layout, and what a fresh process found."""
    home, expected, asked = tmp_path_factory.mktemp("layouts"), {}, {}
    for family, layout in ROWS:
        model, said = made_smaller(family, layout)
        folder = home / f"{family}-{layout}".replace(" ", "_")
        model.save_pretrained(folder)
        torch.save((AUTO.get(family, "AutoModelForCausalLM"), batch_of(family)), folder / loads.INPUTS)
        count = sum(parameter.numel() for parameter in model.parameters())
        expected[family, layout] = {"class": type(model).__name__, "parameters": count, "said": said}
        asked[f"{family}/{layout}"] = [str(folder), None, layout == "per_layer"]
        if layout == "per_layer" and family in IMPORTED:
            asked[f"{family}/{layout}/imported"] = [str(folder), "optimum_dsa", False]
    environment = os.environ | {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-W", "ignore", loads.__file__, json.dumps(asked)]
    ran = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=home)
    assert ran.returncode == 0, ran.stderr
    return expected, json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(("family", "layout"), ROWS)
def test_a_fresh_process_has_the_model(family, layout, saved):
    """With and without this package: class, outputs, texts by every cache, and a step of training."""
    expected, found = saved[0][family, layout], saved[1]
    for name in found.keys() & {f"{family}/{layout}", f"{family}/{layout}/imported"}:
        other = found[name]
        assert "error" not in other, other["error"]
        assert other["class"] == expected["class"] and other["parameters"] == expected["parameters"]
        torch.testing.assert_close(torch.tensor(other["logits"]), expected["said"], rtol=1e-4, atol=1e-5)
        assert other["learnt"]
        assert all(text == other["written"][0] for text in other["written"])
