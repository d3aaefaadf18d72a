"""Dense and compressed checkpoints hold the same bits; what is no checkpoint is refused before it costs anything."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAConfig, DSAPruner, convert
from optimum_dsa.bitmask import LARGEST, TYPES, pack
from optimum_dsa.conversion import QUANT_METHOD
from optimum_dsa.files import LARGEST_JSON
from optimum_dsa.shards import COMPRESSED, find_shards, index_name, packed_headers

from .common import state, tiny_llama


INDEX = index_name(COMPRESSED)


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
    for path in (pruned / name).glob("*.json"):
        back, there = (json.loads((folder / path.name).read_text()) for folder in (tmp_path / "back", pruned / name))
        assert back == there
    assert not list((tmp_path / "there").glob("model*"))
    assert json.loads((tmp_path / "there" / INDEX).read_text())["metadata"]["total_size"] == after


def test_saving_compressed_and_converting_is_the_same(pruned, tmp_path):
    convert(pruned / "one", tmp_path / "out", "compressed")
    for path in (pruned / "compressed").iterdir():
        if path.name != "dsa_config.json":
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
        from optimum_dsa.conversion import convert

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


# -- refused


def test_wrong_requests(pruned, tmp_path):
    for arguments, message in [
        ((pruned / "one", tmp_path / "out", "sparse"), "'dense' or 'compressed', got 'sparse'"),
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


def refused(folder, tmp_path, message):
    """Converting and loading both refuse `folder`, without memory growing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError), match=message):
        convert(folder, tmp_path / "out", "dense")
    with pytest.raises((ValueError, OSError), match=message):
        DSAPruner.from_pretrained(folder)
    assert not (tmp_path / "out").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KB; a bomb would take gigabytes


@pytest.fixture
def bad(tmp_path):
    """A compressed Llama to be damaged."""
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "bad", compressed=True, max_shard_size="20KB")
    return tmp_path / "bad"


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/secret.safetensors", "a\\b.safetensors", "x.bin", 7, None]
)
def test_an_index_that_points_elsewhere(bad, tmp_path, place):
    save_file({"a": torch.zeros(4)}, tmp_path / "secret.safetensors")
    index = json.loads((bad / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = place
    (bad / INDEX).write_text(json.dumps(index))
    refused(bad, tmp_path, "beside their index only")


@pytest.mark.parametrize(
    "content,message",
    [
        ("[" * 200_000, "nested too deep"),
        ('{"weight_map": ' * 100_000, "nested too deep"),
        ('{"weight_map": {"a": ' + "9" * 100_000 + "}}", "is not JSON"),
        ("{", "is not JSON"),
        ("\x00\xff", "is not JSON"),
        ("[]", "is no index of weights"),
        ('{"weight_map": {}}', "is no index of weights"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "which is not there"),
    ],
)  # fmt: skip
def test_an_index_that_is_none(bad, tmp_path, content, message):
    (bad / INDEX).write_bytes(content.encode("latin-1"))
    refused(bad, tmp_path, message)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_that_is_too_large_is_not_read(bad, tmp_path, name):
    with (bad / name).open("wb") as file:
        file.truncate(LARGEST_JSON + 1)  # a hole: it takes no disk
    refused(bad, tmp_path, "no file of this kind needs more")


def test_a_pickle_under_the_name_of_a_shard(bad, tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))

    shard = next(bad.glob("*.safetensors"))
    shard.write_bytes(pickle.dumps(Evil()) + bytes(100))
    refused(bad, tmp_path, "is not a safetensors file")
    assert not ran.exists()


def test_pickles_only(bad, tmp_path):
    for path in (*bad.glob("*.safetensors"), bad / INDEX):
        path.unlink()
    torch.save({"a": torch.zeros(4)}, bad / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin only. That is a pickle"):
        convert(bad, tmp_path / "out", "dense")
    with pytest.raises(FileNotFoundError, match="That is a pickle"):
        DSAPruner.from_pretrained(bad)


def change_header(shard, name, place, value):
    """Overwrite one number in the header of a packed tensor."""
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    assert place < LARGEST // 8
    data[begin + 8 * place : begin + 8 * place + 8] = value.to_bytes(8, "little", signed=True)
    shard.write_bytes(data)


@pytest.mark.parametrize("place,value", [(1, 77), (2, 10**12), (3, 10**6), (4, 2**40), (5, 2**62), (4, -1)])
def test_a_packed_tensor_that_promises_too_much(bad, tmp_path, place, value):
    for shard in bad.glob("*.safetensors"):
        for name in packed_headers(shard):
            change_header(shard, name, place, value)
    refused(bad, tmp_path, "is damaged")


def test_a_mask_of_the_wrong_length(bad, tmp_path):
    shard = next(shard for shard in bad.glob("*.safetensors") if packed_headers(shard))
    tensors = load_file(shard)
    name = next(iter(packed_headers(shard)))
    tensors[name] = tensors[name][:-8].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(bad, tmp_path, "is damaged")


def test_a_truncated_shard(bad, tmp_path):
    shard = max(bad.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(bad, tmp_path, "is not a safetensors file")


def test_a_huge_shape_in_a_dense_file(tmp_path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2**40, 2**20], "data_offsets": [0, 2**61]}}).encode()
    folder = checkpoint(tmp_path / "in", {"a": torch.zeros(4)})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        convert(folder, tmp_path / "out", "compressed")


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_a_config_that_asks_for_more_than_the_weights(bad, tmp_path, form):
    folder = bad
    if form == "dense":
        convert(bad, tmp_path / "dense", "dense")
        folder = tmp_path / "dense"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="asks for 640,.* parameters, and the checkpoint has"):
        DSAPruner.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_two_forms_in_one_folder(pruned, tmp_path):
    convert(pruned / "one", tmp_path / "in", "compressed")
    shutil.copy(pruned / "one" / "model.safetensors", tmp_path / "in")
    for use in (
        lambda: convert(tmp_path / "in", tmp_path / "out", "dense"),
        lambda: DSAPruner.from_pretrained(tmp_path / "in"),
    ):
        with pytest.raises(ValueError, match="holds dense and compressed weights"):
            use()


def test_a_link_out_of_the_folder_is_not_copied(pruned, tmp_path):
    (tmp_path / "secret").write_text("key")
    convert(pruned / "one", tmp_path / "in", "compressed")
    (tmp_path / "in" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link out of its folder"):
        convert(tmp_path / "in", tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_index_names_and_no_shard_has(bad, tmp_path):
    index = json.loads((bad / INDEX).read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    (bad / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks ghost"):
        convert(bad, tmp_path / "out", "dense")


def test_a_dense_checkpoint_with_packed_tensors(tmp_path):
    folder = checkpoint(tmp_path / "in", {"a": pack(torch.eye(64))})
    with pytest.raises(ValueError, match="packed tensors already, such as a"):
        convert(folder, tmp_path / "out", "compressed")


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
