"""What packed matrices give in decoding on a GPU: the parts `layers` and `decode` of `gpu.py`, which runs them."""

import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StaticCache

from optimum_dsa.packed import masked
from optimum_dsa.packed.cuda import BATCH, WAYS, Kernels, kernels, unpacked
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.measured import milliseconds
from optimum_dsa.packed.two_of_four import TwoOfFour


LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336))
SMALL_LAYERS = ((64, 256),)
KINDS = (
    *("2:4", "2:4 int8", "2:4 int4"),
    *(f"{share} %{values}" for share in (50, 60, 70, 80) for values in ("", " int8")),
    "50 % int4",
)
END_TO_END = ("dense", "2:4", "2:4 int8", "2:4 int4", "60 %", "60 % int8")
BATCHES = {"2:4": (1, 4, BATCH), "mask": (1, 2)}
WRONG = 2**-7  # of a product in bfloat16, relative to float64: an error of the kernel, and not of rounding
MB = 2**20


def pruned(weight: Tensor, kind: str) -> Tensor:
    """The weight, (rows, columns), with zeros as `kind` says: the smallest two of four, or a share anywhere."""
    if kind.startswith("2:4"):
        fours = weight.view(len(weight), -1, 4)
        return fours.scatter(2, fours.abs().topk(2, dim=2, largest=False).indices, 0).view_as(weight)
    generator = torch.Generator(weight.device).manual_seed(0)
    share = int(kind.split(" %")[0]) / 100
    return weight.masked_fill(torch.rand(weight.shape, generator=generator, device=weight.device) < share, 0)


def packed(weight: Tensor, kind: str) -> PackedMatrix | TwoOfFour:
    """A pruned weight, (rows, columns), as it is multiplied with."""
    matrix = (
        PackedMatrix.quantised(weight, int(kind[-1]), scales="absmax") if "int" in kind else PackedMatrix.of(weight)
    )
    return TwoOfFour.of(matrix) if kind.startswith("2:4") else matrix


def apart(output: Tensor, input: Tensor, dense: Tensor) -> float:
    """How far a product is from that in float64, relative to it.

    Raises:
        RuntimeError: further than bfloat16 rounds.
    """
    expected = input.double() @ dense.double().t()
    found = float((output.double() - expected).norm() / expected.norm())
    if not found < WRONG:
        raise RuntimeError(
            f"A product is {found:.1e} away from that in float64, so a kernel is wrong; tell us the card."
        )
    return found


def layers(device: torch.device) -> Iterator[str]:
    """Every kernel checked against float64 first, then the fastest way beside torch's product in bfloat16."""
    found = kernels(device)
    if found is None:
        yield "no kernels (they need an NVIDIA GPU from sm_80, nvcc and OPTIMUM_DSA_JIT=1): matrices are unpacked"
    for rows, columns in LAYERS if device.type == "cuda" else SMALL_LAYERS:
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator, device=device).bfloat16()
        inputs = torch.randn(BATCH, columns, generator=generator, device=device).bfloat16()
        for kind in KINDS:
            matrix = packed(pruned(weight, kind), kind)
            whole_numbers = torch.float32 if "int" in kind else torch.bfloat16
            dense = matrix.dense(whole_numbers)
            for batch in BATCHES["2:4" if kind.startswith("2:4") else "mask"] if found is not None else (1,):
                yield row(matrix, dense, inputs[:batch], found, f"{kind:<9} {rows} x {columns}  batch {batch}")


def row(matrix, dense: Tensor, inputs: Tensor, found: Kernels | None, name: str) -> str:
    """One line: the error, microseconds of torch's product, and of the packed one, and how they compare."""
    error, weight = apart(matrix.linear(inputs), inputs, dense), dense.bfloat16()
    if found is None:
        times = {
            "dense": milliseconds(lambda: nn.functional.linear(inputs, weight), inputs.device),
            "unpacked": milliseconds(lambda: matrix.linear(inputs), inputs.device, 3),
        }
    else:
        output = inputs.new_empty(len(inputs), matrix.shape[0])
        for run in runs(found, matrix, inputs, output).values():
            output.fill_(torch.nan)
            run()
            error = max(error, apart(output, inputs, dense))
        times = measured(found, matrix, weight, inputs)
    before = times.pop("dense")
    way, after = min(times.items(), key=lambda pair: pair[1])
    return (
        f"{name}  torch {1e3 * before:8.1f} us  packed {1e3 * after:8.1f} us ({way})  {before / after:5.2f} x  "
        f"{matrix.nbytes / weight.nbytes:.3f} of the bytes  {error:.1e} from float64"
    )


def runs(found: Kernels, matrix, inputs: Tensor, output: Tensor) -> dict[str, Callable[[], None]]:
    """Every way to cut the kernel for this matrix."""
    if isinstance(matrix, TwoOfFour):
        fitting = [way for way in WAYS if found.fits(way, inputs, matrix.groups, matrix.shape[0])]
        return {way: partial(found.run, way, inputs, matrix.groups, matrix.scales, output) for way in fitting}
    if not masked.takes(inputs, matrix.parts):
        return {}
    fitting = found.masked.ways(inputs, matrix.parts)
    return {way: partial(found.masked.run, way, inputs, matrix.parts, output) for way in fitting}


def measured(found: Kernels, matrix, weight: Tensor, inputs: Tensor) -> dict[str, float]:
    """Milliseconds of every way, of unpacking, and of the dense weight; into the table, as at the first product."""
    if isinstance(matrix, TwoOfFour):
        return dict(found.measure(inputs, matrix.groups, matrix.scales, matrix.shape[0]))
    others = {
        "unpacked": lambda input: unpacked(input, *matrix.parts),
        "dense": lambda input: nn.functional.linear(input, weight),
    }
    return dict(found.masked.measure(inputs, matrix.parts, others))


class Product(nn.Module):
    """A linear map without a bias whose matrix is packed."""

    def __init__(self, matrix: PackedMatrix | TwoOfFour):
        super().__init__()
        self.matrix = matrix

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix.linear(input)


@torch.no_grad()
def pack(model: LlamaForCausalLM, kind: str) -> int:
    """Prune and pack the matrices of the blocks, in place, one after the other; bytes of all of them after it."""
    taken = 0
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                weight = layer.weight if kind == "dense" else pruned(layer.weight, kind)
                matrix = None if kind == "dense" else packed(weight.bfloat16(), kind)
                taken += weight.nbytes if matrix is None else matrix.nbytes
                if matrix is not None:
                    block.set_submodule(name, Product(matrix))
    return taken


@torch.no_grad()
def tokens_per_second(model: LlamaForCausalLM, prompt: Tensor, tokens: int, graph: bool) -> tuple[float, Tensor]:
    """Of greedy decoding with a cache, batch 1, and the tokens; replayed as one CUDA graph a token where `graph`."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + 2 * tokens + 8)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    last = model(prompt, **{name: cache}).logits[:, -1:].argmax(-1)

    def step() -> None:
        last.copy_(model(last, **{name: cache}).logits[:, -1:].argmax(-1))

    for _ in range(3):  # what is measured at first use, is measured here
        step()
    run = step
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        run = captured.replay
    written = []
    if prompt.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        run()
        written.append(last.clone())
    text = torch.cat(written, 1).cpu()  # waits for all of them
    return tokens / (time.perf_counter() - start), text


def decode(make: Callable[[], LlamaForCausalLM], device: torch.device, prompt: Tensor) -> Iterator[str]:
    """Tokens a second and memory of a model that `make` makes, the same at every call: dense and packed."""
    found, cuda, model, first = kernels(device), device.type == "cuda", None, None
    for kind in END_TO_END:
        model = None  # so that no two are there at once
        if cuda:
            torch.cuda.empty_cache()
        model = make()
        if first is None:
            size = sum(parameter.numel() for parameter in model.parameters())
            yield f"{size / 1e9:.2f} B random weights, {model.dtype}, batch 1, {prompt.shape[1]} tokens before"
        taken = pack(model, kind)
        # Without kernels, unpacking asks for numbers on the way, which a graph cannot.
        graph = cuda and (kind == "dense" or found is not None)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        speed, text = tokens_per_second(model, prompt.to(device), 64 if graph or not cuda else 8, graph)
        first = first or speed
        memory = f"{torch.cuda.max_memory_allocated(device) / MB:.0f} MB at most" if cuda else "a CPU"
        yield (
            f"{kind:<9} {speed:8.1f} tokens/s  {speed / first:5.2f} x dense  matrices {taken / MB:.1f} MB, {memory}"
            f"{', one graph a token' if graph else ''}; wrote {text[0, :4].tolist()}"
        )
