"""An adapter on disk, and the pruned model under it: the one is worth nothing without the zeros of the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..common.files import read_json
from ..common.installation import how_to_install
from ..model.offload import is_offloaded
from ..pruning.report import PruningReport
from .limits import read_contents, within


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter, and not a model's own weights."""
    return Path(folder, ADAPTER_CONFIG).is_file() and not Path(folder, "config.json").is_file()


def base_under(folder: str | Path) -> str:
    """Path or Hub id of the model that the adapter in `folder` names as its base.

    Raises:
        ValueError: it names none.
    """
    path = Path(folder, ADAPTER_CONFIG)
    data = read_json(path)
    base = data.get("base_model_name_or_path") if isinstance(data, Mapping) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} names no base_model_name_or_path, the model that the adapter belongs to.")
    return base


def with_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """`model` inside a PEFT model with the adapter in `folder`, for inference.

    Raises:
        FileNotFoundError: its weights are not there as safetensors.
        ValueError: peft is missing, `model` is offloaded, or the adapter is larger than its weights.
    """
    if is_offloaded(model):  # PEFT would write its own names into the files that the weights are read from
        raise ValueError(f"{folder} holds an adapter, whose base has to be in memory; leave out the device map.")
    weights = Path(folder, ADAPTER_WEIGHTS)
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds an adapter without {ADAPTER_WEIGHTS}; save it again as safetensors.")
    try:
        from peft import PeftModel  # which knows our method by now: the package's door sees to it
    except ImportError as error:
        raise ValueError(f"{folder} holds an adapter, which needs peft: {how_to_install('peft')} ({error}).") from None
    with within(read_contents([weights]), folder):
        return PeftModel.from_pretrained(model, str(folder)).eval()


def is_same_model(described: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two contents of `dsa_config.json` tell of the same zeros and the same structures."""

    def cut(data: Mapping[str, Any]) -> dict[str, Any]:
        units = (data.get("structured") or {}).get("units", {})
        return {unit: (one["kept"], one["gone"]) for unit, one in units.items()}

    return described["achieved"]["units"] == other["achieved"]["units"] and cut(described) == cut(other)


def check_base(
    model: nn.Module, stored: str | None, directory: Path, report: PruningReport, described: Mapping[str, Any] | None
) -> None:
    """Make the adapters of `model` name the pruned model in `stored` as their base, in place.

    Args:
        described (`Mapping[str, Any]`, *optional*): the `dsa_config.json` in `stored`, as it is now.

    Raises:
        ValueError: no folder is known to hold the weights under the adapters with their zeros, or `directory` would
            replace it.
    """
    way_out = "save the pruned model to a folder of its own first, or merge the adapter (RecoveryConfig(merge=True))"
    if stored is None:
        raise ValueError(f"The adapter would be saved without the pruned weights that it belongs to; {way_out}.")
    # The adapter would name a folder that it has just replaced.
    if Path(stored).is_dir() and directory.is_dir() and Path(stored).samefile(directory):
        raise ValueError(f"{directory} holds the pruned model under the adapter; save the adapter to another folder.")
    # The folder may have been pruned anew since: its zeros, not its name, make it the base.
    if described is None or not is_same_model(described, report.to_dict()):
        raise ValueError(
            f"{stored} does not hold the zeros and widths that the model under the adapter has; {way_out}."
        )
    for config in model.peft_config.values():
        config.base_model_name_or_path = stored
