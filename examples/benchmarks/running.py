"""What a user of a pruned model gains from packed matrices: speed of writing and memory, of whole models in one run.

A random Llama in the shape of TinyLlama-1.1B (or --model, a dense model) is pruned by magnitude at each sparsity and
stored without its zeros, in bfloat16 and with kept values of 8 bits. Then all forms are loaded one after the other,
and read a prompt and write tokens in turn: the fastest of some rounds counts. `resident` is what the process has more
of each form once it has run, imports not counted. The weights mean nothing: what a pruned model says is measured by
frontier.py and quantised.py.

    OPTIMUM_DSA_JIT=1 python running.py --threads 1
    OPTIMUM_DSA_JIT=1 python running.py --sparsities 0.5 0.6 --forms "dense bf16" packed
    python running.py --small                                             # a tiny shape: shows only that it works
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, measure_speed
from optimum_dsa.checkpoint.running import load_as
from optimum_dsa.packed.loading import load


SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 128}
# form -> which folder, how its matrices are held, and the type of what is not packed; ratios are over the last
FORMS = {
    "packed int8": ("int8", "packed", torch.bfloat16),
    "packed": ("plain", "packed", torch.bfloat16),
    "dense f32": ("plain", "dense", torch.float32),
    "dense bf16": ("plain", "dense", torch.bfloat16),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a dense model instead of a random one: folder or Hub id")
    parser.add_argument("--small", action="store_true", help="a tiny random model")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.6], help="shares of zeros (default: 0.6)")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), help="what is held against each other"
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens that are read (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that are written (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts (default: 5)")
    return parser.parse_args()


def dense_model(args: argparse.Namespace) -> nn.Module:
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if args.small else {"num_key_value_heads": 4}
    config = LlamaConfig(**(SMALL if args.small else SHAPE), **heads)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # never twice as large as it has to be
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def store(args: argparse.Namespace, sparsity: float, values: str, folder: Path) -> None:
    """Prune and save: `values` is plain, or the type of whole numbers."""
    # Without text: which weights stay, and what the numbers are, changes nothing of the speed.
    asked = {} if values == "plain" else {"values": {"name": values, "scales": "absmax", "feedback": False}}
    pruner = DSAPruner(dense_model(args))
    pruner.prune(None, DSAConfig(sparsity, "magnitude", "uniform", **asked))
    pruner.save_pretrained(folder, encoding="compressed" if values == "plain" else "quantised")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    kernels = load()
    print(f"packed products: {kernels.name} ({kernels.reason})", flush=True)
    for sparsity in args.sparsities:
        with tempfile.TemporaryDirectory() as scratch:
            for values in {FORMS[form][0] for form in args.forms}:
                store(args, sparsity, values, Path(scratch, values))
            loaders: dict[str, Callable[[], nn.Module]] = {}
            for form in args.forms:
                values, held, dtype = FORMS[form]
                folder = str(Path(scratch, values))
                loaders[form] = lambda folder=folder, held=held, dtype=dtype: load_as(folder, held, dtype=dtype)
            numbers = {"prompt": args.prompt, "new_tokens": args.new_tokens, "rounds": args.rounds}
            found = measure_speed(loaders, **numbers)
        print(f"\n{sparsity:g} of the weights are zero\n{found}", flush=True)
        print(json.dumps({"sparsity": sparsity, **found.to_dict()}), flush=True)


if __name__ == "__main__":
    main()
