"""How long pruning will take: from a block that was timed, or from arithmetic and the speed of one product."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...model.architecture import find_architecture
from ...model.gradients import collect_gradients
from ...model.walk import walk_blocks
from ..allocate import fit
from ..allocation import Unit
from ..calibration import Calibration
from ..configuration import DSAConfig
from ..reconstruct import FIRST, TRIALS, Reconstruct
from ..source import batches_to_train, held_out, step_size
from ..steps import RemoveWeights, Step, union
from ..training import LOOKS
from .memory import Text
from .shape import BlockShape, ModelShape


WINDOWS = 2  # that a block is timed on

# Update -> operations for a matrix, as a multiple of rows · columns², and once for an input, of columns³: so many
# products' worth of time. A Cholesky factor runs at a third of a product's speed, an eigendecomposition at a tenth;
# `admm` takes some 60 steps, and a new inverse at every third.
OPERATIONS = {"none": (0, 0), "sparsegpt": (4, 6), "admm": (160, 120), "refit": (64, 0), "swap": (64, 0)}
TARGET = (4, 6)  # `dense_target`: two products, and the factor
# Of `on_grid`, operations' worth of time for each weight: finding scales; and where errors are fed back, column by
# column, for each weight beside them, for a matrix as a multiple of rows · columns², and for an input of columns³.
GRID = {"absmax": 700, "mse": 13_000}
FEEDBACK = (5_000, 25, 6)
SCORES = 400  # operations' worth of time that a weight's score and its place in an order take


@dataclass(frozen=True)
class Seconds:
    """What a block of `size` weights takes: `fixed` whatever the text, and so much for each `token` of it.

    Where a rate of training is sought, that takes a block of this size `seeking` once for the whole model.
    """

    size: int
    fixed: float
    token: float
    seeking: float = 0.0

    def total(self, shape: ModelShape, text: Text) -> float:
        """Seconds of all blocks, by their sizes."""
        blocks = sum(block.size for block in shape.blocks) / self.size
        return blocks * (self.fixed + self.token * text.tokens) + self.seeking


@torch.no_grad()
def time_block(model: nn.Module, config: DSAConfig, text: Text) -> Seconds:
    """Prune the second block of a model of two, on one or two random windows, and time it.

    The second and not the first: what goes into it is not what the dense model has there, as everywhere behind.
    """
    config = replace(config, exclude=(), include=())
    architecture = find_architecture(model, config.blocks, skip_unprunable=True)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    windows = min(WINDOWS, text.samples)
    tokens = torch.randint(vocabulary, (windows, text.length), generator=generator)
    calibration = Calibration({"input_ids": tokens}, "random")
    batches = calibration.batches(min(text.batch, windows))
    uniform = fit(dict.fromkeys(architecture.units("block"), config.sparsity), architecture, config, "block")
    steps: list[Step] = [RemoveWeights(config.resolved, uniform, config.update.true_sequential)]
    walking = acting = again = seeking = 0.0
    unseen = 0
    if config.resolved.allocation_reads:
        passed, measuring, _ = _second(
            model, architecture, batches, config.resolved.allocation_reads, False, [_measure(config)]
        )
        walking, acting = passed * _passes(config, len(architecture.blocks), text.samples), measuring
    if "gradients" in config.resolved.reads:
        start = time.perf_counter()
        collect_gradients(model, architecture, batches)
        walking += _since(start, model) / len(architecture.blocks)
    trains = config.reconstruct.steps and windows > 1
    if trains:
        # A rate is sought in the first blocks of a model alone.
        steps.append(
            Reconstruct(replace(config.reconstruct, rate=config.reconstruct.rate or FIRST), 0, config.values.bits)
        )
        batches, unseen = batches_to_train(calibration, replace(config, batch_size=text.batch))
    reads = union(steps)
    passed, removing, again = _second(
        model, architecture, batches if reads else None, reads, config.sequential, steps[:1], unseen
    )
    size = architecture.blocks[min(1, len(architecture.blocks) - 1)].size
    walking, acting = walking + passed, acting + removing
    if trains:
        _, training, _ = _second(model, architecture, batches, reads, config.sequential, steps[1:], unseen)
        training *= step_size(text.samples) / step_size(windows)
        acting += training
        seeking = training * _trials(config)
    return Seconds(size, acting, (walking + again) / (windows * text.length), seeking)


def _trials(config: DSAConfig) -> int:
    """Trainings of a block beyond the one that every block has."""
    return TRIALS if config.reconstruct.rate is None else 0


def _measure(config: DSAConfig):
    """What an allocation does at a block."""

    def measure(walked) -> None:
        if config.allocator.reads == "model":
            return
        for name, weights in walked.block.units(config.unit_granularity).items():
            tensors = [walked.tensor(weight) for weight in weights]
            statistics = [walked.statistics.get(weight.name) for weight in weights]
            config.allocator.measure(Unit(name, 0.0, tensors, statistics, config.resolved.allocation_metric))

    return measure


def _passes(config: DSAConfig, blocks: int, windows: int) -> float:
    """How many forward passes the allocation costs."""
    return config.allocator.passes(blocks, windows) if getattr(config.allocator, "reads", "") == "model" else 1


def _second(model, architecture, batches, reads, sequential, steps, unseen=0) -> tuple[float, float, float]:
    """Seconds of the walk from the first block to the second, of `steps` there, and of passes that they ask for."""
    walk = walk_blocks(model, architecture, batches, reads=reads, sequential=sequential, unseen=unseen)
    first = next(walk)
    for weight in first.weights:
        first.tensor(weight).mul_(0.9)
    start = time.perf_counter()
    walked, passes = next(walk, None), [0.0]
    walking = _since(start, model)
    if walked is None:  # a model of one block
        walked, walking = first, 0.0

    def again(weights):
        begun = time.perf_counter()
        found = walked.again(weights)
        passes[0] += _since(begun, model)
        return found

    start = time.perf_counter()
    for act in steps:
        act(replace(walked, again=again if walked.again else None))
    acting = _since(start, model)
    walk.close()
    return walking, max(acting - passes[0], 0.0), passes[0]


def _since(start: float, model: nn.Module) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # a GPU is told what to do, and does it later
    return time.perf_counter() - start


def operations(shape: ModelShape, config: DSAConfig, text: Text) -> tuple[float, float]:
    """Floating-point operations of pruning: of forward passes, in the model's type, and of all else, in float32.

    Each kind is weighed by how slow it is: products count as they are.
    """
    trainings = 1 + _trials(config) / len(shape.blocks)
    allocating = _passes(config, len(shape.blocks), text.samples) if config.resolved.allocation_reads else 0
    forward, rest = zip(*(_of_block(block, config, text, trainings, allocating) for block in shape.blocks))
    return sum(forward), sum(rest)


def _of_block(
    block: BlockShape, config: DSAConfig, text: Text, trainings: float, passes: float
) -> tuple[float, float]:
    reads, resolved = config.resolved.reads, config.resolved
    of_matrix, of_input = OPERATIONS.get(config.recipe.update, OPERATIONS["refit"])
    if "cross_gram" in reads:
        of_matrix, of_input = of_matrix + TARGET[0], of_input + TARGET[1]
    forward = (
        2
        * text.tokens
        * (
            sum(rows * group.columns * group.share for group in block.inputs for rows in group.rows)
            + text.length * block.hidden  # attention, half of whose scores are masked
        )
    )
    gram = 2 * text.tokens * sum(group.columns**2 * group.share for group in block.inputs)
    if reads:
        # With `true_sequential` one for every input but the first, on the average up to the middle of the block.
        collecting = (len(block.inputs) - 1) / 2 if config.update.true_sequential else 1
        passes += collecting * (2 if "cross_gram" in reads else 1) + config.sequential
        # Forward, and back at twice the cost.
        passes += 3 * ("gradients" in reads) + 3 * collecting * ("regional" in reads)
    sums = ("gram" in resolved.allocation_reads) + ("gram" in reads) + ("cross_gram" in reads)
    each, feeds = _of_grid(config)
    of_matrix = of_matrix + feeds[0]
    # The factor of sparsegpt and of dense targets is kept, and serves once more.
    of_input = of_input + (feeds[1] if config.recipe.update != "sparsegpt" and "cross_gram" not in reads else 0)
    scored = each * block.size + block.size * SCORES * (
        (not resolved.chooses) + bool(config.allocator and resolved.allocation_reads)
    )
    if config.reconstruct.steps:
        # A step runs forward and back, at twice the cost; the windows held out are looked at all along.
        trained = config.reconstruct.steps * step_size(text.samples) / text.samples
        passes += 1 + trainings * (3 * trained + LOOKS * held_out(text.samples) / text.samples)
    return passes * forward, (
        sums * gram
        + of_matrix * sum(rows * group.columns**2 for group in block.inputs for rows in group.rows)
        + of_input * sum(group.columns**3 for group in block.inputs)
        + scored
    )


def _of_grid(config: DSAConfig) -> tuple[float, tuple[float, float]]:
    """Operations of `on_grid`: for each weight; and for a matrix and an input, as those of an update are counted."""
    values = config.values
    if values.name is None:
        return 0.0, (0.0, 0.0)
    each = GRID.get(values.scales, GRID["mse"])
    return (each + FEEDBACK[0], FEEDBACK[1:]) if values.feedback else (each, (0.0, 0.0))


def speed(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a product of two matrices reaches here: some 50 ms of trying."""
    width = 4096 if torch.device(device).type == "cuda" else 512
    left = torch.ones(width, width, device=device, dtype=dtype)
    left @ left
    start, products = time.perf_counter(), 0
    while products < 3 or time.perf_counter() - start < 0.03:
        result = left @ left
        result[0, 0].item()  # waits for a GPU
        products += 1
    return 2 * width**3 * products / (time.perf_counter() - start)
