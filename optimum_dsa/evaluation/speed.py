"""How fast a causal model reads and writes, and what it takes: measured, and beside another in one run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..common.columns import columns
from ..common.machine import shown_bytes
from ..model.adapters import inner_model
from ..model.inputs import check_length, kind_of, word_embeddings
from ..model.parameters import count_parameters


_CACHES = ("cache", "past_key_values")  # what a model's cache is called in newer releases, and in older ones


@dataclass(frozen=True)
class Speed:
    """What one model took. Rates are of the fastest of some rounds.

    Attributes:
        model (`str`): how it is called.
        prefill (`float`): tokens of a prompt read in a second.
        decode (`float`): tokens written in a second, one after the other.
        parameters (`int`): without what is tied counted twice.
        weight_bytes (`int`): what parameters and buffers take in memory.
        flops (`int`): floating point operations for a token of the prompt, as PyTorch counts them: products of zeros
            are counted as well.
        cache_bytes (`int`, *optional*): what the cache of keys and values takes for a token; `None` where it is not
            made of them.
        peak_bytes (`int`, *optional*): the most that was taken on a GPU; `None` on a CPU, which does not tell.
    """

    model: str
    prefill: float
    decode: float
    parameters: int
    weight_bytes: int
    flops: int
    cache_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class SpeedComparison:
    """Models measured in turn, in one process, so that whatever else the machine does slows all of them.

    Attributes:
        speeds (`Mapping[str, Speed]`): by name; others are held against the first.
        prompt, new_tokens, batch_size, rounds: how it was measured.
        threads (`int`): of PyTorch, on a CPU.
        device, dtype (`str`): of the first.
    """

    speeds: Mapping[str, Speed]
    prompt: int
    new_tokens: int
    batch_size: int
    rounds: int
    threads: int
    device: str
    dtype: str

    def __str__(self) -> str:
        first, *others = self.speeds.values()
        lines = [("", *(speed.model for speed in self.speeds.values()), *(["ratio"] if len(others) == 1 else []))]
        for label, value, show in _ROWS:
            found = [value(speed) for speed in self.speeds.values()]
            if any(each is None for each in found):
                continue
            ratio = [f"{found[0] / found[1]:.2f}"] if len(others) == 1 and found[1] else [""] * (len(others) == 1)
            lines.append((label, *map(show, found), *ratio))
        how = f"prompt {self.prompt}, {self.new_tokens} new tokens, batch {self.batch_size}, best of {self.rounds}"
        where = f"{self.device}, {self.dtype}" + (f", {self.threads} threads" if self.device == "cpu" else "")
        return "\n".join([*columns(lines), f"{how}; {where}"])


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else _whole(value)


_ROWS: tuple[tuple[str, Callable[[Speed], Any], Callable[[Any], str]], ...] = (
    ("prefill, tokens/s", lambda speed: speed.prefill, _rate),
    ("decode, tokens/s", lambda speed: speed.decode, _rate),
    ("parameters", lambda speed: speed.parameters, _whole),
    ("weights", lambda speed: speed.weight_bytes, shown_bytes),
    ("cache, bytes a token", lambda speed: speed.cache_bytes, _whole),
    ("FLOPs a token", lambda speed: speed.flops, _whole),
    ("peak memory", lambda speed: speed.peak_bytes, shown_bytes),
)


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    rounds: int = 5,
    seed: int = 0,
) -> SpeedComparison:
    """Tokens a second of causal models, in reading a prompt and in writing with their caches.

    Args:
        models (`Mapping[str, nn.Module]`): by the name that the result has; each is run once before it is timed, and
            then all in turn.
        prompt (`int`, defaults to 512): tokens that are read.
        new_tokens (`int`, defaults to 64): tokens that are written then, whichever they are.
        batch_size (`int`, defaults to 1): sequences at a time.
        rounds (`int`, defaults to 5): of which the fastest counts.
        seed (`int`, defaults to 0): of the tokens that are read.

    Raises:
        ValueError: a model that is not causal, or has no room for so many tokens; a number that is none.
    """
    numbers = {"prompt": prompt, "new_tokens": new_tokens, "batch_size": batch_size, "rounds": rounds}
    for name, value in numbers.items():
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
    if not models:
        raise ValueError("Name a model to measure.")
    for name, model in models.items():
        _check(name, model, prompt + new_tokens)
    runs = {name: _Run(model, prompt, new_tokens, batch_size, seed) for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = run.once()
            if number:  # the first warms up
                times[name].append(taken)
    first = next(iter(models.values()))
    speeds = {}
    for name, run in runs.items():
        read, written = (min(each) for each in zip(*times[name]))
        speeds[name] = run.speed(name, batch_size * prompt / read, batch_size * new_tokens / written)
    device, dtype = first.device, str(first.dtype).removeprefix("torch.")
    return SpeedComparison(speeds, prompt, new_tokens, batch_size, rounds, torch.get_num_threads(), device.type, dtype)


def _check(name: str, model: nn.Module, length: int) -> None:
    if kind_of(model) != "causal":
        raise ValueError(f"{name} is a {type(inner_model(model)).__name__}, and only causal models write on.")
    check_length(length, model)


class _Run:
    """One model, and what it is timed on."""

    def __init__(self, model: nn.Module, prompt: int, new_tokens: int, batch_size: int, seed: int):
        self.model, self.new_tokens = model.eval(), new_tokens
        vocabulary = getattr(word_embeddings(model), "num_embeddings", 2)
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(vocabulary, (batch_size, prompt), generator=generator).to(model.device)
        # Logits of the last token alone, where a class can be asked for them: writing needs no others.
        accepted = inspect.signature(inner_model(model).forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.known = _CACHES[0] if _CACHES[0] in accepted else _CACHES[1]
        self.peak, self.cache = None, None

    @torch.inference_mode()
    def once(self) -> tuple[float, float]:
        """Seconds of reading the prompt, and of writing."""
        gpu = self.model.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        start = self._now()
        output = self.model(self.tokens, use_cache=True, **self.options)
        read = self._now()
        for _ in range(self.new_tokens):
            latest = output.logits[:, -1:].argmax(dim=-1)
            known = {self.known: self._cache_of(output)}
            output = self.model(latest, use_cache=True, **known, **self.options)
        written = self._now()
        self.cache = _cache_bytes(self._cache_of(output), self.tokens.shape[1] + self.new_tokens)
        if gpu:
            self.peak = torch.cuda.max_memory_allocated(self.model.device)
        return read - start, written - read

    def _cache_of(self, output: Any) -> Any:
        """What a model keeps of the tokens that it has seen."""
        found = [kept for name in _CACHES if (kept := getattr(output, name, None)) is not None]
        if not found:
            raise ValueError(f"{type(self.model).__name__} gives no cache, so it cannot write token after token.")
        return found[0]

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def speed(self, name: str, prefill: float, decode: float) -> Speed:
        # The fused kernels of attention are not counted everywhere; the plain products are.
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
            self.model(self.tokens, use_cache=False, **self.options)
        held = {id(value): value for value in (*self.model.parameters(), *self.model.buffers())}
        return Speed(
            name,
            prefill,
            decode,
            count_parameters(self.model),
            sum(value.nbytes for value in held.values()),
            counter.get_total_flops() // self.tokens.numel(),
            self.cache,
            self.peak,
        )


def _cache_bytes(cache: Any, length: int) -> int | None:
    """Bytes for a token of one sequence in a cache that has seen `length` of them."""
    layers = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ()) if hasattr(layer, "keys")]
    tensors = [value for pair in layers for value in pair if isinstance(value, Tensor)]
    if not tensors:
        return None
    return sum(value.nbytes for value in tensors) // (tensors[0].shape[0] * length)
