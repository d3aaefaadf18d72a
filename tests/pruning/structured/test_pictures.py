"""The language tower of a model that reads pictures is cut on what it makes of them; the other tower stays."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import prune_structures

from .families import EVERY


def pictures(samples=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(90, (samples, 12), generator=generator)
    ids[:, 2:6] = 96  # a place for each of the picture's four patches
    return {"input_ids": ids, "pixel_values": torch.randn(samples, 3, 16, 16, generator=generator)}


@pytest.mark.parametrize(
    ("structures", "importance"), [(("ffn", "kv_group"), "saap"), (("ffn",), "obs"), (("block",), "wanda_sp")]
)
def test_a_model_of_pictures_is_cut_on_them(structures, importance, tmp_path):
    model, batch = EVERY["Llava"][0](), pictures()
    tower = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    report = prune_structures(model, batch, DSAStructuredConfig(0.5, structures, importance))
    assert report.sparsity > 0.35 and all("language_model" in unit for unit in report.gone)
    assert all(torch.equal(value, tower[name]) for name, value in model.model.vision_tower.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
