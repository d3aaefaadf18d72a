"""What a processor returned, in lists, DataLoaders and datasets, calibrates."""

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader, Dataset, IterableDataset

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, load_calibration

from ..conftest import IMAGE_TOKEN
from ..model.test_pictures import prompt, qwen
from ..tiny import tiny_llama, tokens


PIXELS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[IMAGE_TOKEN] * 4 + list(range(3, 9))]).repeat(6, 1)


class Rows(Dataset):
    """Pictures with a label each, as torchvision gives them, or by name."""

    def __init__(self, named):
        self.named = named

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, number):
        if number >= len(PIXELS):
            raise IndexError
        return {"pixel_values": PIXELS[number], "labels": 1} if self.named else (PIXELS[number], 1)


class Stream(IterableDataset):
    def __iter__(self):
        return ({"pixel_values": row} for row in PIXELS)


FORMS = {
    "loader": DataLoader(Rows(True), batch_size=4),
    "loader of pairs": DataLoader(Rows(False), batch_size=4),
    "loader of a stream": DataLoader(Stream(), batch_size=4),
    "dataset": Rows(True),
    "datasets": datasets.Dataset.from_dict({"pixel_values": PIXELS.tolist(), "text": ["x"] * 6}),
    "tensors": list(PIXELS.split(4)),
    "arrays": [{"pixel_values": part.numpy()} for part in PIXELS.split(4)],
    "lists of arrays": [tf.BatchFeature({"pixel_values": [row.numpy() for row in part]}) for part in PIXELS.split(4)],
    "rows": [{"pixel_values": row, "labels": np.int64(1)} for row in PIXELS],
}


@pytest.mark.parametrize("form", FORMS)
def test_pictures_in_any_form_are_samples(tiny, form):
    found = load_calibration(FORMS[form], tiny("vit"), None, DataConfig(num_samples=6))
    given = found.inputs["pixel_values"]
    same = (given[:, None] == PIXELS[None]).flatten(2).all(2)  # a dataset's rows are drawn
    assert given.dtype == torch.float32 and same.sum(0).tolist() == same.sum(1).tolist() == [1] * 6
    assert found.facts()["samples"] == 6


def test_no_more_is_taken_of_a_loader_than_is_asked_for(tiny):
    config = DSAConfig(0.5, "wanda", "uniform", data=DataConfig(num_samples=4))
    report = DSAPruner(tiny("vit")).prune(FORMS["loader"], config)
    assert report.calibration["samples"] == 4 and report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.calibration["source"] == "DataLoader"


def collated(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("form", ["loader", "batches", "rows", "datasets"])
def test_prompts_with_a_picture_each(tiny, form):
    rows = [{"input_ids": ids, "pixel_values": pixels} for ids, pixels in zip(IDS, PIXELS)]
    source = {
        "loader": DataLoader(rows, batch_size=4, collate_fn=collated),
        "batches": [{**collated(rows[start : start + 3]), "prompt": ["a", "b", "c"]} for start in (0, 3)],
        "rows": rows,
        "datasets": datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "pixel_values": PIXELS.tolist()}),
    }[form]
    model = tiny("llava")
    found = load_calibration(source, model, None, DataConfig(num_samples=6))
    assert found.inputs["input_ids"].shape == (6, 10) and found.inputs["pixel_values"].shape == PIXELS.shape
    assert DSAPruner(model).prune(source, DSAConfig(0.5, "wanda", "uniform", data=DataConfig(6))).removed


def test_prompts_with_any_number_of_pictures_come_from_a_loader():
    prompts = [prompt(2), prompt(1, seed=1), prompt(0, 9, seed=2)]
    whole = load_calibration(prompts, qwen())
    rows = [{name: value[0] if name in ("input_ids", "attention_mask") else value for name, value in one.items()}
            for one in prompts]  # fmt: skip
    for source in (DataLoader(prompts, batch_size=None), [{**one, "id": "x"} for one in prompts], rows):
        found = load_calibration(source, qwen())
        assert len(found.parts) == 3 and found.facts()["tokens"] == whole.facts()["tokens"]
        for part, expected in zip(found.parts, whole.parts):
            assert all(torch.equal(part[name].reshape(value.shape), value) for name, value in expected.items())


def speech():
    """A tiny Wav2Vec2, and recordings of 400 numbers."""
    config = tf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.Wav2Vec2ForCTC(config).eval(), {"input_values": torch.randn(4, 400)}


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_sound_comes_in_rows_and_from_a_loader(family, tiny, inputs, caplog):
    model, given = speech() if family == "wav2vec2" else (tiny(family), inputs(family))
    items = [{name: value[number] for name, value in given.items()} | {"path": "a.wav"} for number in range(3)]
    found = load_calibration(items, model)
    assert found.facts()["samples"] == 3 and "no tensor is not used: path" in caplog.text
    assert all(torch.equal(found.inputs[name], value[:3]) for name, value in given.items())
    report = DSAPruner(model).prune(DataLoader(items, batch_size=2), DSAConfig(0.5, "wanda", "uniform"))
    assert report.calibration["samples"] == 3


def test_rows_of_token_ids_are_text_still():
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]

    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(rows)

        def __iter__(self):
            return self.rows

    for source in (DataLoader(rows, batch_size=2), DataLoader(Once(), batch_size=2)):
        found = load_calibration(source, tiny_llama(), None, DataConfig(num_samples=4))
        assert sorted(map(tuple, found.inputs["input_ids"].tolist())) == sorted(map(tuple, tokens(4, 8).tolist()))


def test_a_table_with_text_beside_is_text_for_a_model_of_text():
    beside = datasets.Dataset.from_dict({"input_ids": tokens(4, 8).tolist(), "pixel_values": PIXELS[:4].tolist()})
    found = load_calibration(beside, tiny_llama(), None, DataConfig(num_samples=4))
    assert found.inputs.keys() == {"input_ids"} and found.facts()["samples"] == 4


def test_a_search_of_pictures_is_refused_in_one_line(tiny):
    with pytest.raises(ValueError, match="ViTForImageClassification reads pictures, and a search") as error:
        DSAPruner(tiny("vit")).search(FORMS["loader"], DSAConfig(0.5, data=DataConfig(num_samples=3)))
    assert "\n" not in str(error.value)
