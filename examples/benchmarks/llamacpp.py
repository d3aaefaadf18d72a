"""What a user would take instead: the same model in llama.cpp's types, beside pruned ones that run packed, by bytes.

Of a dense model, rows of llama.cpp: f16 through the GGUF export, and from it Q8_0, Q4_0, Q3_K and Q2_K with the
engine's own quantiser (the C function of the library in `xllamacpp`; no importance matrix). Of pruned ones: a mask
with kept weights in bf16, int8 and int4, at every sparsity. `bytes` are those of the blocks' matrices over bf16's;
embeddings, head and norms stay in 16 bits in every row, and where a type of 256 columns a scale does not fit a matrix,
that is Q4_0 (`fallback` says of how many). Perplexities are of the weights that each row stands for, on the same
windows in PyTorch, so that they leave out what llama.cpp rounds of inputs; `tokens/s` are of one sequence in the
engine itself and in packed layers, one after the other.

    OPTIMUM_DSA_JIT=1 python llamacpp.py MODEL --tokens tokens.safetensors --samples 32 --windows 8 --threads 1
    python llamacpp.py                                       # the embedded model: shows only that it works
"""

import argparse
import ctypes
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import xllamacpp
from rows import FULL, Rows, file_there, loaded, measured, windows_of

from optimum_dsa import DSAConfig, DSAPruner, ValuesConfig, demo_model, export, measure_speed
from optimum_dsa.checkpoint.running import load_as
from optimum_dsa.packed.linear import PackedModule


TYPES = ("f16", "Q8_0", "Q4_0", "Q3_K", "Q2_K")
VALUES = {"bf16": ValuesConfig(), "int8": ValuesConfig("int8"), "int4": ValuesConfig("int4", group=32)}
FALLBACK = "Q4_0"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=demo_model(), help="a dense Llama's folder (default: the demo's)")
    parser.add_argument(
        "--tokens", type=file_there, help="safetensors file with calibration, wikitext2_test, ...; default: demo text"
    )
    parser.add_argument("--output", help="file of finished rows, a JSON object a line; those in it are not run again")
    parser.add_argument("--types", nargs="*", choices=TYPES, default=TYPES, help="of llama.cpp (default: all)")
    parser.add_argument("--values", nargs="*", choices=VALUES, default=list(VALUES), help="kept (default: all)")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--method", default="sparsegpt", help="by which weights are pruned (default: sparsegpt)")
    parser.add_argument(
        "--dense-targets",
        action="store_true",
        help="fit matrices to what the dense model has there (targets, true_sequential, residual): of alps, sparsegpt",
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--windows", type=int, default=8, help="windows that are measured")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens that are read before any is written")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens that are written")
    parser.add_argument("--device", default="cpu", help="of perplexities and pruning; speed is a CPU's")
    return parser.parse_args()


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a GGUF is a matrix in a block."""
    return name.startswith("blk.") and len(shape) == 2


def quantise(source: Path, target: Path, kind: str) -> tuple[int, int, int]:
    """Write a GGUF with the matrices of another's blocks as `kind`; their bytes, how many fell back, and how many."""
    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
    library.ggml_quantize_chunk.argtypes += [ctypes.c_void_p]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    taken = fallen = matrices = 0
    for tensor in reader.tensors:
        rows = tensor.data
        if not is_matrix(tensor.name, rows.shape) or kind == "f16":
            writer.add_tensor(tensor.name, rows, raw_dtype=tensor.tensor_type)
            continue
        chosen = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[chosen]
        if rows.shape[1] % block:
            chosen, fallen = gguf.GGMLQuantizationType[FALLBACK], fallen + 1
            block, size = gguf.GGML_QUANT_SIZES[chosen]
        floats = np.ascontiguousarray(rows, dtype=np.float32)
        made = np.empty((len(floats), floats.shape[1] // block * size), dtype=np.uint8)
        places = [each.ctypes.data for each in (floats, made)]
        if library.ggml_quantize_chunk(int(chosen), *places, 0, *floats.shape, None) != made.nbytes:
            raise RuntimeError(f"The engine made of {tensor.name} another number of bytes than {kind} takes.")
        writer.add_tensor(tensor.name, made, raw_dtype=chosen)
        taken, matrices = taken + made.nbytes, matrices + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return taken, fallen, matrices


def engine_speed(path: Path, args: argparse.Namespace) -> float:
    """Tokens a second that llama.cpp writes."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port, settings.verbosity = str(path), 0, -1
    settings.n_ctx = args.prompt + args.new_tokens + 8
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = args.threads
    asked = {"prompt": list(range(3, 3 + args.prompt)), "n_predict": args.new_tokens, "ignore_eos": True}
    answer = xllamacpp.Server(settings).handle_completions(asked | {"temperature": 0, "cache_prompt": False})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    return round(answer["timings"]["predicted_per_second"], 2)


def of_engine(kind: str, tokens: dict, args: argparse.Namespace, scratch: Path, dense: int) -> dict:
    """A row of llama.cpp."""
    plain, path = scratch / "f16.gguf", scratch / f"{kind}.gguf"
    if not plain.exists():
        export(args.model, plain, "gguf", "f16")
    taken, fallen, matrices = quantise(plain, path, kind) if kind != "f16" else (dense, 0, 0)
    model = DSAPruner.from_pretrained(str(path), dtype=torch.float32).model.to(args.device).eval()
    facts = {"bytes": round(taken / dense, 3), **measured(model, tokens, args)}
    facts |= {"tokens/s": engine_speed(path, args), "file": path.stat().st_size}
    return {"row": f"llama.cpp {kind}", **facts, **({"fallback": f"{fallen} of {matrices}"} if fallen else {})}


def of_mask(sparsity: float, values: str, tokens: dict, args: argparse.Namespace, scratch: Path, dense: int) -> dict:
    """A row of a pruned model."""
    pruner, folder = DSAPruner(loaded(args)), str(scratch / f"{sparsity}-{values}")
    config = DSAConfig(sparsity, args.method, values=VALUES[values], update=FULL if args.dense_targets else None)
    pruner.prune(tokens["calibration"][: args.samples], config)
    if values == "bf16":
        for weight in pruner.model.parameters():
            weight.data = weight.bfloat16().float()
    found = measured(pruner.model, tokens, args)
    pruner.model.bfloat16()
    pruner.save_pretrained(folder, encoding="packed")
    model = load_as(folder, "packed", dtype=torch.bfloat16)
    packed = [module.matrix.to_bytes(model.dtype) for module in model.modules() if isinstance(module, PackedModule)]
    numbers = {"prompt": args.prompt, "new_tokens": args.new_tokens, "rounds": 2}
    speed = round(measure_speed({"packed": lambda: model}, **numbers).speeds["packed"].decode, 2)
    facts = {"bytes": round(sum(map(len, packed)) / dense, 3), **found}
    return {"row": f"mask {sparsity:.0%} + {values}", **facts, "tokens/s": speed}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    tokens = windows_of(args)
    rows = Rows(args.output, args.model, tokens)
    blocks = [layer for layer in loaded(args).model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    dense = 2 * sum(layer.weight.numel() for layer in blocks)
    works = {f"llama.cpp {kind}": (of_engine, kind) for kind in args.types}
    works |= {f"mask {each} {kind}": (of_mask, each, kind) for each in args.sparsities for kind in args.values}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (make, *of) in works.items():
            facts = [name, args.samples, args.windows, args.method, args.threads]
            facts += ["dense targets"] if args.dense_targets and make is of_mask else []
            work = lambda make=make, of=of: make(*of, tokens, args, Path(scratch), dense)  # noqa: E731
            print(json.dumps(rows.row(json.dumps(facts), work)), flush=True)


if __name__ == "__main__":
    main()
