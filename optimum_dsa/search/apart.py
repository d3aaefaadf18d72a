"""Whether validation is text that calibration has not seen."""

from __future__ import annotations

import logging

from torch import Tensor

from ..pruning.calibration import Calibration


logger = logging.getLogger(__name__)

FEW = 0.05  # share of the validation windows up to which shared ones are warned of: texts repeat themselves


def check_apart(calibration: Calibration | None, validation: Tensor) -> None:
    """Raise `ValueError` where calibration windows are used for validation; warn where a few are.

    `validation` is (windows, length). Windows of two lengths are compared in pieces of the shorter one.
    """
    known = None if calibration is None else calibration.inputs.get("input_ids")
    if known is None:
        return
    length = min(known.shape[1], validation.shape[1])
    seen = {piece for window in known for piece in _pieces(window, length)}
    shared = sum(any(piece in seen for piece in _pieces(window, length)) for window in validation)
    if not shared:
        return
    found = f"{shared} of {len(validation)} validation windows are calibration windows as well"
    if shared > FEW * len(validation):
        raise ValueError(
            f"{found}: candidates would be judged on the text that their scores are from. Give another text for "
            "validation, or none: then other windows of the calibration text are taken."
        )
    logger.warning("%s; give another text for validation where that is not by chance.", found)


def _pieces(window: Tensor, length: int) -> list[bytes]:
    """The whole pieces of a window, (length of the window,), as bytes that can be looked up in a set."""
    # In one dtype: equal tokens may come as int32 and as int64.
    return [piece.long().cpu().numpy().tobytes() for piece in window.split(length) if len(piece) == length]
