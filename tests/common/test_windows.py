"""Token ids as they come, and several sources with weights."""

import datasets
import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, RecoveryConfig, load_calibration, load_tokens, measure
from optimum_dsa.common.texts import Reading
from optimum_dsa.common.token_rows import as_tensors
from optimum_dsa.common.windows import shares, spread
from optimum_dsa.data import first_windows

from ..tiny import bos_tokenizer, tiny_llama, tokens


IDS = tokens(12, 16)


def rows(padded=False):
    """The ids as a tokenised dataset has them; padded ones have three more that the mask marks."""
    pad = [0, 0, 0] if padded else []
    return [
        {"input_ids": row + pad, "attention_mask": [1] * len(row) + [0] * len(pad), "labels": row + pad}
        for row in IDS.tolist()
    ]


SOURCES = {
    "array": lambda: IDS.numpy(),
    "int32": lambda: IDS.numpy().astype(numpy.int32),
    "lists": lambda: IDS.tolist(),
    "list of rows": lambda: list(IDS),
    "pairs of inputs and labels": lambda: [(row[None], row[None]) for row in IDS],
    "arrays by name": lambda: {"input_ids": IDS.numpy(), "attention_mask": numpy.ones((12, 16))},
    "lists by name": lambda: {"input_ids": IDS.tolist()},
    "dataset": lambda: datasets.Dataset.from_list(rows()),
    "padded dataset": lambda: datasets.Dataset.from_list(rows(padded=True)),
    "dataset of tensors": lambda: datasets.Dataset.from_list(rows()).with_format("torch"),
    "streamed": lambda: datasets.Dataset.from_list(rows()).to_iterable_dataset(),
    "loader of tensors": lambda: DataLoader(IDS, batch_size=5),
    "loader of tuples": lambda: DataLoader(TensorDataset(IDS, IDS), batch_size=5),
    "loader of batches": lambda: DataLoader(datasets.Dataset.from_list(rows()).with_format("torch"), batch_size=5),
    "loader of rows": lambda: DataLoader(IDS, batch_size=None),
    "torch dataset": lambda: TensorDataset(IDS),
}


@pytest.mark.parametrize("name", SOURCES)
def test_token_ids_are_taken_as_they_are(name):
    data = load_calibration(SOURCES[name](), tiny_llama(), None, DataConfig(num_samples=12))
    found = data.inputs["input_ids"]
    assert found.dtype == torch.long and sorted(found.tolist()) == sorted(IDS.tolist())
    assert data.facts()["tokens"] == IDS.numel() and "bos" not in data.facts()


@pytest.mark.parametrize("name", ["array", "loader of batches"])
def test_token_ids_train_and_measure_too(name):
    pruner = DSAPruner(tiny_llama(), bos_tokenizer())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    steps = RecoveryConfig(steps=1, batch_size=2, validation_windows=2)
    assert "bos" not in pruner.recover(SOURCES[name](), steps).data
    expected = measure(pruner.model, IDS).perplexity
    assert measure(pruner.model, SOURCES[name](), tokenizer=bos_tokenizer()).perplexity == pytest.approx(expected)


def test_rows_of_several_lengths_are_joined_and_cut_and_padding_is_not_read():
    ragged = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    joined = [5, 6, 7, 1, 8, 9, 1, 10, 11, 12]  # 1 ends a text
    padded = {"input_ids": [[5, 6, 7, 0], [0, 0, 8, 9], [10, 11, 12, 13]],
              "attention_mask": [[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]}  # fmt: skip
    loader = DataLoader(datasets.Dataset.from_dict(padded).with_format("torch"), batch_size=2)
    for source in (
        ragged,
        datasets.Dataset.from_dict({"input_ids": ragged}),
        datasets.Dataset.from_dict(padded),
        loader,
    ):
        found = load_tokens(source, bos_tokenizer(adds=False), sequence_length=5)
        assert found.flatten().tolist() == joined
    # rows that were closed by who made them are not closed again
    closed = load_tokens([[5, 6, 1], [8, 1]], bos_tokenizer(adds=False), sequence_length=5)
    assert closed.tolist() == [[5, 6, 1, 8, 1]]


def test_a_length_that_is_asked_for_cuts_rows_and_one_that_is_not_keeps_them():
    model = tiny_llama()
    kept = load_calibration(datasets.Dataset.from_list(rows()), model, bos_tokenizer(), DataConfig(num_samples=4))
    cut = load_calibration(
        datasets.Dataset.from_list(rows()),
        model,
        bos_tokenizer(adds=False),
        DataConfig(num_samples=4, sequence_length=8),
    )
    assert kept.facts()["length"] == 16 and cut.facts()["length"] == 8


def test_an_endless_loader_is_read_no_further_than_needed():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield IDS[0]

    data = load_calibration(DataLoader(Endless(), batch_size=2), tiny_llama(), None, DataConfig(num_samples=3))
    assert data.facts()["samples"] == 3


@pytest.mark.parametrize(
    "source,message",
    [
        (numpy.zeros((2, 4)), "LongTensor"),
        (numpy.full((2, 4), 97), "another tokenizer"),
        (
            DataLoader([{"input_ids": row, "pixel_values": row.float()} for row in IDS]),
            "hold pixel_values, and LlamaForCausalLM has no such input",
        ),
        ({"a.txt": "much"}, "'a.txt' has 'much', and a weight is a number above 0"),
        ({"a.txt": 0}, "has '0', and a weight"),
        ({}, "no source"),
        ({("1 2 3",): 1.0, ("4 5 6",): 1e-9}, "2 samples are too few for weights"),
    ],
)
def test_what_cannot_calibrate_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_calibration(source, tiny_llama(), bos_tokenizer(), DataConfig(num_samples=2, sequence_length=2))


ONE = tuple("1 2 3 4 5 6 7 8" for _ in range(40))
TWO = tuple("11 12 13 14 15 16 17 18" for _ in range(40))


@pytest.mark.parametrize(
    "weights,counts", [((1, 1), (8, 8)), ((3, 1), (12, 4)), ((0.9, 0.1), (14, 2)), ((2, 1), (11, 5))]
)
def test_sources_give_windows_by_their_weight(weights, counts):
    tokenizer, source = bos_tokenizer(adds=False), dict(zip((ONE, TWO), weights))
    found = load_tokens(source, tokenizer, num_samples=16, sequence_length=8, seed=3)
    second = (found > 12).any(1)
    assert (int((~second).sum()), int(second.sum())) == counts
    # every half of them is mixed alike, and each source's are those that it gives alone
    half = second[:8].sum()
    assert abs(float(half) - counts[1] / 2) <= 1
    alone = load_tokens(ONE, tokenizer, num_samples=counts[0], sequence_length=8, seed=3)
    assert torch.equal(found[~second], alone)
    data = load_calibration(source, tiny_llama(), tokenizer, DataConfig(num_samples=16, sequence_length=8))
    assert data.facts()["source"] == f"{weights[0]:g} 40 texts + {weights[1]:g} 40 texts"


def test_a_mixture_is_trained_on_in_order_and_says_what_is_short(caplog):
    tokenizer = bos_tokenizer(adds=False)
    found = first_windows({ONE: 1, TWO[:2]: 1}, tokenizer, 8, 20, Reading())
    assert int((found > 12).any(1).sum()) == 2 and "2 texts holds 2 windows, and its share are 10" in caplog.text
    with pytest.raises(ValueError, match="shares of num_samples windows; say how many"):
        load_tokens({ONE: 1, TWO: 1}, tokenizer, sequence_length=8)
    with pytest.raises(ValueError, match="2 texts holds 2 windows of 8 tokens, and 10 are needed"):
        load_tokens({ONE: 1, TWO[:2]: 1}, tokenizer, num_samples=20, sequence_length=8)


def test_a_search_judges_by_other_windows_of_every_source(monkeypatch):
    taken = {}
    monkeypatch.setattr("optimum_dsa.search.search.search", lambda model, data, tokens, *_, **__: taken.update(
        calibration=data.inputs["input_ids"], validation=tokens
    ))  # fmt: skip
    data = DataConfig(num_samples=4, sequence_length=8)
    config = DSAConfig(0.5, "magnitude", "uniform", data=data)
    DSAPruner(tiny_llama(), bos_tokenizer(adds=False)).search({ONE: 1, TWO: 1}, config)
    for windows in taken.values():
        assert len(windows) == 4 and int((windows > 12).any(1).sum()) == 2
    with pytest.raises(ValueError, match="given as tensors are used whole"):
        DSAPruner(tiny_llama()).search(IDS.numpy(), config)


def test_shares_meet_the_whole():
    assert shares({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    parts = [torch.zeros(3, 2).long(), torch.ones(1, 2).long()]
    assert spread(parts)[:, 0].tolist() == [0, 0, 1, 0]


def test_what_is_no_array_of_numbers_is_left_alone():
    for source in ("wikitext2", ["a", "b"], [], [[1, 2], [3]], {"wikitext2": 2.0}, numpy.array(["a"])):
        assert as_tensors(source) is source
