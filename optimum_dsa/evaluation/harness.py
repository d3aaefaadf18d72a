"""A model as lm-eval runs it: where its inputs lie, how many go at once, how far it is, what the next one can use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..common.fences import has_device_map
from ..common.machine import memory_available
from ..common.progress import Progress


# Windows or questions in a forward pass: on a CPU more are no faster.
MOST = {"cpu": 16, "cuda": 64}
SHARE = 4  # of the memory that is free, one part in so many is for a batch: the estimate is rough


def fitting(batch_size: int | str, model: nn.Module, length: int) -> int:
    """How many windows of `length` tokens go into a forward pass; for "auto" as many as are sure to fit, a power of 2.

    What a token takes is estimated: its logits, once in the model's dtype and once in float32, and 16 hidden states,
    which are the widest products of a block.
    """
    if batch_size != "auto":
        return int(batch_size)
    device, config = place_of(model), model.config.get_text_config()
    itemsize = torch.empty((), dtype=model.dtype).element_size()
    token = getattr(config, "vocab_size", 0) * (4 + itemsize) + 16 * getattr(config, "hidden_size", 1024) * itemsize
    fit = memory_available(str(device)) // SHARE // (length * token)
    most = MOST.get(device.type, MOST["cpu"])
    return 1 << (max(1, min(most, fit)).bit_length() - 1)


def place_of(model: nn.Module) -> torch.device:
    """Where inputs of a model go; where its weights are on the disk, it calls no device its own."""
    return torch.device("cpu") if has_device_map(model) else model.device


def wrapped(model: nn.Module, tokenizer: Any, batch_size: int | str, length: int, bos: bool | None = None) -> Any:
    """The model and its tokenizer as lm-eval's `HFLM`, with a `Progress` that says how much time is left.

    Args:
        batch_size: requests in a forward pass, or "auto": on a GPU as lm-eval finds by trying, longest requests first;
            elsewhere as `fitting` estimates, since a CPU that runs out of memory ends the process.
        length: longest input in tokens.
    """
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    place = place_of(model)
    tries = batch_size == "auto" and place.type == "cuda"

    class Placed(HFLM):
        """lm-eval's wrapper, with inputs put where the model takes them."""

        device = property(lambda self: place)

        def loglikelihood(self, requests, disable_tqdm=False):
            return self._shown(super().loglikelihood, requests)

        def generate_until(self, requests, disable_tqdm=False):
            return self._shown(super().generate_until, requests)

        def _shown(self, run: Callable, requests: Sequence[Any]) -> list:
            with Counted([request.args for request in requests]) as counted:
                self.set_cache_hook(counted)  # it is told of every answer
                try:
                    return run(requests, disable_tqdm=True)
                finally:
                    self.set_cache_hook(CacheHook(None))

    return Placed(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size="auto" if tries else fitting(batch_size, model, length),
        max_length=length,
        device=str(place),
        **({} if bos is None else {"add_bos_token": bos}),
    )


class Counted(Progress):
    """How far lm-eval is with its requests, by the length of their texts: it begins with the longest.

    Args:
        requests: arguments of each: a context, and what is to follow or how to generate.
    """

    def __init__(self, requests: Iterable[tuple]):
        super().__init__("Tasks", 100, "%", "optimum_dsa.evaluate")
        self._whole = max(1, sum(map(_size, requests)))
        self._part = 0

    def add_partial(self, attr: str, req: tuple, res: Any) -> None:
        """A request has its answer; lm-eval calls it as it would a cache of answers."""
        self._part = min(self._whole, self._part + _size(req))
        self.show(100 * self._part // self._whole)


def _size(request: tuple) -> int:
    """The time that a request takes, as characters that are read; what is written is not known yet."""
    return sum(len(part) for part in request if isinstance(part, str)) + 1


@contextmanager
def requests_kept(folder: str | None) -> Iterator[dict[str, bool]]:
    """The options of lm-eval that keep requests in a folder, for the next model; none where there is no folder.

    lm-eval tells requests apart by the task's name alone, so that a folder is to serve one set of tasks.
    """
    if folder is None:
        yield {}
        return
    from lm_eval.caching import cache

    before = cache.PATH
    cache.PATH = folder
    try:
        yield {"cache_requests": True}
    finally:
        cache.PATH = before


@contextmanager
def no_repository() -> Iterator[None]:
    """Keeps lm-eval from asking git for the commit that one stands in: elsewhere git complains on the terminal."""
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


@contextmanager
def no_bars() -> Iterator[None]:
    """Keeps tqdm from drawing: how far lm-eval is, `Counted` says, and the command whether it is said at all."""
    from tqdm import tqdm

    before = tqdm.__init__

    def silent(self, *args, **kwargs):
        before(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = before


@contextmanager
def beside(folder: str | os.PathLike | None) -> Iterator[None]:
    """In a folder, or where we are: data sets find files that are named without their folder."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def own_folder() -> tempfile.TemporaryDirectory:
    """A folder that goes when nothing speaks of it any more."""
    return tempfile.TemporaryDirectory(prefix="optimum-dsa-requests-")
