"""How fast a causal model reads and writes, and what it takes: measured, and beside another in one run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ..common.machine import lying_in_files, machine_name, settled_memory
from ..model.adapters import inner_model
from ..model.inputs import check_length, kind_of, word_embeddings
from .reading import Memory, held, packed_bytes, weights_in, weights_read
from .speed_result import Speed, SpeedComparison


_CACHES = ("cache", "past_key_values")  # what a model's cache is called in newer releases, and in older ones


def measure_speed(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]],
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    rounds: int = 5,
    seed: int = 0,
) -> SpeedComparison:
    """Tokens a second of causal models, in reading a prompt and in writing with their caches.

    Args:
        models (`Mapping[str, nn.Module | Callable[[], nn.Module]]`): by the name that the result has; or what loads
            one, so that the memory that it takes is measured as well. Each is run once before it is timed, and then
            all in turn.
        prompt (`int`, defaults to 512): tokens that are read.
        new_tokens (`int`, defaults to 64): tokens that are written then, whichever they are.
        batch_size (`int`, defaults to 1): sequences at a time.
        rounds (`int`, defaults to 5): of which the fastest counts. In each the machine's memory is measured as well.
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
    runs: dict[str, _Run] = {}
    if any(not isinstance(model, nn.Module) for model in models.values()):
        _import_all()
    for name, model in models.items():
        before = None
        if not isinstance(model, nn.Module):
            before, model = settled_memory(), model()
        _check(name, model, prompt + new_tokens)
        runs[name] = _Run(model, prompt, new_tokens, batch_size, seed)
        runs[name].once()  # warms up
        if before is not None and model.device.type == "cpu":
            own = max(settled_memory() - before, 0)
            runs[name].resident = own + lying_in_files(held(model).values())
    first = next(iter(runs.values())).model
    memory = Memory(first.device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        memory.measure()
        for name, run in runs.items():
            times[name].append(run.once())
    speeds = {}
    for name, run in runs.items():
        read, written = (min(each) for each in zip(*times[name]))
        speeds[name] = run.speed(name, batch_size * prompt / read, batch_size * new_tokens / written)
    device, dtype = first.device, str(first.dtype).removeprefix("torch.")
    return SpeedComparison(
        speeds,
        prompt,
        new_tokens,
        batch_size,
        rounds,
        torch.get_num_threads(),
        device.type,
        dtype,
        memory.bandwidth,
        machine_name(device),
        datetime.now(timezone.utc).date().isoformat(),
    )


def _import_all() -> None:
    """Run a model of nothing, so that what is imported and set up then is in no model's memory."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng([]):  # it draws weights
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    _Run(model, prompt=2, new_tokens=1, batch_size=1, seed=0).once()


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
        self.peak, self.cache, self.resident = None, None, None

    @torch.inference_mode()
    def once(self) -> tuple[float, float]:
        """Seconds of reading the prompt, and of writing."""
        gpu = self.model.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
            others = torch.cuda.memory_allocated(self.model.device) - self._weight_bytes()
        start = self._now()
        output = self.model(self.tokens, use_cache=True, **self.options)
        read = self._now()
        for _ in range(self.new_tokens):
            latest = output.logits[:, -1:].argmax(dim=-1)
            known = {self.known: self._cache_of(output)}
            output = self.model(latest, use_cache=True, **known, **self.options)
        written = self._now()
        self.cache = _cache_bytes(self._cache_of(output), self.tokens.shape[1] + self.new_tokens)
        if gpu:  # what other models hold meanwhile is not its own
            self.peak = torch.cuda.max_memory_allocated(self.model.device) - others
        return read - start, written - read

    def _weight_bytes(self) -> int:
        return sum(value.nbytes for value in held(self.model).values())

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
        batch, length = self.tokens.shape
        # A cache grows while it is read: on average to half of what is written.
        cache = (self.cache or 0) * (length + self.new_tokens / 2)
        return Speed(
            name,
            prefill,
            decode,
            weights_in(self.model),
            self._weight_bytes(),
            counter.get_total_flops() // self.tokens.numel(),
            self.cache,
            self.peak,
            round(weights_read(self.model, batch) / batch + cache),
            packed_bytes(self.model),
            self.resident,
        )


def _cache_bytes(cache: Any, length: int) -> int | None:
    """Bytes for a token of one sequence in a cache that has seen `length` of them."""
    layers = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ()) if hasattr(layer, "keys")]
    tensors = [value for pair in layers for value in pair if isinstance(value, Tensor)]
    if not tensors:
        return None
    return sum(value.nbytes for value in tensors) // (tensors[0].shape[0] * length)
