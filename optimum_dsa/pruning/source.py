"""What pruning is told about the inputs of the weights: text, tensors, or statistics that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..common.progress import progress as shown
from ..model.architecture import Architecture
from ..model.calls import explained, feed
from ..model.statistics import CollectedStatistics
from .calibration import Calibration, load_calibration
from .configuration import DSAConfig


Known = Calibration | CollectedStatistics  # what statistics come from, or are
Source = Known | Tensor | Mapping[str, Tensor]


def as_calibration(source: Source | None, model: nn.Module) -> Known | None:
    """`source`, tokens (samples, length) or inputs by name, as what batches or statistics can be taken from."""
    known = source is None or isinstance(source, (Calibration, CollectedStatistics))
    return source if known else load_calibration(source, model)


def batches_of(
    calibration: Known | None, config: DSAConfig, who: str
) -> list[dict[str, Tensor]] | CollectedStatistics:
    """What a walk is fed, (samples, length, ...) by name; raises `ValueError` where there is nothing for `who`."""
    if calibration is None:
        raise ValueError(f"The {who} needs calibration data; pass texts, a file, a dataset or tokens.")
    return calibration.batches(config.batch_size) if isinstance(calibration, Calibration) else calibration


def batches_to_train(calibration: Known | None, config: DSAConfig) -> tuple[list[dict[str, Tensor]], int]:
    """What a walk is fed whose blocks are trained, (samples, length, ...) by name, and how many are held out.

    These are the last, and the walk's `unseen`: what is fitted to statistics can be told from what is learnt by
    windows alone that neither has seen.

    Raises:
        ValueError: there is nothing to be trained on.
    """
    parts = list(calibration.parts) if isinstance(calibration, Calibration) else []
    if len(parts) > 1:
        return parts, held_out(len(parts))
    known = isinstance(calibration, Calibration) and not parts
    samples = len(next(iter(calibration.inputs.values()))) if known else len(parts)
    if samples < 2:
        raise ValueError(
            f"{config.reconstruct.asked} trains on calibration windows, and looks at another one whether that helps; "
            f"got {samples}. Give text, and not statistics, and num_samples of at least 2; or leave training out."
        )
    kept = samples - held_out(samples)
    size = micro_batch(kept, config.batch_size)
    first, last = ({name: value[part] for name, value in calibration.inputs.items()} for part in _halves(kept))
    apart = replace(calibration, inputs=last).batches(size)
    return replace(calibration, inputs=first).batches(size) + apart, len(apart)


def _halves(at: int) -> tuple[slice, slice]:
    return slice(None, at), slice(at, None)


def held_out(samples: int) -> int:
    """How many of so many calibration windows stop the training of blocks, and choose its rate."""
    # A loss per output and token is known well from few tokens; and what is held out is lost to the fit.
    return max(samples // 16, 1)


def micro_batch(samples: int, batch_size: int) -> int:
    """The largest batch of at most `batch_size` of which a number makes a [`step_size`], whatever that is."""
    return min(2 ** (batch_size.bit_length() - 1), step_size(samples))


def step_size(samples: int) -> int:
    """Sequences of a step of training, of so many in all: 4, or the power of two that leaves four such groups."""
    # On llama-10m's 128 windows 8 gave what 4 give at the same number of steps, and cost twice the time.
    return min(4, 2 ** max((samples // 4).bit_length() - 1, 0))


class _NotFiniteError(ValueError):
    """A block makes a NaN or an infinity."""


def check_finite_outputs(model: nn.Module, architecture: Architecture, calibration: Known | None) -> None:
    """Raise `ValueError` for a NaN or infinity in what a block makes of the first sample, by name."""
    if not isinstance(calibration, Calibration):
        return

    def check(name: str):
        def hook(module, args, output):
            hidden = output if isinstance(output, Tensor) else output[0]
            if not hidden.isfinite().all():
                raise _NotFiniteError(
                    f"The output of {name} holds NaN or infinities on the first calibration sample; "
                    "try another dtype (bfloat16 or float32)."
                )

        return hook

    # Hooks on blocks and not a look at the logits: an overflow is named where it begins.
    handles = []
    try:
        for stack in architecture.stacks:
            for block in stack.blocks:
                handles.append(model.get_submodule(block.name).register_forward_hook(check(block.name)))
        batch = calibration.batches(1)[0]
        with explained(model, batch, _NotFiniteError):
            feed(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def progress(description: str, hidden: bool = False):
    """Shows how many blocks are done, unless `hidden`; silenced by the Hugging Face switches."""
    return lambda blocks: shown(blocks, description, "block", "optimum_dsa.prune", hidden)
