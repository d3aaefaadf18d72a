"""Calibration, and validation on text that calibration has not seen."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..common.apart import FEW, shared_windows
from ..common.token_rows import as_tensors, is_inputs
from ..data import SAMPLES, DataConfig
from ..pruning.calibration import Calibration, load_calibration


logger = logging.getLogger(__name__)


def load_apart(
    model: nn.Module, tokenizer: Any, calibration: Any, validation: Any, data: DataConfig
) -> tuple[Calibration, Tensor]:
    """What calibrates, and windows to judge by, (windows, length): of `validation`, or others of the calibration.

    Raises:
        ValueError: as `load_calibration`; pictures, or tensors for calibration and nothing for validation.
    """
    if data.image_column is not None:
        raise ValueError("A search compares predictions of text; leave image_column out, or name an allocation.")
    if not data.packing:
        raise ValueError("A search compares predictions on windows of one length; leave packing=False out.")
    if validation is not None:
        found = load_calibration(calibration, model, tokenizer, data)
        return found, load_calibration(validation, model, tokenizer, data.beside(validation)).inputs["input_ids"]
    if is_inputs(calibration := as_tensors(calibration)):
        raise ValueError("Give validation text or tokens: calibration inputs given as tensors are used whole.")
    number = data.num_samples or SAMPLES
    drawn = load_calibration(calibration, model, tokenizer, replace(data, num_samples=2 * number))
    windows = drawn.inputs.get("input_ids")
    if windows is None or len(drawn.inputs) > 1:
        raise ValueError(f"A search compares predictions of text, and the inputs are {sorted(drawn.inputs)[:5]}.")
    return replace(drawn, inputs={"input_ids": windows[:number]}), windows[number:]


def check_apart(calibration: Calibration | None, validation: Tensor) -> None:
    """Raise `ValueError` where calibration windows are used for validation; warn where a few are.

    `validation` is (windows, length). Windows of two lengths are compared in pieces of the shorter one.
    """
    known = None if calibration is None else calibration.inputs.get("input_ids")
    if known is None:
        return
    shared = shared_windows(known, validation)
    if not shared:
        return
    found = f"{shared} of {len(validation)} validation windows are calibration windows as well"
    if shared > FEW * len(validation):
        raise ValueError(
            f"{found}: candidates would be judged on the text that their scores are from. Give another text for "
            "validation, or none: then other windows of the calibration text are taken."
        )
    logger.warning("%s; give another text for validation where that is not by chance.", found)
