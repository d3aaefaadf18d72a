"""The step of transformers' loading that turns packed tensors into dense ones."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..packed.quantised import pack
from .encodings import decoded
from .run_packed import waiting_at


logger = logging.getLogger(__name__)


class Unpack(ConversionOps):
    """Unpacks what is packed and passes on the rest; when a model is saved, it does nothing.

    Args:
        alone (`bool`): whether no operation follows that gives the tensor its name in the model.

    Attributes:
        dtype (`torch.dtype`): the type that the weights are loaded in, as transformers told it; `None` for their own.
    """

    supports_many_to_many = True  # so that it can go before those that do

    def __init__(self, alone: bool = False):
        self.alone = alone
        self.dtype: torch.dtype | None = None

    def convert(self, input_dict: dict[str, list[Tensor]], full_layer_name="tensor", model=None, **kwargs):
        """Every tensor of a pattern, packed as (bytes,) uint8 or of any shape, as the model has it."""
        try:
            return self._converted(input_dict, full_layer_name, model)
        except ValueError as error:
            # transformers puts it into a long table, and raises that there is one.
            logger.error("%s", error)
            raise

    def _converted(self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model) -> dict:
        waiting = waiting_at(model, full_layer_name) if self.alone else None
        if waiting is not None:
            ((tensor,),) = input_dict.values()
            return {full_layer_name: waiting.take(full_layer_name, tensor, self.dtype)}

        def dense(tensor: Tensor) -> Tensor:
            """A tensor of any shape: unpacked from (bytes,) in the asked dtype, or as it is."""
            plain = decoded(tensor, full_layer_name)
            return tensor if plain is None else plain.to(self.dtype)

        unpacked = {pattern: [dense(tensor) for tensor in tensors] for pattern, tensors in input_dict.items()}
        if self.alone:
            # One name, one tensor: nothing follows that would take it out of its list.
            ((tensor,),) = unpacked.values()
            return {full_layer_name: tensor}
        return unpacked

    @property
    def reverse_op(self) -> ConversionOps:
        return _Nothing()


class PackAgain(ConversionOps):
    """Packs what was put together of several tensors, where a model's experts wait for it; passes on the rest."""

    supports_many_to_many = True

    def convert(self, input_dict: dict[str, list[Tensor] | Tensor], full_layer_name="tensor", model=None, **kwargs):
        """Tensors of any shape by what they are called in the model, or a list of one."""
        waiting, found = waiting_at(model, full_layer_name), dict(input_dict)
        if waiting is not None and len(found) == 1:
            ((name, value),) = found.items()
            tensor = value[0] if isinstance(value, list) else value
            packed = pack(tensor)
            found[name] = waiting.take(full_layer_name, tensor if packed is None else packed, tensor.dtype)
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        return _Nothing()


class UnpackOnly(WeightConverter):
    """Unpacks the tensors of one name where the model itself has nothing to convert, and is forgotten afterwards.

    A model keeps the conversions that "were used" and reverses them when it is saved; these never say so.

    Args:
        source_patterns (`str`): a regular expression that the tensors' names match.
        target_patterns (`str`): what the match is called in the model.
        operations (`list`, *optional*): the `Unpack` of a copy.
        force_cpu (`bool`): whether tensors are gathered on the CPU; on a GPU, faster than they are unpacked.
    """

    def __init__(self, source_patterns: str, target_patterns: str, operations=None, force_cpu: bool = True):
        super().__init__(source_patterns, target_patterns, operations or [Unpack(alone=True)], force_cpu=force_cpu)

    def was_used(self) -> bool:
        return False


class _Nothing(ConversionOps):
    def convert(self, input_dict, **kwargs):
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return _Nothing()
