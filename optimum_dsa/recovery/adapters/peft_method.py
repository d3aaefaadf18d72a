"""Sparse adapters as the PEFT method SPARSE_LORA; importing this module registers it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...common.fences import add_peft_type
from ...pruning.allocation import Allocation
from .layer import SparseLoraLinear
from .modes import GROUP_SIZE, MODES
from .ranks import pattern_of, ranks_for


NAME = "SPARSE_LORA"
# Options of LoRA that change the product and that sparse adapters do not have.
REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)

add_peft_type(NAME)


@dataclass
class SparseLoraConfig(LoraConfig):
    """A PEFT config: adapters that merge into a sparse model and keep each of its zeros.

    ```python
    from optimum_dsa import SparseLoraConfig
    from peft import get_peft_model

    model = get_peft_model(model, SparseLoraConfig(mode="mask", r=16, lora_alpha=32, target_modules="all-linear"))
    ```

    Args:
        mode (`str`, defaults to `"mask"`): A row of `MODES`: `"mask"`, `"scale"`, `"spp"` or `"grouped"`.
        group_size (`int`, defaults to 32): Of mode `"grouped"`: columns of a weight that change by one number.
        kwargs (`dict`): The fields of peft's `LoraConfig` (`r`, `lora_alpha`, `target_modules`, `rank_pattern`,
            `lora_dropout`, ...). Those that make another product of it (DoRA, aLoRA, ...) raise `ValueError`.

    A process that loads such an adapter with `PeftModel.from_pretrained` has to import this class before.
    """

    mode: str = field(
        default="mask", metadata={"help": "mask, scale, spp or grouped: what is added to the sparse weight."}
    )
    group_size: int = field(default=GROUP_SIZE, metadata={"help": "columns of a group, in mode grouped."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        check_group_size(self.mode, self.group_size)
        for option in fields(LoraConfig):
            default = option.default if option.default is not MISSING else None
            if option.name in REFUSED and getattr(self, option.name) not in (default, None, False):
                raise ValueError(f"A sparse adapter has no {option.name}; leave it out, or use peft's LoraConfig.")
        # PiSSA and OLoRA subtract the start of the factors from the weight, whose zeros would be lost.
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes the frozen weight or needs a dense product; "
                "a sparse adapter takes True, False or 'gaussian'."
            )

    @classmethod
    def for_allocation(cls, allocation: Allocation, r: int = 8, lora_alpha: float = 8, **kwargs) -> SparseLoraConfig:
        """A config whose rank is higher where more was pruned: `r` on average, proportional to the sparsity.

        alpha / rank is the same everywhere.
        """
        ranks = ranks_for(allocation, r)
        # LoRA scales by alpha / rank: at one alpha a higher rank would learn more slowly.
        alphas = {unit: lora_alpha * rank / r for unit, rank in ranks.items()}
        return cls(
            r=r, lora_alpha=lora_alpha, rank_pattern=pattern_of(ranks), alpha_pattern=pattern_of(alphas), **kwargs
        )


def check_group_size(mode: str, group_size: int) -> None:
    """Raise where a mode does not exist (`UnknownNameError`), or has no such groups (`ValueError`)."""
    if not MODES[mode].grouped and group_size != GROUP_SIZE:
        raise ValueError(
            f"group_size={group_size} is for mode 'grouped', and mode={mode!r} has no groups; leave it out."
        )
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size={group_size!r} is a number of columns, 1 or more; 32 is what formats have.")


class SparseLoraModel(LoraModel):
    """The PEFT tuner of `SparseLoraConfig`."""

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            kind = f"{type(base).__name__} ({getattr(getattr(base, 'weight', None), 'dtype', 'no weight')})"
            raise ValueError(
                f"{kwargs.get('target_name')}: a sparse adapter needs an nn.Linear or Conv1D in floating point, got "
                f"{kind}; take it out of target_modules, name it in exclude_modules, or unpack a packed model."
            )
        return SparseLoraLinear(
            target, adapter_name, config=lora_config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"]
        )

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", **kwargs) -> None:
        """As in PEFT, for adapters of mode "mask", whose factors can be added; others raise `ValueError`."""
        other = [name for name in adapters if name in self.peft_config and self.peft_config[name].mode != "mask"]
        if other:
            raise ValueError(
                f"The factors of {', '.join(other)} multiply the weight and cannot be added; merge the adapters one "
                "after the other, or activate several at once."
            )
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)


register_peft_method(name=NAME.lower(), config_cls=SparseLoraConfig, model_cls=SparseLoraModel, prefix="lora_")
