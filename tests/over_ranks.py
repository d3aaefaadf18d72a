"""Prunes tiny models, alone or as one of the processes that torchrun starts; argument: a folder for what comes out."""

import hashlib
import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig  # noqa: E402

from optimum_dsa import DSAConfig, DSAPruner, find_architecture  # noqa: E402
from optimum_dsa.common.ranks import current_ranks  # noqa: E402
from optimum_dsa.model.offload import resident  # noqa: E402
from optimum_dsa.pruning.prune import prune  # noqa: E402
from tests.tiny import VOCABULARY, tiny_llama, tokens  # noqa: E402


def padded():
    """Samples of several lengths, one with a hole: (samples, length) each."""
    mask = torch.ones(9, 16, dtype=torch.int64)
    mask[1, :5], mask[4, 9:], mask[6, 12:] = 0, 0, 0
    return {"input_ids": tokens(9), "attention_mask": mask}


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}


def routed(config, **settings):
    """A random model with four experts a block."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES, initializer_range=0.1, **settings)).eval()


def qwen(experts=4):
    return routed(Qwen3MoeConfig, num_experts=experts, moe_intermediate_size=24)


def mixtral():
    return routed(MixtralConfig, num_local_experts=4)


# name -> the model, its calibration data, the settings
CASES = {
    "wanda": (tiny_llama, tokens(9), {"allocation": "dsa"}),
    "sparsegpt": (tiny_llama, tokens(9), {"method": "sparsegpt", "allocation": "dsa"}),
    "2:4 of many chunks": (
        tiny_llama,
        tokens(9, 64),
        {"method": "sparsegpt", "pattern": "2:4", "allocation": "uniform", "batch_size": 3},
    ),
    "alps to dense targets": (
        tiny_llama,
        tokens(9),
        {
            "method": "alps",
            "update": {"name": "admm", "targets": "dense", "residual": True, "true_sequential": True},
        },
    ),
    "dsnot, head, padding": (tiny_llama, padded(), {"method": "wanda+dsnot", "include": ("lm_head",)}),
    "experts": (qwen, tokens(9, 8), {"allocation": "dsa"}),
    "experts, sparsegpt": (mixtral, tokens(9, 4), {"method": "sparsegpt", "allocation": "owl"}),
    "experts that nobody reaches": (lambda: qwen(24), tokens(3, 2), {"method": "sparsegpt", "batch_size": 1}),
    "one batch": (tiny_llama, tokens(2), {"method": "sparsegpt"}),
}


def outcome(name, ranks, *where, **options):
    make, data, settings = CASES[name]
    model = make()
    config = DSAConfig(**{"sparsity": 0.5, "batch_size": 2, **settings})
    report = prune(model, data, config, *where, ranks=ranks, **options)
    content = hashlib.sha256()
    for parameter in model.parameters():
        content.update(parameter.detach().numpy().tobytes())
    facts = {key: value for key, value in report.to_dict().items() if key != "seconds"}
    return {"weights": content.hexdigest(), "report": json.loads(json.dumps(facts))}


def spread(folder, ranks):
    """Weights that a prune leaves of a model of which half is on a disk, as its device map has it, and what a search
    finds for it."""
    pruner = DSAPruner.from_pretrained(
        folder / "dense",
        device_map="auto",
        max_memory={"cpu": 60_000},  # of 130,000 bytes
        offload_folder=folder / f"offload-{ranks.index}-of-{ranks.count}",
    )
    places = {str(place) for place in pruner.model.hf_device_map.values()}
    config = DSAConfig(0.5, "sparsegpt", batch_size=2)
    found = pruner.search(tokens(9), config, "level_switch", "4 evaluations", validation=tokens(4, seed=5))
    report = pruner.prune(tokens(9), config)
    content = hashlib.sha256()
    for weight in find_architecture(pruner.model).weights:
        with resident(pruner.model, [weight.module]):
            content.update(weight.tensor(pruner.model).detach().numpy().tobytes())
    return {
        "places": sorted(places),
        "weights": content.hexdigest(),
        "sparsity": report.sparsity,
        "found": found.best.to_dict(),
    }


def failing(ranks, at):
    """What each process raises where the last one's second block does, in run number `at`."""
    model, runs = tiny_llama(), iter(range(at))

    def fail(*_):
        if next(runs, None) is None:
            raise ValueError("out of order")

    if ranks.index == ranks.count - 1:
        model.model.layers[1].register_forward_pre_hook(fail)
    try:
        prune(model, tokens(9), DSAConfig(0.5, "sparsegpt", batch_size=2), ranks=ranks)
    except ValueError as error:
        return str(error)


def others(ranks):
    """What a process says that was given other tokens than the rest."""
    try:
        prune(tiny_llama(), tokens(9, seed=ranks.index), DSAConfig(0.5), ranks=ranks)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, ranks = Path(sys.argv[1]), current_ranks()
    found = {name: outcome(name, ranks) for name in CASES}
    if (folder / "blocks").is_dir():
        found["resumed"] = outcome("experts, sparsegpt", ranks, folder / "blocks", resume=True)
    else:
        found["resumed"] = outcome("experts, sparsegpt", ranks, folder / "blocks")
    found["spread"] = spread(folder, ranks)
    found["failed"] = [failing(ranks, at) for at in (0, 2, 5, 9)]
    found["others"] = others(ranks)
    (folder / f"{ranks.index}-of-{ranks.count}.json").write_text(json.dumps(found))
