"""The Trainer that recovery uses: distillation, and how far it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..common.progress import Progress
from ..model.examples import IGNORED, logits_of, run_examples
from ..model.inputs import kind_of
from .configuration import RecoveryConfig


REFERENCE = "https://arxiv.org/abs/1503.02531"  # of distillation


class RecoveryTrainer(Trainer):
    """A Trainer whose training loss is (1 - share) · language modelling + share · divergence from a teacher.

    The validation loss is that of language modelling. Sequences have equal lengths, so every batch's mean counts the
    same.

    Args:
        teacher (`nn.Module`, *optional*): the dense model.
        share (`float`, defaults to 0.0): weight of the divergence.
        temperature (`float`, defaults to 1.0): both distributions are softened by it; the divergence is multiplied by
            its square, so that gradients keep their size.
    """

    def __init__(
        self, *args, teacher: nn.Module | None = None, share: float = 0.0, temperature: float = 1.0, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.teacher, self.share, self.temperature = teacher, share, temperature
        self.masked = kind_of(self.model) == "masked"
        self.model_accepts_loss_kwargs = False  # means of batches, divided by the number of accumulated ones
        # Two bars would write over each other.
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ShownProgress())
        if teacher is not None:
            teacher.eval().to(self.args.device)

    def get_train_dataloader(self):
        """Whole batches, where there is one: any number of processes trains on the same ones, in the same order."""
        self.args.dataloader_drop_last = len(self.train_dataset) >= self.args.train_batch_size * self.args.world_size
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False  # what is measured is measured to its end

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.masked:
            # of the words alone: a model for pretraining has no loss without labels of its second task
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            words, labels = logits_of(outputs), inputs["labels"]
            loss = functional.cross_entropy(words.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        else:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.teacher is not None and self.share and model.training:
            with torch.no_grad():
                expected = run_examples(self.teacher, inputs)
            loss = (1 - self.share) * loss + self.share * divergence(logits_of(outputs), expected, self.temperature)
        return (loss, outputs) if return_outputs else loss


def divergence(logits: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of KL(expected ‖ predicted), times the temperature's square.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531.

    Args:
        logits (`Tensor`): (samples, length, vocabulary), those that are trained.
        expected (`Tensor`): the teacher's, of the same shape.
    """
    # float32: a softmax over a large vocabulary in half precision loses the small probabilities.
    student = functional.log_softmax(logits.float() / temperature, dim=-1).flatten(0, -2)
    teacher = functional.log_softmax(expected.float() / temperature, dim=-1).flatten(0, -2)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class DivergedError(ValueError):
    """Training left the numbers; what came of it is not kept."""


def check_loss(loss: float, config: RecoveryConfig) -> None:
    """Raise `DivergedError` for a loss, or a perplexity, that is no number."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"Training diverged: the validation loss is {loss}. Nothing was kept; take a learning rate below "
            f"{config.rate:g}."
        )


def check_finite(model: nn.Module, config: RecoveryConfig) -> None:
    """Raise `DivergedError` for a weight, of the model or of an adapter, that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DivergedError(
                f"Training diverged: {name} holds NaN or infinities. Nothing was kept; take a learning rate below "
                f"{config.rate:g}."
            )


class StopWhereItDiverges(TrainerCallback):
    """Ends a training at the first validation loss that is no number."""

    def __init__(self, config: RecoveryConfig):
        self.config = config

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        check_loss((metrics or {}).get("eval_loss", 0.0), self.config)


class ShownProgress(TrainerCallback):
    """Shows how many steps are done, and the latest losses; silenced by the Hugging Face switches."""

    def __init__(self):
        self.shown: Progress | None = None
        self.losses: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.shown = Progress("Recovering", state.max_steps, "step", "optimum_dsa.recover")
            self.shown.done = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.shown is not None:
            self.shown.show(state.global_step, **self.losses)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "validation loss"}
        self.losses |= {shown: f"{logs[name]:.3f}" for name, shown in names.items() if name in (logs or {})}

    def on_train_end(self, args, state, control, **kwargs):
        if self.shown is not None:
            self.shown.close()
            self.shown = None
