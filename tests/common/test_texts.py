"""Sources of text as people bring them: read as they are named, no further than needed, or refused in one line."""

import json
import logging
import shutil

import datasets
import numpy
import pandas
import pytest

from optimum_dsa import DataConfig, load_tokens
from optimum_dsa.common import row_files
from optimum_dsa.common.slices import parse_split
from optimum_dsa.common.texts import Reading, check_source, iterate_texts, read_items


ROWS = [{"text": f"row {number}", "id": number} for number in range(10)]
TEXTS = [row["text"] for row in ROWS]


def read(source, **how):
    return [item if isinstance(item, str) else "".join(item) for item in read_items(source, Reading(**how))]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of `save_to_disk`, and one with subsets."""
    folder = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": one, "test": one.select(range(2))}).save_to_disk(str(folder / "two"))
    for name in "xy":
        write(folder / "subsets" / f"{name}.jsonl", [{"text": name}])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "xy")
    (folder / "subsets" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@pytest.fixture
def forbidden(monkeypatch):
    """No builder of `datasets` may prepare a copy in its cache."""

    def fail(*args, **kwargs):
        pytest.fail("a copy was made in the cache of datasets")

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", fail)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".JSONL"])
@pytest.mark.parametrize("name,other", [("what?", "whatx"), ("a[1]", "a1"), ("all*", "all5"), ("{a,b}", "a")])
def test_a_path_means_the_file_of_that_name_alone(tmp_path, forbidden, suffix, name, other):
    path = write(tmp_path / f"{name}{suffix}", ROWS)
    write(tmp_path / f"{other}{suffix}", [{"text": "of a neighbour", "id": 0}])
    assert read(str(path)) == TEXTS


@pytest.mark.parametrize("name,other", [("data[1]", "data1"), ("wh?t", "what")])
def test_a_folder_means_the_folder_of_that_name_alone(tmp_path, forbidden, name, other):
    write(tmp_path / name / "train.parquet", ROWS)
    write(tmp_path / name / "test.parquet", ROWS[:1])
    write(tmp_path / other / "train.parquet", [{"text": "of a neighbour", "id": 0}])
    assert read(str(tmp_path / name)) == TEXTS and read(tmp_path / name, split="test") == TEXTS[:1]


@pytest.mark.parametrize("layout", ["array", "lines", "indented", "one line", "bare"])
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_json_is_read_however_it_is_laid_out(monkeypatch, tmp_path, layout, block):
    monkeypatch.setattr(row_files, "BLOCK", block)
    rows = [
        {"text": 'a "quoted, [text]" é\n', "n": [1, {"b": 2}]},
        {"text": "", "n": []},
        {"text": "last", "n": 10**20},
    ]
    texts = {
        "array": json.dumps(rows, indent=1),
        "lines": "\n".join(map(json.dumps, rows)) + "\n",
        "indented": "\n".join(json.dumps(row, indent=2) for row in rows),
        "one line": json.dumps(rows),
        "bare": "\n".join(json.dumps(row["text"]) for row in rows),
    }
    (tmp_path / "a.json").write_text(texts[layout], encoding="utf-8")
    assert read(tmp_path / "a.json") == [row["text"] for row in rows]


@pytest.mark.parametrize("text", ["[]", "[\n]", "", " \n"])
def test_a_json_file_with_nothing_in_it_has_no_rows(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == []


def test_a_text_file_is_read_part_by_part(monkeypatch, tmp_path):
    text = "ein Satz mit ß und 漢\nund noch einer\n" * 40
    (tmp_path / "a.txt").write_bytes("\ufeff".encode() + text.replace("\n", "\r\n").encode())
    monkeypatch.setattr(row_files, "BLOCK", 11)
    (item,) = read_items(tmp_path / "a.txt", Reading())
    parts = list(item)
    assert len(parts) > 100 and "".join(parts) == text
    (tmp_path / "bad.txt").write_bytes(b"good" * 10 + b"\xff")
    with pytest.raises(ValueError, match="bad.txt is not text in UTF-8 .* at byte 40"):
        read(tmp_path / "bad.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_of_a_large_file_only_what_is_needed_is_read(monkeypatch, tmp_path, name):
    """Neither the rest of the file nor its tokens: what is behind may even be broken."""
    rows = [{"text": "abcdefgh " * 20}] * 3000
    if name == "a.txt":
        (tmp_path / name).write_text("".join(row["text"] for row in rows))
    else:
        write(tmp_path / name, rows)
    monkeypatch.setattr(row_files, "BLOCK", 2**14)
    seen = 0

    class Letters:
        eos_token_id = 96

        def __call__(self, text, **kwargs):
            nonlocal seen
            seen += len(text)
            return {"input_ids": [ord(letter) % 96 for letter in text]}

    if name != "a.parquet":
        with (tmp_path / name).open("ab") as file:
            file.write(b"\xff not text, and no JSON")
    found = load_tokens(tmp_path / name, Letters(), num_samples=2, sequence_length=64)
    # a text that has no rows is cut into pieces of 2**16 characters
    assert found.shape == (2, 64) and seen < (2**17 if name == "a.txt" else 2**12)


@pytest.mark.parametrize(
    "split,expected",
    [
        ("train[:3]", TEXTS[:3]),
        ("train[3:5]", TEXTS[3:5]),
        ("train[-2:]", TEXTS[-2:]),
        ("train[:-8]", TEXTS[:2]),
        ("train[20%:50%]", TEXTS[2:5]),
        ("train[:1]+train[9:]", [TEXTS[0], TEXTS[9]]),
        ("train[8:99]", TEXTS[8:]),
        ("train[4:4]", []),
        ("train", TEXTS),
    ],
)
def test_a_slice_of_a_split_is_what_datasets_takes(tmp_path, forbidden, saved, split, expected):
    memory = datasets.Dataset.from_list(ROWS)
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    sources = [write(tmp_path / f"a{suffix}", ROWS) for suffix in (".jsonl", ".json", ".parquet")]
    sources += [
        tmp_path / "folder",
        saved / "one",
        saved / "two",
        memory,
        datasets.DatasetDict({"train": memory}),
        TEXTS,
    ]
    for source in sources:
        assert read(source, split=split) == expected, source
    plain = datasets.DatasetDict({"train": memory})["train"]
    if "+" not in split and "%" not in split:
        inner = split.removeprefix("train").strip("[]") or ":"
        start, _, stop = inner.partition(":")
        assert plain[slice(int(start) if start else None, int(stop) if stop else None)]["text"] == expected


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "[:5]", "train[:5", "", "train[1]"])
def test_what_is_no_split_is_refused(split):
    with pytest.raises(ValueError, match="split is a name, or rows of it such as"):
        parse_split(split)


def test_a_share_of_what_nobody_counted_is_refused():
    streamed = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert read(streamed, split="train[2:4]") == TEXTS[2:4]
    streamed.info.splits = None
    with pytest.raises(ValueError, match=r"Nothing says how many rows .* as in train\[:1000\]"):
        from optimum_dsa.common.open_dataset import row_count

        row_count(streamed, "train", local=False)


def test_folders_of_save_to_disk_are_read_where_they_lie(forbidden, saved):
    assert read(saved / "one") == TEXTS == read(str(saved / "two"))
    assert read(saved / "two", split="test") == TEXTS[:2]
    assert read(saved / "one", otherwise="test") == TEXTS  # a default, where there is one split only


def test_a_subset_is_chosen_by_its_name(saved):
    assert read(saved / "subsets", subset="y") == ["y"] and read(saved / "subsets", subset="x") == ["x"]


@pytest.mark.parametrize(
    "source,how,message",
    [
        ("two", {"split": "nope"}, "it has no split 'nope'; it has train, test"),
        ("one", {"split": "test"}, "save_to_disk wrote one split, and it has no 'test'"),
        ("one", {"subset": "x"}, "has no subset 'x'"),
        ("subsets", {}, "Cannot load the dataset .*subsets': Config name is missing.*one with subset .--subset"),
        ("subsets", {"subset": "z"}, "Cannot load the dataset .*'z' not found"),
        ("subsets", {"subset": "x", "split": "dev[:2]"}, "Cannot load the dataset .*Bad split: dev"),
        ("script", {}, "Cannot load the dataset .*script': Dataset scripts are no longer supported"),
        ("broken", {}, "Cannot read the dataset .*broken': JSON parse error"),
        ("a.jsonl", {"split": "dev"}, "a.jsonl is a file, which has no split 'dev'; leave split out, or take some"),
        ("a.jsonl", {"subset": "x"}, "a.jsonl is a file, and has no subset 'x'"),
        ("a.txt", {"split": "train[:5]"}, "a.txt is one text"),
        ("a.jsonl", {"text_column": "id"}, "a.jsonl, line 1: expected a text, got int"),
        ("a.jsonl", {"text_column": "body"}, "a.jsonl, line 1: no column 'body'; it has text, id"),
    ],
)  # fmt: skip
def test_what_a_dataset_cannot_give_is_one_line(tmp_path, saved, source, how, message):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("import datasets\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "a"}\n' * 3 + '{"text": \n')
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        read(tmp_path / source, **how)
    assert "\n" not in str(raised.value)


def test_columns_that_are_not_needed_are_not_decoded():
    """Sound and pictures beside the text need decoders that may not be installed."""
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [{"path": "/nope.png", "bytes": None}] * 2}, features
    )
    assert read(data) == ["a", "b"] == read(data.to_iterable_dataset())


NULLS = [None, "a", "", "b", None]


@pytest.mark.parametrize("kind", ["list", "jsonl", "parquet", "dataset", "frame", "rows"])
def test_rows_without_text_are_passed_over_and_counted(tmp_path, caplog, kind):
    rows = [{"text": text} for text in NULLS]
    source = {
        "list": lambda: NULLS,
        "jsonl": lambda: write(tmp_path / "a.jsonl", rows),
        "parquet": lambda: write(tmp_path / "a.parquet", rows),
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "frame": lambda: pandas.DataFrame(rows),
        "rows": lambda: rows,
    }[kind]()

    class Letters:
        eos_token_id = 96

        def __call__(self, text, **kwargs):
            return {"input_ids": [ord(letter) for letter in text]}

    assert load_tokens(source, Letters(), sequence_length=3).tolist() == [[97, 96, 98]]
    assert "3 of the 5 rows that were read hold no text (2 null, 1 empty) and were passed over" in caplog.text


def test_empty_rows_alone_are_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "optimum_dsa"):
        load_tokens(["ab", "", "cd"], Letters96(), sequence_length=2)
    assert not caplog.records


class Letters96:
    eos_token_id = 96

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) for letter in text]}


def test_texts_in_arrays_frames_and_rows_are_texts():
    assert (
        read(numpy.array(TEXTS)) == read(pandas.Series(TEXTS)) == read(pandas.DataFrame(ROWS)) == read(ROWS) == TEXTS
    )
    assert read(pandas.DataFrame({"body": TEXTS}), text_column="body") == TEXTS


def test_the_check_reads_the_start_and_counts_nothing(tmp_path):
    reading = Reading()
    check_source(write(tmp_path / "a.jsonl", [{"text": None}, *ROWS]), reading)
    check_source({str(tmp_path / "a.jsonl"): 1.0}, reading)
    assert (reading.passed.rows, reading.passed.null) == (0, 0)
    with pytest.raises(FileNotFoundError):
        check_source({str(tmp_path / "a.jsonl"): 1.0, str(tmp_path / "b.jsonl"): 2.0}, reading)


def test_a_folder_of_text_is_what_its_files_are(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} begins\n\nand ends\n")
    assert [*iterate_texts(tmp_path)] == [text for name in "ab" for text in iterate_texts(tmp_path / f"{name}.txt")]
    with pytest.raises(ValueError, match=r"Bad split: test.*name one that it has with split \(--split\)"):
        next(iterate_texts(tmp_path, split="test"))
    (tmp_path / "c.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ValueError, match="files of 2 kinds, such as a.txt and c.jsonl"):
        next(iterate_texts(tmp_path))


@pytest.mark.parametrize(
    "row", ['{"text": "\\ud800 hello"}', '{"messages": [{"role": "user", "content": "\\udfff"}]}']
)
def test_half_a_letter_is_named_by_its_place(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "\\ud83d\\ude00 é"}}\n{row}\n')
    with pytest.raises(ValueError, match="line 2: the text has half a letter"):
        [*read_items(tmp_path / "a.jsonl", Reading())]


def test_a_text_has_no_column_and_beside_rows_that_have_one_needs_none(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    write(tmp_path / "b.jsonl", [{"said": "hello"}])
    config = DataConfig(text_column="said")
    with pytest.raises(ValueError, match="is one text, and has no column 'said'; leave it out"):
        check_source(tmp_path / "a.txt", config.reading())
    check_source({str(tmp_path / name): 1.0 for name in ("a.txt", "b.jsonl")}, config.reading())
    check_source(tmp_path / "a.txt", config.beside(tmp_path / "a.txt").reading())
