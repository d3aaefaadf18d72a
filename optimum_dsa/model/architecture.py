"""The blocks and the prunable weights of any transformers model, found by structure and not by name.

A *stack* is a list of composite modules that the model runs one after the other; its elements are *blocks*. A *weight*
is a matrix of a block that multiplies activations. Everything of two or more dimensions in a block is a weight, stays
dense for a stated reason, or is refused by name.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.registry import near
from .adapters import adapter_parameters, plain_name
from .experts import expert_counts, fused_parameters, is_vector, routers
from .left_dense import excluding, sizes_of, told
from .parameters import one_name_each
from .stacks import UnprunableError, find_stacks


logger = logging.getLogger(__name__)


# What a unit of an allocation is: a block, one matrix, or a part of a block (its attention, its MLP).
GRANULARITIES = ("block", "matrix", "block:kind")
# Filters along the sequence, a few weights a channel, and decays and passes of a state: they multiply no vector.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STATE = ("A_log", "D")


@dataclass(frozen=True)
class Weight:
    """One prunable matrix.

    Attributes:
        name (`str`): the parameter's full name, with `[e]` for expert e of a fused parameter.
        module (`str`): full name of the module that owns the parameter.
        attribute (`str`): the parameter's name in that module.
        shape (`tuple[int, int]`): (out_features, in_features).
        transposed (`bool`): whether the parameter is stored as (in_features, out_features).
        expert (`int`): which matrix it is of a parameter that holds those of several experts, see `stacked`.
    """

    name: str
    module: str
    attribute: str
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def tensor(self, model: nn.Module) -> Tensor:
        """The live weight as (out_features, in_features): a view that writes through to the parameter."""
        return self.matrix(self.parameter(model).data)

    def is_read_around(self, model: nn.Module) -> bool:
        """Whether the module around the weight's own may read it without calling that, as recurrences do (`dt_proj`).

        Experts that are below each other in one matrix are told apart there, too.
        """
        if self.expert is not None:
            return self.parameter(model).dim() == 2
        return hasattr(model.get_submodule(self.module.rpartition(".")[0]), STATE[0])

    def parameter(self, model: nn.Module) -> nn.Parameter:
        """The parameter that holds the weight, of its own shape; several experts may share it."""
        return getattr(model.get_submodule(self.module), self.attribute)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight's part of a tensor of its parameter's shape, as (out_features, in_features): a view."""
        matrix = tensor if self.expert is None else self.stacked(tensor)[self.expert]
        return matrix.t() if self.transposed else matrix

    def stacked(self, tensor: Tensor) -> Tensor:
        """A tensor of its parameter's shape, which several experts share, as (experts, rows, columns): a view."""
        rows = self.shape[1] if self.transposed else self.shape[0]
        return tensor if tensor.dim() == 3 else tensor.unflatten(0, (-1, rows))


@dataclass(frozen=True)
class Block:
    """A block of the model and its prunable weights. `depth` runs from 0 (first of its stack) to 1 (last)."""

    name: str
    weights: tuple[Weight, ...]
    depth: float = 0.0

    @property
    def size(self) -> int:
        return sum(weight.size for weight in self.weights)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that hold it: itself, or those of weights outside the blocks."""
        if all(weight.module.startswith(f"{self.name}.") or weight.module == self.name for weight in self.weights):
            return (self.name,)
        return tuple(dict.fromkeys(weight.module for weight in self.weights))

    def units(self, granularity: str) -> dict[str, tuple[Weight, ...]]:
        """Unit name -> its weights, of those that this block holds.

        At "block:kind" a unit is a part of the block, such as its attention or its MLP, and is named after it:
        "layers.3.self_attn". A block that holds the matrices of its MLP side by side has a unit for each.
        """
        if granularity == "matrix":
            return {weight.name: (weight,) for weight in self.weights}
        if granularity == "block":
            return {self.name: self.weights} if self.weights else {}
        paths = {weight: weight.module.removeprefix(f"{self.name}.").split(".") for weight in self.weights}
        # In some families (T5) a block is one list of its parts, and which of them is told by a number.
        listed = len({path[0] for path in paths.values()}) == 1 and all(
            path[1:2] and path[1].isdigit() for path in paths.values()
        )
        found: dict[str, list[Weight]] = {}
        for weight, path in paths.items():
            found.setdefault(".".join([self.name, *path[: 2 if listed else 1]]), []).append(weight)
        return {name: tuple(weights) for name, weights in found.items()}


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other; `name` is that of the list that holds them."""

    name: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Architecture:
    """Everything that can be pruned in a model.

    Attributes:
        stacks (`tuple[Stack, ...]`): in the order in which the model runs them.
        head (`Block`): weights outside the blocks that were asked for with `include`, as one more block; or `None`.
        dense (`dict[str, str]`): names of matrices in the blocks that are left dense -> why; `name[e]` is one of the
            matrices in a parameter of experts.
        dense_sizes (`dict[str, int]`): their names -> how many weights they have.
    """

    stacks: tuple[Stack, ...]
    head: Block | None = None
    dense: dict[str, str] = field(default_factory=dict)
    dense_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        found = [block for stack in self.stacks for block in stack.blocks]
        return found + ([self.head] if self.head else [])

    @property
    def weights(self) -> list[Weight]:
        return [weight for block in self.blocks for weight in block.weights]

    def units(self, granularity: str) -> dict[str, tuple[Weight, ...]]:
        """Unit name -> its weights, at "block", "matrix" or "block:kind"; blocks without weights are left out."""
        return {name: weights for block in self.blocks for name, weights in block.units(granularity).items()}

    def granularity_of(self, units: Collection[str]) -> str | None:
        """The granularity whose units have these names; `None` if none has."""
        return next((known for known in GRANULARITIES if self.units(known).keys() == set(units)), None)


def find_architecture(
    model: nn.Module,
    blocks: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    skip_unprunable: bool = False,
) -> Architecture:
    """The stacks, blocks and prunable weights of `model`.

    Args:
        model (`nn.Module`): any transformers model; of a model with several towers, the language tower is taken. What
            PEFT adapters brought into it is passed over without a word.
        blocks (`Sequence[str]`, *optional*): names of the module lists to prune instead, such as
            `vision_tower.encoder.layers`.
        exclude (`Sequence[str]`, *optional*): names or glob patterns of weights or modules to leave dense; parts of a
            dotted name match too (`down_proj`, `layers.0`).
        include (`Sequence[str]`, *optional*): names or patterns of matrices outside the blocks to prune as well
            (`lm_head`, `embed_tokens`).
        skip_unprunable (`bool`, defaults to `False`): leave dense, with a warning, what would otherwise be refused.

    Raises:
        UnprunableError: no blocks, or a matrix of a block that no rule can prune; it says what to exclude.
        ValueError: a name in `blocks`, `exclude` or `include` that matches nothing.
    """
    packed = next((name for name, module in model.named_modules() if getattr(module, "is_packed", False)), None)
    if packed is not None:
        raise UnprunableError(
            f"{packed} of this {type(model).__name__} is packed, and its weights are not there to be changed; unpack "
            "the model first (DSAPruner.unpack())."
        )
    names = _named_stacks(model, blocks) if blocks else find_stacks(model)
    tied, adapters = _tied_parameters(model, names), adapter_parameters(model)
    dense: dict[str, str] = {}
    refused: dict[str, str] = {}
    used: set[str] = set()
    stacks = []
    for stack_name in names:
        modules = model.get_submodule(stack_name)
        found = []
        for index, (child, module) in enumerate(modules.named_children()):
            name = f"{stack_name}.{child}"
            weights = tuple(_block_weights(name, module, tied, adapters, exclude, used, dense, refused))
            # A stack of one block has depth 0, and not 0 / 0.
            found.append(Block(name, weights, index / max(len(modules) - 1, 1)))
        stacks.append(Stack(stack_name, tuple(found)))
    # Refused together and not one by one, so that one `exclude` can name them all.
    if refused:
        prunable = sum(block.size for stack in stacks for block in stack.blocks) + sum(sizes_of(model, dense).values())
        left = told(sizes_of(model, refused), prunable)
        if not skip_unprunable:
            listed = "; ".join(f"{name} ({why})" for name, why in list(refused.items())[:5])
            raise UnprunableError(
                f"{type(model).__name__} has {len(refused)} weights that cannot be pruned: {listed}. "
                f"Leave them dense with exclude={excluding(refused)} or skip_unprunable=True: then dense are {left}."
            )
        logger.warning("Left dense, because it cannot be pruned: %s.", left)
        dense.update(refused)
    head = _head(model, names, include, exclude, used) if include else None
    # After the search and not before it: only that tells which patterns named something.
    for pattern in (*exclude, *include):
        if pattern not in used:
            raise ValueError(_unmatched(model, names, pattern, inside=pattern in exclude))
    architecture = Architecture(tuple(stacks), head, dense, sizes_of(model, dense))
    if not architecture.weights:
        raise UnprunableError(f"{type(model).__name__} has blocks ({', '.join(names)}) but no weight left to prune.")
    return architecture


def _named_stacks(model: nn.Module, names: Iterable[str]) -> list[str]:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in names:
        if name not in lists:
            raise ValueError(f"{type(model).__name__} has no module list {name!r}.{near(name, lists)}")
    return [name for name in lists if name in names]


def _tied_parameters(model: nn.Module, stacks: Sequence[str]) -> set[str]:
    """Names of block parameters that another part of the model shares."""
    names: dict[str, list[str]] = {}
    for name, one in one_name_each(model).items():
        names.setdefault(one, []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group if _within(name, stacks)}


def _within(name: str, stacks: Sequence[str]) -> bool:
    return any(name == stack or name.startswith(f"{stack}.") for stack in stacks)


def _block_weights(
    block: str,
    module: nn.Module,
    tied: set[str],
    adapters: set[int],
    exclude: Sequence[str],
    used: set[str],
    dense: dict[str, str],
    refused: dict[str, str],
) -> Iterator[Weight]:
    """The prunable weights of a block; fills `dense` and `refused` with the reasons for the others."""
    scoring = routers(module)
    for path, owner in module.named_modules():
        owner_name = f"{block}.{path}" if path else block
        for attribute, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{attribute}"
            if parameter.dim() < 2 or not parameter.numel():  # what was cut whole leaves matrices of nothing
                continue
            if id(parameter) in adapters:
                _matches(name, exclude, used)  # whoever excludes it by name has what was asked
                continue
            if _matches(name, exclude, used):
                dense[name] = "excluded"
            # Zeros here would be zeros there, and the statistics of this input say nothing of that one.
            elif name in tied:
                dense[name] = "shared with another part of the model"
            elif isinstance(owner, nn.Embedding):
                dense[name] = "embedding"
            # A set of tensors compares by identity, so that this costs no comparison of values.
            elif parameter in scoring:
                dense[name] = "router of experts"
            elif not parameter.is_floating_point():
                refused[name] = f"quantised, {parameter.dtype}"
            elif isinstance(owner, (nn.Linear, Conv1D)) and attribute == "weight" and parameter.dim() == 2:
                yield _weight(name, owner_name, attribute, parameter.shape, isinstance(owner, Conv1D))
            elif attribute in (fused := fused_parameters(owner)):
                how = fused[attribute]
                for expert in range(how.count):
                    yield _weight(f"{name}[{expert}]", owner_name, attribute, how.shape, how.transposed, expert)
                for expert in range(how.count, how.count + how.idle):
                    dense[f"{name}[{expert}]"] = "expert that computes nothing"
            # Two dimensions, but no matrix: a vector of biases per expert.
            elif parameter.dim() == 2 and parameter.shape[0] in expert_counts(owner):
                dense[name] = "biases of experts"
            elif isinstance(owner, CONVOLUTIONS) and owner.groups == owner.in_channels:
                dense[name] = "convolution of single channels"
            elif attribute in STATE and hasattr(owner, STATE[0]):
                dense[name] = "state of a recurrence"
            elif is_vector(parameter):
                dense[name] = "vector"
            else:
                refused[name] = f"{type(owner).__name__}, shape {tuple(parameter.shape)}"


def _weight(name, module, attribute, shape, transposed, expert=None) -> Weight:
    rows, columns = reversed(shape) if transposed else shape
    return Weight(name, module, attribute, (int(rows), int(columns)), transposed, expert)


def _head(
    model: nn.Module, stacks: Sequence[str], include: Sequence[str], exclude: Sequence[str], used: set[str]
) -> Block | None:
    """The matrices outside the blocks that `include` names and `exclude` does not; of a shared one, the product."""
    weights: dict[str, Weight] = {}
    one_name = one_name_each(model)
    for path, owner in model.named_modules():
        if _within(path, stacks):
            continue
        for attribute, parameter in owner.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if parameter.dim() != 2 or name not in one_name or not _matches(name, include, used):
                continue
            if _matches(name, exclude, used):
                continue
            if not isinstance(owner, (nn.Linear, Conv1D, nn.Embedding)):
                raise UnprunableError(f"{name} ({type(owner).__name__}) cannot be pruned; take it out of include.")
            # Of a tied embedding and head, the head stands for both: only it multiplies an input that can be observed.
            if one_name[name] not in weights or not isinstance(owner, nn.Embedding):
                weights[one_name[name]] = _weight(name, path, attribute, parameter.shape, isinstance(owner, Conv1D))
    # Whoever prunes one name of a shared matrix prunes the others; that must have been asked for.
    for name, one in one_name.items():
        if one in weights and not (_matches(name, include, set()) and not _matches(name, exclude, set())):
            named = weights[one].name
            raise UnprunableError(
                f"{named} and {name} are one matrix in this model, so zeros in the one are zeros in the other; to "
                f"prune both, include {name!r} as well, or else leave {named!r} out."
            )
    return Block("outside the blocks", tuple(weights.values()), 1.0) if weights else None


def _unmatched(model: nn.Module, stacks: Sequence[str], pattern: str, inside: bool) -> str:
    """What to say of a pattern that matches no matrix inside, or outside, the blocks."""
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]
    parts = {part for name in matrices if _within(name, stacks) == inside for part in name.split(".")}
    place = "of its blocks" if inside else "outside its blocks"
    return f"Nothing in {type(model).__name__} is named {pattern!r} among the matrices {place}.{near(pattern, parts)}"


def is_named(model: nn.Module, pattern: str) -> bool:
    """Whether a name or glob pattern, as `exclude` and `include` take them, names a parameter of `model`."""
    return any(matches(name, pattern) for name, _ in model.named_parameters(remove_duplicate=False))


def matches(name: str, pattern: str) -> bool:
    """Whether a name or glob pattern, as `exclude` takes it, names the weight."""
    return _matches(name, (pattern,), set())


def _matches(name: str, patterns: Sequence[str], used: set[str]) -> bool:
    """Whether a pattern names the weight, a module around it, or a run of parts of its name; notes which did."""
    name = plain_name(name)  # a matrix under an adapter has the name that it had without
    # "model.layers.0.mlp" -> "model", "model.layers", ...: a glob may name any module around the weight.
    around = list(accumulate(name.split("."), "{}.{}".format))
    # Dots on both sides, so that "layers.1" does not name "layers.10".
    hits = [
        pattern
        for pattern in patterns
        if f".{pattern}." in f".{name}." or any(fnmatch.fnmatchcase(part, pattern) for part in around)
    ]
    used.update(hits)
    return bool(hits)
