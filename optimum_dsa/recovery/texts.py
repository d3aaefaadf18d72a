"""What recovery trains on and is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..common.token_rows import as_tensors
from ..data import Passed, check_tokens, default_length, describe, first_windows, starts_with_bos
from .configuration import RecoveryConfig


def read_windows(
    model: nn.Module, tokenizer: Any, train: Any, validation: Any, config: RecoveryConfig
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Training windows, validation windows, (samples, length) int64 each, and facts of both.

    Raises:
        ValueError: too little text, no tokenizer for text, or tokens that the model does not know.
    """
    wanted = (config.data.num_samples or config.windows) + (config.validation_windows if validation is None else 0)
    train, validation, passed = as_tensors(train), as_tensors(validation), Passed()
    windows = _read(model, tokenizer, train, config, wanted, passed)
    if validation is not None:
        held_out = _read(model, tokenizer, validation, config, config.validation_windows, Passed(), beside=True)
    elif len(windows) > config.validation_windows:
        # the last of the text, not windows between those that are trained on
        held_out = windows[-config.validation_windows :]
        windows = windows[: -config.validation_windows]
    else:
        raise ValueError(
            f"{describe(train)} holds {len(windows)} windows of {windows.shape[1]} tokens, and "
            f"{config.validation_windows} of them would be for validation; give more text, validation text, or a "
            "smaller validation_windows."
        )
    data = {
        "train": describe(train) if not isinstance(train, Tensor) else "tensor",
        "validation": "end of train" if validation is None else describe(validation),
        "windows": len(windows),
        "validation_windows": len(held_out),
        "sequence_length": windows.shape[1],
        "tokens": config.windows * windows.shape[1],
    }
    if not isinstance(train, Tensor) and not passed.token_rows:
        data["bos"] = starts_with_bos(tokenizer, config.data.bos)
    return windows, held_out, data | passed.facts()


def _read(
    model: nn.Module,
    tokenizer: Any,
    source: Any,
    config: RecoveryConfig,
    wanted: int,
    passed: Passed,
    beside: bool = False,
) -> Tensor:
    """At most `wanted` windows, (samples, length) int64, in the order of the text; `beside` that of training."""
    if isinstance(source, Tensor):
        check_tokens(source, model)
        return source.long()
    if isinstance(source, Mapping) and isinstance(next(iter(source.values()), None), Tensor):
        raise ValueError(f"Training takes text or token ids, and the inputs are {sorted(source)}; give ids.")
    data = config.data.beside(source) if beside else config.data
    length = config.data.sequence_length or default_length(model)
    reading = replace(data.reading(), passed=passed)
    keeps_rows = data.sequence_length is None
    windows = first_windows(source, tokenizer, length, wanted, reading, data.bos, keeps_rows)
    if len(windows) == 0:
        raise ValueError(f"{describe(source)} holds 0 windows of {length} tokens; give more text or shorter windows.")
    check_tokens(windows, model)
    return windows
