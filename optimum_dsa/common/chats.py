"""Conversations -> text, by the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


# Columns that hold conversations, in the order in which they are looked for.
COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"))
# Who speaks, where messages have "from" and "value" for "role" and "content".
SPEAKERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")}
SPEAKERS |= {role: role for role in ("system", "user", "assistant", "tool")}
EXTRA = ("tools", "system", "chat_template_kwargs")  # columns beside a conversation that belong to it


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        messages: each with a `role` and a `content`.
        where: where it stands, for errors.
        tools: what the template is told of tools.
        options: what else the template is told, such as `enable_thinking`.
    """

    messages: list[dict[str, Any]]
    where: str
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def text(self, tokenizer: Any) -> str:
        """The conversation as the model was trained to read it, special tokens included.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{self.where} is a conversation, and the tokenizer ({type(tokenizer).__name__}) has no chat "
                "template; name a tokenizer that has one, or a text_column of plain text."
            )
        options = {**self.options} if self.tools is None else {**self.options, "tools": self.tools}
        try:
            return tokenizer.apply_chat_template(self.messages, tokenize=False, **options)
        except Exception as error:  # noqa: BLE001 - a template is a program, and may raise anything
            why = " ".join(str(error).split())
            raise ValueError(f"{self.where}: the chat template refuses the conversation: {why}.") from error


def chat_columns(columns: Sequence[str]) -> tuple[str, ...] | None:
    """Those of `columns` that hold a conversation together; `None` where there is none."""
    return next((names for names in COLUMNS if {*names} <= {*columns}), None)


def chat_from(row: Mapping[str, Any], names: Sequence[str], where: str) -> Chat | None:
    """The conversation in the columns `names` of a row; `None` where they hold nothing."""
    values = [row[name] for name in names]
    if any(value is None for value in values):
        return None
    tools = row.get("tools")
    messages: list[dict[str, Any]] = []
    for role, value in zip(("user", "assistant"), values):
        # a prompt and its completion may be messages themselves, or the bare text of one
        bare = isinstance(value, str) and len(names) > 1
        messages += [{"role": role, "content": value}] if bare else messages_of(value, where)
    said, options = row.get("system"), row.get("chat_template_kwargs")
    if isinstance(said, str) and said and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": said}, *messages]
    options = (
        {name: part for name, part in options.items() if part is not None} if isinstance(options, Mapping) else {}
    )
    return Chat(messages, where, tools if isinstance(tools, list) else None, options)


def is_conversation(value: Any) -> bool:
    """Whether a value looks like a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with a role and a content, of a list of them.

    Raises:
        ValueError: it is no such list, or holds something else than text.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{where}: expected messages, each with a role and a content; got {str(value)[:60]!r}.")
    found = []
    for item in value:
        # columns of a table have every key in every row: what a message lacks is null there
        message = {name: part for name, part in item.items() if part is not None}
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            if speaker not in SPEAKERS:
                raise ValueError(
                    f"{where}: a message is from {speaker!r}, and nobody is known by that; write one of "
                    f"{', '.join(SPEAKERS)}, or give its role."
                )
            message = {"role": SPEAKERS[speaker], "content": message.pop("value", None), **message}
        if "role" not in message:
            raise ValueError(f"{where}: a message has no role; it has {', '.join(message) or 'nothing'}.")
        if isinstance(parts := message.get("content"), (list, tuple)):
            message["content"] = _joined(parts, where)
        if isinstance(calls := message.get("tool_calls"), (list, tuple)):
            message["tool_calls"] = [_with_arguments(call) for call in calls]
        found.append(message)
    return found


def _with_arguments(call: Any) -> Any:
    """A call of a tool whose arguments are an object; in OpenAI's form they are JSON in a text."""
    inner = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("arguments"), str):
        return call
    with suppress(ValueError):  # what is no JSON the template may print as it is
        return {**call, "function": {**inner, "arguments": json.loads(inner["arguments"])}}
    return call


def _joined(parts: Sequence[Any], where: str) -> str:
    """The text of a content that comes in parts: templates of models of text alone would print the list."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where}: a message holds {kind!r}, and only text can be read from conversations.")
    return "".join(part["text"] for part in parts)
