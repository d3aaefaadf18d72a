"""A model tried: it answers or continues a text, token after token, and how fast it did is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer

from ..common.chats import Chat
from ..common.fences import has_device_map
from ..model.inputs import KINDS, inputs_of


_WRITES = ("causal", "sequence-to-sequence")


@dataclass(frozen=True)
class GeneratedText:
    """What a model wrote, and what it took. Rates are of this one run, its first products and the showing included.

    Attributes:
        text (`str`): without the prompt and without special tokens.
        chat (`bool`): whether the prompt was put as a question, in the tokenizer's chat template.
        prompt_tokens, new_tokens (`int`): how many were read, special ones included, and written.
        prefill (`float`): tokens of the prompt read in a second, until the first new token was there.
        decode (`float`, *optional*): tokens written in a second after the first; `None` where there are no others.
        ended (`bool`): whether the model ended the text itself.
    """

    text: str
    chat: bool
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float | None
    ended: bool

    def __str__(self) -> str:
        read = f"{self.prompt_tokens:,} tokens read ({self.prefill:,.1f}/s)"
        rate = "" if self.decode is None else f" ({self.decode:,.1f}/s)"
        asked = "as a chat" if self.chat else "as it is"
        return f"prompt {asked}; {read}, {self.new_tokens:,} written{rate}"


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    stream: Callable[[str], None] | None = None,
) -> GeneratedText:
    """What a causal or sequence-to-sequence model writes after a prompt.

    Args:
        prompt (`str`): what it continues or answers.
        max_new_tokens (`int`, defaults to 128): the most that is written; less where a text cannot be so long.
        temperature (`float`, defaults to 0): 0 always takes the likeliest token; more takes others more often.
        top_p (`float`, defaults to 1): tokens are drawn from the likeliest that have so much of the probability; below
            1 also at temperature 0, which is 1 then.
        seed (`int`, defaults to 0): of what is drawn; the global generator stays as it is.
        chat (`bool`, *optional*): whether the prompt is put in the tokenizer's chat template. By default where the
            model was trained for it, by [`answers_chats`].
        stream (`Callable[[str], None]`, *optional*): is given every piece of the text as it comes.

    Raises:
        ValueError: a model that does not write text, a setting out of its range, an empty prompt or one for which the
            model has no room.
    """
    found = inputs_of(model)
    if found.kind not in _WRITES:
        raise ValueError(
            f"{type(model).__name__} {KINDS[found.kind]} and writes no text after a prompt; name a causal or a "
            "sequence-to-sequence model."
        )
    if not (isinstance(max_new_tokens, int) and max_new_tokens >= 1):
        raise ValueError(f"max_new_tokens is a whole number of at least 1, got {max_new_tokens!r}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is a number of at least 0, got {temperature!r}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is a share of the probability, more than 0 and at most 1, got {top_p!r}.")
    chat = answers_chats(model, tokenizer) if chat is None else chat
    tokens = _read(tokenizer, prompt, chat)
    length = tokens.shape[1]
    if found.kind == "causal" and found.hard:
        if length >= found.longest:
            raise ValueError(
                f"The prompt has {length} tokens, and {type(model).__name__} has room for {found.longest} with the "
                "text that it writes; shorten it."
            )
        max_new_tokens = min(max_new_tokens, found.longest - length)
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    # Where weights are on the disk, the model calls no device its own.
    tokens = tokens if has_device_map(model) and model.device.type == "meta" else tokens.to(model.device)
    watch = _Watch(tokenizer, stream)
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        model.eval().generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, streamer=watch
        )
    return watch.told(length, chat, settings.eos_token_id)


def answers_chats(model: nn.Module, tokenizer: Any) -> bool:
    """Whether a model was trained to answer: what it ends a text with also ends an answer in its chat template.

    A template alone does not tell: those of many base models are there for whoever trains them further.
    """
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids = tokenizer(Chat(talk, "a trial").text(tokenizer), add_special_tokens=False)["input_ids"]
        asked = tokenizer(Chat(talk[:1], "a trial").text(tokenizer), add_special_tokens=False)["input_ids"]
    except ValueError:  # no template, or one that wants something else
        return False
    # Of the answer alone: a question may be closed by the token that ends every text.
    return bool({*ids[len(asked) :]} & _ends(getattr(model.generation_config, "eos_token_id", None)))


def _read(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """The tokens of a prompt, (1, length)."""
    if chat:
        talk = Chat([{"role": "user", "content": prompt}], "the prompt", options={"add_generation_prompt": True})
        ids = tokenizer(talk.text(tokenizer), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("The prompt is empty, and the tokenizer puts nothing in front of it; write something.")
    return torch.tensor([ids])


def _settings(model: nn.Module, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    """The model's own settings of generation, with what was asked in place of its own way to choose tokens."""
    settings = deepcopy(model.generation_config)
    draws = temperature > 0 or top_p < 1
    # Each by a number that means nothing is cut off: what is None transformers takes from the model's own again.
    neutral = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0} if draws else {}
    settings.update(
        do_sample=draws,
        num_beams=1,
        temperature=temperature or 1.0,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_new_tokens=0,
        **neutral,
    )
    settings.use_cache, settings.return_dict_in_generate = True, False
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:  # never read with one sequence; without it transformers warns
        settings.pad_token_id = next(iter(sorted(_ends(settings.eos_token_id))), 0)
    return settings


def _ends(token: int | list[int] | None) -> set[int]:
    return set() if token is None else {*token} if isinstance(token, list) else {token}


class _Watch(TextStreamer):
    """Hands on the text as it comes, and remembers when its tokens came."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream
        self.pieces: list[str] = []
        self.times: list[float] = []  # of the prompt, before it was read, and of every token
        self.latest = -1

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.latest = int(value.flatten()[-1])
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        if self.stream is not None and text:
            self.stream(text)

    def told(self, prompt: int, chat: bool, ends: int | list[int] | None) -> GeneratedText:
        start, first, *others = self.times
        decode = len(others) / (others[-1] - first) if others else None
        return GeneratedText(
            "".join(self.pieces),
            chat,
            prompt,
            1 + len(others),
            prompt / (first - start),
            decode,
            self.latest in _ends(ends),
        )
