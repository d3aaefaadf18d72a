"""Texts, files and datasets -> token windows; disjoint parts for calibration, validation and test."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .common.frame import Frame
from .common.registry import near
from .common.settings import check_settings, setting
from .common.texts import (  # noqa: F401 - the door of reading
    DATASETS,
    Passed,
    Reading,
    check_source,
    describe,
    is_mixture,
    is_text_file,
    iterate_texts,
    names_dataset,
    read_items,
)
from .common.values import is_number
from .common.windows import cut_windows, paper_windows, separate, shares, spread, whole_rows


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
        text_column (`str`, defaults to `"text"`): The column of a dataset that holds the text or the conversation.
            Where there is no `"text"`, conversations are looked for in `messages`, `conversations`, and `prompt` with
            `completion`.
        split (`str`, *optional*): The split of a named dataset, or rows of it as in `"train[:50]"`. Defaults to
            `"train"`.
        subset (`str`, *optional*): The configuration of a dataset that has several.
        image_column (`str`, *optional*): The column of a dataset that holds pictures, `"image"` of a folder of them;
            the text column is then what is said of each.
        packing (`bool`, defaults to `True`): Whether texts and conversations are joined and cut into sequences of one
            length. Otherwise each is a sequence of its own in calibration, cut behind `sequence_length` and padded;
            padding does not count.
        bos (`bool`, *optional*): Whether each sequence starts with the tokenizer's beginning-of-sequence token. By
            default where the tokenizer adds it.
        seed (`int`, defaults to 0): Which sequences are taken.
    """

    num_samples: int | None = setting(None, low=1)
    sequence_length: int | None = setting(None, low=2)
    text_column: str = "text"
    split: str | None = None
    subset: str | None = None
    image_column: str | None = None
    packing: bool = True
    bos: bool | None = None
    seed: int = setting(0, low=0)

    def __post_init__(self):
        check_settings(self)
        self.reading().parts  # noqa: B018 - what is no split is refused here

    def reading(self, otherwise: str | None = None) -> Reading:
        """How a source is read; `otherwise` is the split where none is named."""
        return Reading(self.text_column, self.split, self.subset, otherwise)

    def beside(self, source: Any) -> DataConfig:
        """The settings by which a second source, such as validation text, is read: a file of its own, whole."""
        column = DataConfig.text_column if is_text_file(source) else self.text_column
        return self if names_dataset(source) else replace(self, split=None, subset=None, text_column=column)


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
    subset: str | None = None,
    bos: bool | None = None,
    windows: str = "each",
    reading: Reading | None = None,
    keeps_rows: bool = True,
) -> Tensor:
    """Non-overlapping windows of the source's text, LongTensor (samples, sequence_length).

    Texts are joined, with the tokenizer's end-of-text token between them; conversations as its chat template writes
    them. With `num_samples`, that many windows are drawn in an order that `seed` decides; without, all windows are
    taken in the order of the text.

    Args:
        source (`Any`): texts, a path, a dataset or its name, a DataLoader or rows of token ids; or a mapping of
            several to their weights, as in `{"wikitext2": 3, "code.jsonl": 1}`: each gives its share of the windows.
        bos (`bool`, *optional*): whether the tokenizer's beginning-of-sequence token stands in front, counted in the
            length; by default where the tokenizer adds it by itself.
        windows (`str`, defaults to `"each"`): in front of what it stands: of `"each"` window, or, as `"paper"`, once
            of the whole text, whose rows are then joined by two line breaks, the empty ones too, with no end-of-text
            between them. The second reproduces published perplexities, and takes the whole text.
        reading (`Reading`, *optional*): instead of column, split and subset.
        keeps_rows (`bool`, defaults to `True`): whether rows of token ids that have one length, and are no longer than
            `sequence_length`, are the windows; other rows are joined and cut like texts.

    Raises:
        ValueError: the text holds fewer windows than were asked for; no beginning-of-sequence token to put in front.
    """
    check_cut(windows, num_samples)
    reading = Reading(text_column, split, subset) if reading is None else reading
    given = {"sequence_length": sequence_length, "seed": seed, "bos": bos, "windows": windows, "keeps_rows": False}
    if is_mixture(source):
        if num_samples is None:
            raise ValueError("Sources with weights give shares of num_samples windows; say how many.")
        drawn = []
        for one, share in shares(check_weights(source), num_samples).items():
            drawn.append(load_tokens(one, tokenizer, num_samples=share, reading=reading.of(one), **given))
        return spread(drawn)
    if windows == "paper":
        items, bos = read_items(source, reading), starts_with_bos(tokenizer, bos)
        found = paper_windows(items, tokenizer, sequence_length, bos)
        reading.passed.say(describe(source))
    else:
        pool = None if num_samples is None else num_samples * POOL
        found = first_windows(source, tokenizer, sequence_length, pool, reading, bos, keeps_rows)
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


def padded_tokens(
    source: Any, tokenizer: Any, num_samples: int, length: int, reading: Reading, frame: Frame, config: DataConfig
) -> tuple[Tensor, Tensor]:
    """Texts, conversations or rows of token ids of `source`, each a row of its own; and where the rows are no padding.

    Both are (samples, longest of them) int64, at most `length` tokens long. Rows are drawn by the seed of `config`
    from the first `POOL` times as many.
    """
    if is_mixture(source):
        raise ValueError("Sources with weights give shares of windows; leave packing=False out, or give one source.")
    bos = False if frame else starts_with_bos(tokenizer, config.bos)
    begin = (tokenizer.bos_token_id,) if bos else frame.before
    items, rows = read_items(source, reading), []
    room = length - len(begin) - len(frame.behind)
    # a template's own is kept where nobody says whether there is to be one
    own_bos = config.bos is None and not begin
    for ids, made in islice(separate(items, tokenizer, reading.passed, length, own_bos), num_samples * POOL):
        # rows of token ids are what somebody has made, frame and all
        rows.append(ids if made else [*begin, *ids[:room], *frame.behind])
    reading.passed.say(describe(source), packed=False)
    if len(rows) < num_samples:
        raise ValueError(
            f"{describe(source)} holds {len(rows)} texts, and {num_samples} are needed; give more, or a smaller "
            "num_samples."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[:num_samples]
    chosen = [torch.tensor(rows[number]) for number in order.tolist()]
    known = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    pad = next((token for token in known if token is not None), 0)  # nothing is read of it
    mask = pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
    return pad_sequence(chosen, batch_first=True, padding_value=pad), mask


def first_windows(
    source: Any,
    tokenizer: Any,
    length: int,
    wanted: int | None,
    reading: Reading,
    bos: bool | None = None,
    keeps_rows: bool = True,
) -> Tensor:
    """At most `wanted` windows, LongTensor (samples, length), in the order of the source; see [`load_tokens`]."""
    passed = reading.passed
    if is_mixture(source):
        parts = []
        for one, share in shares(check_weights(source), wanted).items():
            parts.append(first_windows(one, tokenizer, length, share, reading.of(one), bos, False))
            if len(parts[-1]) < share:
                logger.warning("%s holds %d windows, and its share are %d.", describe(one), len(parts[-1]), share)
        return spread(parts)
    items = read_items(source, reading)
    if keeps_rows:
        rows, items = whole_rows(items, length, wanted)
        if rows is not None:
            passed.token_rows += len(rows)
            return rows
    begins = starts_with_bos(tokenizer, bos)
    # a template's own is kept where nobody says whether there is to be one
    found = cut_windows(items, tokenizer, length, wanted, begins, passed, own_bos=bos is None and not begins)
    passed.say(describe(source))
    return found


def check_weights(source: Mapping[Any, Any]) -> dict[Any, float]:
    """The weights of several sources, by source.

    Raises:
        ValueError: one of them is no positive number, or there is no source.
    """
    for one, weight in source.items():
        if not is_number(weight) or weight <= 0:
            raise ValueError(
                f"A mapping is inputs by name, all of them tensors, or sources with their weights; {str(one)[:40]!r} "
                f"has {str(weight)[:40]!r}, and a weight is a number above 0."
            )
    if not source:
        raise ValueError("There is no source of text; name one.")
    return dict(source)


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
