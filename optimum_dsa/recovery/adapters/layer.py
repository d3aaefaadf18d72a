"""The layer that `SparseLoraConfig` puts around an nn.Linear or a Conv1D."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...common.fences import check_adapter_arguments
from ..gradual.held_zeros import keep_alive_
from .modes import MODES
from .product import Part, changed_weight, sparse_linear


class SparseLoraLinear(LoraLinear):
    """A frozen sparse weight and adapters that change only what is not zero in it.

    The product is that of the merged weight: merging changes no output. Where the adapter's input has dropout, two
    products are added. A merged layer keeps the weight as it was, so that unmerging is exact.
    """

    other_param_names = (*LoraLinear.other_param_names, "modes", "group_sizes")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs):
        self.modes: dict[str, str] = {}
        self.group_sizes: dict[str, int] = {}
        self._unmerged: tuple[nn.Parameter] | None = None  # a tuple, so that it is no parameter of this module
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        """Add the factors of an adapter; see `MODES` for their shapes."""
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        mode = MODES[config.mode]
        self.modes[adapter_name], self.group_sizes[adapter_name] = config.mode, config.group_size
        a = self.lora_A[adapter_name].weight
        if mode.column:
            # A Linear like every lora_B: PEFT saves, loads and moves it as its own.
            column = nn.Linear(1, self.out_features, bias=False, device=a.device, dtype=a.dtype)
            if config.init_lora_weights and not a.is_meta:
                nn.init.zeros_(column.weight)
            self.lora_B[adapter_name] = column
        if mode.start and config.init_lora_weights and not a.is_meta:
            mode.start(a.data, self.lora_B[adapter_name].weight.data)
        if not mode.scaled:
            self.lora_alpha[adapter_name], self.use_rslora[adapter_name], self.scaling[adapter_name] = r, False, 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The merged layer's output for x, (..., in_features) -> (..., out_features)."""
        check_adapter_arguments(self, x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            result = self.base_layer(x, *args, **kwargs)
            for name in {name for name in names if name in self.lora_A}:
                # As in PEFT: each sample of a batch may name its own adapter.
                rows = [row for row, chosen in enumerate(names) if chosen == name]
                result[rows] = self._product(x[rows], [name]).to(result.dtype)
            return result
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        return self._product(x, adapters)

    def _product(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """x · (W + Σ ΔW)ᵀ + bias with these adapters, (..., in_features) -> (..., out_features)."""
        weight, bias = self._matrix(self.get_base_layer().weight), self.get_base_layer().bias
        if weight.is_meta:
            raise ValueError(
                "The weight under a sparse adapter is offloaded (device 'meta'); load the model on one device, or "
                "merge the adapter into it."
            )
        # Dropout changes the input of the adapter alone, so that it cannot be part of one product.
        dropped = [name for name in adapters if getattr(self.lora_dropout[name], "p", 0) > 0 and self.training]
        folded = [self._part(name) for name in adapters if name not in dropped]
        if folded:
            result = sparse_linear(x, weight, folded)
            result = result if bias is None else result + bias.to(result.dtype)
        else:
            result = self.base_layer(x)
        for name in dropped:
            result = result + sparse_linear(self.lora_dropout[name](x), weight, [self._part(name)], whole=False)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, of the shape that the base layer stores; zero where the weight is."""
        return self._matrix(changed_weight(self._matrix(self._original()), [self._part(adapter)], whole=False))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the weight; its zeros stay, and no other weight becomes one.

        With `safe_merge`, raises `ValueError` and leaves the weight alone where the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        original, base = self._original(), self.get_base_layer()
        # All from the weight as it was, by which `scale` and `spp` multiply: a merged one has other values.
        parts = [self._part(name) for name in (*self.merged_adapters, *names)]
        merged = self._matrix(changed_weight(self._matrix(original), parts).to(original.dtype)).contiguous()
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"NaNs or infinities in the merged weights; the adapters {names} seem to be broken.")
        keep_alive_(merged, original != 0)
        if self._unmerged is None:
            self._unmerged = (base.weight,)
        # a parameter of its own: whatever shares the old one (a tied embedding) has to stay as it was
        base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight back as it was before any merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        original, base = self._original(), self.get_base_layer()
        # The very parameter, so that a tied embedding is tied again.
        base.weight = self._unmerged[0]
        base.weight.data = original
        self._unmerged = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _original(self) -> Tensor:
        """The base weight without any adapter, of the shape in which the base layer stores it."""
        weight = self.get_base_layer().weight.data
        return weight if self._unmerged is None else self._unmerged[0].data.to(weight.device, weight.dtype)

    def _part(self, adapter: str) -> Part:
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        mode = MODES[self.modes[adapter]]
        delta = partial(mode.delta, group_size=self.group_sizes[adapter]) if mode.grouped else mode.delta
        return Part(delta, a, b, self.scaling[adapter])

    def _matrix(self, weight: Tensor) -> Tensor:
        """(out_features, in_features) from what the base layer stores, and the other way round."""
        return weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "sparse_lora.", 1)
