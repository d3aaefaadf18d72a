"""The tensors of a GGUF: from which of a checkpoint's each is made, and how those come out of it again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gguf_families import Family, Widths


# Experts are single matrices in a checkpoint, and one tensor of all of a layer there.
_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of earlier releases; masks and angles
BLOCK = 32  # weights of a row that share a scale
BITS = {"q8_0": 8, "q4_0": 4}


@dataclass(frozen=True)
class Part:
    """A tensor of a GGUF.

    Attributes:
        called (`str`): its name there.
        shape (`tuple[int, ...]`): there, the rows' length last.
        names (`tuple[str, ...]`): of the checkpoint's tensors that it is made of, several of experts.
        heads (`int`): whose halves are put beside each other; 0 for none.
        lift (`float`): what is added.
        transposed (`bool`): whether it is the other way round there.
        without (`tuple[int, ...]`, *optional*): the shape of what it is made of, where that is nothing: it is zeros.
    """

    called: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    heads: int = 0
    lift: float = 0.0
    transposed: bool = False
    without: tuple[int, ...] | None = None

    def make(self, tensors: list[Tensor]) -> Tensor:
        """The tensor, of `shape`, float32, of those that `names` are, in this order."""
        if self.without is not None:
            return torch.zeros(self.shape)
        found = tensors[0].float() if len(tensors) == 1 else torch.stack([one.float() for one in tensors])
        if self.heads:
            # The halves of a head that turn together lie beside each other there.
            found = found.reshape(self.heads, 2, -1, *found.shape[1:]).transpose(1, 2).reshape(found.shape)
        return (found.T if self.transposed else found) + self.lift if self.lift or self.transposed else found

    def undo(self, made: Tensor) -> list[Tensor]:
        """What `make` made a tensor of `shape` of: one for each of `names`."""
        if self.without is not None:
            return [made.new_zeros(self.without)]
        found = (made.T if self.transposed else made) - self.lift if self.lift or self.transposed else made
        if self.heads:
            found = found.reshape(self.heads, -1, 2, *found.shape[1:]).transpose(1, 2).reshape(found.shape)
        return list(found.unbind()) if len(self.names) > 1 else [found]


def parts_of(
    shapes: Mapping[str, tuple[int, ...]], family: Family, widths: list[Widths], config: Any, table: Any
) -> list[Part]:
    """The tensors that a GGUF has of a checkpoint's.

    Args:
        shapes: name -> shape of every tensor of the checkpoint, dense.
        widths: of every layer.
        table: gguf's names of tensors, by those of other programs.

    Raises:
        ValueError: a tensor that llama.cpp has none for.
    """
    found, experts = [], {}
    for name, shape in shapes.items():
        if name.endswith(_BUFFERS) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if expert := _EXPERT.fullmatch(name):
            experts.setdefault(f"{expert[1]}.experts.{expert[3]}_proj.weight", {})[int(expert[2])] = name, shape
        else:
            part = _part(name, (name,), shape, family, widths, table)
            found += [part] if _is_there(part, widths) else []
    for name, some in experts.items():
        names, shapes_of = zip(*(some[number] for number in sorted(some)))
        found.append(_part(name, names, (len(names), *shapes_of[0]), family, widths, table))
    return found


def _part(
    name: str, names: tuple[str, ...], shape: tuple[int, ...], family: Family, widths: list[Widths], table: Any
) -> Part:
    called = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if called is None:
        raise ValueError(f"{name} is no tensor that a GGUF of this family has.")
    place = name.split(".")
    of_head = family.turned and place[-2] in ("q_proj", "k_proj")
    heads = widths[int(place[-4])][place[-2] == "k_proj"] if of_head else 0
    transposed = name.endswith(family.transposed) if family.transposed else False
    lift = 1.0 if family.lifted and name.endswith("norm.weight") else 0.0
    without = shape if 0 in shape else None
    shape = tuple(max(size, 1) for size in shape)
    return Part(called, (*reversed(shape),) if transposed else shape, names, heads, lift, transposed, without)


def _is_there(part: Part, widths: list[Widths]) -> bool:
    """Whether llama.cpp asks for a tensor: of a layer without attention, for none of that nor its norm.

    Where a layer has no MLP it would pass over its attention, too, so that one channel of zeros stands for it.
    """
    layer = re.fullmatch(r"blk\.(\d+)\.attn_.*", part.called)
    return layer is None or widths[int(layer[1])][0] > 0


def kind_of(part: Part, kind: str, called: Iterable[str]) -> str:
    """As what a tensor is written where matrices are written as `kind`; by llama.cpp's own rules.

    Vectors, norms, positions and routers stay float32. The last layer has more bits than 4, and so has the embedding
    where it is the last layer, too: 8 here, as gguf writes no Q6_K. Rows that do not divide by 32 stay float16.

    Args:
        called: the names of all tensors of the file.
    """
    if kind == "f32" or len(part.shape) < 2 or "_norm." in part.called or part.called.startswith(_EXACT):
        return "f32"
    if ".ffn_gate_inp." in part.called:
        return "f32"
    if kind in BITS and part.shape[-1] % BLOCK:
        return "f16"
    last = "output.weight" if "output.weight" in called else "token_embd.weight"
    return "q8_0" if kind == "q4_0" and part.called == last else kind


_EXACT = ("rope_", "position_embd")
