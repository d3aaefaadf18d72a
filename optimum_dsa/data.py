"""Texts, files and datasets -> token windows; disjoint parts for calibration, validation and test."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .common.registry import near
from .common.settings import check_settings, setting
from .common.texts import DATASETS, check_source, describe, iterate_texts  # noqa: F401 - the door of reading


logger = logging.getLogger(__name__)

SAMPLES = 128  # sequences of calibration where nobody says how many

# Windows are drawn from the first POOL times as many as are asked for: enough to be mixed, bounded for any corpus.
POOL = 8

# How windows are cut: a BOS before each, or one before the whole text, as in the code behind published figures.
CUTS = ("each", "paper")


@dataclass(frozen=True)
class DataConfig:
    """Which text is taken, and how it becomes windows of tokens.

    Args:
        num_samples (`int`, *optional*): Sequences to take from a text source. By default 128 for calibration, and as
            many as the steps need for training.
        sequence_length (`int`, *optional*): Tokens per sequence. Defaults to the model's longest, at most 2048.
        text_column (`str`, defaults to `"text"`): The column of a dataset that holds the text.
        split (`str`, *optional*): The split of a named dataset. Defaults to `"train"`.
        image_column (`str`, *optional*): The column of a dataset that holds pictures, `"image"` of a folder of them;
            the text column is then what is said of each.
        bos (`bool`, *optional*): Whether each sequence starts with the tokenizer's beginning-of-sequence token. By
            default where the tokenizer adds it.
        seed (`int`, defaults to 0): Which sequences are taken.
    """

    num_samples: int | None = setting(None, low=1)
    sequence_length: int | None = setting(None, low=2)
    text_column: str = "text"
    split: str | None = None
    image_column: str | None = None
    bos: bool | None = None
    seed: int = setting(0, low=0)

    def __post_init__(self):
        check_settings(self)


DEFAULT = DataConfig()


def load_tokens(
    source: Any,
    tokenizer: Any,
    *,
    num_samples: int | None = None,
    sequence_length: int = 2048,
    seed: int = 0,
    text_column: str = "text",
    split: str | None = None,
    bos: bool | None = None,
    windows: str = "each",
) -> Tensor:
    """Non-overlapping windows of the source's text, LongTensor (samples, sequence_length).

    Texts are joined, with the tokenizer's end-of-text token between them. With `num_samples`, that many windows are
    drawn in an order that `seed` decides; without, all windows are taken in the order of the text.

    Args:
        bos (`bool`, *optional*): whether the tokenizer's beginning-of-sequence token stands in front, counted in the
            length; by default where the tokenizer adds it by itself.
        windows (`str`, defaults to `"each"`): in front of what it stands: of `"each"` window, or, as `"paper"`, once
            of the whole text, whose rows are then joined by two line breaks, the empty ones too, with no end-of-text
            between them. The second reproduces published perplexities, and takes the whole text.

    Raises:
        ValueError: the text holds fewer windows than were asked for; no beginning-of-sequence token to put in front.
    """
    check_cut(windows, num_samples)
    bos = starts_with_bos(tokenizer, bos)
    texts = iterate_texts(source, text_column, split)
    if windows == "paper":
        found = _paper_windows(texts, tokenizer, sequence_length, bos)
    else:
        found = cut_windows(
            texts, tokenizer, sequence_length, None if num_samples is None else num_samples * POOL, bos
        )
    needed = 1 if num_samples is None else num_samples
    if len(found) < needed:
        raise ValueError(
            f"{describe(source)} holds {len(found)} windows of {sequence_length} tokens, and {needed} are needed; "
            "give more text, or a smaller num_samples or sequence_length."
        )
    if num_samples is None:
        return found
    # On the CPU by a generator of its own: the same windows on every machine, and no global seed is touched.
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return found[order[:num_samples]]


def check_cut(windows: str, num_samples: int | None) -> None:
    """Raise `ValueError` unless `windows` is one of `CUTS`, and can be had of so many windows (`None`: of all)."""
    if windows not in CUTS:
        raise ValueError(f"windows is one of {', '.join(CUTS)}, got {windows!r}.{near(str(windows), CUTS)}")
    if windows == "paper" and num_samples is not None:
        raise ValueError(
            f"windows='paper' measures the whole text, as published figures do; leave out num_samples={num_samples}."
        )


def starts_with_bos(tokenizer: Any, bos: bool | None = None) -> bool:
    """Whether windows of text start with the tokenizer's beginning-of-sequence token: as asked, or as it does itself.

    Models that were trained with the token in front of every text are out of their depth without it: some put most of
    their attention there, and a perplexity without it says little of them.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        # by what it does: neither its class nor a setting such as add_bos_token tells what a post-processor adds
        def begins(special: bool) -> bool:
            return tokenizer("a", add_special_tokens=special)["input_ids"][:1] == [token]

        return token is not None and begins(True) and not begins(False)
    if bos and token is None:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__}) has no beginning-of-sequence token; leave out bos={bos}."
        )
    return bool(bos)


def fingerprint(tokens: Tensor) -> str:
    """16 letters that tell one set of windows, (samples, length), from another: text, tokenizer and cut together."""
    content = tokens.long().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + content).hexdigest()[:16]


def split_windows(windows: Tensor, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Disjoint parts of `windows`, (samples, length), of the given sizes: name -> (size, length), drawn by `seed`.

    Raises:
        ValueError: the sizes add up to more windows than there are.
    """
    if sum(sizes.values()) > len(windows):
        raise ValueError(f"{dict(sizes)} needs {sum(sizes.values())} windows, and there are {len(windows)}.")
    order = iter(torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist())
    return {name: windows[list(islice(order, size))] for name, size in sizes.items()}


def cut_windows(
    texts: Iterable[str], tokenizer: Any, length: int, wanted: int | None = None, bos: bool = False
) -> Tensor:
    """At most `wanted` windows, LongTensor (samples, length), of the joined texts; with `bos`, it stands in front."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = _text_tokens(length, bos)
    ids: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        if ids:
            ids += separator
        # Without: special tokens are put in where they are asked for, and once.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # A corpus may be larger than the disk: it is streamed, and read no further than needed.
        if wanted is not None and len(ids) >= wanted * size:
            break
    count = len(ids) // size if wanted is None else min(len(ids) // size, wanted)
    found = torch.tensor(ids[: count * size], dtype=torch.long).view(count, size)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), found], 1) if bos else found


def _text_tokens(length: int, bos: bool) -> int:
    """How many tokens of text a window of `length` tokens holds."""
    if length <= bos:
        raise ValueError(f"A window of {length} tokens has no room for text behind its BOS; use longer ones, or none.")
    return length - bos


def _paper_windows(texts: Iterable[str], tokenizer: Any, length: int, bos: bool) -> Tensor:
    """Windows, (samples, length), of the whole text as published code cuts it; it is tokenized in one piece."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids] if bos else ids
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)
