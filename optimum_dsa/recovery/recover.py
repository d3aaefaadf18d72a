"""`recover`: a pruned model and text in, the same zeros and a better model out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedConfig, TrainingArguments, default_data_collator

from ..checkpoint.load import load_model
from ..common.devices import shard_on_cpu
from ..common.launched import process_count
from ..evaluation.perplexity import example_losses, mean_perplexity
from ..model.adapters import has_adapters
from ..model.examples import check_causal, examples
from ..model.inputs import kind_of
from ..model.offload import is_offloaded
from ..model.sharded import twin
from ..pruning.report import PruningReport
from .checkpoints import begin, last_whole_checkpoint, settings_of
from .configuration import RecoveryConfig
from .elsa.budget import is_dense
from .gradual.callback import DSACallback
from .gradual.sharding import refuse_launched
from .layouts import readable
from .precision import in_float32
from .processes import (
    SetAside,
    begin_together,
    check_divided,
    check_ties,
    environment_kept,
    from_first,
    fsdp_settings,
    shared_folder,
    wait_for_all,
)
from .recoveries import RECOVERIES
from .result import RecoveryResult, by_step
from .texts import read_windows
from .trainer import RecoveryTrainer, StopWhereItDiverges, check_finite, check_loss


def recover(
    model: nn.Module,
    tokenizer: Any,
    train: Any,
    config: RecoveryConfig,
    report: PruningReport,
    validation: Any = None,
    teacher: str | Path | nn.Module | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
) -> tuple[nn.Module, RecoveryResult]:
    """Train `model` in place and keep its zeros: the model, merged or with its adapter, and what was done.

    Under torchrun every process is given the same, and comes back with the same model; the first one writes
    checkpoints.

    Args:
        train (`Any`): texts, a file, a dataset or its name, or a LongTensor (samples, length).
        report (`PruningReport`): how the model was pruned; ranks follow its allocation.
        validation (`Any`, *optional*): as `train`; by default the last windows of it, which are not trained on.
        teacher (`str | Path | nn.Module`, *optional*): the dense model, where `config.distillation` is not 0.
        checkpoints (`str | Path`, *optional*): folder for the Trainer's checkpoints; by default a temporary one.
        resume (`bool`, defaults to `False`): go on from the last of them.

    Raises:
        ValueError: no weights and no structures went from the model, or it cannot be trained as asked.
        DivergedError: the loss or a weight is no number any more. With adapters the model is as it was before; with
            `method="full"` it has to be loaded again.
    """
    _check(model, config, report, teacher, checkpoints, resume)
    windows, held_out, data = read_windows(model, tokenizer, train, validation, config)
    check_divided(config, len(windows))
    teacher = _teacher(model, teacher)
    begin_together(model)
    if checkpoints is not None:
        texts = {"training": windows, "validation": held_out}
        settings = settings_of(model, texts, teacher, config, report)
        from_first(lambda: begin(Path(checkpoints), settings, resume))
    causal = kind_of(model) == "causal"
    if causal:
        check_causal(model, held_out)
    # masks are drawn once, so that the same is asked before and after
    seed = config.data.seed
    learnt, asked = examples(model, windows, tokenizer, seed), examples(model, held_out, tokenizer, seed + 1)
    before = mean_perplexity(example_losses(model, asked, config.batch_size, causal))
    start = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(environment_kept())
        stack.enter_context(_left_as_found(model))
        stack.enter_context(in_float32(model, config.trains_weights))
        folder = Path(checkpoints or stack.enter_context(shared_folder()))
        trained = RECOVERIES[config.method](model, config, report)
        try:
            trainer = make_trainer(trained, learnt, asked, config, teacher, folder)
            if config.trains_weights:
                _keeps_the_budget(config, report).attach(trainer)
            _train(trained, trainer, config, folder, resume)
            check_finite(trained, config)
            if trained is not model and config.merge:
                trained = trained.merge_and_unload(safe_merge=True)
        except BaseException:
            if trained is not model:
                trained.unload()  # the model is given back as it came
            raise
    trained.eval()
    seconds = time.perf_counter() - start
    after = mean_perplexity(example_losses(trained, asked, config.batch_size, causal))
    check_loss(after[0], config)
    history = by_step(trainer.state.log_history)
    return trained, RecoveryResult(
        config, before[0], after[0], trainer.state.global_step, history, data, seconds, before[1], after[1]
    )


def _train(trained: nn.Module, trainer: RecoveryTrainer, config: RecoveryConfig, folder: Path, resume: bool) -> None:
    """Run `trainer`, from the last checkpoint in `folder` with `resume`, and have in `trained` what it comes to."""
    files, sharded = RECOVERIES.fact(config.method, "files", ()), trainer.model is not trained
    last = from_first(lambda: last_whole_checkpoint(folder, files)) if resume else None
    with ExitStack() as stack:
        if sharded:
            aside = SetAside(trained)
            stack.callback(aside.bring_back)
            trainer.add_callback(aside)
        if last is not None:
            last = stack.enter_context(readable(last, trained, trainer.create_optimizer(), sharded))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        wait_for_all()  # before the first removes what the others may be reading
        if sharded:
            aside.bring_back(trainer.model)
        else:
            # Takes accelerate's wrapper of mixed precision off the forward, which would stay on the user's model.
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def _keeps_the_budget(config: RecoveryConfig, report: PruningReport) -> Any:
    """The callback under which all weights are trained; adapters keep zeros by themselves."""
    if make := RECOVERIES.fact(config.method, "callback"):
        callback = make(config, report)
    else:
        callback = DSACallback(exclude=report.config.exclude, include=report.config.include)
        callback.frees_excluded = False
    callback.brings_files = False  # checkpoints are to be resumed from; whoever saves the model brings them
    return callback


def check_trainable(offloaded: bool) -> None:
    """Raise `ValueError` for a model whose weights are `offloaded`."""
    if offloaded:
        raise ValueError("A model with offloaded weights cannot be trained; load it on one device.")


def _check(
    model: nn.Module, config: RecoveryConfig, report: PruningReport, teacher: Any, checkpoints: Any, resume: bool
) -> None:
    if is_dense(report) and report.structured is None:
        raise ValueError(
            f"{type(model).__name__} was not pruned: no dsa_config.json says so, and {report.sparsity:.2%} of its "
            "prunable weights are zero. Prune it first, or train it under a budget with method='elsa'; a dense "
            "model that stays dense is trained with transformers' Trainer."
        )
    if has_adapters(model):
        raise ValueError("The model has an adapter already; merge it first (model.merge_and_unload()).")
    check_trainable(is_offloaded(model))
    if bool(config.distillation) != (teacher is not None):
        raise ValueError(
            f"distillation={config.distillation:g} and teacher={'given' if teacher is not None else None} do not fit: "
            "give the dense model as teacher and a distillation in (0, 1], or neither."
        )
    refuse_launched()
    check_divided(config)
    if config.sharding == "fsdp":
        check_ties(model)
    if (resume or config.save_steps) and checkpoints is None:
        raise ValueError("Resuming needs a folder of checkpoints; name one.")
    if checkpoints is not None and not resume and (left := sorted(Path(checkpoints).glob("checkpoint-*"))):
        raise FileExistsError(
            f"{checkpoints} holds {left[0].name} of another run, which this one would replace; resume that run, or "
            "name another folder."
        )


def _teacher(model: nn.Module, teacher: Any) -> nn.Module | None:
    if teacher is None:
        return None
    found = teacher if isinstance(teacher, nn.Module) else load_model(str(teacher))
    mine, its = (one.get_input_embeddings().num_embeddings for one in (model, found))
    if mine != its:
        raise ValueError(f"The teacher knows {its} tokens and the model {mine}; it must be the dense parent.")
    return found


def make_trainer(
    trained: nn.Module,
    windows: Tensor | Mapping[str, Tensor],
    held_out: Tensor | Mapping[str, Tensor],
    config: RecoveryConfig,
    teacher: nn.Module | None,
    folder: Path,
) -> RecoveryTrainer:
    """The Trainer of `trained`, with or without adapters, on `windows`; validates on `held_out`.

    With `sharding` what it trains is a twin, so that `trained` stays whole.

    Both are (samples, length) of a causal model, or `examples`: inputs and labels by name, (samples, ...) each.
    """
    early, sharded = config.patience is not None, config.sharding == "fsdp"
    # The Trainer brings back the best model from a checkpoint, which has to be of a step that was measured.
    saves = config.eval_steps if early else config.save_steps
    # newer versions of transformers warn of this name, older ones know no other
    memory = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
    arguments = TrainingArguments(
        str(folder),
        max_steps=config.steps,
        learning_rate=config.rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.steps // 10,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.batch_size // process_count(),
        per_device_eval_batch_size=config.batch_size // process_count(),
        gradient_accumulation_steps=config.accumulation,
        bf16=config.bf16,
        **memory,
        seed=config.data.seed,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        logging_steps=config.eval_steps,
        save_strategy="steps" if saves else "no",
        save_steps=saves or 500,
        save_total_limit=2,
        load_best_model_at_end=early,
        metric_for_best_model="eval_loss" if early else None,
        greater_is_better=False if early else None,
        prediction_loss_only=True,
        label_names=["labels"],
        report_to="none",
        use_cpu=next(trained.parameters()).device.type == "cpu",
        **({"fsdp": True, "fsdp_config": fsdp_settings(trained)} if sharded else {}),
    )
    if sharded:
        shard_on_cpu()
    return RecoveryTrainer(
        twin(trained) if sharded else trained,
        arguments,
        default_data_collator,
        _rows(windows),
        _rows(held_out),
        callbacks=[StopWhereItDiverges(config), *([EarlyStoppingCallback(config.patience)] if early else ())],
        teacher=teacher,
        share=config.distillation,
        temperature=config.temperature,
    )


def _rows(given: Tensor | Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """One example after the other, as a Trainer reads them."""
    if isinstance(given, Tensor):
        given = {"input_ids": given, "labels": given}
    return [dict(zip(given, values)) for values in zip(*given.values())]


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Give parameters their `requires_grad` and configurations their values back, drop gradients and what saves them.

    A Trainer that saves memory turns the cache off, checkpointing on, and hooks itself to the embeddings; a model that
    keeps these is slow to write text, and says so in the config.json that is saved with it.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    settings = [(settings, dict(vars(settings))) for settings in _settings_in(model)]
    checkpoints = getattr(model, "is_gradient_checkpointing", False)
    try:
        yield
    finally:
        for found, values in settings:
            vars(found).clear()
            vars(found).update(values)
        if getattr(model, "is_gradient_checkpointing", False) and not checkpoints:
            model.gradient_checkpointing_disable()
            with suppress(AttributeError):  # where nothing is hooked
                model.disable_input_require_grads()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in before:
                parameter.requires_grad_(before[name])


def _settings_in(model: nn.Module) -> list[Any]:
    """The model's configuration, those inside it, and that of generation."""
    found = [part for name in ("config", "generation_config") if (part := getattr(model, name, None)) is not None]
    for part in found:  # grows
        found += [inner for inner in vars(part).values() if isinstance(inner, PreTrainedConfig)]
    return found
