"""What a GPU gives, in one command of at most five minutes: each part is printed as it ends.

    equal    a small model pruned there and on the CPU: how many bits of the masks differ, and the logits
    kernel   sparsegpt's kernel against its reference, on one run of 128 columns: the greatest difference, milliseconds
    1b, 8b   random Llamas in these shapes (of 8b a few blocks): seconds of a bare forward of the blocks, of wanda,
             sparsegpt and alps, over wanda's and over the forward's, and the peak memory beyond what was there, less
             the activations, in MB and in X·Xᵀs of the widest matrix
    search   the 1b shape again: a search of a few candidates, seconds and peak memory
    layers   packed matrices, 2:4 and of 50 to 80 %: every kernel against float64, then microseconds beside torch's
    decode   a random model of a billion weights, dense and packed: tokens a second and memory
    model    with --model and --tokens: that model at 70 %, perplexity on `test` (or `wikitext2_test`) of the file

Aims on a GPU: sparsegpt at most twice wanda's time and three X·Xᵀs, alps at most four times wanda's. Where there is
none the shapes are small, and the figures say only that the script works. When the time is up no row is begun. Kernels
of packed matrices are compiled at first use with OPTIMUM_DSA_JIT=1, where nvcc is, or carried along in a folder that
OPTIMUM_DSA_KERNELS_PATH names.

    python gpu.py
    python gpu.py --model MODEL --tokens tokens.safetensors
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import decoding
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_dsa import DSAConfig, UpdateConfig, capture_calls, find_architecture, load_calibration, perplexity, prune
from optimum_dsa.pruning.unstructured.elimination import eliminate, elimination_on
from optimum_dsa.search.search import search


PARTS = ("equal", "kernel", "layers", "decode", "1b", "8b", "search", "model")
VOCABULARY = 1024
# hidden size, intermediate size, blocks, heads, heads of keys and values; samples, length
SHAPES = {"1b": (2048, 8192, 16, 32, 8, 128, 2048), "8b": (4096, 14336, 4, 32, 8, 128, 2048)}
SMALL = {"1b": (64, 192, 2, 4, 2, 8, 16), "8b": (96, 256, 1, 4, 2, 8, 32)}
DECODED = {"cuda": (2048, 8192, 18, 32, 8), "cpu": (64, 256, 2, 4, 2)}  # 1.1 B weights, as 1b with two blocks more
METHODS = ("wanda", "sparsegpt", "alps")
MB = 2**20


def wait(device: torch.device) -> None:
    """Until everything that was started there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measured(device: torch.device, work: Callable) -> tuple[float, int]:
    """Seconds of `work`, and the bytes that it takes at most beyond what is there; of a CPU the whole process's."""
    wait(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = torch.cuda.memory_allocated(device) if cuda else status("VmRSS")
    start = time.perf_counter()
    work()
    wait(device)
    seconds = time.perf_counter() - start
    most = torch.cuda.max_memory_allocated(device) if cuda else status("VmHWM")
    return seconds, max(most - before, 0)


def llama(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama, the same at every call."""
    hidden, intermediate, blocks, heads, key_heads = shape[:5]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def windows(samples: int, length: int, seed: int = 1) -> Tensor:
    """Random tokens, (samples, length)."""
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def equal(device: torch.device) -> Iterator[str]:
    """Masks and logits of a small model, there and on the CPU."""
    tokens = windows(16, 32)
    for method in ("magnitude", "ria", *METHODS):
        found = []
        for place in (torch.device("cpu"), device):
            model = llama((64, 160, 2, 4, 2), place, torch.float32)
            # One and the same model: each device draws other random numbers.
            model.load_state_dict(llama((64, 160, 2, 4, 2), torch.device("cpu"), torch.float32).state_dict())
            prune(model, tokens, DSAConfig(0.5, method, "uniform"))
            weights = [weight.tensor(model).cpu() for weight in find_architecture(model).weights]
            with torch.no_grad():
                logits = model(tokens.to(place)).logits.cpu()
            found.append((torch.cat([weight.flatten() == 0 for weight in weights]), logits))
        (here, first), (there, second) = found
        differ, apart = (here != there).float().mean().item(), (first - second).abs().max().item()
        yield f"{method:<10} {differ:8.4%} of the bits differ   logits {apart:.1e} apart, of {first.abs().max():.1f}"


def kernel(device: torch.device) -> Iterator[str]:
    """The kernel of sparsegpt against its reference."""
    rows, columns = (4096, 128) if device.type == "cuda" else (64, 128)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    hessian = inputs.t() @ inputs + 0.1 * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).to(device)
    weight = torch.randn(columns, rows, generator=generator).to(device)
    dead = torch.zeros(columns, dtype=torch.bool, device=device)
    mask = torch.rand(rows, columns, generator=generator).to(device) > 0.5
    for text, keep, neighbours, removed in (("a mask", mask, 0, 0), ("2:4", None, 4, 2), ("4:8", None, 8, 4)):
        chosen = elimination_on(device, columns, neighbours)
        if chosen is eliminate:
            yield f"{text:<7} no kernel here (it needs an NVIDIA GPU and Triton): the reference is what runs"
            continue
        results, milliseconds = [], []
        for each in (eliminate, chosen):
            each(weight.clone(), upper, dead, keep, neighbours, removed)  # compiles
            results.append(weight.clone())
            seconds, _ = measured(device, partial(each, results[-1], upper, dead, keep, neighbours, removed))
            milliseconds.append(f"{1e3 * seconds:.2f}")
        reference, block = results
        bits = ((reference == 0) != (block == 0)).float().mean().item()
        apart = (reference - block).abs().max().item()
        yield f"{text:<7} {bits:.4%} of the bits differ, weights {apart:.1e} apart; {' -> '.join(milliseconds)} ms"


class Shape:
    """One random Llama, and what pruning it costs."""

    def __init__(self, name: str, device: torch.device):
        cuda = device.type == "cuda"
        self.shape = (SHAPES if cuda else SMALL)[name]
        self.device, self.dtype = device, torch.bfloat16 if cuda else torch.float32
        self.tokens = windows(*self.shape[5:])
        self.model = llama(self.shape, device, self.dtype)
        self.dense = {name: value.clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def forward(self) -> None:
        """Every block on every batch, one after the other."""
        (stack,) = find_architecture(self.model).stacks
        calls = capture_calls(self.model, stack, [{"input_ids": part} for part in self.tokens.split(8)])
        for index, block in enumerate(stack.blocks):
            for number in range(len(calls)):
                calls.hidden[number] = calls.run(self.model.get_submodule(block.name), index, number)

    def rows(self) -> Iterator[str]:
        """One per method."""
        hidden, widest = self.shape[0], max(self.shape[:2])
        configs = {method: DSAConfig(0.6, method, "uniform") for method in METHODS}
        for config in configs.values():  # libraries are loaded and kernels compiled once
            prune(llama((64, 160, 1, 4, 2), self.device, self.dtype), windows(8, 32), config)
        self.forward()
        forward, activations = measured(self.device, self.forward)
        size = sum(parameter.nbytes for parameter in self.model.parameters())
        yield (
            f"{self.shape[2]} blocks of {hidden} x {self.shape[1]}, {self.shape[5]} x {self.shape[6]} tokens, "
            f"{self.dtype}: model {size / MB:.0f} MB, a forward {forward:.2f} s and {activations / MB:.0f} MB"
        )
        first = None
        for method, config in configs.items():
            self.model.load_state_dict(self.dense)
            seconds, taken = measured(self.device, partial(prune, self.model, self.tokens, config))
            first, extra = first or seconds, max(taken - activations, 0)
            yield (
                f"{method:<10} {seconds:8.2f} s  {seconds / first:6.2f} x wanda  {seconds / forward:6.2f} x forward  "
                f"{extra / MB:8.1f} MB beyond  {extra / (4 * widest**2):5.2f} X·Xᵀs"
            )


def searched(device: torch.device) -> Iterator[str]:
    """A search of a few candidates of the 1b shape."""
    shape = Shape("1b", device)
    calibration = load_calibration(shape.tokens[:16], shape.model)
    validation, found = windows(4, shape.shape[6], seed=2), []
    budget = f"{8 * validation.numel()} tokens"

    def work() -> None:
        found.append(search(shape.model, calibration, validation, DSAConfig(0.6), budget=budget, finalists=1))

    seconds, taken = measured(device, work)
    tried = len(found[0].trace.trials)
    yield f"{tried} candidates and a finalist  {seconds:.2f} s  {taken / MB:.0f} MB beyond the model"


def real(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """A model's perplexity at 70 %, on text that no choice was made on."""
    with safe_open(args.tokens, "pt") as file:
        names = list(file.keys())
        test = "test" if "test" in names else "wikitext2_test"
        calibration, sealed = (file.get_tensor(name).long() for name in ("calibration", test))
    calibration, sealed = calibration[: args.samples], sealed[: args.windows]
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    yield f"{len(calibration)} x {calibration.shape[1]} for calibration, {test} {len(sealed)} x {sealed.shape[1]}"
    yield f"{'dense':<32} {perplexity(copy.deepcopy(dense).to(device), sealed):9.3f}"
    whole = UpdateConfig(targets="dense", true_sequential=True, residual=True)
    for name, config in {
        "wanda": DSAConfig(0.7, "wanda", "uniform"),
        "sparsegpt": DSAConfig(0.7, "sparsegpt", "uniform"),
        "alps": DSAConfig(0.7, "alps", "uniform"),
        "alps, dense targets, residual": DSAConfig(0.7, "alps", "uniform", update=whole),
    }.items():
        model = copy.deepcopy(dense).to(device)
        seconds, taken = measured(device, partial(prune, model, calibration, config))
        yield f"{name:<32} {perplexity(model, sealed):9.3f} {seconds:8.1f} s {taken / MB:8.0f} MB beyond the model"


def decoded(device: torch.device) -> Iterator[str]:
    """A random model decodes, dense and packed."""
    anew = partial(llama, DECODED[device.type], device, torch.bfloat16)
    yield from decoding.decode(anew, device, windows(1, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=5.0, help="no row is begun after them")
    parser.add_argument("--model", help="a folder or Hub id")
    parser.add_argument("--tokens", help="safetensors file with `calibration` and `test`, (samples, length)")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration of the model")
    parser.add_argument("--windows", type=int, default=304, help="windows of its test")
    args = parser.parse_args()
    if bool(args.model) != bool(args.tokens):
        parser.error("--model and --tokens belong together.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: small shapes, on the CPU"
    print(f"{card}, torch {torch.__version__}", flush=True)
    work: dict[str, Callable[[], Iterator[str]]] = {
        "equal": lambda: equal(device),
        "kernel": lambda: kernel(device),
        "layers": lambda: decoding.layers(device),
        "decode": lambda: decoded(device),
        "1b": lambda: Shape("1b", device).rows(),
        "8b": lambda: Shape("8b", device).rows(),
        "search": lambda: searched(device),
        "model": lambda: real(args, device),
    }
    for part in args.part:
        if part == "model" and not args.model:
            continue
        rows = work[part]()
        while True:
            spent = time.perf_counter() - start
            if spent > 60 * args.minutes:
                print(f"{part:<7} left out from here on: {spent / 60:.1f} minutes are spent", flush=True)
                break
            row = next(rows, None)
            if row is None:
                break
            print(f"{part:<7} {row}", flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
