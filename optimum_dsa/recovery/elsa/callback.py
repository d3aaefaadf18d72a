"""`ElsaCallback`: a `transformers.Trainer` that trains under a budget of zeros which move until the end."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ...model.adapters import inner_model
from ...model.sharded import is_sharded
from ...pruning.report import PruningReport
from ..gradual.schedule import SCHEDULES
from ..gradual.sharding import refuse_engine, refuse_shared_devices, synchronise
from .budget import counts_of
from .split import FILE, SplitWeights


class ElsaCallback(TrainerCallback):
    """Draws a model to exactly the zeros of a budget while it is trained, by ADMM on the training loss itself.

    After an optimizer step, penalty · (x - z + u) is taken from the weights; every few steps z becomes the projection
    of x + u onto the budget, and u what is left. The budget grows to its whole first, so that the weights that stay
    learn to do without the others while these are still there. At the end the weights are zero where z is. Until then
    the model is dense: what is evaluated on the way is x with the zeros that it would have by then.

    It holds one float32 and one bool per prunable weight, which go into each checkpoint. Every process of DDP holds
    all of it, as each has the same weights and gradients; under FSDP 2 each holds that of its shares, and a projection
    brings the scores of one matrix together at a time.

    Lee et al., 2025, https://arxiv.org/abs/2510.01650, algorithm 1.

    Args:
        report (`PruningReport`): the budget: its allocation's counts, its config's pattern. No zero that the model
            has is held.
        penalty (`float`, defaults to 0.2): in (0, 1], what a step takes of the distance to the sparse weights.
        every (`int`, defaults to 5): optimizer steps between two projections.
        growth (`float`, defaults to 0.5): in [0, 1], the share of the steps in which the budget grows.
        shape (`str`, defaults to `"cubic"`): a row of `SCHEDULES`: how it grows.
    """

    def __init__(
        self, report: PruningReport, penalty: float = 0.2, every: int = 5, growth: float = 0.5, shape: str = "cubic"
    ):
        if not 0 < penalty <= 1:
            raise ValueError(f"penalty is a number in (0, 1], got {penalty!r}: with 0 nothing leads to the budget.")
        SCHEDULES[shape]
        self.report, self.penalty, self.every, self.growth, self.shape = report, penalty, every, growth, shape
        self._split: SplitWeights | None = None
        self._residual = 0.0  # at the last projection: an evaluation may have made the weights sparse since
        self._aside: list[tuple[Tensor, Tensor]] = []  # weights that an evaluation has made sparse, and they before it

    def attach(self, trainer) -> ElsaCallback:
        """Add this to `trainer`, behind the callback that decides when it evaluates; the callback itself."""
        refuse_shared_devices()
        trainer.add_callback(self)
        return self

    # -- events, in the order of a run

    def on_init_end(self, args, state, control, **kwargs):
        refuse_shared_devices()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        refuse_engine(model)
        if args.load_best_model_at_end:
            raise ValueError(
                "A model is sparse only at the end of its training under a budget, and load_best_model_at_end "
                "(patience) would bring back an earlier one; leave it out."
            )
        self._split = SplitWeights(inner_model(model), *counts_of(inner_model(model), self.report))
        if state.global_step:
            self._load(Path(args.output_dir, f"checkpoint-{state.global_step}"))
        else:
            self._split.begin()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._split.pull(self.penalty)
        done = state.global_step + 1  # the Trainer counts a step after this event
        if done % self.every == 0 or done == state.max_steps:
            self._project(optimizer, done / state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            self._show_sparse()

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            self._show_sparse()

    def on_evaluate(self, args, state, control, **kwargs):
        self._show_dense()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or self._split is None or "loss" not in logs:
            return
        numbers = {"residual": self._residual}
        logs.update(numbers)
        if state.log_history:  # the Trainer has appended its own copy already
            state.log_history[-1].update(numbers)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero or is_sharded(self._split.model):
            self._save(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.is_world_process_zero)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        self._show_dense()  # of an evaluation that was interrupted
        if state.global_step < state.max_steps:
            self._project(optimizer, 1.0)
        self._split.make_sparse()

    # -- what they do

    def _project(self, optimizer, time: float) -> None:
        """Choose the zeros at the share `time` of the steps; at 1 all of the budget's."""
        state = getattr(optimizer, "state", {})
        moments = {parameter: found["exp_avg_sq"] for parameter, found in state.items() if "exp_avg_sq" in found}
        self._split.project(moments, SCHEDULES[self.shape](min(time / self.growth, 1.0)) if self.growth else 1.0)
        # Every process has the same numbers; devices that round differently would drift apart.
        if not is_sharded(self._split.model):  # what is shared out is one number in one place
            synchronise(found.dual for found in self._split.splits.values())
            synchronise(found.keep for found in self._split.splits.values())
        self._residual = self._split.residual()

    @torch.no_grad()
    def _show_sparse(self) -> None:
        """Until `_show_dense`, the model has the zeros that it would have if training ended here."""
        if not self._aside:
            self._aside = self._split.copies()
            self._split.make_sparse()

    @torch.no_grad()
    def _show_dense(self) -> None:
        for tensor, dense in self._aside:
            tensor.copy_(dense)
        self._aside = []

    def _save(self, folder: Path, writes: bool) -> None:
        """Write z and u into `folder`, whole or not at all, in the process that `writes`; all bring their shares."""
        stored = self._split.stored()
        if not writes:
            return
        temporary = folder / f".{FILE}"
        save_file(stored, temporary)
        os.replace(temporary, folder / FILE)

    def _load(self, folder: Path) -> None:
        try:
            tensors = load_file(folder / FILE)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no whole {FILE}, without which training under a budget cannot go on ({error}); go on "
                "from an earlier checkpoint, or begin anew."
            ) from None
        self._split.restore(tensors)
        self._residual = self._split.residual()
