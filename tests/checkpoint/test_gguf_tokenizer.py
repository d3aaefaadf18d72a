"""Tokenizers in a GGUF: the real llama.cpp reads texts as ours do, and what has no name there is refused."""

import json

import pytest
import torch
import transformers as tf

from optimum_dsa.checkpoint.exports import export

from .engine import family, next_token, save, sentencepiece, served


pytest.importorskip("gguf")
TEXTS = (
    "def main(self):\n    return [0, 1]",
    "  two  spaces, and: \u00e9\u4e2d\u6587 \U0001f600\n\n",
    "<unk> and </s> within",
    "",
)


def llama_class():
    """Of transformers' own class, which makes it anew from vocabulary and merges."""
    model = json.loads(sentencepiece().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return tf.LlamaTokenizer(vocab=model["vocab"], merges=merges)


@pytest.mark.parametrize("kind", ["prefixed", "as it stands", "of its class"])
def test_texts_become_the_same_tokens(kind, tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = llama_class() if kind == "of its class" else sentencepiece(prefix=kind == "prefixed")
    model = family("mistral")
    folder = save(model, tmp_path / "model", tokenizer)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    export(folder, tmp_path / "out.gguf", "gguf", "f32")
    server, compared = served(tmp_path / "out.gguf"), 0
    # Before a text that begins with a space, and behind a special token, llama.cpp puts one, and this class none.
    for text in TEXTS if kind != "of its class" else (TEXTS[0], "[0, 1] and \u00e9\u4e2d"):
        given = tokenizer(text).input_ids
        # random weights: one token more or less changes all probabilities
        said = next_token(server, text) if given else None
        if said is not None:
            with torch.no_grad():
                expected = model(torch.tensor([given])).logits[0, -1].log_softmax(-1)
            assert all(value == pytest.approx(expected[number].item(), abs=0.01) for number, value in said[1].items())
            compared += 1
    assert compared > 1


def test_scores_are_the_order_of_merges_and_bytes_are_said(tmp_path):
    gguf = pytest.importorskip("gguf")
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["\u2581\u2581own"])
    folder = save(family("llama", vocab_size=520), tmp_path / "model", tokenizer)
    export(folder, tmp_path / "out.gguf", "gguf")
    said = {name: gguf.GGUFReader(tmp_path / "out.gguf").get_field(f"tokenizer.ggml.{name}").contents() for name in (
        "model", "tokens", "scores", "token_type", "add_space_prefix", "add_bos_token",
    )}  # fmt: skip
    assert said["model"] == "llama" and said["add_space_prefix"] and not said["add_bos_token"]
    kinds = dict(zip(said["tokens"], said["token_type"]))
    assert kinds["<unk>"] == 2 and kinds["</s>"] == 3 and kinds["<0x0A>"] == 6 and kinds["e"] == 1
    assert kinds["  own"] == 4 and kinds["[PAD519]"] == 5
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    scores, merged = dict(zip(said["tokens"], said["scores"])), ["".join(pair) for pair in model["merges"]]
    assert scores[merged[0]] == 0 and all(scores[one] >= scores[two] for one, two in zip(merged, merged[1:]))


def twice(made):
    """The first merge to a token that another one gives, too."""
    names = ["".join(pair) for pair in made["model"]["merges"]]
    return next(pair for pair, name in zip(made["model"]["merges"], names) if names.count(name) > 1)


def moved(made):
    merges, one = made["model"]["merges"], twice(made)
    merges.append(merges.pop(merges.index(one)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved, "is merged at two times"),
        (lambda made: made["model"]["merges"].remove(twice(made)), "are not merged to"),
        (lambda made: made.update(normalizer={"type": "NFKC"}), "nothing but spaces .*; it has a NFKC"),
    ],
)
def test_what_no_scores_give_is_refused(change, message, tmp_path):
    folder = save(family("llama"), tmp_path / "model", sentencepiece())
    made = json.loads((folder / "tokenizer.json").read_text())
    change(made)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out.gguf", "gguf")


def test_a_tokenizer_of_neither_kind_is_refused(tmp_path):
    folder = save(family("llama"), tmp_path / "model")
    made = json.loads((folder / "tokenizer.json").read_text())
    made["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(
        ValueError, match="SentencePiece's, or one of bytes .*GPT-2's, .* it is a BPE after Whitespace"
    ):
        export(folder, tmp_path / "out.gguf", "gguf")
