"""One row a family: the folder that its users have, what they calibrate it with, and how they use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers as tf

from optimum_dsa import DataConfig

from ..conftest import ENCODER, SEQ2SEQ, SIZES, VISION
from ..own_code import own_code
from ..tiny import bos_tokenizer, tiny_llama
from . import uses


TEXT = [" ".join(str((start * step) % 80) for step in range(200)) for start in range(1, 9)]
LICENCE = {"LICENSE": "Do as you like.", "notes/how.md": "What nobody reads."}


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        make: writes the base into a folder.
        use: a row of `USES`.
        calibration: what is calibrated with, from the base's folder.
        options: with which it is loaded.
        files: what lies beside it as well, name -> content.
        config: fields of the configuration.
    """

    make: Callable[[Path], Any]
    use: str
    calibration: Callable[[Path], Any] = lambda folder: TEXT
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=lambda: LICENCE)
    config: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, model, *others) -> Path:
    for part in (model, *others):
        part.save_pretrained(folder)
    return folder


def letters(*special: str, before: tuple[str, ...] = ()) -> dict[str, int]:
    """A vocabulary of bytes, as byte-level tokenizers write them, and special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {token: number for number, token in enumerate([*before, *bytes_to_unicode().values(), *special])}


# -- texts


def halves(folder: Path) -> Path:
    """A Llama whose own code halves every second MLP."""
    bos_tokenizer().save_pretrained(own_code(folder))
    return folder


def adapter(folder: Path) -> Path:
    """An adapter that was trained on a dense Llama, which lies beside it."""
    import peft

    base = save(folder.parent / f"{folder.name}-base", tiny_llama(), bos_tokenizer())
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def bert(folder: Path, head: str = "BertForMaskedLM", **settings) -> Path:
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *map(str, range(80))])}
    model = getattr(tf, head)(tf.BertConfig(**ENCODER, **settings))
    return save(folder, model, tf.BertTokenizer(vocab=vocabulary, model_max_length=64))


def roberta(folder: Path) -> Path:
    """66 positions, which hold 64 tokens, and byte-level words."""
    vocabulary = letters("<mask>", before=("<s>", "<pad>", "</s>", "<unk>"))
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0}
    model = tf.RobertaForMaskedLM(tf.RobertaConfig(**{**ENCODER, **sizes}))
    return save(folder, model, tf.RobertaTokenizer(vocab=vocabulary, merges=[]))


def bart(folder: Path) -> Path:
    vocabulary = letters("<mask>", before=("<s>", "<pad>", "</s>", "<unk>"))
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0}
    model = tf.BartForConditionalGeneration(tf.BartConfig(**{**SEQ2SEQ, **sizes}, forced_eos_token_id=2))
    return save(folder, model, tf.BartTokenizer(vocab=vocabulary, merges=[]))


def t5(folder: Path, head: str = "T5ForConditionalGeneration") -> Path:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{number}", -2.0) for number in range(80))]
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = getattr(tf, head)(tf.T5Config(vocab_size=97, feed_forward_proj="gated-gelu", **sizes))
    return save(folder, model, tf.T5Tokenizer(vocab=words, extra_ids=3))


def pairs(folder: Path) -> list[dict]:
    """Documents and their summaries as a data collator hands them out: padded, labels beside."""
    words = tf.AutoTokenizer.from_pretrained(folder)
    batches = []
    for number in range(0, 8, 2):
        given = words([row[: 20 + 10 * n] for n, row in enumerate(TEXT[number : number + 2])], padding=True)
        labels = words([row[: 5 + 5 * n] for n, row in enumerate(TEXT[number : number + 2])], padding=True)
        ids, real = torch.tensor(labels["input_ids"]), torch.tensor(labels["attention_mask"]).bool()
        batch = {name: torch.tensor(given[name]) for name in ("input_ids", "attention_mask")}
        batches.append({**batch, "labels": ids.masked_fill(~real, -100)})
    return batches


EMBEDDER = {
    "modules.json": json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]),
    "1_Pooling/config.json": '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}',
    "sentence_bert_config.json": '{"max_seq_length": 32}',
    "config_sentence_transformers.json": '{"prompts": {"query": "1 "}}',
}  # fmt: skip


def decoder(name: str, **changes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        settings = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
        model = tf.AutoModelForCausalLM.from_config(getattr(tf, f"{name}Config")(**settings))
        return save(folder, model, bos_tokenizer())

    return make


# -- pictures and sound


def vit(folder: Path) -> Path:
    model = tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5))
    return save(folder, model, tf.ViTImageProcessor(size={"height": 8, "width": 8}))


def pictures(folder: Path) -> Any:
    return tf.AutoImageProcessor.from_pretrained(folder)(images=[uses.PICTURE] * 4, return_tensors="pt")


def crop() -> tf.CLIPImageProcessor:
    return tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def clip(folder: Path) -> Path:
    words = letters()
    words |= {f"{letter}</w>": len(words) + number for number, letter in enumerate(list(words))}
    words |= {"<|startoftext|>": len(words), "<|endoftext|>": len(words) + 1}
    text = {**ENCODER, "vocab_size": len(words), "eos_token_id": len(words) - 1}
    config = tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    processor = tf.CLIPProcessor(crop(), tf.CLIPTokenizer(vocab=words, merges=[]))
    return save(folder, tf.CLIPModel(config), processor)


def captions(folder: Path) -> Any:
    """Three texts beside two pictures, as its processor returns them."""
    processor = tf.AutoProcessor.from_pretrained(folder)
    texts = ["a cat", "a dog and more", "1 2"]
    return processor(text=texts, images=[uses.PICTURE] * 2, return_tensors="pt", padding=True)


def whisper(folder: Path) -> Path:
    special = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|nospeech|>")
    words = letters(*special, "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>")
    tokenizer = tf.WhisperTokenizer(vocab=words, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*special[1:], "<|notimestamps|>"]})
    sizes = {"vocab_size": len(words), "pad_token_id": 256, "eos_token_id": 256, "bos_token_id": 256}
    sizes |= {"decoder_start_token_id": 257, "num_mel_bins": 8, "max_source_positions": 50}
    model = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**{**SEQ2SEQ, **sizes}, max_target_positions=64, suppress_tokens=[], begin_suppress_tokens=[])
    )
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = tf.GenerationConfig(
        **{name: sizes[name] for name in names},
        no_timestamps_token_id=words["<|notimestamps|>"],
        is_multilingual=False,
    )
    return save(folder, model, tf.WhisperProcessor(tf.WhisperFeatureExtractor(8, chunk_length=1), tokenizer))


def recordings(folder: Path) -> Any:
    """Two recordings and what is said in them, padded, as examples on training Whisper prepare them."""
    processor = tf.AutoProcessor.from_pretrained(folder)
    given = processor([uses.SOUND, numpy.flip(uses.SOUND)], sampling_rate=16_000, return_tensors="pt")
    said = processor.tokenizer(["one", "three"], padding=True, return_tensors="pt")
    given["labels"] = said["input_ids"].masked_fill(~said["attention_mask"].bool(), -100)
    return given


def wav2vec2(folder: Path) -> Path:
    folder.mkdir()
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    sizes = {name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_attention_heads": 4}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": len(words)}
    tokenizer = tf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    processor = tf.Wav2Vec2Processor(tf.Wav2Vec2FeatureExtractor(), tokenizer)
    return save(folder, tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**sizes, pad_token_id=0)), processor)


def sounds(folder: Path) -> Any:
    processor = tf.AutoProcessor.from_pretrained(folder)
    return processor([uses.SOUND[:3200], uses.SOUND[1000:4200]], sampling_rate=16_000, return_tensors="pt")


def llava(folder: Path) -> Path:
    words = bos_tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    words.pad_token = "<eos>"
    image = words.convert_tokens_to_ids("<image>")
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**SIZES), image_token_id=image
    )
    both = tf.LlavaProcessor(
        crop(), words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return save(folder, tf.LlavaForConditionalGeneration(config), both)


def prompts(folder: Path) -> list[Any]:
    """Prompts with a picture each, of several lengths, one a batch."""
    processor = tf.AutoProcessor.from_pretrained(folder)
    texts = ["<image> 1 2", "3 4 <image> 5", "<image> 6"]
    return [processor(images=uses.PICTURE, text=text, return_tensors="pt") for text in texts]


def qwen(folder: Path) -> Path:
    special = ("<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = letters(*special)
    tokenizer = tf.Qwen2Tokenizer(vocab=words, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**SIZES, "vocab_size": len(words), "rope_parameters": rope, "tie_word_embeddings": False}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    vision |= {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1], "window_size": 16}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **{name: words[word] for name, word in zip(names, special[1:])}
    )
    size = {"shortest_edge": 64, "longest_edge": 256}
    images = tf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size)
    return save(folder, tf.Qwen2_5_VLForConditionalGeneration(config), images, tokenizer)


QWEN = {
    **LICENCE,
    "video_preprocessor_config.json": '{"video_processor_type": "Qwen2VLVideoProcessor"}',
    "chat_template.jinja": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


def patches(folder: Path) -> list[dict]:
    """Prompts with two pictures, one and none, each as its parts return them."""
    images, words = tf.AutoImageProcessor.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)
    batches = []
    for count in (2, 1, 0):
        seen = images(images=[uses.PICTURE] * count, return_tensors="pt") if count else {}
        each = int(seen["image_grid_thw"][0].prod()) // 4 if count else 0
        mark = f"<|vision_start|>{'<|image_pad|>' * each}<|vision_end|>"
        given = words(f"{mark * count}1 2 3", return_tensors="pt")
        kinds = (given["input_ids"] == words.convert_tokens_to_ids("<|image_pad|>")).long()
        batches.append({**given, "mm_token_type_ids": kinds, **seen})
    return batches


FAMILIES: dict[str, Family] = {
    "own code": Family(halves, "own_code", options={"trust_remote_code": True}),
    "adapter": Family(adapter, "adapter", files={}),
    "bert": Family(bert, "fill_mask"),
    "roberta": Family(roberta, "fill_mask"),
    "bart": Family(bart, "writes_text", pairs),
    "t5": Family(t5, "writes_text", pairs),
    "cross-encoder": Family(
        lambda folder: bert(folder, "BertForSequenceClassification", num_labels=1, sentence_transformers={"v": 1}),
        "rerank",
    ),
    "embedder": Family(lambda folder: bert(folder, "BertModel"), "embed", files=EMBEDDER | LICENCE),
    "sentence-t5": Family(
        lambda folder: t5(folder, "T5EncoderModel"), "embed", files=EMBEDDER | LICENCE,
        config={"data": DataConfig(num_samples=4, sequence_length=32)},
    ),
    "tagger": Family(lambda folder: bert(folder, "BertForTokenClassification", num_labels=3), "tag"),
    "vit": Family(vit, "image_classification", pictures),
    "clip": Family(clip, "zero_shot_images", captions),
    "whisper": Family(whisper, "hear", recordings),
    "wav2vec2": Family(wav2vec2, "hear_letters", sounds),
    "llava": Family(llava, "picture_and_text", prompts),
    "qwen2.5-vl": Family(qwen, "pictures_in_patches", patches, files=QWEN),
    "mixtral": Family(decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), "text_generation"),
    "mamba hybrid": Family(
        decoder(
            "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head="auto", mamba_d_state=8, mamba_chunk_size=8,
            mamba_n_groups=1, head_dim=None,
        ),
        "text_generation",
    ),
    "llama 4": Family(
        decoder(
            "Llama4Text", intermediate_size=16, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=2,
            moe_layers=[1],
        ),
        "text_generation",
    ),
}  # fmt: skip
