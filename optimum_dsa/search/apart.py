"""Whether validation is text that calibration has not seen."""

from __future__ import annotations

import logging

from torch import Tensor

from ..common.apart import FEW, shared_windows
from ..pruning.calibration import Calibration


logger = logging.getLogger(__name__)


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
