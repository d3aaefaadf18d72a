import pytest
import torch
import transformers as tf

from optimum_dsa import Calibration, DataConfig, DSAConfig, DSAPruner, load_calibration, prune

from ..model.test_inputs import clip
from ..test_data import BOS, NUMBERS, TEXTS, Letters
from ..tiny import VOCABULARY, bos_tokenizer, same_state, state, tiny_llama, tokens


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


def test_text_that_is_written_is_calibrated_without_its_padding(tiny):
    """A batch as a collator hands it out: as if every pair had come alone, without padding."""
    model, ids = tiny("t5"), tokens(2, 9).clamp(3, 80)
    mask, labels = torch.ones_like(ids), tokens(2, 6, seed=1).clamp(3, 80)
    mask[0, 7:] = 0
    labels[0, 4:] = -100
    alone = [{"input_ids": ids[:1, :7], "labels": labels[:1, :4]}, {"input_ids": ids[1:], "labels": labels[1:]}]
    config = DSAConfig(0.5, "wanda", "uniform")
    models = [tiny("t5"), tiny("t5")]
    prune(models[0], load_calibration({"input_ids": ids, "attention_mask": mask, "labels": labels}, model), config)
    prune(models[1], load_calibration(alone, model), config)
    assert same_state(models[0], state(models[1]))


@pytest.mark.parametrize("name", ["WhisperForConditionalGeneration", "WhisperModel"])
def test_what_is_heard_needs_what_is_said_of_it(name, tiny, inputs):
    model = getattr(tf, name)(tiny("whisper").config).eval()
    heard = {"input_features": inputs("whisper")["input_features"]}
    with pytest.raises(ValueError, match=f"{name} writes text of input_features, and calibration needs that text"):
        load_calibration(heard, model)
    found = load_calibration({**heard, "labels": tokens(6, 5)}, model)
    report = prune(model, found, DSAConfig(0.5, "wanda", "uniform"))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and not report.unseen
    # one that gives labels of what it hears, and writes nothing, needs no more
    labels = tf.WhisperForAudioClassification(tiny("whisper").config)
    assert load_calibration(heard, labels).inputs.keys() == heard.keys()


@pytest.mark.parametrize("given", ["input_ids", "pixel_values"])
def test_half_of_what_a_model_reads_is_refused_in_one_line(given):
    batch = {"input_ids": tokens(2, 6), "pixel_values": torch.zeros(2, 3, 8, 8)}
    with pytest.raises(ValueError, match=rf"CLIPModel does not run on the first .*\({given} \(1, .*give all") as error:
        DSAPruner(clip()).prune({given: batch[given]}, DSAConfig(0.5, "wanda", "uniform"))
    assert "\n" not in str(error.value)
