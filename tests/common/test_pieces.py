"""Texts are tokenized piece by piece, and the ids are those of the whole."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optimum_dsa import demo_texts
from optimum_dsa.common import pieces
from optimum_dsa.common.pieces import encode, token_ids


TEXT = "\n".join(demo_texts("calibration"))[:12_000]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pre):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre
    return made, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)


def llama_2():
    """No pre-tokenizer: the whole text is one word, with a space put in front; bytes for what is not known."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    learnt.train_from_iterator([line.strip() for line in TEXT.splitlines()], letters)
    model = json.loads(learnt.to_str())["model"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for word in model["vocab"]:
        vocabulary.setdefault(word, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


KINDS = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "t5": unigram,
    "bert": word_piece,
}


@pytest.fixture(scope="module", params=[*KINDS, "llama2"])
def tokenizer(request):
    if request.param == "llama2":
        made = llama_2()
    else:
        made, trainer = KINDS[request.param]()
        made.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


CJK = "".join(chr(0x4E00 + (number * 37) % 2000) for number in range(9000))


@pytest.mark.parametrize(
    "text", [TEXT, TEXT.replace("\n", " "), CJK, "a;\n\n\t b  c" * 400], ids=["code", "line", "cjk", "odd"]
)
def test_the_ids_of_pieces_are_those_of_the_whole(monkeypatch, tokenizer, text):
    monkeypatch.setattr(pieces, "PIECE", 700)
    for given in (text, iter([text[start : start + 501] for start in range(0, len(text), 501)])):
        found = list(token_ids(given, tokenizer))
        assert sum(found, []) == encode(text, tokenizer)
        assert len(found) > 4 and max(map(len, found)) <= 6 * 700  # a letter may be 3 bytes


def test_the_end_of_a_text_is_not_asked_for_before_it_is_needed(tokenizer):
    def endless():
        while True:
            yield TEXT

    ids = token_ids(endless(), tokenizer)
    assert len(next(ids)) + len(next(ids)) > 1000


def test_a_tokenizer_whose_ids_hang_together_is_given_all(monkeypatch):
    class Sealed:
        """Its last id depends on the whole text, so that there is no place to cut."""

        def __call__(self, text, **kwargs):
            return {"input_ids": [*text.encode(), len(text)]}

    monkeypatch.setattr(pieces, "PIECE", 100)
    assert sum(token_ids("ab " * 300, Sealed()), []) == Sealed()("ab " * 300)["input_ids"]
