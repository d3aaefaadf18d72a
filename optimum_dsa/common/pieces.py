"""Long texts -> token ids, piece by piece: the ids of the whole text, in the memory of a piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any


PIECE = 2**16  # characters: so few take no memory worth speaking of, and so many no time to begin
CONTEXT = 64  # characters in front of a piece that decide how it begins: most words are shorter
TRIES = 32  # places that are tried to cut, of each kind
LONGEST = 16  # pieces after which a text is cut where it may be seen


def token_ids(text: str | Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of a text, or of the text that parts make together, without special tokens; those of a piece at a time.

    A text is cut where its tokens show that it can be: the ids of what stands in front are the same with and without
    what follows. A piece is tokenized with the end of the one before it in front, whose ids are then taken away.
    """
    held, context = "", ""
    for part in _parts(text):
        held += part
        while len(held) >= 2 * PIECE and (cut := _place(held, tokenizer)) is not None:
            yield _behind(context, held[:cut], tokenizer)
            context, held = held[max(cut - CONTEXT, 0) : cut], held[cut:]
    if held:
        yield _behind(context, held, tokenizer)


def encode(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text without special tokens: these are put in where they are asked for, and once."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _parts(text: str | Iterable[str]) -> Iterable[str]:
    """A text in parts, so that what is left of it is not copied again for every piece."""
    if not isinstance(text, str):
        return text
    return (text[start : start + 4 * PIECE] for start in range(0, len(text), 4 * PIECE))


def _behind(context: str, piece: str, tokenizer: Any) -> list[int]:
    """The ids of a piece that stands behind `context`."""
    if not context:
        return encode(piece, tokenizer)
    known, both = encode(context, tokenizer), encode(context + piece, tokenizer)
    return both[len(known) :] if both[: len(known)] == known else encode(piece, tokenizer)


def _place(text: str, tokenizer: Any) -> int | None:
    """Where a piece of about `PIECE` characters, or of a few times as many, can end; `None`: more has to be seen."""
    for last in range(PIECE, len(text) - PIECE + 1, PIECE):
        words = (at for at in range(last, last // 2, -1) if text[at].isspace() and not text[at - 1].isspace())
        for at in (*islice(words, TRIES), *range(last, last - TRIES, -1)):
            before = text[at - CONTEXT : at]
            known = encode(before, tokenizer)
            if encode(before + text[at : at + CONTEXT], tokenizer)[: len(known)] == known:
                return at
    return LONGEST * PIECE if len(text) > LONGEST * PIECE else None
