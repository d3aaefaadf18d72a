"""Outputs as their users take them: one fresh process, without this package, loads them all by what lies in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf

from optimum_dsa import DSAConfig, DSAPruner

from .own_code import own_code
from .tiny import bos_tokenizer


USE = """
import json, sys
import numpy, torch, transformers as tf
from PIL import Image

tf.logging.set_verbosity_error()
home, found = sys.argv[1], {}
torch.set_num_threads(1)

model = tf.AutoModelForCausalLM.from_pretrained(f"{home}/code", trust_remote_code=True)
with torch.no_grad():
    found["code"] = model(torch.tensor([[1, 2, 3, 4]])).logits.sum().item()
found["words"] = tf.AutoTokenizer.from_pretrained(f"{home}/code")("x = 1").input_ids

modules = json.load(open(f"{home}/embedder/modules.json"))
pooling = json.load(open(f"{home}/embedder/{modules[1]['path']}/config.json"))
assert pooling["pooling_mode_mean_tokens"]
words = tf.AutoTokenizer.from_pretrained(f"{home}/embedder")("1 2 3", return_tensors="pt")
words.pop("token_type_ids", None)
with torch.no_grad():
    states = tf.AutoModel.from_pretrained(f"{home}/embedder")(**words).last_hidden_state
found["embedder"] = states.mean(1).sum().item()

picture = Image.fromarray(numpy.arange(192, dtype="uint8").reshape(8, 8, 3))
look = tf.pipeline("image-classification", model=f"{home}/vit")
found["vit"] = {row["label"]: row["score"] for row in look(picture, top_k=5)}

hear = tf.pipeline("automatic-speech-recognition", model=f"{home}/whisper")
found["whisper"] = type(hear.feature_extractor).__name__

processor = tf.AutoProcessor.from_pretrained(f"{home}/llava")
given = processor(images=picture, text="<image> 1 2", return_tensors="pt")
with torch.no_grad():
    found["llava"] = tf.AutoModelForImageTextToText.from_pretrained(f"{home}/llava")(**given).logits.sum().item()
print(json.dumps(found))
"""


def pruned(model_or_path, place, **options):
    pruner = DSAPruner.from_pretrained(model_or_path, **options)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(place)
    return pruner


def embedder(folder):
    """A BERT with a sentence embedder's files."""
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    tf.BertModel(config).save_pretrained(folder)
    bos_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def with_processor(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def image_words():
    """A tokenizer that knows the place of a picture."""
    tokenizer = bos_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


@pytest.mark.usefixtures("modules")
def test_every_output_is_used_as_its_base_is(tmp_path, tiny):
    base, out = tmp_path / "base", tmp_path / "out"
    code = pruned(own_code(base / "code"), out / "code", trust_remote_code=True)
    bert = pruned(embedder(base / "embedder"), out / "embedder")
    looks = tf.ViTImageProcessor(size={"height": 8, "width": 8})
    vit = pruned(with_processor(tiny("vit"), looks, base / "vit"), out / "vit")
    hears = tf.WhisperProcessor(tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), bos_tokenizer())
    pruned(with_processor(tiny("whisper"), hears, base / "whisper"), out / "whisper")
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    words = image_words()
    model = tiny("llava")
    model.config.image_token_id = words.convert_tokens_to_ids("<image>")
    patch = model.config.vision_config.patch_size
    both = tf.LlavaProcessor(
        pictures, words, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    llava = pruned(with_processor(model, both, base / "llava"), out / "llava")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(out)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        assert found["code"] == pytest.approx(code.model(torch.tensor([[1, 2, 3, 4]])).logits.sum().item(), rel=1e-4)
        read = bert.tokenizer("1 2 3", return_tensors="pt")
        states = bert.model(input_ids=read.input_ids).last_hidden_state
        assert found["embedder"] == pytest.approx(states.mean(1).sum().item(), rel=1e-3, abs=1e-4)
    assert found["words"] == code.tokenizer("x = 1").input_ids
    assert found["vit"].keys() == set(vit.model.config.id2label.values())
    assert found["whisper"] == "WhisperFeatureExtractor"
    assert isinstance(found["llava"], float) and type(llava.model).__name__ == "LlavaForConditionalGeneration"
    assert {path.name for path in (out / "llava").iterdir()} >= {"processor_config.json", "tokenizer.json"}
