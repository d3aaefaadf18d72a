"""What is trained to bring a pruned model back: rows of a table, (model, config, report) -> what the Trainer gets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn
from transformers import set_seed

from ..common.installation import how_to_install
from ..common.registry import Registry
from ..model.architecture import find_architecture
from ..model.inputs import kind_of
from ..model.parameters import one_name_each
from ..pruning.report import PruningReport
from .elsa.split import FILE


if TYPE_CHECKING:
    from .configuration import RecoveryConfig
    from .elsa.callback import ElsaCallback

# The fact `trains_weights` says that the model's own weights are trained: then `DSACallback` keeps their zeros, and
# they are in float32 meanwhile. `rate` is the learning rate where nobody gives one; adapters have one for each mode.
# `moves_zeros`: it ends with the zeros of a budget, wherever they were; then `callback` (config, report) makes the
# callback that sees to it, in the place of `DSACallback`, and `files` are what that adds to each checkpoint.
RECOVERIES = Registry("recovery method")

# What PEFT calls a kind of model; for others it has a wrapper that takes any.
TASK_TYPES = {"causal": "CAUSAL_LM", "sequence-to-sequence": "SEQ_2_SEQ_LM"}


@RECOVERIES.register("sparse-lora", trains_weights=False)
def sparse_lora(model: nn.Module, config: RecoveryConfig, report: PruningReport) -> nn.Module:
    """`model` inside a PEFT model with sparse adapters on all matrices that were pruned."""
    try:
        from peft import get_peft_model

        from .adapters.peft_method import SparseLoraConfig
    except ImportError as error:
        raise ValueError(
            f"Sparse adapters need peft: {how_to_install('peft')}; or use method='full' ({error})."
        ) from None
    asked = report.config
    weights = find_architecture(model, asked.blocks, asked.exclude, asked.include, skip_unprunable=True).weights
    one_name = one_name_each(model)
    users = Counter(one_name.values())
    # an adapter on a tied head would train the head alone, and merging it would change the embedding as well
    modules = [weight.module for weight in weights if weight.expert is None and users[one_name[weight.name]] == 1]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no pruned nn.Linear or Conv1D; use method='full'.")
    set_seed(config.data.seed)
    options = {
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha is not None else 2 * config.rank,
        "mode": config.mode,
        "group_size": config.group_size,
        "target_modules": modules,
        "task_type": TASK_TYPES.get(kind_of(model)),
    }
    if config.ranks == "allocation":
        adapters = SparseLoraConfig.for_allocation(report.allocation, **options)
    else:
        adapters = SparseLoraConfig(**options)
    return get_peft_model(model, adapters)


@RECOVERIES.register(trains_weights=True, rate=3e-4)
def full(model: nn.Module, config: RecoveryConfig, report: PruningReport) -> nn.Module:
    """`model` itself: all weights that are not zero are trained."""
    return model


def _elsa_callback(config: RecoveryConfig, report: PruningReport) -> ElsaCallback:
    from .elsa.callback import ElsaCallback

    return ElsaCallback(report, config.penalty, config.project_every, config.growth, config.shape)


@RECOVERIES.register(
    reference="https://arxiv.org/abs/2510.01650",
    trains_weights=True,
    moves_zeros=True,
    rate=2e-3,
    callback=_elsa_callback,
    files=(FILE,),
)
def elsa(model: nn.Module, config: RecoveryConfig, report: PruningReport) -> nn.Module:
    """`model` itself, dense or pruned: all weights are trained, and drawn to the budget's zeros on the way (ADMM)."""
    return model
