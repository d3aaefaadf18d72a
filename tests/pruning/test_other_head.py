"""A pruned model that is loaded under another head: masks, verify and the callback go on."""

import pytest
import torch
import transformers as tf

from optimum_dsa import Allocation, DSACallback, DSAConfig, DSAPruner, prune, verify
from optimum_dsa.pruning.other_head import report_for

from ..tiny import tiny_llama, tokens


HEADS = [
    ("llama", "LlamaForSequenceClassification"),
    ("llama", "LlamaModel"),
    ("llama", "LlamaForTokenClassification"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("gpt2", "GPT2Model"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertModel"),
    ("t5", "T5ForSequenceClassification"),
    ("mixtral", "MixtralForSequenceClassification"),
]
CONFIGS = [DSAConfig(0.6, "magnitude", "uniform"), DSAConfig(0.6, "magnitude", "uniform", granularity="matrix")]


def saved(model, folder, config=CONFIGS[0]):
    pruner = DSAPruner(model)
    pruner.prune(None, config)
    pruner.save_pretrained(folder)
    return pruner


def masks(pruner):
    return [mask for _, mask in pruner.masks()]


@pytest.mark.parametrize("family,head", HEADS)
@pytest.mark.parametrize("config", CONFIGS, ids=["block", "matrix"])
def test_masks_and_verify_go_on_under_another_head(family, head, config, tiny, tmp_path):
    first = saved(tiny(family), tmp_path, config)
    model = getattr(tf, head).from_pretrained(tmp_path)
    found = DSAPruner(model)
    assert found.verify().holds, found.verify()
    assert all(torch.equal(*pair) for pair in zip(masks(found), masks(first), strict=True))
    assert {name for name, _ in found.masks()} <= {name for name, _ in model.named_parameters()} | {
        name for name, _ in found.masks() if name.endswith("]")
    }
    # and so does what is asked with the report that was written
    other = verify(model, first.report)
    assert other.holds and other.removed == first.report.removed
    assert any("another head" in part for part in other.unproven) == (
        model.num_parameters() != first.report.parameters
    )
    # a weight that came back is found under any head
    weight = next(p for name, p in model.named_parameters() if p.dim() == 2 and ".0." in name and (p == 0).sum() > 99)
    weight.data[weight == 0] = 1.0
    assert not found.verify().holds


@pytest.mark.parametrize("head", ["LlamaForSequenceClassification", "LlamaModel", "GPT2ForSequenceClassification"])
def test_the_callback_goes_on_and_its_checkpoint_is_what_it_says(head, tiny, tmp_path):
    saved(tiny("gpt2" if "GPT2" in head else "llama"), tmp_path / "pruned")
    model = getattr(tf, head).from_pretrained(tmp_path / "pruned")
    model.config.pad_token_id = 0
    before = masks(DSAPruner(model))
    arguments = tf.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_steps=2
    )
    data = [{"input_ids": row, "labels": torch.tensor(1)} for row in tokens(4)]

    class Trainer(tf.Trainer):
        def compute_loss(self, model, inputs, **kwargs):  # a model without a head has no loss of its own
            return model(input_ids=inputs["input_ids"])[0].float().square().mean()

    trainer = Trainer(model, arguments, train_dataset=data)
    DSACallback().attach(trainer)
    trainer.train()
    assert all(torch.equal(*pair) for pair in zip(masks(DSAPruner(model)), before, strict=True))
    again = DSAPruner.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert type(again.model).__name__ == head and again.verify().holds, again.verify()
    assert again.report.parameters == again.model.num_parameters()


def test_a_head_that_was_pruned_and_is_gone_is_left_out(tmp_path):
    config = DSAConfig(0.6, "magnitude", "uniform", include=("lm_head",), exclude=("model.layers.0.mlp.*",))
    first = saved(tiny_llama(), tmp_path, config)
    found = DSAPruner(tf.LlamaForSequenceClassification.from_pretrained(tmp_path))
    assert len(masks(found)) == len(masks(first)) - 1
    assert set(found.report.achieved) == set(first.report.achieved) - {"outside the blocks"}
    assert not found.report.config.include and len(found.report.dense) == 3
    bare = DSAPruner(tf.LlamaModel.from_pretrained(tmp_path))
    assert len(masks(bare)) == len(masks(first)) - 1 and "layers.0.mlp.up_proj.weight" in bare.report.dense


def test_an_allocation_of_one_head_is_one_of_another(tmp_path):
    shares = {f"model.layers.{number}": share for number, share in enumerate((0.3, 0.6, 0.6))}
    given = Allocation(shares, dict.fromkeys(shares, 7680))
    report = prune(tiny_llama().model, None, DSAConfig(0.5, "magnitude", given))
    assert list(report.achieved.values()) == pytest.approx([0.3, 0.6, 0.6], abs=1e-3)


def test_under_its_own_head_nothing_is_renamed():
    model = tiny_llama()
    report = prune(model, None, CONFIGS[1])
    assert report_for(model, report) is report


@pytest.mark.parametrize("change", ["labels", "words"])
def test_a_head_of_another_size_is_another_head(change, tiny, tmp_path):
    """Other labels for a picture, words that a language model learns: the same class, and other parameters."""
    first = saved(tiny("vit" if change == "labels" else "llama"), tmp_path / "pruned")
    if change == "labels":
        options = {"num_labels": 3, "ignore_mismatched_sizes": True}
        model = tf.ViTForImageClassification.from_pretrained(tmp_path / "pruned", **options)
    else:
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        model.resize_token_embeddings(101)
    pruner = DSAPruner(model)
    assert pruner.verify().holds, pruner.verify()
    pruner.save_pretrained(tmp_path / "out")
    again = DSAPruner.from_pretrained(tmp_path / "out")
    assert again.verify().holds and again.report.parameters == model.num_parameters() != first.report.parameters
    assert all(torch.equal(*pair) for pair in zip(masks(again), masks(first), strict=True))
