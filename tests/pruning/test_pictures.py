"""Pictures from a folder or dataset, read by the processor beside the model."""

import json

import datasets
import pytest
import torch
import transformers as tf
from PIL import Image

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, RecoveryConfig, load_calibration
from optimum_dsa.pruning.pictures import picture_inputs

from ..conftest import IMAGE_TOKEN
from ..model.test_inputs import clip
from ..test_commands import run
from ..tiny import masking_tokenizer


ASKED = DataConfig(num_samples=4, image_column="image")
SIZE = {"height": 8, "width": 8}


def pixels(count=6):
    return [Image.new("RGB", (12, 10), (40 * number, 255 - 40 * number, 90)) for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures, and what is said of each."""
    place = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, picture in enumerate(pixels()):
        picture.save(place / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"{number} 7 8"}))
    (place / "metadata.jsonl").write_text("\n".join(rows))
    return place


@pytest.fixture
def vit(tiny, tmp_path):
    model = tiny("vit")
    model.save_pretrained(tmp_path / "vit")
    tf.ViTImageProcessor(size=SIZE).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_folder_of_pictures_calibrates(vit, folder):
    pruner = DSAPruner.from_pretrained(vit)
    data = load_calibration(str(folder), pruner.model, None, ASKED)
    assert data.inputs["pixel_values"].shape == (4, 3, 8, 8) and len(data.batches(3)) == 2
    assert data.facts()["samples"] == 4 and data.facts()["source"] == folder.name
    processor = tf.ViTImageProcessor(size=SIZE)
    every = [processor(images=[picture], return_tensors="pt")["pixel_values"][0] for picture in pixels()]
    drawn = [next(n for n, one in enumerate(every) if torch.equal(one, row)) for row in data.inputs["pixel_values"]]
    assert len(set(drawn)) == 4
    other = load_calibration(str(folder), pruner.model, None, DataConfig(4, image_column="image", seed=1))
    assert not torch.equal(other.inputs["pixel_values"], data.inputs["pixel_values"])
    report = pruner.prune(str(folder), DSAConfig(0.5, "wanda", "uniform", data=ASKED))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    memory = datasets.Dataset.from_dict({"image": pixels()}).cast_column("image", datasets.Image())
    assert load_calibration(memory, pruner.model, None, ASKED).inputs["pixel_values"].shape == (4, 3, 8, 8)


def test_pictures_from_the_command_line(vit, folder, monkeypatch, capsys, tmp_path):
    asked = ["--dataset", str(folder), "--image-column", "image", "--num-samples", "2"]
    code, out, err = run(monkeypatch, capsys, "prune", str(vit), "-o", str(tmp_path / "out"), "-s", "0.5", *asked)
    assert code == 0, err
    said = json.loads((tmp_path / "out" / "dsa_config.json").read_text())
    assert said["config"]["data"]["image_column"] == "image" and said["calibration"]["samples"] == 2


@pytest.mark.parametrize("form", ["parquet", "paths", "saved", "slice"])
def test_pictures_are_read_from_whatever_text_is_read_from(form, vit, folder, tmp_path):
    model = DSAPruner.from_pretrained(vit).model
    memory = datasets.Dataset.from_dict({"image": pixels()}).cast_column("image", datasets.Image())
    source, config = tmp_path / "rows", ASKED
    if form == "parquet":
        memory.to_parquet(str(source := tmp_path / "rows.parquet"))
    elif form == "paths":
        for number, picture in enumerate(pixels()):
            picture.save(tmp_path / f"{number}.png")
        source = tmp_path / "rows.jsonl"  # names of files beside it
        source.write_text("".join(f'{{"image": "{number}.png"}}\n' for number in range(6)))
    elif form == "saved":
        memory.save_to_disk(str(source))
    else:
        source, config = folder, DataConfig(4, image_column="image", split="train[:4]")
    found = load_calibration(str(source), model, None, config).inputs["pixel_values"]
    processor = tf.ViTImageProcessor(size=SIZE)
    every = [processor(images=[picture], return_tensors="pt")["pixel_values"][0] for picture in pixels()]
    drawn = [next(n for n, one in enumerate(every) if torch.equal(one, row)) for row in found]
    assert len(set(drawn)) == 4 and (form != "slice" or max(drawn) == 3)


def test_texts_that_are_too_long_are_cut_and_counted(tiny, folder, caplog):
    processor = tf.CLIPProcessor(tf.CLIPImageProcessor(size=SIZE, crop_size=SIZE), masking_tokenizer())
    model = clip()
    asked = DataConfig(4, 4, image_column="image")
    found = picture_inputs(str(folder), model, asked, processor)
    assert all(row["input_ids"].shape == (1, 4) for row in found)
    assert "4 of 4 texts beside pictures are longer than 4 tokens and were cut" in caplog.text
    with pytest.raises(ValueError, match="reads no pictures; leave image_column out"):
        picture_inputs(str(folder), tiny("llama"), ASKED, processor)


def llava_processor(template=None):
    tokenizer = masking_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == 95
    images = tf.CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    return tf.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["text", "chat"])
def test_pictures_with_text_are_prompts(template, tiny, folder):
    model = tiny("llava")
    model.config.image_token_id = model.config.image_token_index = 95
    found = picture_inputs(str(folder), model, ASKED, llava_processor(template))
    assert len(found) == 4 and IMAGE_TOKEN != 95
    for row in found:
        assert (row["input_ids"] == 95).sum() == 4 and row["pixel_values"].shape == (1, 3, 8, 8)
        assert row["input_ids"][0].tolist()[-3:-1] == [12, 13]  # "7 8"
    report = DSAPruner(model).prune(found, DSAConfig(0.5, "wanda", "uniform"))
    assert report.calibration["samples"] == 4


def test_what_cannot_be_read_is_refused_in_one_line(tiny, vit, folder):
    model = DSAPruner.from_pretrained(vit).model
    for source, config, said in (
        (str(folder), DataConfig(image_column="picture"), "no column 'picture' of pictures; it has image, text"),
        (str(folder), DataConfig(7, image_column="image"), "holds 6 pictures, and 7 are needed"),
        (str(folder / "none"), ASKED, "No such file or folder"),
        ({str(folder): 1.0, "other": 1.0}, ASKED, "Pictures are read from one dataset"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
            load_calibration(source, model, None, config)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs the processor beside it"):
        load_calibration(str(folder), tiny("vit"), None, ASKED)
    with pytest.raises(ValueError, match="image_column='image' is for calibration"):
        RecoveryConfig(data=ASKED)
    with pytest.raises(ValueError, match="A search compares predictions of text"):
        DSAPruner(tiny("llama")).search(str(folder), DSAConfig(0.5, data=ASKED))
