"""Scores in bins that need no range beforehand: the leading bits of a float32."""

from __future__ import annotations

import torch
from torch import Tensor


BINS = 1 << 16  # whose edges are 0.4 % apart


def score_bins(scores: Tensor) -> Tensor:
    """The bin of every score, of any shape: (scores,) int32. Scores are float32 and not negative."""
    # without a sign, the order of the numbers is that of their bits
    return scores.flatten().view(torch.int32) >> 15


def score_histogram(scores: Tensor) -> Tensor:
    """How many of the scores, of any shape, are in each bin: (`BINS`,) int64."""
    return score_bins(scores).bincount(minlength=BINS)
