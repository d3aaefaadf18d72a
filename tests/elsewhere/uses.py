"""What users do with a model of each kind, from its folder alone; run as a script, this is the fresh process.

    python uses.py '{"bert": ["fill_mask", "out/bert", null], ...}'

Each use gives what the model said and the model as the user has it. With `model`, the same is asked of one in memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path

import numpy
import torch
import transformers as tf
from PIL import Image


PICTURE = Image.fromarray(numpy.arange(192, dtype="uint8").reshape(8, 8, 3))
SOUND = numpy.sin(numpy.arange(16_000, dtype="float32") / 20)
SAID = "1 2 3 4"
PREPARE = {
    "tokenizer": tf.AutoTokenizer,
    "processor": tf.AutoProcessor,
    "image_processor": tf.AutoImageProcessor,
    "feature_extractor": tf.AutoFeatureExtractor,
}


def pipe(task, folder, model, *parts, **options):
    """A pipeline of the task, as `pipeline(task, model=folder)` makes one; what prepares is the folder's own."""
    if model is None:
        return tf.pipeline(task, model=folder, **options)
    return tf.pipeline(task, model=model, **{part: PREPARE[part].from_pretrained(folder) for part in parts})


def loaded(auto, folder, model, **options):
    return getattr(tf, auto).from_pretrained(folder, **options).eval() if model is None else model


def text_generation(folder, model=None, **options):
    write = pipe("text-generation", folder, model, "tokenizer", **options)
    said = write(SAID, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    with torch.no_grad():
        logits = write.model(**write.tokenizer(SAID, return_tensors="pt")).logits
    return [said, logits[0, -1, :8].tolist()], write.model


def own_code(folder, model=None):
    return text_generation(folder, model, trust_remote_code=True)


def adapter(folder, model=None):
    """The adapter's folder names the pruned model that it is on; merged, as for serving."""
    import peft

    if model is None:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    words = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        return [model(words).logits[0, -1, :8].tolist()], model.get_base_model()


def fill_mask(folder, model=None):
    guess = pipe("fill-mask", folder, model, "tokenizer")
    found = guess(f"1 2 {guess.tokenizer.mask_token} 4", top_k=3)
    return [[row["token"], row["score"]] for row in found], guess.model


def writes_text(folder, model=None):
    """A second sequence: what pipelines of summaries and translations did, which transformers 5 has no more."""
    model = loaded("AutoModelForSeq2SeqLM", folder, model)
    given = tf.AutoTokenizer.from_pretrained(folder)([SAID, "5 6"], return_tensors="pt", padding=True)
    given.pop("token_type_ids", None)
    written = model.generate(**given, max_new_tokens=5, num_beams=2, do_sample=False)
    with torch.no_grad():
        loss = model(**given, labels=given["input_ids"]).loss
    return [written.tolist(), loss.item()], model


def rerank(folder, model=None):
    """Scores of pairs, one label: what a cross-encoder is for."""
    judge = pipe("text-classification", folder, model, "tokenizer")
    pairs = [{"text": SAID, "text_pair": other} for other in ("1 2", "7 8 9")]
    return [row["score"] for row in judge(pairs, function_to_apply="none", padding=True)], judge.model


def tag(folder, model=None):
    name = pipe("token-classification", folder, model, "tokenizer")
    return [[row["entity"], row["score"].item()] for row in name(SAID)], name.model


def embed(folder, model=None):
    """A sentence's mean of its words, by the modules that lie beside the model, normalised."""
    modules = json.loads(Path(folder, "modules.json").read_text())
    pooling = json.loads(Path(folder, modules[1]["path"], "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and modules[2]["type"].endswith("Normalize")
    longest = json.loads(Path(folder, "sentence_bert_config.json").read_text())["max_seq_length"]
    model = loaded("AutoModelForTextEncoding", folder, model)
    words = tf.AutoTokenizer.from_pretrained(folder)(
        [SAID, "5 " * 99], padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**words).last_hidden_state
    mask = words["attention_mask"][..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means)[:, :8].tolist(), model


def image_classification(folder, model=None):
    look = pipe("image-classification", folder, model, "image_processor")
    return [[row["label"], row["score"]] for row in look(PICTURE, top_k=3)], look.model


def zero_shot_images(folder, model=None):
    match = pipe("zero-shot-image-classification", folder, model, "image_processor", "tokenizer")
    found = match(PICTURE, candidate_labels=["cat", "dog"])
    return sorted([row["label"], row["score"]] for row in found), match.model


def hear(folder, model=None):
    listen = pipe("automatic-speech-recognition", folder, model, "feature_extractor", "tokenizer")
    said = listen(SOUND, generate_kwargs={"max_new_tokens": 5, "num_beams": 1})["text"]
    given = tf.AutoProcessor.from_pretrained(folder)(SOUND, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        logits = listen.model(**given, decoder_input_ids=torch.tensor([[1, 2]])).logits
    return [said, logits[0, -1, :8].tolist()], listen.model


def hear_letters(folder, model=None):
    """Letters of a sound, as models with a CTC head give them, without a decoder."""
    listen = pipe("automatic-speech-recognition", folder, model, "feature_extractor", "tokenizer")
    given = tf.AutoProcessor.from_pretrained(folder)(SOUND[:3200], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        logits = listen.model(**given).logits
    return [listen(SOUND[:3200])["text"], logits[0, -1, :8].tolist()], listen.model


def picture_and_text(folder, model=None):
    talk = pipe("image-text-to-text", folder, model, "processor")
    said = talk(images=PICTURE, text="<image> 1 2", generate_kwargs={"do_sample": False, "max_new_tokens": 5})
    given = tf.AutoProcessor.from_pretrained(folder)(images=PICTURE, text="<image> 1 2", return_tensors="pt")
    with torch.no_grad():
        logits = talk.model(**given).logits
    return [said[0]["generated_text"], logits[0, -1, :8].tolist()], talk.model


def pictures_in_patches(folder, model=None):
    """Qwen-VL by its parts: its processor needs torchvision, its image processor and its tokenizer do not."""
    model = loaded("AutoModelForImageTextToText", folder, model)
    seen = tf.AutoImageProcessor.from_pretrained(folder)(images=[PICTURE], return_tensors="pt")
    words = tf.AutoTokenizer.from_pretrained(folder)
    count = int(seen["image_grid_thw"].prod()) // 4
    text = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>12"
    given = words(text, return_tensors="pt")
    given["mm_token_type_ids"] = (given["input_ids"] == words.convert_tokens_to_ids("<|image_pad|>")).long()
    written = model.generate(**given, **seen, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = model(**given, **seen).logits
    return [written.tolist(), logits[0, -1, :8].tolist()], model


USES = {
    use.__name__: use
    for use in (
        text_generation, own_code, adapter, fill_mask, writes_text, rerank, tag, embed, image_classification,
        zero_shot_images, hear, hear_letters, picture_and_text, pictures_in_patches,
    )
}  # fmt: skip


def facts(use, folder, model=None):
    """What a use gave, and class, weights and zeros of the model that it was given by: JSON values."""
    said, used = USES[use](str(folder), model)
    digest, zeros = hashlib.sha256(), {}
    for name, value in sorted(used.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if value.dim() > 1 and (found := int((value == 0).sum())):
            zeros[name] = found
    return {"said": said, "class": type(used).__name__, "weights": digest.hexdigest(), "zeros": zeros}


def main(asked):
    """`asked`: name -> use, folder and a module to import before; the names without one come first."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    found = {}
    for name, (use, folder, needed) in sorted(asked.items(), key=lambda item: item[1][2] or ""):
        if needed:
            __import__(needed)
        assert needed or "optimum_dsa" not in sys.modules
        try:
            found[name] = facts(use, folder)
        except Exception:  # noqa: BLE001 - one that fails is told apart from the others
            found[name] = {"error": traceback.format_exc()}
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
