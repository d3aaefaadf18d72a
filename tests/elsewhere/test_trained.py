"""A pruned model trained with `DSACallback`, under another head or its own: checkpoints are used as others are."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from optimum_dsa import DSACallback, DSAConfig, DSAPruner
from optimum_dsa.checkpoint.description import read_description

from . import uses
from .families import FAMILIES, Family, decoder, save
from .ways import base_of, check_same, used


TEXTS = ["1 2 3", "4 5", "6 7 8 9", "10"]


def classified(words):
    return [{**words(text), "labels": number % 2} for number, text in enumerate(TEXTS)]


def seen(images):
    pixels = images(images=[uses.PICTURE] * 4, return_tensors="pt")["pixel_values"]
    return [{"pixel_values": picture, "labels": number % 3} for number, picture in enumerate(pixels)]


def written(words):
    return [{**words(text), "labels": words(text[::-1])["input_ids"]} for text in TEXTS]


# Family -> the class that is trained and its options, what prepares, its rows, and how the checkpoint is used.
HEADS = {
    "bert": ("AutoModelForSequenceClassification", {"num_labels": 2}, tf.AutoTokenizer, classified, "rerank"),
    "embedder": ("AutoModelForSequenceClassification", {"num_labels": 2}, tf.AutoTokenizer, classified, "rerank"),
    "llama": ("AutoModelForSequenceClassification", {"num_labels": 2}, tf.AutoTokenizer, classified, "rerank"),
    "bart": ("AutoModelForSeq2SeqLM", {}, tf.AutoTokenizer, written, "writes_text"),
    "vit": (
        "AutoModelForImageClassification", {"num_labels": 3, "ignore_mismatched_sizes": True},
        tf.AutoImageProcessor, seen, "image_classification",
    ),
}  # fmt: skip


def padding_decoder(folder):
    """One that pads, without which nobody can train a classifier."""
    decoder("Llama")(folder)
    words = tf.AutoTokenizer.from_pretrained(folder)
    words.pad_token = "<eos>"
    return save(folder, tf.AutoModelForCausalLM.from_pretrained(folder), words)


def trained(name, home):
    """The checkpoint of two steps, and what is expected of it."""
    auto, options, prepare, rows, use = HEADS[name]
    pruner = DSAPruner.from_pretrained(base_of(name, home))
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(home / "pruned" / name)
    torch.manual_seed(0)
    model = getattr(tf, auto).from_pretrained(home / "pruned" / name, **options)
    ready = prepare.from_pretrained(home / "pruned" / name)
    texts = prepare is tf.AutoTokenizer
    if texts and model.config.pad_token_id is None:
        model.config.pad_token_id = ready.pad_token_id
    place = home / "trained" / name
    arguments = tf.TrainingArguments(
        str(place), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_steps=2
    )
    collator = tf.DataCollatorForSeq2Seq(ready) if auto.endswith("Seq2SeqLM") else None
    collator = collator or (tf.DataCollatorWithPadding(ready) if texts else None)
    # pictures are prepared before, as in transformers' own examples of it
    trainer = tf.Trainer(
        model, arguments, collator, rows(ready), processing_class=ready if texts else None
    )  # fmt: skip
    DSACallback().attach(trainer)
    trainer.train()
    DSAPruner(trainer.model, ready if texts else None).save_pretrained(home / "final" / name)
    return place / "checkpoint-2", uses.facts(use, home / "pruned" / name, trainer.model.eval())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", Family(padding_decoder, "rerank"))
        done = {name: trained(name, home) for name in HEADS}
    return done, used({name: (HEADS[name][4], done[name][0], None) for name in HEADS}, home)


@pytest.mark.parametrize("name", HEADS)
def test_a_checkpoint_is_used_by_its_task_without_this_package(name, found):
    check_same(found[1][name], found[0][name][1])


@pytest.mark.parametrize("name", HEADS)
def test_zeros_are_verified_and_the_bases_files_lie_beside(name, found):
    checkpoint = found[0][name][0]
    pruner = DSAPruner.from_pretrained(checkpoint)
    assert pruner.verify().holds, pruner.verify()
    files = FAMILIES[name].files if name in FAMILIES else {"LICENSE": ""}
    assert all((checkpoint / file).is_file() for file in files)
    described = read_description(checkpoint)["base_files"]
    assert files.keys() <= set(described["kept"])
    assert not any(name.startswith("optimizer") for name in described["kept"])
    # and in what is saved of the model itself, in the end
    final = checkpoint.parents[2] / "final" / name
    assert all((final / file).is_file() for file in files)
    assert DSAPruner.from_pretrained(final).verify().holds
