import json

import datasets
import pytest
import torch

from optimum_dsa import load_tokens, split_windows
from optimum_dsa.data import (
    DATASETS,
    check_source,
    fingerprint,
    iterate_texts,
    starts_with_bos,
)

from .tiny import VOCABULARY, bos_tokenizer, tokens


TEXTS = [f"line {index} of a text that is long enough to fill a window\n" * 4 for index in range(12)]


class Letters:
    """A tokenizer with a token per character, and 96 between texts."""

    eos_token_id = 96

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) % 96 for letter in text]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS))
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"body": TEXTS}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    return tmp_path


def test_every_source_gives_the_same_texts(folder):
    expected = "".join(TEXTS)
    memory = datasets.Dataset.from_dict({"text": TEXTS})
    for source in (TEXTS, str(folder / "a.jsonl"), folder / "a.parquet", memory, memory.to_iterable_dataset()):
        assert "".join(iterate_texts(source)) == expected
    assert "".join(iterate_texts(str(folder / "set"), "body")) == expected
    assert list(iterate_texts(folder / "a.txt")) == ["\n".join(TEXTS)]


def test_a_short_name_stands_for_a_repository_and_its_column(folder, monkeypatch):
    monkeypatch.setitem(DATASETS, "wikitext2", (str(folder / "set"), None, "train", "body"))
    assert "".join(iterate_texts("wikitext2")) == "".join(TEXTS)


def test_windows_do_not_overlap_and_texts_are_separated():
    whole = load_tokens(["ab", "", "cd", "ef"], Letters(), sequence_length=4)
    a, b, c, d, e, f = (ord(letter) % 96 for letter in "abcdef")
    assert whole.tolist() == [[a, b, 96, c], [d, 96, e, f]]


def test_the_seed_decides_which_windows_are_drawn():
    def draw(seed):
        return load_tokens(TEXTS, Letters(), num_samples=5, sequence_length=16, seed=seed)

    everything = {tuple(row) for row in load_tokens(TEXTS, Letters(), sequence_length=16).tolist()}
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert all(tuple(row) in everything for row in draw(3).tolist())


NUMBERS = [" ".join(map(str, range(start, start + 9))) for start in range(0, 80, 10)]
BOS, EOS = 0, 1


def test_every_window_starts_with_what_the_tokenizer_adds_and_holds_that_many_tokens_less_of_text():
    plain = load_tokens(NUMBERS, bos_tokenizer(adds=False), sequence_length=7)
    found = load_tokens(NUMBERS, bos_tokenizer(), sequence_length=8)
    assert found.shape == (len(plain), 8) and (found[:, 0] == BOS).all()
    assert torch.equal(found[:, 1:], plain) and not (plain == BOS).any()
    assert torch.equal(load_tokens(NUMBERS, bos_tokenizer(), sequence_length=7, bos=False), plain)
    assert torch.equal(load_tokens(NUMBERS, bos_tokenizer(adds=False), sequence_length=8, bos=True), found)


def test_the_first_token_is_known_by_what_the_tokenizer_does():
    assert starts_with_bos(bos_tokenizer()) and not starts_with_bos(bos_tokenizer(adds=False))
    assert not starts_with_bos(bos_tokenizer(), False) and starts_with_bos(bos_tokenizer(adds=False), True)
    assert not starts_with_bos(Letters())
    with pytest.raises(ValueError, match="Letters.* has no beginning-of-sequence token; leave out bos=True"):
        starts_with_bos(Letters(), True)
    with pytest.raises(ValueError, match="A window of 1 tokens has no room"):
        load_tokens(NUMBERS, bos_tokenizer(), sequence_length=1)


def test_windows_of_papers_have_one_bos_and_no_end_of_text():
    rows = ["1 2 3", "", "4 5", "6 7 8 9 10"]
    found = load_tokens(rows, bos_tokenizer(), sequence_length=3, windows="paper")
    expected = bos_tokenizer()("\n\n".join(rows))["input_ids"]
    assert found.flatten().tolist() == expected[: found.numel()] and len(found) == 3
    assert (found == BOS).sum() == 1 and not (found == EOS).any()
    assert not (load_tokens(rows, bos_tokenizer(), sequence_length=3, windows="paper", bos=False) == BOS).any()
    letters = load_tokens(["a", "", "b"], Letters(), sequence_length=6, windows="paper")
    assert letters.tolist() == [[ord(letter) % 96 for letter in "a\n\n\n\nb"]]
    with pytest.raises(ValueError, match="the whole text"):
        load_tokens(rows, bos_tokenizer(), sequence_length=3, windows="paper", num_samples=1)
    with pytest.raises(ValueError, match="each, paper, got 'papers'. Did you mean 'paper'"):
        load_tokens(rows, bos_tokenizer(), windows="papers")


def test_a_fingerprint_tells_windows_apart():
    one = tokens(4, 8)
    other = one.clone()
    other[3, 7] = (other[3, 7] + 1) % VOCABULARY
    assert fingerprint(one) == fingerprint(one.int()) and len(fingerprint(one)) == 16
    assert len({fingerprint(part) for part in (one, other, one[:3], one.view(8, 4))}) == 4


def test_a_long_source_is_not_read_to_its_end():
    def endless():
        while True:
            yield TEXTS[0]

    assert load_tokens(endless(), Letters(), num_samples=3, sequence_length=8).shape == (3, 8)


def test_parts_are_disjoint_and_seeded():
    windows = torch.arange(40)[:, None]
    parts = split_windows(windows, {"calibration": 10, "validation": 20, "test": 10}, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"calibration": 10, "validation": 20, "test": 10}
    assert torch.cat(list(parts.values())).flatten().sort().values.tolist() == list(range(40))
    again = split_windows(windows, {"calibration": 10, "validation": 20, "test": 10}, seed=3)
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    with pytest.raises(ValueError, match="needs 41 windows, and there are 40"):
        split_windows(windows, {"a": 41})


@pytest.mark.parametrize("texts", [[], [""], ["short"]])
def test_too_little_text_says_how_much_there_is(texts):
    with pytest.raises(ValueError, match="holds 0 windows of 64 tokens, and 2 are needed"):
        load_tokens(texts, Letters(), num_samples=2, sequence_length=64)


@pytest.mark.parametrize(
    "source,error,message",
    [
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl"),
        ("nowhere.txt", FileNotFoundError, "nowhere.txt"),
        ([1, 2], ValueError, "expected a text, got int"),
        (5, ValueError, "Cannot read text from int"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}), ValueError, "one split.*train"),
        (datasets.Dataset.from_dict({"body": TEXTS}), ValueError, "no column 'text'; it has body"),
    ],
)
def test_a_source_that_cannot_be_read_is_a_clear_error(source, error, message):
    with pytest.raises(error, match=message):
        load_tokens(source, Letters(), sequence_length=8)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "broken.jsonl, line 2: not JSON"),
        ("latin.jsonl", b'{"text": "a"}\n\n{"text": "caf\xe9"}\n', "latin.jsonl, line 3: not text in UTF-8"),
        ("list.jsonl", b'["a"]', "list.jsonl, line 1: expected a text, got list"),
        ("other.jsonl", b'{"body": "a"}', "line 1: no column 'text'; it has body"),
        ("broken.json", b'[{"text": "a"', "broken.json, row 1: not JSON"),
        ("broken.parquet", b"PAR1xxxx", "Cannot load the dataset .*broken.parquet.*magic bytes"),
        ("latin.txt", b"caf\xe9", r"latin.txt is not text in UTF-8 \(.* at byte 3\)"),
        ("notes", b"a text", "Cannot read .*notes.*: expected .txt"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read in (check_source, lambda path: list(iterate_texts(path))):
        if read is check_source and "line 2" in message or "line 3" in message:
            continue  # the start of such a file is whole
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["/nope", "./nope", "a/b/c", "nowhere.parquet"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"No such file or folder: '{name}'"):
        check_source(name)


def test_texts_in_memory_are_not_touched_by_the_check():
    texts = iter(TEXTS)
    check_source(texts)
    assert next(texts) == TEXTS[0]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match="expected .txt, .jsonl"):
        load_tokens(tmp_path / "a.pdf", Letters())


def test_a_dataset_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="Cannot load the dataset 'nobody/nothing'"):
        load_tokens("nobody/nothing", Letters())
