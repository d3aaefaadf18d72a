"""LoRA beside packed layers: their matrices stay packed, and gradients go through them to what is trained."""

from __future__ import annotations

from dataclasses import fields

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from ...common.fences import use_lora_layer
from ...packed.linear import PackedLinear
from .peft_method import REFUSED


class PackedLoraLinear(LoraLinear):
    """A packed layer and plain LoRA adapters beside it; nothing is merged into what is packed."""

    def _get_in_out_features(self, module: PackedLinear) -> tuple[int, int]:
        # PEFT would find them too, and warn that it does not know the layer.
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises `ValueError`: a weight that was zero may have a value then, and has no place."""
        raise ValueError(
            "An adapter is not merged into packed layers: take it off (`model.unload()`), unpack the model "
            "(DSAPruner.unpack()), put it on again and merge it there."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def lora_on_packed(config: LoraConfig) -> LoraConfig:
    """`config`, in place, for a packed model: with it PEFT puts plain LoRA beside packed layers too.

    ```python
    model = get_peft_model(pruner.model, lora_on_packed(LoraConfig(target_modules=["q_proj", "v_proj"])))
    ```

    An adapter that was saved is loaded likewise: `PeftModel.from_pretrained(model, folder, config=lora_on_packed(
    LoraConfig.from_pretrained(folder)))`.

    Raises:
        ValueError: it is no plain LoRA, or leaves to PEFT which layers are linear.
    """
    if type(config) is not LoraConfig:
        raise ValueError(
            f"A {type(config).__name__} changes weights, and packed ones are not there; unpack the model "
            "(DSAPruner.unpack()), or take peft's LoraConfig."
        )
    if config.target_modules == "all-linear":
        raise ValueError("PEFT takes packed layers for none of all-linear; name target_modules, such as ['q_proj'].")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} takes its start out of weights, and packed ones are not "
            "there; take True, or unpack the model (DSAPruner.unpack())."
        )
    for option in fields(LoraConfig):
        if option.name in REFUSED and getattr(config, option.name) not in (option.default, None, False):
            raise ValueError(f"A LoRA beside packed layers has no {option.name}; leave it out, or unpack the model.")
    use_lora_layer(config, PackedLinear, PackedLoraLinear)
    return config
