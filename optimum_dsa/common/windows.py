"""Texts, conversations and token ids -> windows of tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from .chats import Chat
from .pieces import encode, token_ids
from .texts import Item, Passed


class NoTokenizerError(ValueError):
    """Text is to be cut into tokens, and there is no tokenizer."""

    def __init__(self):
        super().__init__("Text needs a tokenizer; pass one, or token ids of shape (samples, length).")


def cut_windows(
    items: Iterable[Item],
    tokenizer: Any,
    length: int,
    wanted: int | None = None,
    bos: bool = False,
    passed: Passed | None = None,
    own_bos: bool = False,
) -> Tensor:
    """At most `wanted` windows, LongTensor (samples, length), of the joined items; with `bos`, it stands in front.

    Args:
        items: as `read_items` gives them. No more are asked for than it takes.
        passed: counts what is blank.
        own_bos: whether conversations keep the token that their template puts in front.
    """
    size = _text_tokens(length, bos)
    ids = array("q")
    for part in _joined(items, tokenizer, Passed() if passed is None else passed, own_bos):
        ids.extend(part)
        # A corpus may be larger than the disk: it is streamed, and read no further than needed.
        if wanted is not None and len(ids) >= wanted * size:
            break
    count = len(ids) // size if wanted is None else min(len(ids) // size, wanted)
    del ids[count * size :]
    found = torch.frombuffer(ids, dtype=torch.long).view(count, size) if count else torch.empty(0, size).long()
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), found], 1) if bos else found


def paper_windows(items: Iterable[Item], tokenizer: Any, length: int, bos: bool) -> Tensor:
    """Windows, (samples, length), of the whole text as published code cuts it: rows joined by two line breaks."""

    def parts() -> Iterator[str]:
        for number, item in enumerate(items):
            if isinstance(item, (Chat, list)):
                raise ValueError("windows='paper' is for plain text; leave it out for conversations and token ids.")
            if tokenizer is None:
                raise NoTokenizerError
            yield "\n\n" if number else ""
            yield from [item] if isinstance(item, str) else item

    ids = array("q", [tokenizer.bos_token_id] if bos else [])
    for part in token_ids(parts(), tokenizer):
        ids.extend(part)
    count = len(ids) // length
    del ids[count * length :]
    return torch.frombuffer(ids, dtype=torch.long).view(count, length) if count else torch.empty(0, length).long()


def whole_rows(items: Iterator[Item], longest: int, wanted: int | None) -> tuple[Tensor | None, Iterator[Item]]:
    """Rows of token ids that are windows already: (samples, length), at most `wanted`; and what is left to be read.

    They are where all have one length, and no more than `longest` ids. `None` where the rows are something else;
    what was read to see that stands in front of the rest.
    """
    first = next(items, None)
    if not isinstance(first, list) or not 2 <= len(first) <= longest:
        return None, items if first is None else chain([first], items)
    rows = [first]
    for item in islice(items, None if wanted is None else wanted - 1):
        rows.append(item)
        if not isinstance(item, list) or len(item) != len(first):
            return None, chain(rows, items)
    return torch.tensor(rows, dtype=torch.long), items


def spread(parts: list[Tensor]) -> Tensor:
    """The windows of several sources, (samples, length) each, mixed evenly, each source's in their order."""
    at = [(number + 0.5) / len(part) for part in parts for number in range(len(part))]
    order = sorted(range(len(at)), key=at.__getitem__)
    return torch.cat(parts)[order]


def shares(weights: dict[Any, float], number: int) -> dict[Any, int]:
    """How many of `number` windows each source gives, by its weight; the whole is met, and none gets nothing."""
    total = sum(weights.values())
    exact = {source: number * weight / total for source, weight in weights.items()}
    found = {source: int(share) for source, share in exact.items()}
    for source in sorted(exact, key=lambda source: found[source] - exact[source])[: number - sum(found.values())]:
        found[source] += 1
    if 0 in found.values():
        raise ValueError(f"{number} samples are too few for weights of {list(weights.values())}: one has none.")
    return found


def separate(
    items: Iterable[Item], tokenizer: Any, passed: Passed, longest: int, own_bos: bool
) -> Iterator[tuple[list[int], bool]]:
    """The first `longest` ids of each item that is not blank, and whether they came as ids."""
    for item in items:
        ids = list(islice(chain.from_iterable(_joined([item], tokenizer, passed, own_bos)), longest))
        passed.token_rows += bool(ids) and isinstance(item, list)
        if ids:
            yield ids, isinstance(item, list)


def _joined(items: Iterable[Item], tokenizer: Any, passed: Passed, own_bos: bool) -> Iterator[list[int]]:
    """The ids of items, part by part, with the tokenizer's end-of-text token between them."""
    end = None if tokenizer is None else getattr(tokenizer, "eos_token_id", None)
    begun = closed = False
    for item in items:
        if tokenizer is None and not isinstance(item, list):
            raise NoTokenizerError
        if isinstance(item, str) and not item.strip():
            passed.empty += 1
            continue
        parts = iter(_ids(item, tokenizer, own_bos))
        if (part := next(parts, None)) is None:
            continue
        if begun and end is not None and not closed:
            yield [end]
        begun = True
        for last in chain([part], parts):
            yield last
        # a template closes a conversation itself, and may break the line behind it; ids were closed by who made them
        closed = isinstance(item, (Chat, list)) and end in last[-2:]


def _ids(item: Item, tokenizer: Any, own_bos: bool) -> Iterable[list[int]]:
    """The ids of one item, part by part."""
    if isinstance(item, list):
        return [item]
    if not isinstance(item, Chat):
        return token_ids(item, tokenizer)
    ids = encode(item.text(tokenizer), tokenizer)
    begin = getattr(tokenizer, "bos_token_id", None)
    return [ids[1:] if not own_bos and begin is not None and ids[:1] == [begin] else ids]


def _text_tokens(length: int, bos: bool) -> int:
    """How many tokens of text a window of `length` tokens holds."""
    if length <= bos:
        raise ValueError(f"A window of {length} tokens has no room for text behind its BOS; use longer ones, or none.")
    return length - bos
