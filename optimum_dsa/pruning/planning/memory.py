"""How much memory pruning holds at once, part by part: arithmetic on sizes.

Every formula stands beside the name of the code that it mirrors; where that changes, it changes here. They are held
against the measured peak of a process by a test.

What is freed within one step of the work is added up, and not its largest taken: a C library keeps what is freed for
the next request, and a process does not shrink in between. Collecting statistics and solving matrices with them are
two steps: what the first has freed is what the second is given. Of matrices that are so large that they are given back
at once, factoring is a step of its own, and the statistics of inputs before the widest are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...model.walk import Reads
from ..allocation import ALLOCATIONS
from ..configuration import DSAConfig
from ..distill import CHUNK
from ..source import step_size
from ..unstructured.updates import UPDATES
from .shape import BlockShape, InputShape, ModelShape
from .tried import TOP, Tries, each_try, last, tries_of


FLOAT = 4  # bytes of a number in statistics, scores and updates

# Update -> float32 matrices of the size of the weight, and of X·Xᵀ, that are alive while one matrix is worked on,
# beside what is kept of its input. `none`: scores, their order and the mask. `sparsegpt`: the transposed copy, scores
# of the mask. `admm`: its state, what it seeks, two masks, then those of `refit`; the inverse and its making. `refit`:
# change, residual, direction, slope and the weight; H.
WORKING = {"none": (2.5, 0), "sparsegpt": (2.5, 0), "admm": (6, 2), "refit": (6, 1), "swap": (5, 1)}
OTHER = (6, 2)  # of an update that somebody has added

# Likewise of `on_grid`, after the update: the pruned weight, its numbers as they are found and as floats. With
# feedback the transposed copy; then in `settled` what the grid stands for, twice, its scales, slopes, what they are
# made from, and numbers; H.
GRID, FEEDBACK = (2.5, 0), (6, 1)

# Update -> what `LayerStatistics` computes of an input and keeps until its matrices are pruned, and how many more of
# X·Xᵀ's size it takes meanwhile. `inverse_factor`: two matrices beside the factor. `spectrum`: H, and LAPACK's two.
KEPT = {"sparsegpt": ("factor", 2), "admm": ("spectrum", 3)}

RETURNED = 2**25  # bytes: glibc keeps what is smaller for the next request

SOLVING = ("factors", "matrix at work")  # parts of memory that are there while a matrix is pruned


@dataclass(frozen=True)
class Text:
    """How much calibration text: sequences, tokens of each, sequences per forward pass."""

    samples: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def divided(self, ranks: int) -> Text:
        """What each of so many processes is given: at most."""
        return replace(self, samples=-(-self.samples // ranks))

    @property
    def tokens_at_once(self) -> int:
        """Tokens of one forward pass."""
        return min(self.samples, self.batch) * self.length


def phases(
    shape: ModelShape, config: DSAConfig, text: Text, offloaded: bool = False, devices: int = 1
) -> dict[str, dict[str, int]]:
    """Phase of the work -> part -> bytes of one device, of everything but the libraries.

    Args:
        text: what one process is given.
        offloaded: whether weights are elsewhere, and brought in block by block.
        devices: over how many the weights are spread; the work is done on one at a time.
    """
    found = {"loading": {"weights": weights(shape, offloaded, devices)}}
    if (tries := tries_of(config, text.samples, text.length)) is not None:
        found |= _trying(shape, each_try(config), text, tries, found["loading"])
        config = last(config)
    if config.resolved.allocation_reads:
        found["allocating"] = found["loading"] | _allocating(shape, config, text)
    parts = found["loading"] | _pruning(shape, config, text)
    found["collecting"] = {part: size for part, size in parts.items() if part not in SOLVING}
    found |= _solving(shape, config, {part: size for part, size in parts.items() if part != "one batch"})
    if config.reconstruct.steps:
        found["training blocks"] = found["loading"] | _training(shape, config, text)
    if config.reconstruct.distill:
        found["training the model"] = found["loading"] | _distilling(shape, text)
    return {name: {part: int(size) for part, size in parts.items() if size >= 1} for name, parts in found.items()}


def weights(shape: ModelShape, offloaded: bool, devices: int = 1) -> int:
    """Bytes of the weights that are on a device: all, its share, or one block's or a matrix outside at a time."""
    largest = max(block.parameters for block in shape.blocks)
    if offloaded:
        return max(largest, shape.largest_outside) * shape.itemsize
    # Blocks are not divided: of many devices, some may have one more than their share.
    share = max(-(-len(shape.blocks) // devices) * largest, -(-shape.parameters // devices))
    return min(share, shape.parameters) * shape.itemsize


def on_disk(shape: ModelShape, config: DSAConfig, text: Text) -> int:
    """Bytes of activations that are kept on the disk: of the walk that keeps most."""
    if config.activations == "memory":
        return 0
    reads = bool(config.resolved.reads or config.resolved.allocation_reads or config.reconstruct.steps)
    beside = "cross_gram" in config.resolved.reads or bool(config.reconstruct.steps)
    return int(reads + 2 * shape.stacks * beside) * text.tokens * shape.hidden * shape.itemsize


def _allocating(shape: ModelShape, config: DSAConfig, text: Text) -> dict[str, float]:
    """`allocate`: one walk, `sequential=False`, that measures unit after unit."""
    reads = config.resolved.allocation_reads
    block = _largest(shape)
    sizes = [block.size] if config.unit_granularity == "block" else [rows * cols for rows, cols in block.weights]
    return {
        "calibration text": _tokens(text),
        # Every stack's are recorded before the first is walked.
        "activations": shape.stacks * _activations(shape, config, text),
        "one batch": _batch(shape, block, text),
        "statistics": _statistics(block, "gram" in reads),
        # `Unit.flat_scores`, and the copy that a pre-process makes, with its mask.
        "scores": max(sizes) * (2 * FLOAT + 1),
        # `restored`, a block's weights as they were, and what `besa` learns with, the dearest of them.
        "masks": block.size * (6 * FLOAT + shape.itemsize) if config.allocator.reads == "model" else 0,
    } | _gradients(shape, reads, text)


def _trying(
    shape: ModelShape, config: DSAConfig, text: Text, tries: Tries, loaded: dict[str, int]
) -> dict[str, dict[str, float]]:
    """`search.ready_made.settle`, with `config` as every allocation is tried: masks are compared, then prunes."""
    apart = Text(tries.windows, tries.length, text.batch)
    block, prunable = _largest(shape), sum(block.size for block in shape.blocks)
    texts = {"calibration text": _tokens(text) + _tokens(apart)}
    # `Objective._dense_predictions`: halves, and numbers of tokens as short as the vocabulary allows.
    number = 4 if shape.vocabulary > 2**15 else 2
    kept = loaded | texts | {"dense predictions": apart.tokens * min(TOP, shape.vocabulary) * (2 + number)}
    # Of one batch, as they come, in float32, and what their sum is made from.
    logits = apart.tokens_at_once * shape.vocabulary * (shape.itemsize + 2 * FLOAT)
    batch = {"one batch": logits + _batch(shape, block, apart)}
    # `Resolver._walk`: all allocators at once, of which some read X·Xᵀ.
    scored = replace(config, allocation="lsa") if "lsa" in ALLOCATIONS else config
    found = {"reading scores": loaded | _allocating(shape, scored, text) | texts}
    largest = max((rows * columns for rows, columns in block.weights), default=0)
    # `MaskedModel`: two bytes a weight for its turn; one more matrix where it is masked.
    orders = {"orders": 2 * prunable, "matrix at work": largest * (4 * FLOAT + 1)}
    found["comparing masks"] = kept | orders | batch
    # The masks of a prune, and where weights are changed all of them a second time.
    tried = {"tried weights": prunable * (1 + (shape.itemsize if config.resolved.updates else 0))}
    parts = _pruning(shape, config, text) | texts
    found["trying allocations"] = kept | tried | {name: parts[name] for name in parts if name != "one batch"}
    found["judging allocations"] = kept | tried | batch
    return found


def _pruning(shape: ModelShape, config: DSAConfig, text: Text) -> dict[str, float]:
    """`run_steps` with `RemoveWeights`, at the block where it needs most."""
    reads, update = config.resolved.reads, config.recipe.update
    cross = "cross_gram" in reads
    block = _largest(shape)
    parts: dict[str, float] = {}
    if reads:
        parts["calibration text"] = _tokens(text)
        parts["activations"] = _activations(shape, config, text)
        # With `true_sequential` those of one input at a time, and of all experts together.
        alone = config.update.true_sequential and all(group.share == 1 for group in block.inputs)
        held = replace(block, inputs=(max(block.inputs, key=lambda group: group.columns),)) if alone else block
        parts["one batch"] = _batch(shape, held, text, block)
        parts["statistics"] = _statistics(held, "gram" in reads, cross, "residual" in reads)
    parts |= _gradients(shape, reads, text)
    if cross:
        # `DenseStream`: what goes into the dense block, what comes out, its weights, and what its matrices are given.
        parts["dense activations"] = 2 * shape.stacks * _activations(shape, config, text)
        parts["dense block"] = block.parameters * shape.itemsize
        parts["one batch"] += text.tokens_at_once * shape.itemsize * sum(group.columns for group in held.inputs)
    if "residual" in reads:
        # `watching_additions`, of the dense block and of the other: outputs that are added, and what comes of it.
        parts["one batch"] += 8 * text.tokens_at_once * block.hidden * shape.itemsize
    if "gram" in reads:
        parts["factors"] = _factors(config, block)
    parts["matrix at work"] = max(_working(update, block, cross), _on_grid(config, block))
    return parts


def _gradients(shape: ModelShape, reads: Reads, text: Text) -> dict[str, float]:
    """`collect_gradients`, of all weights, and the backward pass of one sample; `regional_gradients`, of one block."""
    blocks = shape.blocks if "gradients" in reads else (_largest(shape),) if "regional" in reads else ()
    if not blocks:
        return {}
    logits = 3 * text.length * shape.vocabulary * FLOAT if "gradients" in reads else 0
    computed = text.length * sum(_computed(shape, block) for block in blocks)
    # The sums; and one gradient, in the model's type and in float32, before it is added and dropped.
    largest = max((rows * columns for block in blocks for rows, columns in block.weights), default=0)
    return {
        "gradients": FLOAT * sum(block.size for block in blocks) + largest * (shape.itemsize + FLOAT),
        "backward pass": computed + logits,
    }


def _solving(shape: ModelShape, config: DSAConfig, parts: dict[str, float]) -> dict[str, dict[str, float]]:
    """The steps in which matrices are pruned, of `parts`, at the input that takes most, the widest."""
    block = _largest(shape)
    matrix = FLOAT * block.widest**2
    if "factors" not in parts or matrix <= RETURNED:
        return {"solving": parts}
    widest = max(range(len(block.inputs)), key=lambda number: block.inputs[number].columns)
    reads = config.resolved.reads
    left = _statistics(replace(block, inputs=block.inputs[widest:]), True, "cross_gram" in reads, "residual" in reads)
    parts = parts | {"statistics": min(left, parts["statistics"])}
    factoring = {part: size for part, size in parts.items() if part != "matrix at work"}
    return {"factoring": factoring, "solving": parts | {"factors": len(_derived(config)) * matrix}}


def _training(shape: ModelShape, config: DSAConfig, text: Text) -> dict[str, float]:
    """`Reconstruct`, which comes when a block is pruned, and its statistics are gone."""
    parts = _pruning(shape, config, text)
    block = _largest(shape)
    for gone in ("statistics", *SOLVING):
        parts.pop(gone, None)
    parts.setdefault("calibration text", _tokens(text))
    parts.setdefault("activations", _activations(shape, config, text))
    # What goes into the dense block, and what it gives.
    parts["dense activations"] = 2 * shape.stacks * _activations(shape, config, text)
    parts.setdefault("dense block", block.parameters * shape.itemsize)
    span, share = config.reconstruct.span, 0.5 if config.reconstruct.apart else 1
    # The start, the best, gradients, Adam's two, a mask of a byte; a copy where the weights are not in float32.
    parts["training"] = span * share * block.size * (FLOAT * (5 if shape.itemsize >= FLOAT else 6) + 1)
    batch = min(text.batch, step_size(text.samples)) * text.length
    parts["one batch"] = span * share * batch * _computed(shape, block)
    # Blocks that are trained together wait for the last.
    return parts | {"dense block": span * parts["dense block"]}


def _distilling(shape: ModelShape, text: Text) -> dict[str, float]:
    """`Distillation`, which comes when all blocks are pruned."""
    copies = FLOAT * (5 if shape.itemsize >= FLOAT else 6) + 1
    computed = sum(_computed(shape, block) for block in shape.blocks)
    return {
        "calibration text": _tokens(text),
        "dense outputs": text.tokens * shape.hidden * shape.itemsize,
        "training": sum(block.size for block in shape.blocks) * copies,
        # Of one sequence, and of predictions the two, their logarithms and gradients.
        "one batch": text.length * computed + 6 * FLOAT * min(CHUNK, text.length * shape.vocabulary),
    }


def _computed(shape: ModelShape, block: BlockShape) -> float:
    """Bytes that a block computes of a token, and keeps until its gradient is there."""
    numbers = sum((group.columns + sum(group.rows)) * group.share for group in block.inputs) + 4 * block.hidden
    return numbers * shape.itemsize + 4 * block.hidden * FLOAT


def _largest(shape: ModelShape) -> BlockShape:
    """The block that needs most, by its matrices."""
    return max(shape.blocks, key=lambda block: (block.size, block.parameters))


def _tokens(text: Text) -> int:
    """`Calibration.inputs`: 8 bytes a token."""
    return 8 * text.tokens


def _activations(shape: ModelShape, config: DSAConfig, text: Text) -> int:
    """`BlockCalls.hidden` of all batches, or of the one at hand: what goes in, and what comes out."""
    if config.activations == "disk":
        return min(2 * text.tokens_at_once, text.tokens) * shape.hidden * shape.itemsize
    return text.tokens * shape.hidden * shape.itemsize


def _batch(shape: ModelShape, watched: BlockShape, text: Text, block: BlockShape | None = None) -> int:
    """A forward pass of one batch through a block, by default the one that is `watched` as a whole.

    The inputs of all its weights that are watched, which `Observer` holds to the end of the batch; the widest outputs;
    the block's own input twice, once in float32, as norms compute in it.
    """
    block = block or watched
    held = sum(group.columns * group.share for group in watched.inputs)
    widest = max((sum(group.rows) * group.share for group in block.inputs), default=0)
    return int(text.tokens_at_once * ((held + widest + block.hidden) * shape.itemsize + block.hidden * FLOAT))


def _statistics(block: BlockShape, gram: bool, cross: bool = False, residual: bool = False) -> int:
    """`LayerStatistics` of every different input of a block: Σ x², X·Xᵀ, the drift, the lack."""
    numbers = sum(group.columns for group in block.inputs)
    if gram:
        numbers += sum(group.columns**2 * (2 if cross and group.share == 1 else 1) for group in block.inputs)
    if residual:
        numbers += sum(group.columns * group.rows[0] for group in block.inputs if _is_added(group, block))
    return numbers * FLOAT


def _is_added(group: InputShape, block: BlockShape) -> bool:
    """Whether the outputs of a weight are added to the residual stream: `Observer.add_residual`, by sizes alone."""
    return len(group.rows) == 1 and group.rows[0] == block.hidden and group.share == 1


def _factors(config: DSAConfig, block: BlockShape) -> int:
    """What is computed of X·Xᵀ of one input, the widest, kept until its matrices are pruned, and takes meanwhile."""
    wanted = _derived(config)
    more = max(KEPT.get(config.recipe.update, (None, 0))[1], 2 if wanted else 0)
    return (len(wanted) + more) * block.widest**2 * FLOAT


def _derived(config: DSAConfig) -> set[str]:
    """What is computed of X·Xᵀ and kept until its matrices are pruned."""
    resolved, kept = config.resolved, KEPT.get(config.recipe.update, (None, 0))[0]
    # The metric `obs`, where it is asked, `dense_target` and errors that are fed back use the factor as well.
    feeds = config.values.name is not None and config.values.feedback
    wanted = {kept} | ({"factor"} if "cross_gram" in resolved.reads or feeds else set())
    if not resolved.chooses and "gram" in resolved.metric_reads:
        wanted.add("factor")
    return wanted - {None}


def _working(update: str, block: BlockShape, cross: bool) -> float:
    """`ResolvedMethod.pruned` of the largest matrix of a block, with the target that stands for the weight."""
    of_weight, of_gram = WORKING.get(update, OTHER if UPDATES.fact(update, "reads", "nothing") == "gram" else (2.5, 0))
    largest = max((rows * columns for rows, columns in block.weights), default=0)
    return (largest * (of_weight + (2 if cross else 0)) + of_gram * block.widest**2) * FLOAT


def _on_grid(config: DSAConfig, block: BlockShape) -> float:
    """`ResolvedMethod.on_grid` of the largest matrix of a block."""
    if config.values.name is None:
        return 0
    of_weight, of_gram = FEEDBACK if config.values.feedback else GRID
    largest = max((rows * columns for rows, columns in block.weights), default=0)
    return (largest * of_weight + of_gram * block.widest**2) * FLOAT


def in_dtype(shape: ModelShape, itemsize: int) -> ModelShape:
    """The same model in numbers of `itemsize` bytes."""
    return replace(shape, itemsize=itemsize)
