"""What every kind of model takes, how long a sequence may be, and what is refused before any work."""

import pytest
import torch
import transformers as tf
from torch import nn

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, load_calibration
from optimum_dsa.model.inputs import (
    check_length,
    check_takes_text,
    check_tokens,
    default_length,
    inputs_of,
    kind_of,
    word_embeddings,
)

from ..conftest import ENCODER, FAMILIES, SEQ2SEQ, SIZES, VISION, VOCABULARY
from ..tiny import bos_tokenizer, tiny_llama, tokens


KINDS = {
    "bert": "masked", "distilbert": "masked", "vit": "vision", "t5": "sequence-to-sequence",
    "bart": "sequence-to-sequence", "whisper": "speech",
}  # fmt: skip
TEXT = [" ".join(map(str, range(90))) + "\n"] * 60
SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 66, "pad_token_id": 1}
ROBERTA = {**ENCODER, **SMALL}


def built(name, **settings):
    """A tiny model of a class of transformers."""
    torch.manual_seed(0)
    made = getattr(tf, name)
    return made(made.config_class(**settings)).eval()


GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2}
LED = {**SEQ2SEQ, "attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32}
MPT = {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}
NYSTROM = {**ENCODER, "num_landmarks": 4, "segment_means_seq_len": 64}
# family -> class, its configuration, and how long a sequence it really takes
LONGEST = {
    "roberta": ("RobertaForMaskedLM", ROBERTA, 64),
    "xlm-roberta": ("XLMRobertaModel", ROBERTA, 64),
    "mpnet": ("MPNetForMaskedLM", ROBERTA, 64),
    "luke": ("LukeForMaskedLM", {**ROBERTA, "entity_vocab_size": 8, "entity_emb_size": 16}, 64),
    "led": ("LEDForConditionalGeneration", LED, 32),
    "mpt": ("MptForCausalLM", MPT, 48),
    "gpt2": ("GPT2LMHeadModel", {**GPT, "n_positions": 64}, 64),
    "gptj": ("GPTJForCausalLM", {**GPT, "n_positions": 40, "rotary_dim": 8}, 40),
    "bart": ("BartForConditionalGeneration", {**SEQ2SEQ, "max_position_embeddings": 64}, 64),
    "nystromformer": ("NystromformerForMaskedLM", NYSTROM, 64),
}


def longest_of(family):
    """A model of the family, and how long a sequence it takes."""
    name, settings, longest = LONGEST[family]
    return built(name, **settings), longest


@pytest.mark.parametrize("family", sorted(LONGEST))
def test_the_longest_sequence_is_the_longest_that_runs(family):
    model, longest = longest_of(family)
    found = inputs_of(model)
    assert (found.longest, found.hard, default_length(model)) == (longest, True, longest)
    given = tokens(1, longest).clamp_min(3)
    extra = {"decoder_input_ids": given} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=given, **extra)
    check_tokens(given, model)
    with pytest.raises(ValueError, match=f"takes at most {longest} tokens, and these sequences have {longest + 1}"):
        check_length(longest + 1, model)
    with pytest.raises((IndexError, RuntimeError, ValueError)), torch.no_grad():
        longer = tokens(1, longest + 1).clamp_min(3)
        model(input_ids=longer, **({"decoder_input_ids": longer} if extra else {}))


@pytest.mark.parametrize("family", ["roberta", "led", "mpt"])
def test_a_model_is_pruned_on_text_with_default_options(family):
    model, longest = longest_of(family)
    pruner = DSAPruner(model, bos_tokenizer(adds=False))
    report = pruner.prune(TEXT, DSAConfig(0.5, "wanda", "uniform", data=DataConfig(num_samples=2)))
    assert report.calibration["length"] == longest and report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_length_that_cannot_be_is_refused_before_any_text_is_read():
    def never():
        raise AssertionError("read")
        yield

    for family, length in (("gpt2", 100), ("roberta", 65)):
        with pytest.raises(ValueError, match=f"takes at most 64 tokens, and these sequences have {length}"):
            load_calibration(never(), longest_of(family)[0], bos_tokenizer(), DataConfig(sequence_length=length))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_of_its_kind(family, tiny, inputs):
    model = tiny(family)
    found = inputs_of(model)
    assert found.kind == KINDS.get(family, "causal") and found.main == next(iter(inputs(family)))
    assert found.takes_text == ("input_ids" in inputs(family))
    with torch.device("meta"):
        assert inputs_of(type(model)(model.config)) == found


HEADS = {
    "BertForSequenceClassification": "classifier",
    "BertForTokenClassification": "classifier",
    "BertForQuestionAnswering": "classifier",
    "BertForPreTraining": "masked",
    "BertLMHeadModel": "causal",
    "BertModel": "embedder",
    "RobertaForMaskedLM": "masked",
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_decides_the_kind(name):
    assert kind_of(built(name, **ENCODER)) == HEADS[name]


def test_a_class_of_ones_own_is_of_the_kind_of_what_it_is_made_from_or_of_what_it_can_do(tiny):
    class Mine(tf.LlamaForCausalLM):
        pass

    class Elsewhere(tf.PreTrainedModel, tf.GenerationMixin):
        config_class, _supports_sdpa = tf.LlamaConfig, True

        def prepare_inputs_for_generation(self, *args, **kwargs):
            return {}

        def forward(self, input_ids):
            return input_ids

    sizes = tf.LlamaConfig(**SIZES)
    assert kind_of(Mine(sizes)) == "causal" and kind_of(Elsewhere(sizes)) == "causal"
    peft = pytest.importorskip("peft")
    assert kind_of(peft.get_peft_model(tiny("bert"), peft.LoraConfig(target_modules=["query"]))) == "masked"


def clip():
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).eval()


def test_text_given_to_a_model_of_pictures_or_sound_is_refused_in_one_line(tiny):
    models = [
        (tiny("whisper"), "input_features"),
        (tiny("vit"), "pixel_values"),
        (clip(), "input_ids and pixel_values"),
    ]
    for model, named in models:
        with pytest.raises(ValueError, match=rf"\({named}\), and text alone is no input of it") as error:
            load_calibration(["1 2 3"], model, bos_tokenizer())
        assert "\n" not in str(error.value)
    check_takes_text(tiny("llava"))


def test_words_are_found_where_transformers_does_not_find_them():
    model = clip()
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert word_embeddings(model).num_embeddings == VOCABULARY and inputs_of(model).longest == 16
    assert word_embeddings(nn.Linear(2, 2)) is None


def test_tokens_of_a_decoder_are_held_against_it_too(tiny, inputs):
    batch = inputs("whisper")
    for wrong, message in ((tokens(6, 65), "at most 64 tokens"), (tokens(6, 8) + VOCABULARY, "another tokenizer")):
        with pytest.raises(ValueError, match=message):
            load_calibration({**batch, "decoder_input_ids": wrong}, tiny("whisper"))


def test_sequences_that_a_model_has_no_positions_for_are_refused_or_said(caplog):
    learned = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    check_tokens(tokens(2, 64, vocabulary=64), learned)  # as many words as positions: the table of words is no limit
    with pytest.raises(ValueError, match="takes at most 64 tokens, and these sequences have 65; use sequence_length"):
        check_tokens(tokens(2, 65, vocabulary=64), learned)
    check_tokens(tokens(2, 65), tiny_llama())
    assert "was made for 64 tokens, and these sequences have 65" in caplog.text
