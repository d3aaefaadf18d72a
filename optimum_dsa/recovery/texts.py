"""What recovery trains on and is measured on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..common.apart import FEW, same_source, shared_windows
from ..common.frame import Frame, frame_of
from ..common.token_rows import as_tensors, is_inputs
from ..data import Passed, describe, first_windows, is_mixture, starts_with_bos
from ..model.examples import PREDICTS, check_predicts_tokens
from ..model.inputs import check_length, check_tokens, default_length, kind_of
from .configuration import RecoveryConfig


logger = logging.getLogger(__name__)

END_OF_TRAIN = "end of train"  # where no text was given for validation
_SEEN = (
    "what was trained on tells nothing of other text. Give another text for validation, or none: then the end of the "
    "training text is kept back."
)


def read_windows(
    model: nn.Module, tokenizer: Any, train: Any, validation: Any, config: RecoveryConfig
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Training windows, validation windows, (samples, length) int64 each, and facts of both.

    Raises:
        ValueError: too little text, no tokenizer for text, tokens that the model does not know, or text for
            validation that is trained on.
    """
    predicted = PREDICTS[check_predicts_tokens(model, tokenizer, "train")]
    if any(same_source(one, validation) for one in (train if is_mixture(train) else [train])):
        raise ValueError(f"{describe(train)} is given for training and for validation: {_SEEN}")
    wanted = (config.data.num_samples or config.windows) + (config.validation_windows if validation is None else 0)
    train, validation, passed = as_tensors(train), as_tensors(validation), Passed()
    windows = _read(model, tokenizer, train, config, wanted, passed)
    if validation is not None:
        most = config.validation_windows
        held_out = _read(model, tokenizer, validation, config, most, Passed(), beside=True)[:most]
        _check_apart(windows, held_out)
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
        "validation": END_OF_TRAIN if validation is None else describe(validation),
        "windows": len(windows),
        "validation_windows": len(held_out),
        "sequence_length": windows.shape[1],
        "tokens": config.windows * windows.shape[1],
    }
    if predicted is not None:
        data["predicted"] = predicted
    if not isinstance(train, Tensor) and not passed.token_rows:
        data["bos"] = starts_with_bos(tokenizer, config.data.bos)
    return windows, held_out, data | passed.facts()


def _check_apart(windows: Tensor, held_out: Tensor) -> None:
    """Raise `ValueError` where `held_out` windows are trained on, (samples, length) each; warn where a few are."""
    shared = shared_windows(windows, held_out)
    if not shared:
        return
    found = f"{shared} of {len(held_out)} validation windows are training windows as well"
    if shared > FEW * len(held_out):
        raise ValueError(f"{found}: {_SEEN}")
    logger.warning("%s; give another text for validation where that is not by chance.", found)


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
    if is_inputs(source):
        raise ValueError(f"Training takes text or token ids, and the inputs are {sorted(source)}; give ids.")
    data = config.data.beside(source) if beside else config.data
    length = config.data.sequence_length or default_length(model)
    check_length(length, model)  # before any text is read
    frame = frame_of(tokenizer) if kind_of(model) != "causal" and data.bos is None and tokenizer else Frame()
    reading, rows = replace(data.reading(), passed=passed), passed.token_rows
    bos = False if frame else data.bos
    keeps_rows = data.sequence_length is None
    windows = first_windows(source, tokenizer, length - len(frame), wanted, reading, bos, keeps_rows)
    if passed.token_rows == rows:
        windows = frame.around(windows)
    if len(windows) == 0:
        raise ValueError(f"{describe(source)} holds 0 windows of {length} tokens; give more text or shorter windows.")
    check_tokens(windows, model)
    return windows
