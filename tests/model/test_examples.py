"""What a model of every kind is trained and judged on."""

import pytest
import torch
import transformers as tf

from optimum_dsa.model.examples import (
    IGNORED,
    check_causal,
    check_predicts_tokens,
    examples,
    run_examples,
    specials,
    without_labels,
)

from ..conftest import ENCODER, FAMILIES, VOCABULARY
from ..tiny import bos_tokenizer, masking_tokenizer, tiny_llama, tokens


def framed(samples=64, length=20):
    """Windows in a BERT's frame, (samples, length)."""
    windows = torch.randint(5, 95, (samples, length), generator=torch.Generator().manual_seed(0))
    windows[:, 0], windows[:, -1] = 1, 2
    return windows


def test_masked_examples_ask_for_a_share_of_the_tokens_and_for_no_special_one(tiny):
    windows = framed()
    found = examples(tiny("bert"), windows, masking_tokenizer(), seed=3)
    asked = found["labels"] != IGNORED
    assert (asked.sum(1) == round(0.15 * 18)).all() and not asked[:, [0, -1]].any()
    assert torch.equal(found["labels"][asked], windows[asked])
    assert torch.equal(found["input_ids"][~asked], windows[~asked])
    given = found["input_ids"][asked]
    masked, same = (given == 3).float().mean(), (given == windows[asked]).float().mean()
    assert 0.72 < masked < 0.88 and 0.04 < same < 0.17
    again = examples(tiny("bert"), windows, masking_tokenizer(), seed=3)
    other = examples(tiny("bert"), windows, masking_tokenizer(), seed=4)
    assert torch.equal(again["labels"], found["labels"]) and torch.equal(again["input_ids"], found["input_ids"])
    assert not torch.equal(other["labels"], found["labels"])


def test_a_short_window_is_asked_for_one_token_at_least(tiny):
    found = examples(tiny("bert"), framed(9, 3), masking_tokenizer())
    assert ((found["labels"] != IGNORED).sum(1) == 1).all()


def test_a_second_half_is_written_and_a_next_token_is_the_token_itself(tiny):
    windows = tokens(3, 7)
    found = examples(tiny("t5"), windows)
    assert torch.equal(torch.cat([found["input_ids"], found["labels"]], 1), windows)
    assert found["input_ids"].shape[1] == 3
    found = examples(tiny_llama(), windows)
    assert torch.equal(found["input_ids"], windows) and torch.equal(found["labels"], windows)


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "llama"])
def test_examples_give_the_loss_that_the_model_itself_gives(family, tiny):
    model = tiny(family)
    given = examples(model, framed(4, 12), masking_tokenizer())
    with torch.no_grad():
        logits, loss = run_examples(model, given).float(), model(**given).loss
    labels = given["labels"]
    logits, labels = (logits[:, :-1], labels[:, 1:]) if family == "llama" else (logits, labels)
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(own, loss)


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.auto == "AutoModelForCausalLM"])
def test_causal_families_see_no_later_token(family, tiny):
    check_causal(tiny(family), tokens(2, 12).clamp(3, 80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [False, True])
def test_a_causal_head_on_a_model_that_sees_everything_is_refused(change, dtype):
    """Siblings: an encoder with a causal head, and a model that was trained to denoise."""
    settings = ENCODER if change else {**ENCODER, "is_decoder": True}
    model = tf.BertLMHeadModel(tf.BertConfig(**settings)).train().to(dtype)
    if change:
        with pytest.raises(ValueError, match="BertLMHeadModel sees the tokens behind the one that it is to predict"):
            check_causal(model, tokens(2, 12))
    else:
        check_causal(model, tokens(2, 12))
    assert model.training
    xlnet = tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(ValueError, match="XLNetLMHeadModel sees"):
        check_causal(xlnet, tokens(2, 12))


def test_a_model_without_a_loss_on_text_is_refused_in_one_line(tiny):
    labels = tf.BertForTokenClassification(tf.BertConfig(**ENCODER))
    for model, said in ((labels, "predicts labels and no tokens"), (tiny("whisper"), "reads sound")):
        for what, way_out in (("measure", "measure it by its own task"), ("train", "with DSACallback beside")):
            with pytest.raises(ValueError, match=f"{said}, so there is no loss of it on a text; .*{way_out}"):
                check_predicts_tokens(model, bos_tokenizer(), what)
    for tokenizer, named in ((None, "None"), (bos_tokenizer(), "TokenizersBackend|PreTrainedTokenizerFast")):
        with pytest.raises(ValueError, match=rf"its tokenizer \(({named})\) has no mask token"):
            check_predicts_tokens(tiny("bert"), tokenizer)


def test_special_tokens_are_those_of_the_tokenizer():
    assert specials(torch.tensor([[1, 5, 3, 94, 2, 0, 4]]), masking_tokenizer()).tolist() == [
        [True, False, True, False, True, True, True]
    ]


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_a_decoder_reads_labels_as_it_does_in_training(family, tiny, inputs):
    """What the decoder is given in the model's own forward pass, with padding of labels told apart."""
    model, labels = tiny(family), tokens(2, 6).clamp(3, 80)
    labels[0, 4:] = IGNORED
    batch = {name: value[:2] for name, value in inputs(family).items() if not name.startswith("decoder_")}
    given = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
        found = without_labels({**batch, "labels": labels}, model)
        logits = model(**found).logits
    hook.remove()
    assert torch.equal(*given) and "labels" not in found
    assert found["decoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(own, loss)


@pytest.mark.parametrize("name", ["T5Model", "BartModel", "WhisperModel"])
def test_so_does_one_without_a_head(name, tiny):
    model = getattr(tf, name)(tiny(name.removesuffix("Model").lower()).config)
    labels = torch.tensor([[7, 8, IGNORED]])
    found = without_labels({"labels": labels}, model)
    start = model.config.decoder_start_token_id
    assert found["decoder_input_ids"].tolist() == [[start, 7, 8]]
    assert found["decoder_attention_mask"].tolist() == [[1, 1, 0]]


def test_labels_of_other_models_are_nothing_that_is_computed_with(tiny):
    ids = tokens(2, 6)
    for family, labels in (("llama", ids[:, :3]), ("bert", ids), ("bart", torch.tensor([0, 1]))):
        assert without_labels({"input_ids": ids, "labels": labels}, tiny(family)).keys() == {"input_ids"}
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :2], "labels": ids}
    assert without_labels(given, tiny("t5")).keys() == {"input_ids", "decoder_input_ids"}
