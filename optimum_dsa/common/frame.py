"""What a tokenizer puts around a text by itself: [CLS] and [SEP] of a BERT, the end-of-text of a T5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Token ids that stand before and behind the text of every window.

    Models that were trained on framed texts are out of their depth without. `len` is how many there are.
    """

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.behind)

    def around(self, windows: Tensor) -> Tensor:
        """`windows`, (samples, length) int64, in the frame: (samples, length + len(self))."""
        parts = [torch.tensor(ids, dtype=torch.long).expand(len(windows), -1) for ids in (self.before, self.behind)]
        return torch.cat([parts[0], windows, parts[1]], 1)


def frame_of(tokenizer: Any) -> Frame:
    """The frame that `tokenizer` puts around one text, by what it does."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return Frame(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    return Frame()
