"""A model tried: the text is the model's own, every folder of ours gives it, and what cannot write is refused."""

import io
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig, answers_chats, convert, generate_text

from ..test_commands import run
from ..tiny import bos_tokenizer, needs_compressed_loading, tiny_llama, tokens


TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ end }} {% endfor %}"


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=93)


@pytest.fixture(scope="module")
def tokenizer():
    return bos_tokenizer()


def template(end: str) -> str:
    return f"{{% set end = '{end}' %}}" + TURNS + "{% if add_generation_prompt %}7{% endif %}"


def test_the_text_is_what_the_model_writes_itself(model, tokenizer):
    ids = tokenizer("4 5 6", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=1, pad_token_id=1)[0, ids.shape[1] :]
    found = generate_text(model, tokenizer, "4 5 6", max_new_tokens=9)
    assert found.text == tokenizer.decode(written, skip_special_tokens=True)
    assert (found.prompt_tokens, found.new_tokens, found.chat) == (4, len(written), False)
    assert found.ended is bool(written[-1] == 1) and found.prefill > 0 and found.decode > 0


def test_it_comes_in_pieces_that_are_the_text(model, tokenizer):
    pieces = []
    found = generate_text(model, tokenizer, "4", max_new_tokens=9, stream=pieces.append)
    assert "".join(pieces) == found.text and len(pieces) > 3


def test_what_the_authors_recommend_does_not_choose_the_tokens(tokenizer):
    plain, urged = tiny_llama(vocab_size=93), tiny_llama(vocab_size=93)
    urged.generation_config.update(do_sample=True, temperature=9.0, top_k=1, num_beams=4, min_p=0.9, typical_p=0.1)
    before = urged.generation_config.to_dict()
    for options in ({}, {"temperature": 0.9, "top_p": 0.9}):
        one, other = (generate_text(each, tokenizer, "4 5", max_new_tokens=8, **options) for each in (plain, urged))
        assert one.text == other.text
    assert urged.generation_config.to_dict() == before


def test_what_is_drawn_is_of_the_seed_alone(model, tokenizer):
    state = torch.get_rng_state()
    texts = [
        generate_text(model, tokenizer, "4", max_new_tokens=8, temperature=2.0, seed=s).text for s in (0, 0, 1, 2)
    ]
    assert texts[0] == texts[1] and len({*texts}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    likeliest = generate_text(model, tokenizer, "4", max_new_tokens=8).text
    assert generate_text(model, tokenizer, "4", max_new_tokens=8, top_p=1e-6, seed=5).text == likeliest != texts[0]


def test_a_text_ends_where_the_model_ends_it(tokenizer):
    model = tiny_llama(vocab_size=93)
    first = int(model(torch.tensor([[0, 7]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [92, first]
    found = generate_text(model, tokenizer, "4", max_new_tokens=9)
    assert (found.new_tokens, found.ended, found.decode) == (1, True, None)


def test_rates_are_of_the_prompt_and_of_the_tokens_after_the_first(model, tokenizer, monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 13.0, 13.5])
    monkeypatch.setattr("optimum_dsa.evaluation.generate.time.perf_counter", lambda: next(clock))
    found = generate_text(model, tokenizer, "4 5 6", max_new_tokens=4)
    assert (found.prefill, found.decode) == (2.0, 2.0)
    assert str(found) == "prompt as it is; 4 tokens read (2.0/s), 4 written (2.0/s)"


@pytest.mark.parametrize(
    ("given", "ends", "answers"),
    [
        (None, 1, False),
        (template("<eos>"), 1, True),
        (template("<eos>"), [5, 1], True),
        (template("<eos>"), 5, False),  # as of a base model whose tokenizer brings a template along
        (template("5"), 1, False),
        ("{{ raise_exception('no') }}", 1, False),
        ("user <eos> {% if messages[1:] %}b{% endif %}", 1, False),  # the question ends so, the answer does not
        (template("<eos>"), None, False),
    ],
)
def test_a_chat_is_what_ends_its_answers_as_the_model_ends_texts(given, ends, answers):
    model, tokenizer = tiny_llama(vocab_size=93), bos_tokenizer()
    model.generation_config.eos_token_id, tokenizer.chat_template = ends, given
    assert answers_chats(model, tokenizer) is answers
    assert generate_text(model, tokenizer, "4", max_new_tokens=2).chat is answers


def test_a_chat_is_read_as_the_template_has_it(tokenizer):
    model, other = tiny_llama(vocab_size=93), bos_tokenizer()
    other.chat_template = template("9")
    as_chat = generate_text(model, other, "4", max_new_tokens=6, chat=True)
    ids = other("user 4 9 7", add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=1)[0, ids.shape[1] :]
    assert as_chat.prompt_tokens == ids.shape[1]
    assert as_chat.text == other.decode(written, skip_special_tokens=True)
    with pytest.raises(ValueError, match="the prompt is a conversation, and the tokenizer .* has no chat template"):
        generate_text(model, tokenizer, "4", chat=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature is a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature is a number of at least 0, got nan"),
        ({"top_p": 0.0}, "top_p is a share of the probability, more than 0 and at most 1, got 0.0"),
    ],
)
def test_settings_out_of_their_range_are_refused(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_text(model, tokenizer, "4", **settings)


def test_a_text_takes_the_room_that_there_is(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=93, n_positions=8, n_embd=32, n_layer=1, n_head=2)).eval()
    assert generate_text(model, tokenizer, "4 5 6 7").new_tokens <= 3
    with pytest.raises(ValueError, match="The prompt has 8 tokens, and GPT2LMHeadModel has room for 8"):
        generate_text(model, tokenizer, "1 2 3 4 5 6 7")
    with pytest.raises(ValueError, match="The prompt is empty"):
        generate_text(model, bos_tokenizer(adds=False), "")


def test_a_second_sequence_is_written_and_an_encoder_writes_none(tokenizer):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=93, decoder_start_token_id=0, **sizes)).eval()
    found = generate_text(model, tokenizer, "4 5", max_new_tokens=5)
    assert found.prompt_tokens == 3 and 1 <= found.new_tokens <= 5
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = BertForMaskedLM(BertConfig(intermediate_size=48, **sizes))
    with pytest.raises(ValueError, match="BertForMaskedLM predicts masked tokens and writes no text after a prompt"):
        generate_text(encoder, tokenizer, "4")


def zeros(folder, **options):
    pruner = DSAPruner(tiny_llama(vocab_size=93), bos_tokenizer())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(folder, **options)
    return pruner.model


def smaller(folder):
    pruner = DSAPruner(tiny_llama(vocab_size=93), bos_tokenizer())
    pruner.prune(tokens(vocabulary=93), DSAStructuredConfig(0.3, layout="per_layer", allocation="global"))
    pruner.save_pretrained(folder)
    return pruner.model


def adapter(folder):
    zeros(folder / "base")
    made = get_peft_model(
        DSAPruner.from_pretrained(folder / "base").model,
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    made.save_pretrained(folder)
    bos_tokenizer().save_pretrained(folder)
    return made.eval()


def packed(folder):
    zeros(folder / "dense")
    convert(folder / "dense", folder / "packed", "packed")
    for file in (folder / "packed").iterdir():
        file.rename(folder / file.name)
    return DSAPruner.from_pretrained(folder).model


FOLDERS = {
    "dense": zeros,
    "compressed": lambda folder: zeros(folder, compressed=True),
    "packed": packed,
    "per_layer": smaller,
    "adapter": adapter,
}


@needs_compressed_loading
@pytest.mark.parametrize("form", FOLDERS)
def test_every_folder_writes_as_its_model_did(form, monkeypatch, capsys, tmp_path):
    model = FOLDERS[form](tmp_path)
    expected = generate_text(model, bos_tokenizer(), "4 5 6", max_new_tokens=12)
    code, output, errors = run(
        monkeypatch, capsys, "generate", str(tmp_path), "--prompt", "4 5 6", "--max-new-tokens", "12"
    )
    assert (code, output) == (0, f"{expected.text}\n"), errors
    said = errors.splitlines()[-1]
    assert said.startswith("prompt as it is; 4 tokens read (") and f"{expected.new_tokens} written" in said


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    bos_tokenizer().save_pretrained(place)
    return str(place)


def test_a_prompt_is_read_from_standard_input_and_json_is_all(folder, model, tokenizer, monkeypatch, capsys):
    options = ["--max-new-tokens", "8", "--temperature", "1.5", "--top-p", "0.9", "--seed", "3", "--json"]
    monkeypatch.setattr("sys.stdin", io.StringIO("4 5\n"))
    code, output, errors = run(monkeypatch, capsys, "generate", folder, "--prompt", "-", *options)
    assert (code, errors) == (0, "")
    expected = generate_text(model, tokenizer, "4 5", max_new_tokens=8, temperature=1.5, top_p=0.9, seed=3)
    found = json.loads(output)
    assert {name: found[name] for name in ("text", "prompt_tokens", "new_tokens", "ended", "chat")} == {
        "text": expected.text,
        "prompt_tokens": 3,
        "new_tokens": expected.new_tokens,
        "ended": expected.ended,
        "chat": False,
    }
    assert run(monkeypatch, capsys, "generate", folder, "--prompt", "4", "-q") == (0, "", "")


def test_a_terminal_is_not_moved_by_a_text_and_a_file_has_it_as_it_is(monkeypatch, capsys):
    from optimum_dsa.commands.generate import write

    write("a\t\x1b[2Jb\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write("a\t\x1b[2Jb\n")
    assert capsys.readouterr().out == "a\t\x1b[2Jb\na\t\\x1b[2Jb\n"


def test_a_model_without_a_tokenizer_takes_another_s(folder, monkeypatch, capsys, tmp_path):
    tiny_llama(vocab_size=93).save_pretrained(tmp_path)
    code, output, errors = run(monkeypatch, capsys, "generate", str(tmp_path), "--prompt", "4")
    assert code == 2 and output == "" and "has no tokenizer that could be loaded; name one with --tokenizer" in errors
    code, output, _ = run(
        monkeypatch, capsys, "generate", str(tmp_path), "--prompt", "4", "--tokenizer", folder, "--max-new-tokens", "3"
    )
    assert code == 0 and output.strip()
