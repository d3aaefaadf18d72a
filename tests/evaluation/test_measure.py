import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from optimum_dsa import DSAConfig, DSAPruner, RecoveryConfig, load_tokens, measure, perplexity
from optimum_dsa.data import fingerprint
from optimum_dsa.evaluation.comparison import comparison_table

from ..test_commands import run
from ..tiny import bos_tokenizer, tiny_llama, tokens


NUMBERS = [" ".join(map(str, range(start, start + 9))) for start in range(0, 80, 3)]


@pytest.fixture
def model():
    return tiny_llama(vocab_size=93)


def test_a_model_in_memory_and_one_from_a_folder_give_one_result(model, tmp_path):
    tokenizer = bos_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"sequence_length": 16, "name": "it"}
    found = measure(model, NUMBERS, tokenizer=tokenizer, **options)
    assert found == DSAPruner(model, tokenizer).measure(NUMBERS, **options)
    loaded = DSAPruner.from_pretrained(tmp_path / "model")
    assert found == loaded.measure(NUMBERS, **options)
    assert loaded.measure(NUMBERS, sequence_length=16).model == "model"
    assert measure(model, tokens(2, 8, vocabulary=93)).model == "LlamaForCausalLM"


def test_the_protocol_stands_beside_the_number(model):
    for options, bos in (({}, True), ({"bos": False}, False), ({"windows": "paper"}, True)):
        found = measure(model, NUMBERS, tokenizer=bos_tokenizer(), sequence_length=16, **options)
        windows = load_tokens(NUMBERS, bos_tokenizer(), sequence_length=16, **options)
        assert found.perplexity == pytest.approx(perplexity(model, windows))
        assert found.losses and found.perplexity == pytest.approx(math.exp(sum(found.losses) / len(found.losses)))
        how = found.protocol
        assert (how.windows, how.sequence_length, how.bos, how.dtype) == (len(windows), 16, bos, "float32")
        assert how.cut == options.get("windows", "each") and how.fingerprint == fingerprint(windows)
        assert how.dataset == f"{len(NUMBERS)} texts"
    given = measure(model, tokens(3, 8, vocabulary=93)).protocol
    assert (given.dataset, given.cut, given.bos, given.windows) == ("tokens", None, None, 3)


def test_windows_of_papers_give_what_the_published_loop_gives(model):
    """The loop of GPTQ, SparseGPT and Wanda, line by line."""
    tokenizer, seqlen = bos_tokenizer(), 16
    encoded = tokenizer("\n\n".join(NUMBERS), return_tensors="pt").input_ids
    samples = encoded.numel() // seqlen
    nlls = []
    for i in range(samples):
        batch = encoded[:, (i * seqlen) : ((i + 1) * seqlen)]
        logits = model(batch).logits
        shifted, labels = logits[:, :-1, :].contiguous(), batch[:, 1:]
        loss = torch.nn.CrossEntropyLoss()(shifted.view(-1, shifted.size(-1)), labels.reshape(-1))
        nlls.append(loss.float() * seqlen)
    published = torch.exp(torch.stack(nlls).sum() / (samples * seqlen)).item()
    found = measure(model, NUMBERS, tokenizer=tokenizer, sequence_length=seqlen, windows="paper")
    assert found.perplexity == pytest.approx(published, rel=1e-5) and found.protocol.windows == samples


def test_models_with_other_longest_inputs_do_not_share_a_table(model):
    short = tiny_llama(vocab_size=93, max_position_embeddings=32)
    rows = [
        measure(one, NUMBERS, tokenizer=bos_tokenizer(), name=str(number)) for number, one in enumerate((model, short))
    ]
    assert [row.protocol.sequence_length for row in rows] == [64, 32]
    first, second = comparison_table(rows).split("\n\n")
    assert "windows of 64 tokens" in first and "windows of 32 tokens" in second


def test_zeros_are_counted_where_the_model_was_pruned(model, tmp_path):
    pruner = DSAPruner(model, bos_tokenizer())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform", exclude=["mlp"]))
    pruner.save_pretrained(tmp_path / "out")
    verified = pruner.verify()
    for subject in (pruner, DSAPruner.from_pretrained(tmp_path / "out")):
        found = subject.measure(tokens(2, 8, vocabulary=93))
        assert (found.size, round(found.sparsity * found.size)) == (verified.prunable, verified.removed)
        assert found.sparsity == pytest.approx(0.6, abs=1e-3)
    # a stranger's model, whose dsa_config.json is not there: all weights of the blocks
    assert measure(model, tokens(2, 8, vocabulary=93)).sparsity < 0.4


def test_what_adapters_brought_is_not_counted(model, tmp_path):
    pytest.importorskip("peft")
    pruner = DSAPruner(model, bos_tokenizer())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    text = tokens(40, 8, vocabulary=93)
    before = pruner.measure(text)
    loaded = DSAPruner.from_pretrained(tmp_path / "out")
    loaded.recover(text, RecoveryConfig(steps=1, batch_size=2, validation_windows=2, merge=False))
    for found in (loaded.measure(text), measure(loaded.model, text)):
        assert (found.size, found.sparsity) == (before.size, before.sparsity)


def test_an_adapter_on_disk_is_worth_what_its_merge_is(tmp_path):
    """A tied head that was pruned as well: the merge once changed the embedding."""
    pytest.importorskip("peft")
    pruner = DSAPruner(tiny_llama(tie_word_embeddings=True, vocab_size=93), bos_tokenizer())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform", include=["lm_head", "embed_tokens"]))
    pruner.save_pretrained(tmp_path / "out")
    text = tokens(40, 8, vocabulary=93)
    for name, merge in (("adapter", False), ("merged", True)):
        one = DSAPruner.from_pretrained(tmp_path / "out")
        config = {"steps": 8, "batch_size": 4, "validation_windows": 2, "learning_rate": 0.02}
        one.recover(text, RecoveryConfig(merge=merge, **config))
        one.save_pretrained(tmp_path / name)
    kept, merged = (DSAPruner.from_pretrained(tmp_path / name).measure(text) for name in ("adapter", "merged"))
    assert kept.perplexity == pytest.approx(merged.perplexity, rel=1e-4)
    assert (kept.size, kept.sparsity) == (merged.size, merged.sparsity)
    assert kept.perplexity != pytest.approx(pruner.measure(text).perplexity, rel=1e-3)


def test_what_is_wrong_is_said_with_the_way_out(model, tmp_path):
    (tmp_path / "broken.jsonl").write_text("{")
    for text, message in (
        (None, "Say what to measure"),
        (tmp_path / "broken.jsonl", "line 1: not JSON"),
        ("/nope", "No such file or folder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            measure(model, text, tokenizer=bos_tokenizer())
    with pytest.raises(ValueError, match="Did you mean 'paper'"):
        measure(model, NUMBERS, windows="papers")
    for name, value in (("sequence_length", 1), ("num_samples", 0), ("batch_size", 0), ("limit", 0)):
        with pytest.raises(ValueError, match=f"{name} is a whole number of at least"):
            measure(model, NUMBERS, **{name: value})


ROWS = tokens(4, 16, vocabulary=93)
FORMS = {
    "tensor": ROWS,
    "array": ROWS.numpy(),
    "lists": ROWS.tolist(),
    "dataset": Dataset.from_dict({"input_ids": ROWS.tolist()}),
    "dataset with masks": Dataset.from_dict({"input_ids": ROWS.tolist(), "attention_mask": [[1] * 16] * 4}),
    "loader": DataLoader([{"input_ids": row} for row in ROWS], batch_size=2),
    "encoding": BatchEncoding({"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_token_ids_need_no_tokenizer(model, form):
    found = DSAPruner(model).measure(FORMS[form])
    assert found.perplexity == pytest.approx(perplexity(model, ROWS)) and found.protocol.fingerprint == fingerprint(
        ROWS
    )


def test_nor_do_rows_of_several_lengths_or_in_a_file(model, tiny, tmp_path, monkeypatch, capsys):
    padded = BatchEncoding({"input_ids": ROWS, "attention_mask": (torch.arange(16) < torch.tensor([[8]] * 4)).long()})
    joined = ROWS[:, :8].reshape(2, 16)
    ragged = Dataset.from_dict({"input_ids": [ROWS[0, :8].tolist(), ROWS[1:, :8].flatten().tolist()]})
    for source in (padded, ragged):
        assert measure(model, source, sequence_length=16).perplexity == pytest.approx(perplexity(model, joined))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS.tolist()))
    model.save_pretrained(tmp_path / "bare")
    asked = ["evaluate", str(tmp_path / "bare"), "--dataset", str(tmp_path / "rows.jsonl"), "--json"]
    code, output, errors = run(monkeypatch, capsys, *asked)
    assert code == 0, errors
    assert json.loads(output)["models"][0]["perplexity"] == pytest.approx(perplexity(model, ROWS))
    t5, rows = tiny("t5"), Dataset.from_dict({"input_ids": (ROWS % 60).tolist()})
    assert measure(t5, rows).perplexity == pytest.approx(perplexity(t5, ROWS % 60))


@pytest.mark.parametrize("options", [{}, {"windows": "paper"}])
def test_text_without_one_is_refused_by_the_models_name(model, options):
    for text in (NUMBERS, Dataset.from_dict({"text": NUMBERS})):
        with pytest.raises(ValueError, match="it has no tokenizer, so text cannot be read"):
            measure(model, text, name="it", sequence_length=16, **options)


def test_a_tokenizer_is_loaded_from_where_it_is(model, tmp_path):
    bos_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        DSAPruner.from_pretrained(tmp_path / "bare").measure(NUMBERS, sequence_length=16)
    for place in (str(tmp_path / "tokenizer"), Path(tmp_path / "tokenizer")):
        pruner = DSAPruner.from_pretrained(tmp_path / "bare", place)
        assert pruner.measure(NUMBERS, sequence_length=16).protocol.bos
        assert DSAPruner.from_pretrained(model, place).tokenizer is not None
    with pytest.raises(ValueError, match="No tokenizer can be loaded from '/nope'"):
        DSAPruner.from_pretrained(tmp_path / "bare", "/nope")
