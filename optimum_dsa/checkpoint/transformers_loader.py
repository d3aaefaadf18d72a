"""How transformers loads compressed checkpoints: a quantizer that unpacks each tensor and leaves an ordinary model.

Or, where that is asked for, one whose matrices stay packed.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..common.fences import add_loading_options, check_compressed_loading
from ..common.files import read_json
from ..common.installation import how_to_upgrade
from ..packed.pack_model import unpack_model
from .convert import MARK
from .encodings import BITMASK, ENCODINGS, QUANT_METHOD
from .run_packed import check_places, make_waiting, pack_waiting, refuse_saving
from .shards import check_index, check_size, count_weights, index_name, packed_headers


logger = logging.getLogger(__name__)


class DSAQuantizationConfig(QuantizationConfigMixin):
    """What `config.json` of an encoded checkpoint says: the encoding, and the version of its format.

    Given to `from_pretrained`, it says how such a checkpoint is loaded.

    Args:
        run_packed (`bool`, defaults to `False`): keep matrices packed and multiply with them as they are; without it
            they are unpacked while they are loaded.
    """

    def __init__(self, format_version: int = 1, encoding: str = BITMASK.name, run_packed: bool = False, **ignored):
        if not isinstance(encoding, str) or encoding not in ENCODINGS:
            raise ValueError(
                f"The weights are stored as {encoding!r}, which this optimum-dsa does not know; upgrade it with "
                f"{how_to_upgrade()}, or import what registers it."
            )
        row = ENCODINGS[encoding]
        if format_version != row.version:
            raise ValueError(
                f"The weights are {row.shown} in version {format_version!r} of the format, and this optimum-dsa knows "
                f"version {row.version}; upgrade it with {how_to_upgrade()}."
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.encoding = encoding
        if not isinstance(run_packed, bool):
            raise ValueError(f"run_packed is true or false, got {run_packed!r}; correct the checkpoint's config.json.")
        self.run_packed = run_packed

    @property
    def dequantize(self) -> bool:
        """Whether transformers forgets the quantizer when the weights are loaded."""
        return not self.run_packed

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller's decides, whatever the checkpoint's says."""
        return {"run_packed": self.run_packed}


class DSAQuantizer(HfQuantizer):
    """Unpacks tensors while transformers loads them; the model is as if its checkpoint had been dense.

    With `run_packed`, matrices stay packed, and it stays with the model.
    """

    requires_calibration = True  # there is nothing to do for a checkpoint that is not compressed

    def __init__(self, quantization_config, **kwargs):
        check_compressed_loading()
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "run_packed is for compressed checkpoints, and this one is dense: convert it with `optimum-cli dsa "
                "convert FOLDER PACKED --to packed`, or load it with DSAPruner.from_pretrained and call pack()."
            )
        super().__init__(quantization_config, **kwargs)
        self._index_name = index_name(ENCODINGS[quantization_config.encoding].stem)

    def update_attn_implementation(self, config):
        """Names the compressed weights to transformers: the one step that sees the configuration before the files."""
        setattr(config, MARK, self._index_name)
        index = Path(str(config.name_or_path), self._index_name)
        if index.is_file():  # a local folder; of the Hub, only files of the repository are downloaded
            check_index(read_json(index), index)
        return config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """Reads the headers of all packed tensors, and refuses what is damaged before memory is taken for it."""
        self._packed, weights = {}, 0
        paths = [Path(path) for path in checkpoint_files or ()]
        # again, for an index in a subfolder or of the Hub: what it names lies beside it
        indexes = {path.parent: path.parent / self._index_name for path in paths}
        named = {
            folder: check_index(read_json(index), index) if index.is_file() else ()
            for folder, index in indexes.items()
        }
        for path in paths:
            if path.name not in named[path.parent]:
                raise ValueError(f"{path} is no shard of the compressed checkpoint that names it.")
            self._packed |= packed_headers(path)
            weights += count_weights(path)
        check_size(model, weights, model.config.name_or_path)
        return model

    def update_weight_conversions(self, weight_conversions, model):
        """The model's own conversions, which now unpack first, and one for all other names of packed tensors.

        All on the CPU: on a GPU, transformers would gather packed tensors faster than they are unpacked.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        from .unpacking import PackAgain, Unpack, UnpackOnly

        updated = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                conversion = copy.copy(conversion)
                conversion.operations = [Unpack(), *conversion.operations, PackAgain()]
                conversion.force_cpu = True
            updated.append(conversion)
        renamings = [conversion for conversion in updated if isinstance(conversion, WeightRenaming)]
        renamed = {_renamed(name, renamings): header for name, header in self._packed.items()}
        if self.quantization_config.run_packed:
            converters = [conversion for conversion in updated if isinstance(conversion, WeightConverter)]
            plain = {name: header for name, header in renamed.items() if not _is_converted(name, converters)}
            make_waiting(model, plain)
        leaves = {name.rpartition(".")[2] for name in renamed}
        # By the last part of a name: transformers matches patterns, and one per tensor would be thousands.
        own = [UnpackOnly(rf"(?<![^.]){re.escape(leaf)}$", leaf) for leaf in sorted(leaves)]
        return [*updated, *own]

    def get_new_dtype(self, converter, param, dtype):
        """Types of ordinary tensors change as always; a packed one stays, and its conversion is told the type."""
        kind = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
        # A cast of packed bytes would destroy them.
        if kind not in ("U8", torch.uint8):
            return dtype
        for operation in getattr(converter, "operations", ()):
            if hasattr(operation, "dtype"):
                operation.dtype = dtype
        return None

    def _process_model_after_weight_loading(self, model, **kwargs):
        """Leaves no trace: what is saved from here on is dense, under the model's own names.

        With `run_packed`, makes packed layers of what was loaded.
        """
        if hasattr(model.config, MARK):
            delattr(model.config, MARK)
        if self.quantization_config.run_packed:
            check_places(model)
            if not pack_waiting(model):
                self.remove_quantization_config(model)
        return model

    def validate_environment(self, *args, device_map=None, **kwargs):
        """Has matrices unpacked where packed ones cannot be, which is known before anything is loaded."""
        places = device_map.values() if isinstance(device_map, Mapping) else ()
        if self.quantization_config.run_packed and "disk" in places:
            logger.warning("Packed matrices are not kept on a disk, where device_map puts modules: they are unpacked.")
            self.quantization_config.run_packed = False

    def remove_quantization_config(self, model):
        """Takes off a loaded model what marks it as quantized, and no more.

        transformers 5.24 would take the conversions of its names too, and save it as if it had never been loaded.
        """
        for owner, name in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
        ):
            if hasattr(owner, name):
                delattr(owner, name)
        model.is_quantized = False

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def get_state_dict_and_metadata(self, model):
        """Never comes to that: transformers would write parts under names that no loader knows."""
        return refuse_saving(model)

    def _dequantize(self, model, dtype=None):
        """What `model.dequantize()` does: its matrices have their zeros again."""
        unpack_model(model)
        return model

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _renamed(name: str, renamings: list[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _is_converted(name: str, converters: list[Any]) -> bool:
    """Whether transformers makes other tensors of the one called `name` while it loads it."""
    return any(converter.rename_source_key(name)[1] is not None for converter in converters)


def register() -> None:
    """Make transformers load compressed checkpoints; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(DSAQuantizationConfig)
        register_quantizer(QUANT_METHOD)(DSAQuantizer)
        add_loading_options(DSAQuantizationConfig)


register()
