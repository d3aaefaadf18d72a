"""An adapter on disk, and the pruned model under it: the one is worth nothing without the zeros of the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..common.escaping import one_line
from ..common.files import read_json
from ..common.installation import how_to_install
from ..model.offload import is_offloaded
from ..pruning.report import PruningReport
from .adapter_task import AdapterTask, task_of
from .limits import read_contents, within


logger = logging.getLogger(__name__)

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
    data = _stated(folder)
    base = data.get("base_model_name_or_path") if isinstance(data, Mapping) else None
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{Path(folder, ADAPTER_CONFIG)} names no base_model_name_or_path, the model that the adapter belongs to."
        )
    beside = Path(folder).parent / base
    # "pruned" is the folder in the working directory, or beside the adapter where somebody has moved both
    return str(beside) if not Path(base).exists() and beside.is_dir() else base


def task_under(folder: str | Path) -> AdapterTask:
    """What the adapter in `folder` was trained for."""
    return task_of(Path(folder), ADAPTER_WEIGHTS, _stated(folder))


def _stated(folder: str | Path) -> Any:
    return read_json(Path(folder, ADAPTER_CONFIG))


def adapters_in(folder: str | Path) -> list[str]:
    """The adapters in folders of `folder`, by their names: PEFT keeps those there that have another than "default"."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{ADAPTER_CONFIG}"))


def with_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """`model` inside a PEFT model with the adapters in `folder`, for inference; of several the first is active.

    Raises:
        FileNotFoundError: its weights are not there as safetensors.
        ValueError: peft is missing, `model` is offloaded, the adapter is larger than its weights, or of another model.
    """
    if is_offloaded(model):  # PEFT would write its own names into the files that the weights are read from
        raise ValueError(f"{folder} holds an adapter, whose base has to be in memory; leave out the device map.")
    places = {"default": Path(folder), **{name: Path(folder, name) for name in adapters_in(folder)}}
    for place in places.values():
        if not (place / ADAPTER_WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{place} holds an adapter without {ADAPTER_WEIGHTS}; save it again as safetensors."
            )
    try:
        from peft import PeftModel  # which knows our method by now: the package's door sees to it
    except ImportError as error:
        raise ValueError(f"{folder} holds an adapter, which needs peft: {how_to_install('peft')} ({error}).") from None
    task_under(folder).resize(model)
    name = type(model).__name__
    with within(read_contents(place / ADAPTER_WEIGHTS for place in places.values()), folder):
        made = PeftModel.from_pretrained(model, str(folder))
        for adapter, place in places.items():
            # of an adapter that is there already, its weights, once more: now PEFT says which have no place
            _check_placed(made, made.load_adapter(str(place), adapter), adapter, place, name)
    if len(places) > 1:
        logger.warning("%s holds the adapters %s; the first is active.", folder, one_line(", ".join(places)))
    return made.eval()


def _check_placed(model: nn.Module, result: Any, adapter: str, place: Path, base: str) -> None:
    """Raise `ValueError` where an adapter's weights and those that `model` has for it are not the same."""
    if model.peft_config[adapter].is_prompt_learning:  # no modules of the model
        return
    twice = {"original_module", "modules_to_save"}  # where words were added, PEFT stores embeddings more than once
    strange = [name for name in result.unexpected_keys if not twice & {*name.split(".")}]
    lacking = [name for name in result.missing_keys if adapter in name.split(".")]
    if found := strange or lacking:
        raise ValueError(
            f"{place} holds an adapter of another model than {base}: "
            f"{'it has' if strange else 'it lacks'} {found[0].removeprefix('base_model.model.')} and "
            f"{len(found) - 1:,} more; name the base that it was trained on, and its task_type, in {ADAPTER_CONFIG}."
        )


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
        # in full, as whoever loads it works elsewhere
        config.base_model_name_or_path = str(Path(stored).absolute()) if Path(stored).is_dir() else stored
        if isinstance(getattr(config, "init_lora_weights", None), str):
            # PiSSA and its like begin by taking from the base what the adapter holds, and that is done: the base of
            # here is the rest already
            config.init_lora_weights = True
