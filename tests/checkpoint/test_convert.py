"""Dense and compressed checkpoints hold the same bits."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAConfig, DSAPruner, convert, prune
from optimum_dsa.checkpoint.encodings import BITMASK, QUANT_METHOD
from optimum_dsa.checkpoint.shards import find_shards, index_name, packed_headers
from optimum_dsa.common.manifest import MANIFEST
from optimum_dsa.packed.bitmask import TYPES, pack

from ..tiny import state, tiny_llama


INDEX = index_name(BITMASK.stem)


def raw(folder):
    """Name -> (type, shape, bytes) of every tensor in the dense weights of a folder."""
    found = {}
    for file in find_shards(folder).files:
        for name, tensor in load_file(folder / file).items():
            found[name] = (tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found


def checkpoint(folder, *shards, metadata=None):
    """A dense checkpoint of the given tensors, one dictionary per file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor: name for shard, name in zip(shards, names) for tensor in shard}
        index = {"metadata": {"total_size": 1, **(metadata or {})}, "weight_map": weight_map}
        (folder / index_name("model")).write_text(json.dumps(index))
    for shard, name in zip(shards, names):
        save_file(shard, folder / name, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion")
    pruner = DSAPruner(tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).bfloat16())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(folder / "one")
    pruner.save_pretrained(folder / "many", max_shard_size="60KB")
    pruner.save_pretrained(folder / "compressed", compressed=True)
    return folder


@pytest.mark.parametrize("name", ["one", "many"])
def test_there_and_back_is_the_same_folder(pruned, tmp_path, name):
    before, after = convert(pruned / name, tmp_path / "there", "compressed")
    assert after < 0.6 * before  # embeddings are dense
    assert (after, before) == convert(tmp_path / "there", tmp_path / "back", "dense")
    assert raw(tmp_path / "back") == raw(pruned / name)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(os.listdir(pruned / name))
    for path in (path for path in (pruned / name).glob("*.json") if path.name != MANIFEST):
        back, there = (json.loads((folder / path.name).read_text()) for folder in (tmp_path / "back", pruned / name))
        assert back == there
    assert not list((tmp_path / "there").glob("model*"))
    assert json.loads((tmp_path / "there" / INDEX).read_text())["metadata"]["total_size"] == after


def test_saving_compressed_and_converting_is_the_same(pruned, tmp_path):
    convert(pruned / "one", tmp_path / "out", "compressed")
    for path in (pruned / "compressed").iterdir():
        if path.name not in ("dsa_config.json", MANIFEST):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "out").iterdir())) == len(list((pruned / "compressed").iterdir()))


TENSORS = st.dictionaries(
    st.sampled_from(["a.weight", "b.weight", "c.experts", "d.bias", "e", "ü.weight"]),
    st.tuples(
        st.sampled_from([*TYPES, torch.int64, torch.bool, torch.uint8]),
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    ),
    min_size=1,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=st.lists(TENSORS, min_size=1, max_size=3), scale=st.sampled_from([1, 17]))
def test_any_tensors_come_back_bit_for_bit(tmp_path_factory, shards, scale):
    folder = tmp_path_factory.mktemp("any")

    def make(kind, shape, share):
        values = torch.rand([size * scale for size in shape[:1]] + shape[1:])
        return torch.where(values < share, 0.0, 100 * values).to(kind)

    made = [{f"{number}.{name}": make(*what) for name, what in shard.items()} for number, shard in enumerate(shards)]
    made[0]["zeros"] = torch.zeros(2**16)  # so that it becomes smaller, whatever the others are
    source = checkpoint(folder / "in", *made)
    convert(source, folder / "there", "compressed")
    convert(folder / "there", folder / "back", "dense")
    assert raw(folder / "back") == raw(source)


def test_types_that_cannot_be_packed_stay_as_they_are(tmp_path):
    tensors = {
        "f8": torch.zeros(64, 64).to(torch.float8_e4m3fn),
        "int": torch.zeros(64, 64, dtype=torch.int32),
        "scalar": torch.tensor(0.0),
        "empty": torch.zeros(0, 4),
        "no bytes": torch.zeros(0, dtype=torch.uint8),
        "few bytes": torch.zeros(7, dtype=torch.uint8),
        "zeros": torch.zeros(64, 64),
    }
    source = checkpoint(tmp_path / "in", tensors)
    convert(source, tmp_path / "there", "compressed")
    (file,) = (tmp_path / "there").glob("*.safetensors")
    assert packed_headers(file).keys() == {"zeros"}
    assert load_file(file)["f8"].dtype == torch.float8_e4m3fn
    convert(tmp_path / "there", tmp_path / "back", "dense")
    assert raw(tmp_path / "back") == raw(source)


def test_a_folder_can_be_converted_in_its_place_and_strangers_are_kept(pruned, tmp_path):
    convert(pruned / "one", tmp_path / "out", "compressed")
    convert(tmp_path / "out", tmp_path / "out", "dense")
    assert raw(tmp_path / "out") == raw(pruned / "one")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="was not written by optimum-dsa"):
        convert(pruned / "one", tmp_path / "thesis", "compressed")


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """Pages that are filled (not those of files that are mapped) never exceed a few tensors, of forty in the file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(1024, 1024, generator=generator).relu().bfloat16() for i in range(40)}
    checkpoint(tmp_path / "in", tensors)
    code = """
        import sys, threading, time
        from optimum_dsa.checkpoint.convert import convert

        def used():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

        def watch():
            while True:
                seen.append(used())
                time.sleep(0.001)

        folder = sys.argv[1]
        seen = [used()]
        threading.Thread(target=watch, daemon=True).start()
        convert(f"{folder}/in", f"{folder}/there", "compressed")
        convert(f"{folder}/there", f"{folder}/back", "dense")
        print(max(seen) - seen[0], len(seen))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    grown, samples = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert samples > 20 and grown < 24 * 1024  # KB: the tensors have 2 MB each, 80 MB together
    assert raw(tmp_path / "back") == raw(tmp_path / "in")


def test_a_model_with_too_few_zeros_is_not_compressed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="would not become smaller.*Nothing was written"):
        convert(tmp_path / "dense", tmp_path / "out", "compressed")
    hardly = checkpoint(tmp_path / "hardly", {"a": torch.ones(2048, 64), "b": torch.zeros(4, 64)})
    with pytest.raises(ValueError, match="would not become smaller"):
        convert(hardly, tmp_path / "out", "compressed")
    assert sorted(os.listdir(tmp_path)) == ["dense", "hardly"]


def test_saving_what_does_not_become_smaller_is_done_and_told(tmp_path, caplog):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.01, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out", compressed=True)
    assert "compressed weights are no smaller than dense ones" in caplog.text
    caplog.clear()
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out", compressed=True)
    assert not caplog.text


def test_a_sparse_checkpoint_from_elsewhere_is_compressed(tmp_path):
    """It has no dsa_config.json, and needs none."""
    model = tiny_llama()
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform"))
    model.save_pretrained(tmp_path / "foreign")
    before, after = convert(tmp_path / "foreign", tmp_path / "out", "compressed")
    assert after < 0.7 * before
    convert(tmp_path / "out", tmp_path / "back", "dense")
    assert raw(tmp_path / "back") == raw(tmp_path / "foreign")


@pytest.mark.parametrize("size", ["big", "", "GB", "-1GB", "0MB", 0, -5, True, 1.5, None, "2 GiB"])
def test_a_size_that_is_none_is_refused_before_any_work(pruned, tmp_path, size):
    pruner = DSAPruner.from_pretrained(pruned / "one")
    with pytest.raises(ValueError, match="max_shard_size is a number of bytes, or a text such as '2GB'"):
        pruner.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_wrong_requests(pruned, tmp_path):
    for arguments, message in [
        (
            (pruned / "one", tmp_path / "out", "sparse"),
            "stored as 'dense' or 'compressed' or 'quantised', got 'sparse'",
        ),
        ((pruned / "one", tmp_path / "out", "dense"), "is dense already"),
        ((pruned / "compressed", tmp_path / "out", "compressed"), "is compressed already"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    with pytest.raises(FileNotFoundError, match="No folder"):
        convert(tmp_path / "none", tmp_path / "out", "dense")
    quantised = checkpoint(tmp_path / "quantised", {"a": torch.zeros(4)})
    (quantised / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ValueError, match="is quantised \\(gptq\\)"):
        convert(quantised, tmp_path / "out", "compressed")
    assert not (tmp_path / "out").exists()


def test_the_downloaded_cache_is_made_of_links_and_can_be_converted(pruned, tmp_path):
    hub = tmp_path / "models--me--pruned"
    snapshot = hub / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for path in (pruned / "compressed").iterdir():
        (hub / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(hub / "blobs" / path.name)
    convert(snapshot, tmp_path / "out", "dense")
    assert raw(tmp_path / "out") == raw(pruned / "one")
    assert json.loads((pruned / "compressed" / "config.json").read_text())["quantization_config"] == {
        "quant_method": QUANT_METHOD,
        "format_version": 1,
    }


def test_state_of_a_saved_model_is_not_touched(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    before = state(pruner.model)
    pruner.save_pretrained(tmp_path / "out", compressed=True)
    assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())


def test_a_dense_checkpoint_with_packed_tensors(tmp_path):
    folder = checkpoint(tmp_path / "in", {"a": pack(torch.eye(64))})
    with pytest.raises(ValueError, match="packed tensors already, such as a"):
        convert(folder, tmp_path / "out", "compressed")
