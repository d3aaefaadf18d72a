import pytest
import torch

from optimum_dsa import Calibration, DataConfig, load_calibration

from ..test_data import BOS, NUMBERS, TEXTS, Letters
from ..tiny import VOCABULARY, bos_tokenizer, tiny_llama, tokens


def test_calibration_from_tokens_texts_and_inputs_by_name():
    model = tiny_llama()
    assert load_calibration(tokens(4, 8).int(), model).facts() == {
        "source": "tensor", "samples": 4, "length": 8, "tokens": 32, "seed": None,
    }  # fmt: skip
    config = DataConfig(num_samples=3, sequence_length=16, seed=7)
    expected = {"source": "12 texts", "samples": 3, "length": 16, "tokens": 48, "seed": 7, "bos": False}
    assert load_calibration(TEXTS, model, Letters(), config).facts() == expected
    found = load_calibration(NUMBERS, model, bos_tokenizer(), config)
    assert found.facts()["bos"] is True and (found.inputs["input_ids"][:, 0] == BOS).all()
    plain = load_calibration(NUMBERS, model, bos_tokenizer(), DataConfig(num_samples=3, sequence_length=15, bos=False))
    assert plain.facts()["bos"] is False and not (plain.inputs["input_ids"] == BOS).any()
    assert load_calibration(TEXTS, model, Letters(), config=DataConfig(num_samples=3)).facts()["length"] == 64
    named = load_calibration({"input_ids": tokens(5, 8), "attention_mask": torch.ones(5, 8)}, model)
    assert [len(batch["attention_mask"]) for batch in named.batches(2)] == [2, 2, 1]


@pytest.mark.parametrize(
    "source,message",
    [
        (torch.full((2, 4), VOCABULARY), "another tokenizer"),
        (torch.zeros(2, 4), "LongTensor"),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(3, 4)}, "same number of samples"),
        (TEXTS, "needs a tokenizer"),
    ],
)
def test_calibration_that_does_not_fit_the_model_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_calibration(source, tiny_llama())


@pytest.mark.parametrize("side", ["", "decoder_"])
def test_padding_is_not_counted_wherever_it_stands(side):
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :2] = mask[1, 5:] = mask[2, 3:5] = 0  # in front, behind, and a hole
    for main in (tokens(3, 8), torch.zeros(3, 8, 5)):
        name = f"{side}input_ids" if main.dim() == 2 else f"{side}inputs_embeds"
        facts = Calibration({name: main, f"{side}attention_mask": mask}, "x").facts()
        assert (facts["samples"], facts["length"], facts["tokens"]) == (3, 8, 24 - 7)
    assert Calibration({"pixel_values": torch.zeros(3, 3, 8, 8)}, "x").facts()["tokens"] is None


def test_batches_cover_all_samples_in_order():
    data = Calibration({"input_ids": tokens(7, 4)}, "x")
    assert torch.equal(torch.cat([batch["input_ids"] for batch in data.batches(3)]), tokens(7, 4))
