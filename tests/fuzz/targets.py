"""Every reader of what others wrote: real files to begin with, how they are made wrong, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from optimum_dsa import Allocation, AllocationFunction, Calibration, DSAConfig, DSAPruner, DSAStructuredConfig, convert
from optimum_dsa.checkpoint.convert import converted_config
from optimum_dsa.checkpoint.description import contradictions, read_description, report_from, seal_of
from optimum_dsa.checkpoint.encodings import encoding_named
from optimum_dsa.checkpoint.limits import read_contents
from optimum_dsa.checkpoint.load import load_model
from optimum_dsa.checkpoint.shards import count_weights, find_shards, index_name, open_shard
from optimum_dsa.common.files import parse_json, read_json
from optimum_dsa.common.manifest import MANIFEST, files_in, recognised
from optimum_dsa.packed.bitmask import LARGEST, pack, read_header, unpack
from optimum_dsa.pruning.allocation.layout import by_block, grid
from optimum_dsa.pruning.configuration import CONFIG_NAME
from optimum_dsa.pruning.unstructured.patterns import Pattern
from optimum_dsa.search.problem import parse_budget
from optimum_dsa.search.search import search
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import SearchTrace
from optimum_dsa.sharing.card import model_card
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import page
from optimum_dsa.sharing.tables import terminal
from optimum_dsa.sharing.upload import collect

from ..tiny import tiny_llama, tokens
from . import NAMED, mutations


@dataclass(frozen=True)
class Target:
    """A reader and what it is fed.

    Attributes:
        seeds: the contents of real files.
        mutate: (content, randomness) -> a wrong one.
        read: (content, empty folder to write to) -> nothing; raises what is named, or reads on.
        cost: how much slower than the others it is; fewer inputs are tried in CI.
    """

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[bytes, Path], None]
    cost: int = 1

    def wrong(self, number: int) -> bytes:
        """The content that `number` stands for."""
        rng = Random(number)
        return self.mutate(rng.choice(self.seeds()), rng)


# -- real files


@cache
def pruned(compressed: bool = False) -> Path:
    """The folder of a small pruned model, in several shards where it is compressed."""
    folder = Path(mkdtemp(prefix="optimum-dsa-fuzz-")) / "model"
    model = tiny_llama(num_hidden_layers=2, hidden_size=8, intermediate_size=16, vocab_size=16)
    pruner = DSAPruner(model.bfloat16())
    pruner.prune(tokens(vocabulary=16), DSAConfig(0.9, allocation="owl", exclude=("layers.0.mlp",)))
    pruner.save_pretrained(folder, compressed, max_shard_size="1KB")
    return folder


@cache
def smaller() -> Path:
    """The folder of a model out of which structures were cut twice, and whose weights were pruned then."""
    folder = Path(mkdtemp(prefix="optimum-dsa-fuzz-")) / "model"
    pruner = DSAPruner(tiny_llama(num_hidden_layers=2, hidden_size=8, intermediate_size=16, vocab_size=16))
    for config in (DSAStructuredConfig(0.2), DSAStructuredConfig(0.5, ("block",)), DSAConfig(0.5)):
        pruner.prune(tokens(vocabulary=16), config)
    pruner.save_pretrained(folder)
    return folder


@cache
def searched() -> Path:
    """The folder of a small search."""
    folder = Path(mkdtemp(prefix="optimum-dsa-fuzz-")) / "search"
    data = Calibration({"input_ids": tokens()}, "x")
    options = {"strategy": "evolution", "budget": "4k tokens", "folder": folder}
    search(tiny_llama(num_hidden_layers=2), data, tokens(8, 16, seed=5), DSAConfig(0.6), **options)
    return folder


def contents(folder: Callable[[], Path], *names: str) -> Callable[[], list[bytes]]:
    """The contents of files in a folder, which is made when they are asked for."""
    return cache(lambda: [path.read_bytes() for name in names for path in sorted(folder().glob(name))])


def compressed() -> Path:
    return pruned(True)


EVALUATION = {
    "model": "x", "sparsity": 0.6, "size": 10, "perplexity": 9.5, "perplexity_error": 0.1, "dataset": "test.txt",
    "windows": 8, "sequence_length": 16,
}  # fmt: skip
FUNCTIONS = (
    "abslog/var/atan,asin/no_op@+0.08", "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)", "/mean/", "abs,log/std/tanh/no_op@-0.25",
    "2M tokens", "500 evaluations", "10 min", "90 s", "3", "row", "group:128", "2:4", "mixed:8",
)  # fmt: skip


# -- readers


def read_safetensors(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    count_weights(path)
    read_contents([path])
    with open_shard(path) as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def read_checkpoint(content: bytes, folder: Path) -> None:
    form = "dense" if b'"U8"' in content else "compressed"
    stem = "dsa_model" if form == "dense" else "model"
    (folder / "in").mkdir()
    (folder / "in" / f"{stem}.safetensors").write_bytes(content)
    (folder / "in" / "config.json").write_text("{}")
    try:
        convert(folder / "in", folder / "out", form)
    except ValueError as error:
        if "would not become smaller" not in str(error):  # it was read to its end
            raise


def read_packed(content: bytes, folder: Path) -> None:
    read_header(content[:LARGEST], len(content))
    unpack(torch.from_numpy(np.frombuffer(content, np.uint8).copy()))


def read_index(content: bytes, folder: Path) -> None:
    for path in compressed().glob("*.safetensors"):
        (folder / path.name).symlink_to(path)
    (folder / index_name("dsa_model")).write_bytes(content)
    find_shards(folder)


def read_config(content: bytes, folder: Path) -> None:
    from optimum_dsa.checkpoint.transformers_loader import (
        DSAQuantizationConfig,  # after transformers' own module, which it is added to
    )

    path = folder / "config.json"
    path.write_bytes(content)
    config = read_json(path)
    for to in ("dense", "compressed"):
        converted_config(config, encoding_named(to), folder)
    section = config.get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == "optimum-dsa":
        DSAQuantizationConfig(**{name: value for name, value in section.items() if name != "quant_method"})


def read_model(content: bytes, folder: Path) -> None:
    source = compressed() if b"quantization_config" in content else pruned()
    for path in source.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path)
    (folder / "config.json").write_bytes(content)
    load_model(str(folder))


def read_dsa_config(content: bytes, folder: Path) -> None:
    (folder / CONFIG_NAME).write_bytes(content)
    for read in (DSAConfig.from_pretrained, Allocation.load):
        attempt(read, folder)
    found = read_description(folder)
    if found is not None:
        seal_of(found)
        str(report_from(found))
        list(contradictions(found))


def read_model_folder(content: bytes, folder: Path) -> None:
    """What is shown of a pruned model, with this `dsa_config.json`."""
    (folder / CONFIG_NAME).write_bytes(content)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    upload = collect(folder)
    show(upload.outcome)
    model_card(upload.outcome, "me/tiny", upload.model_config)


def read_evaluation(content: bytes, folder: Path) -> None:
    (folder / CONFIG_NAME).write_bytes((pruned() / CONFIG_NAME).read_bytes())
    (folder / "evaluation.json").write_bytes(content)
    outcome = Outcome.read(folder)
    show(outcome)
    model_card(outcome, "me/tiny", {})


def read_allocation(content: bytes, folder: Path) -> None:
    path = folder / "allocation.json"
    path.write_bytes(content)
    found = Allocation.load(path)
    found.counts(), found.overall, by_block(found), grid(found), found.to_dict()
    DSAConfig(0.5, allocation=found)


def read_trace(content: bytes, folder: Path) -> None:
    path = folder / "trace.jsonl"
    path.write_bytes(content)
    trace = SearchTrace.load(path)
    trace.best_so_far()
    show(Outcome.read(folder))


def read_search(content: bytes, folder: Path) -> None:
    for name in ("allocation.json", "trace.jsonl"):
        (folder / name).write_bytes((searched() / name).read_bytes())
    (folder / "search.json").write_bytes(content)
    show(Outcome.read(folder))


def read_texts(content: bytes, folder: Path) -> None:
    text = content.decode("utf-8", "surrogatepass")
    for parse in (AllocationFunction.parse, Pattern.parse, parse_budget):
        str(attempt(parse, text))
    str(DSAConfig(0.5, allocation=text))


def read_candidate(content: bytes, folder: Path) -> None:
    candidate = Candidate.from_dict(parse_json(content.decode("utf-8")))
    str(candidate), hash(candidate), json.dumps(candidate.to_dict())


def read_manifest(content: bytes, folder: Path) -> None:
    """What of a folder counts as ours, with this manifest in it."""
    for path in pruned().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / MANIFEST).write_bytes(content)
    recognised(folder, files_in(folder))


def attempt(read: Callable, content: object) -> object:
    """What comes back; `None` where it is refused."""
    try:
        return read(content)
    except NAMED:
        return None


def show(outcome: Outcome) -> None:
    terminal([outcome]).encode()
    page([outcome], {}).encode()


def candidates() -> list[bytes]:
    lines = (searched() / "trace.jsonl").read_bytes().splitlines()[1:]
    found = [json.dumps(json.loads(line)["candidate"]).encode() for line in lines[:20]]
    full = {"function": "owl", "spread": 0.1, "granularity": "matrix", "offsets": {"q": 0.1}, "counts": [1]}
    return [*found, json.dumps(full).encode()]


@cache
def shards() -> list[bytes]:
    """Weight files of both forms; of the dense ones those that are smaller without their zeros."""
    dense = [path.read_bytes() for path in sorted(pruned().glob("*.safetensors")) if has_zeros(path)]
    return dense + [path.read_bytes() for path in sorted(compressed().glob("*.safetensors"))]


def has_zeros(path: Path) -> bool:
    tensors = load_file(path).values()
    return sum(int((tensor == 0).sum()) for tensor in tensors) > sum(tensor.numel() for tensor in tensors) / 2


@cache
def allocations() -> list[bytes]:
    return [(searched() / "allocation.json").read_bytes(), b'{"model.layers.0": 0.5, "model.layers.1": 0.7}']


TARGETS = {
    "safetensors header": Target(
        contents(compressed, "*.safetensors"), mutations.mutate_safetensors, read_safetensors
    ),
    "checkpoint converted": Target(
        shards, mutations.mutate_safetensors, read_checkpoint, 2
    ),
    "packed tensor": Target(
        cache(lambda: [pack(torch.eye(16, dtype=kind)).numpy().tobytes() for kind in (torch.bfloat16, torch.float32)]),
        mutations.mutate_packed, read_packed,
    ),
    "index": Target(contents(compressed, "*.index.json"), mutations.mutate_json, read_index),
    "config.json": Target(contents(compressed, "config.json"), mutations.mutate_json, read_config),
    "config.json, loaded": Target(
        cache(lambda: [(f / "config.json").read_bytes() for f in (pruned(), compressed())]),
        mutations.mutate_json, read_model, 8,
    ),
    "dsa_config.json": Target(contents(pruned, CONFIG_NAME), mutations.mutate_json, read_dsa_config),
    "dsa_config.json, shown": Target(contents(pruned, CONFIG_NAME), mutations.mutate_json, read_model_folder, 4),
    "dsa_config.json, smaller": Target(contents(smaller, CONFIG_NAME), mutations.mutate_json, read_dsa_config, 4),
    "dsa_config.json, smaller, shown": Target(
        contents(smaller, CONFIG_NAME), mutations.mutate_json, read_model_folder, 4
    ),
    "evaluation": Target(lambda: [json.dumps(EVALUATION).encode()], mutations.mutate_json, read_evaluation, 4),
    "allocation.json": Target(
        allocations, mutations.mutate_json, read_allocation
    ),
    "trace": Target(contents(searched, "trace.jsonl"), mutations.mutate_lines, read_trace, 4),
    "search.json": Target(contents(searched, "search.json"), mutations.mutate_json, read_search, 4),
    "manifest": Target(contents(pruned, MANIFEST), mutations.mutate_json, read_manifest),
    "texts": Target(lambda: [text.encode() for text in FUNCTIONS], mutations.mutate_text, read_texts),
    "candidate": Target(cache(candidates), mutations.mutate_json, read_candidate),
}  # fmt: skip
