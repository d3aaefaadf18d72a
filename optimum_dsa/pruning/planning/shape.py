"""The sizes of a model, as far as pruning it depends on them: no weight is needed to know them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture, Block, Stack, Weight
from ...model.calls import BlockCalls, capture_calls
from ...model.inputs import default_length, inputs_of
from ...model.observer import observing


@dataclass(frozen=True)
class InputShape:
    """Weights of a block that multiply one and the same input.

    Attributes:
        columns: in_features.
        rows: out_features of each weight.
        share: of the tokens, that come here: all but for routed experts.
    """

    columns: int
    rows: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True)
class BlockShape:
    """A block: how many numbers all its parameters hold, and the inputs of its weights in their order."""

    parameters: int
    inputs: tuple[InputShape, ...]
    hidden: int

    @property
    def weights(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every prunable matrix."""
        return [(rows, group.columns) for group in self.inputs for rows in group.rows]

    @property
    def size(self) -> int:
        """How many weights can be pruned."""
        return sum(rows * columns for rows, columns in self.weights)

    @property
    def widest(self) -> int:
        """The most in_features of a weight."""
        return max((group.columns for group in self.inputs), default=0)


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        blocks: every block, in order.
        outside: numbers in the parameters outside the blocks.
        stacks: how many lists of blocks there are: two in an encoder-decoder.
        itemsize: bytes of a number.
        length: tokens of a calibration sequence where nobody says.
        vocabulary: tokens that it tells apart.
        largest_outside: numbers in the largest parameter outside the blocks.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    stacks: int
    itemsize: int
    length: int
    vocabulary: int = 0
    largest_outside: int = 0

    @property
    def parameters(self) -> int:
        return self.outside + sum(block.parameters for block in self.blocks)

    @property
    def hidden(self) -> int:
        """Numbers of a token between two blocks."""
        return max(block.hidden for block in self.blocks)


@torch.no_grad()
def shape_of(model: nn.Module, architecture: Architecture, dtype: torch.dtype) -> ModelShape:
    """The sizes of `model`, whose parameters lie on the device "meta": nothing is computed, and no memory taken."""
    blocks: list[BlockShape] = []
    for stack in architecture.stacks:
        calls = _calls(model, stack)
        for index, block in enumerate(stack.blocks):
            blocks.append(_block_shape(model, block, calls, index))
    own = {id(parameter): parameter for parameter in model.parameters()}  # a tied one is one
    within = sum(block.parameters for block in blocks)
    outside = sum(parameter.numel() for parameter in own.values()) - within
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 0
    stacks, length = len(architecture.stacks), _length(model)
    names = tuple(f"{block.name}." for stack in architecture.stacks for block in stack.blocks)
    left = (value.numel() for name, value in model.named_parameters() if not name.startswith(names))
    return ModelShape(tuple(blocks), outside, stacks, dtype.itemsize, length, vocabulary, max(left, default=0))


def _length(model: nn.Module) -> int:
    """Tokens of a sequence where nobody says; of a model that reads pictures alone, the patches of one and a class."""
    image, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    if inputs_of(model).takes_text or not isinstance(image, int) or not isinstance(patch, int):
        return default_length(model)
    return (image // patch) ** 2 + 1


class _Inputs:
    """Notes which weights are given the same tensor."""

    def __init__(self):
        self.of: dict[str, int] = {}
        self._held: list[Tensor] = []  # an id is free for another tensor as soon as its own is gone

    def observe(self, weight: Weight, inputs: Tensor) -> None:
        self._held.append(inputs)
        self.of.setdefault(weight.name, id(inputs))


def _calls(model: nn.Module, stack: Stack) -> BlockCalls | None:
    """How the model calls the blocks of `stack`, for a sequence of 8 tokens; `None` where that needs values."""
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    # A mask that is whole already: without one, transformers looks whether positions are packed, which needs values.
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float32, device="meta")
    for inputs in ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens}):
        try:
            with torch.device("meta"):
                return capture_calls(model, stack, [inputs])
        except Exception:  # noqa: BLE001 - whatever a model does with values that are not there
            continue
    return None


def _block_shape(model: nn.Module, block: Block, calls: BlockCalls | None, index: int) -> BlockShape:
    module = model.get_submodule(block.name)
    seen, hidden = _Inputs(), 0
    if calls is not None:
        hidden = calls.hidden[0].shape[-1]
        try:
            with torch.device("meta"), observing(model, block, seen):
                calls.hidden[0] = calls.run(module, index, 0)
        except Exception:  # noqa: BLE001 - a router chooses by values; what ran before it is known
            pass
    hidden = hidden or getattr(model.config.get_text_config(), "hidden_size", 0)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return BlockShape(parameters, tuple(_inputs(model, block, seen.of)), hidden)


def _inputs(model: nn.Module, block: Block, seen: dict[str, int]) -> Iterator[InputShape]:
    """The weights of a block in groups that share an input; what was not seen to run has an input of its own."""
    config = model.config.get_text_config()
    groups: dict[object, list[Weight]] = {}
    for weight in block.weights:
        groups.setdefault(seen.get(weight.name, weight.name), []).append(weight)
    # Of the experts of a block each token is sent to a few.
    unseen = [weight for weight in block.weights if weight.name not in seen]
    kinds = max(sum(weight.shape == unseen[0].shape for weight in unseen), 1) if unseen else 1
    active = getattr(config, "num_experts_per_tok", None) or kinds
    for weights in groups.values():
        share = min(active / kinds, 1.0) if weights[0].name not in seen else 1.0
        yield InputShape(weights[0].shape[1], tuple(weight.shape[0] for weight in weights), share)
