"""Texts that somebody else wrote, made harmless for the place where they are shown.

A model's name, a unit, a path or an error may hold anything: control characters that move a terminal's cursor, marks
that reverse the order of letters, a new line that begins a heading, the end of a fence or a tag. Each function here
makes one piece of text stay one piece of text, which still shows what was there.
"""

from __future__ import annotations

import re
import unicodedata


_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi, zero width), half a letter, line and paragraph ends
_TAME = re.compile(r"[A-Za-z0-9À-ɏ·–—…±° .,+/()=%-]*")  # means nothing in Markdown inside a line
_LINKED = re.compile(r"www\.|://", re.IGNORECASE)  # what readers make links of by themselves


def visible(text: str) -> str:
    """`text` with line ends as they are, and every other control character written out, as in `\\x1b`."""
    return "".join(
        letter if letter == "\n" or unicodedata.category(letter) not in _HIDDEN else _written(letter)
        for letter in text
    )


def one_line(text: str) -> str:
    """`text` in one line: `visible`, with line ends and tabs as spaces."""
    return visible(re.sub(r"[\r\n\t]+", " ", text))


def prose_markdown(text: str) -> str:
    """Sentences of ours with names of others in them, as a line of Markdown: each word as `inline_markdown` has it."""

    def shown(word: str) -> str:
        core = word.rstrip(":;")  # which mean nothing in a sentence, as an apostrophe does
        plain = core.replace("'", "")
        return word if plain and inline_markdown(plain) == plain else f"{code_span(core)}{word[len(core) :]}"

    return " ".join(map(shown, one_line(text).split()))


def inline_markdown(text: str) -> str:
    """`text` as Markdown shows it letter by letter, inside a line; nothing in it is markup.

    A text that could mean something becomes a code span, which nothing but its own fence ends.
    """
    text = one_line(text)
    if _TAME.fullmatch(text) and not _LINKED.search(text) and text.strip(" ") == text:
        return text or "–"
    return code_span(text)


def table_cell(markdown: str) -> str:
    """A line of Markdown as the cell of a table: no bar in it divides cells, whichever way a reader splits rows."""
    if "\\|" in markdown:  # readers differ in what a backslash before this pair means
        markdown = markdown.replace("|", "\\x7c")
    return markdown.replace("|", "\\|")


def code_span(text: str) -> str:
    """`text` as a code span of Markdown, in a line."""
    text = one_line(text) or " "
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """`text` as a fenced block of Markdown, whose fence is longer than any in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _written(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
