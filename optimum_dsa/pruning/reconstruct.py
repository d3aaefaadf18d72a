"""Block reconstruction: what is left of a block is trained until it gives what the dense block gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..model.walk import Reads, WalkedBlock
from .sections import ReconstructConfig
from .stretches import Blocks, Stretch, parts, trained
from .training import Reconstruction, Training


REFERENCE = "https://arxiv.org/abs/2510.14444"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # among which one is sought where none is given
FIRST = 1e-3
TRIALS = 6  # trainings that seeking takes beyond the one that a block has anyway: two in each of three blocks


class Reconstruct:
    """Trains the kept weights of every block, its biases and norms, so that it gives what the dense model has there.

    min ‖f(X; Ŵ) − f_dense(X_dense)‖² over what was not removed, X being what the pruned blocks before it give: by Adam
    on float32 weights, the masks held, with the rate and up to the step of the lowest loss on held-out windows.

    Costs a forward and a backward pass of the block for 4 sequences a step (three times as much in the first blocks of
    a model, where a rate is sought), and a forward pass of the dense block. Memory: four times the trained weights in
    float32 (five where they have another dtype), and the activations of one batch.

    Args:
        config: steps, the rate or `None`, how much is trained at a time.
        seed: of the order of the windows.
        bits: of the grid on which the weights lie, and stay; `None` where they lie on none.

    The objective of "A Free Lunch in LLM Compression", https://arxiv.org/abs/2510.14444, section 3.
    """

    reads: Reads = frozenset({"outputs"})

    def __init__(self, config: ReconstructConfig, seed: int = 0, bits: int | None = None):
        self.config, self.seed, self.bits = config, seed, bits
        self.notes: dict[str, Any] = {}  # block -> the fields of its [`Reconstruction`]
        self.waiting: list[WalkedBlock] = []  # blocks that are trained together with the next

    @property
    def found(self) -> dict[str, Reconstruction]:
        """Block -> its [`Reconstruction`]; of blocks that were trained together the last one's is that of all."""
        return {block: Reconstruction(**noted) for block, noted in self.notes.items()}

    def __call__(self, walked: WalkedBlock) -> None:
        # Outside the blocks nothing is behind a weight that it could be matched to.
        if walked.replay is None:
            return
        self.waiting.append(walked)
        if (walked.replay.index + 1) % self.config.span and not walked.replay.is_last:
            return
        together, self.waiting = self.waiting, []
        # A dense block stays dense, and one before which nothing is trained is what it was.
        while together and not together[0].weights:
            together = together[1:]
        if not any(block.weights for block in together):
            return
        # The caller may be in inference mode, through whose tensors no gradient goes.
        with torch.inference_mode(False), torch.enable_grad():
            found = self._train(together)
        for block in together:
            for name in trained(block):
                block.changed(name)
        self.notes[walked.name] = asdict(found)

    def _train(self, together: Sequence[WalkedBlock]) -> Reconstruction:
        blocks = Blocks(together)
        if not self.config.apart:
            found = self._trained(blocks)
            if len(together) > 1:
                blocks.move_on()
            return found
        whole = Training(blocks, 0, self.seed, self.bits)
        # A block that has no parts is one.
        each = [self._trained(part) for part in parts(together[0])] or [self._trained(blocks)]
        # Parts may each be nearer to their targets, and the block no nearer to its own.
        after, steps = whole.loss(), max(found.steps for found in each)
        if not after < whole.found.before:
            whole.finish()
            return whole.found
        return Reconstruction(whole.found.before, after, max(found.rate for found in each), steps)

    def _trained(self, stretch: Stretch) -> Reconstruction:
        training = Training(stretch, self.config.steps, self.seed, self.bits)
        rate, settled = self._rate()
        training.run(rate)
        if not settled:
            seek(training, RATES.index(rate))
        training.finish()
        return training.found

    def _rate(self) -> tuple[float, bool]:
        """The rate to begin with, and whether it is the one: given, or what two blocks in a row were best at."""
        if self.config.rate is not None:
            return self.config.rate, True
        # Two, for the first block of a model sees what no other does: inputs that have lost nothing.
        chosen = [found.rate for found in self.found.values() if found.steps]
        settled = next((rate for rate, other in zip(chosen, chosen[1:]) if rate == other), None)
        return (settled, True) if settled else (chosen[-1] if chosen else FIRST, False)


def seek(training: Training, at: int) -> None:
    """Train at the rates beside `RATES[at]`, which was tried, and on that way as long as it gets better."""
    # A rate at which nothing gets better is too high rather than too low.
    for way in (1, -1) if training.found.steps else (-1, 1):
        number = at + way
        while 0 <= number < len(RATES):
            training.run(RATES[number])
            if training.found.rate != RATES[number]:
                break
            number += way
        if training.found.rate not in (0.0, RATES[at]):
            return
