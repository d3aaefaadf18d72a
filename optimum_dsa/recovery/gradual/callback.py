"""`DSACallback`: a `transformers.Trainer` that keeps zeros, or makes them while it trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ...checkpoint.base_files import BaseFiles
from ...checkpoint.beside import find_beside
from ...checkpoint.description import after, describe, write_description
from ...checkpoint.load import load_tokenizer
from ...checkpoint.origin import base_of, report_of, training_of
from ...common.fences import insert_callback
from ...model.adapters import inner_model, saves_adapters, without_adapters
from ...model.architecture import Architecture, find_architecture
from ...model.parameters import count_parameters
from ...model.sharded import copy_into, is_sharded, twin
from ...pruning.allocate import architecture_for, standing_zeros
from ...pruning.calibration import Calibration, load_calibration
from ...pruning.configuration import DSAConfig
from ...pruning.prune import prune
from ...pruning.report import PruningReport
from ...pruning.zeros import FEWEST_ZEROS, count_zeros, counted, measured_allocation, zeros_in
from .held_zeros import HeldZeros
from .prune_to import prune_to
from .running_statistics import RunningStatistics
from .schedule import PruningSchedule
from .sharding import refuse_engine, refuse_shared_devices, synchronise


logger = logging.getLogger(__name__)

STATE = "dsa"  # our entry in the Trainer's state, which its checkpoints carry


class DSACallback(TrainerCallback):
    """Keeps the zeros of a model in training, or prunes it while it is trained.

    ```python
    trainer = Trainer(model, args, train_dataset=data)
    DSACallback().attach(trainer)  # holds the zeros that the model has
    DSACallback(DSAConfig(0.7), "calibration.txt", PruningSchedule(end=200, every=20)).attach(trainer)
    ```

    After every optimizer step what was zero is zero again; gradients of pruned weights are zero, so that they count in
    no norm. A resumed run reads its masks from the weights and catches up with what its schedule asks for by then,
    also from a checkpoint that was written without the callback. Each checkpoint and push gets a `dsa_config.json` and
    the files that lie beside the model that was loaded, such as its processor and licence.

    Args:
        config (`DSAConfig`, *optional*): How to prune, with the final sparsity. Without it zeros are held only.
        calibration (`Any`, *optional*): As in [`DSAPruner.prune`]; text is read with the Trainer's `processing_class`,
            or else with the tokenizer in the folder that the model was loaded from.
            Or [`RunningStatistics`], which are collected in training.
        schedule (`PruningSchedule`, *optional*): When, and how far. Defaults to one shot before the first step.
        reallocate (`str` or `Sequence[int]`, defaults to `"once"`): Whether the allocation is computed at the first
            moment of the schedule (`"once"`), anew at every one (`"always"`), or anew before the steps given. It is
            that of the final sparsity, scaled down to what is removed by then.
        exclude (`Sequence[str]`): Names or patterns of weights that are not held, where there is no config.
        include (`Sequence[str]`): Matrices outside the blocks to hold as well, where there is no config.

    Attributes:
        report (`PruningReport`): of the last pruning; `None` before.
    """

    def __init__(
        self,
        config: DSAConfig | None = None,
        calibration: Any = None,
        schedule: PruningSchedule | None = None,
        reallocate: str | Sequence[int] = "once",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
    ):
        self.config = config
        self.calibration = calibration
        self.schedule = schedule or PruningSchedule()
        self.reallocate = reallocate
        self.names = {"exclude": tuple(exclude), "include": tuple(include), "blocks": ()}
        self.frees_excluded = config is None  # whoever names them without a config wants their zeros trained
        self.brings_files = True
        self.report: PruningReport | None = None
        self._held: HeldZeros | None = None
        self._proposed: dict[str, float] | None = None
        self._logged: dict[str, float] | None = None
        self._data: Calibration | None = None
        self._running = calibration if isinstance(calibration, RunningStatistics) else None
        self._beside: BaseFiles | None = None
        self._due: int | None = None  # a moment that waits for statistics
        if config is None and (calibration is not None or schedule is not None):
            raise ValueError("Calibration and schedule are for pruning; give a DSAConfig with them.")
        if isinstance(reallocate, str) and reallocate not in ("always", "once"):
            raise ValueError(f"reallocate is 'always', 'once' or steps, got {reallocate!r}.")
        if config is not None:
            if config.resolved.pattern.in_groups and len(self.schedule.moments) > 1:
                raise ValueError(
                    f"Pattern {config.recipe.pattern} has no sparsities in between; give a schedule of one step."
                )
            if config.permute is not None:
                raise ValueError(
                    f"permute={config.permute!r} moves channels, and what an optimizer knows of them would stay where "
                    "it is; prune with it first and train then, or leave permute out."
                )
            if self.schedule.initial > config.sparsity:
                raise ValueError(f"The schedule starts at {self.schedule.initial}, above the {config.sparsity} asked.")
            if self._running and self.schedule.start < 1:
                raise ValueError("Before step 0 no statistics are there yet; give a schedule with start=1 or later.")
            self.names = {"exclude": config.exclude, "include": config.include, "blocks": config.blocks}

    def attach(self, trainer) -> DSACallback:
        """Add this to `trainer` before its reporters, so that sparsity reaches all of them; the callback itself.

        Given as `callbacks=[...]` it does the same, but reporters that come before it do not see its numbers.
        """
        refuse_shared_devices()
        insert_callback(trainer, self)
        return self

    # -- events, in the order of a run

    def on_init_end(self, args, state, control, **kwargs):
        refuse_shared_devices()  # before the Trainer divides the work, which is where NCCL would fail

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        refuse_engine(model)
        inner = inner_model(model)
        self._hold(inner)
        if state.is_world_process_zero:
            self._look_beside(model)
        if self.config is None:
            if measured_allocation(inner, self._architecture(inner)).overall < FEWEST_ZEROS:
                logger.warning("DSACallback has nothing to hold: %s has no zeros to speak of.", type(inner).__name__)
            return
        later = len(self.schedule.moments) > 1 or self.schedule.last > 0
        if later and self.schedule.last >= state.max_steps:
            raise ValueError(
                f"The schedule prunes last before step {self.schedule.last}, but training ends after "
                f"{state.max_steps} steps; choose an earlier end."
            )
        if later and args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would bring back a model of an earlier, lower sparsity; leave it out, or "
                "prune before the first step."
            )
        standing_zeros(inner, architecture_for(inner, self.config), self.config)  # raises where there are too many
        needed = self.config.resolved.reads | self.config.resolved.allocation_reads
        if self._running and {"gradients", "regional"} & needed:
            raise ValueError(
                f"method={self.config.method!r} reads gradients of calibration text, and RunningStatistics hold sums "
                "over inputs alone; give calibration text, or a method that reads none."
            )
        if needed and self._running:
            self._running.watch(inner, self._architecture(inner), "gram" in needed, "mean" in needed)
            if state.is_world_process_zero and state.global_step:
                self._running.load(Path(args.output_dir, f"checkpoint-{state.global_step}"))
        elif needed and self._data is None:
            self._data = self._load(inner, processing_class)
        stored = state.stateful_callbacks.get(STATE)
        self._proposed = (stored or {}).get("proposed", (stored or {}).get("wish"))
        self._catch_up(model, state)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.config is None:
            return
        moment = state.global_step if state.global_step in self.schedule.moments else self._due
        if moment is not None:
            self._prune(model, state, moment)
        if self._running:
            self._running.step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._held.apply()

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if logs is None or self._held is None:
            return
        inner = inner_model(model)
        found = measured_allocation(inner, self._architecture(inner))
        numbers = {"sparsity": found.overall}
        # Units only where something has changed: they are many, and mostly as they were.
        if found.sparsity != self._logged:
            numbers |= {f"sparsity/{unit}": value for unit, value in found.sparsity.items()}
            self._logged = found.sparsity
        logs.update(numbers)
        # The Trainer has appended its own copy already, and reporters read `logs`.
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_save(self, args, state, control, model=None, processing_class=None, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        report = self._report_now(model, state)
        if state.is_world_process_zero and folder.is_dir():
            self.write(model, folder, state.global_step, processing_class, report)
        if self._running:
            self._running.save(folder)

    def on_push_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        report = self._report_now(model, state)
        if state.is_world_process_zero:
            self.write(model, Path(args.output_dir), state.global_step, processing_class, report)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._held.apply()
        self._held.release()
        if self._running:
            self._running.release()
        if self.report is not None:
            self.report = counted(self.report, model)

    # -- what they do

    def write(
        self,
        model: nn.Module,
        folder: str | Path,
        step: int,
        processing_class: Any = None,
        report: PruningReport | None = None,
    ) -> None:
        """Write `dsa_config.json` into `folder`: how the model was pruned, and its zeros as they are now.

        What lies beside the model that was loaded goes along; the Trainer saves its `processing_class` itself. Of a
        sharded model, where one process writes and all of them count, it is given the `report` that was counted.
        """
        report = report or self._counted(model)
        training = {"kind": "DSACallback", "step": step, "schedule": asdict(self.schedule) if self.config else None}
        # A checkpoint of this very run is nothing earlier.
        if (earlier := training_of(model) or {}).get("kind") != training["kind"]:
            training = after(earlier, training)
        Path(folder).mkdir(parents=True, exist_ok=True)
        described, beside = describe(report, base_of(model), training), self._look_beside(model)
        if beside is not None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
            described["base_files"] = beside.described(beside.copy_to(Path(folder), tokenizer))
        write_description(Path(folder), described)

    def _report_now(self, model: nn.Module, state) -> PruningReport | None:
        """What `write` needs, in every process that has to count for it."""
        return self._counted(model) if state.is_world_process_zero or is_sharded(inner_model(model)) else None

    def _counted(self, model: nn.Module) -> PruningReport:
        return report_of(model) if self.report is None else counted(self.report, model)

    def _look_beside(self, model: nn.Module) -> BaseFiles | None:
        """What lies beside the model that was loaded; looked for once. A folder of an adapter gets nothing of it."""
        source = getattr(inner_model(model).config, "name_or_path", None)
        if self._beside is None and self.brings_files and source and not saves_adapters(model):
            self._beside = find_beside(model, str(source), tensors=False)
        return self._beside

    def _hold(self, inner: nn.Module) -> None:
        if self._held is not None:
            self._held.release()
        architecture = self._architecture(inner)
        names = dict.fromkeys(f"{weight.module}.{weight.attribute}" for weight in architecture.weights)
        if not self.frees_excluded:  # what this pruning leaves out may be sparse from an earlier one
            left_out = (name for name, why in architecture.dense.items() if why == "excluded")
            names |= dict.fromkeys(name for name in left_out if zeros_in(inner.get_parameter(name)))
        self._held = HeldZeros(inner, list(names))

    def _zeros(self, inner: nn.Module) -> dict[str, int]:
        return count_zeros(inner, self._architecture(inner))

    def _architecture(self, inner: nn.Module) -> Architecture:
        return find_architecture(inner, **self.names, skip_unprunable=True)

    def _catch_up(self, model: nn.Module, state) -> None:
        """Do at the start of a resumed run what its schedule asked for before."""
        # Only the last counts: it asks for more than all before it.
        missed = [moment for moment in self.schedule.moments if moment < state.global_step]
        if not missed:
            return
        inner = inner_model(model)
        total = sum(weight.size for weight in self._architecture(inner).weights)
        expected = round(self.schedule.sparsity(missed[-1], self.config.sparsity) * total)
        # By the zeros and not by a note: the checkpoint may be from a run without the callback.
        if sum(self._zeros(inner).values()) < expected:
            self._prune(model, state, missed[-1])
        else:
            found = measured_allocation(inner, self._architecture(inner))
            self.report = PruningReport(self.config, found, found.sparsity, count_parameters(inner))

    def _prune(self, model: nn.Module, state, moment: int) -> None:
        data = self._running.collected() if self._running else self._data
        if self._running and data.statistics and not data.facts()["tokens"]:
            self._due = moment  # the first step of a run resumed from a checkpoint without statistics
            return
        self._due = None
        inner = inner_model(model)
        anew = self.reallocate == "always" or (self.reallocate != "once" and moment in self.reallocate)
        # What is scored is the weight itself, on the inputs that it has without what adapters add.
        with without_adapters(model):
            # a threshold over shares needs all of them: every process holds the whole model for as long as this takes
            target = twin(inner, gathered=True) if is_sharded(inner) else inner
            if len(self.schedule.moments) == 1:
                report = prune(target, data, self.config)
            else:
                sparsity, before = self.schedule.sparsity(moment, self.config.sparsity), self._proposed
                report, self._proposed = prune_to(target, data, self.config, sparsity, None if anew else before)
        synchronise(target.get_parameter(name) for name in self._held.parameters)
        if target is not inner:
            copy_into(inner, target)
        self._held.refresh()
        if report is not None:
            self.report = report
        state.stateful_callbacks[STATE] = {"proposed": self._proposed}
        logger.info("Pruned before step %d.", moment)

    def _load(self, inner: nn.Module, tokenizer: Any) -> Calibration:
        if self.calibration is None:
            raise ValueError("This pruning needs calibration data; pass texts, a file, a dataset or tokens.")
        if isinstance(self.calibration, Calibration):
            return self.calibration
        if tokenizer is None and not isinstance(self.calibration, (Tensor, Mapping)):
            tokenizer = load_tokenizer(inner.config.name_or_path or None)
            if tokenizer is None:
                raise ValueError(
                    "Calibration text needs a tokenizer, and none lies beside the model; give one to the Trainer "
                    "(processing_class=tokenizer), or give token ids of shape (samples, length)."
                )
        return load_calibration(self.calibration, inner, tokenizer, self.config.data)
