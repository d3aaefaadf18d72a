"""Models in other forms: a GGUF, quantised weights. What transformers can make dense is made so while it is loaded.

Zeros are of dense weights: packed ones are never pruned, and what cannot be made dense is refused by name.
"""

from __future__ import annotations

import inspect
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..model.adapters import inner_model
from ..model.parameters import count_parameters
from .encodings import QUANT_METHOD


GGUF = ".gguf"


def located(path: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id of the model at `path`, and options; a path to a .gguf is the folder and a `gguf_file`.

    A GGUF on the Hub is named likewise, as in "user/name/model-q4.gguf".

    Raises:
        ValueError: a file that is no GGUF, or a GGUF that is named twice, or has another ending.
        FileNotFoundError: a folder that has no such GGUF, or a model in another place than beside a config.json.
    """
    options = dict(options)
    is_file = Path(path).is_file()
    if not is_gguf(path) or Path(path).is_dir():
        if is_file:
            raise ValueError(f"{path} is a file; a model is a folder, a .gguf or a Hub id.")
        _check_there(Path(path), options.get("gguf_file"), options.get("subfolder") or "")
        return path, options
    if options.get("gguf_file"):
        raise ValueError(f"{path} names a GGUF, and gguf_file={options['gguf_file']!r} another; leave out the one.")
    parts = path.split("/")
    if not path.endswith(GGUF):
        raise ValueError(
            f"{path} ends in {path[-5:]}, and transformers takes what ends in {GGUF} for a GGUF; rename it."
        )
    if is_file:
        return str(Path(path).parent), {**options, "gguf_file": Path(path).name}
    if len(parts) > 2 and not Path(path).is_absolute():
        return "/".join(parts[:2]), {**options, "gguf_file": "/".join(parts[2:])}
    raise FileNotFoundError(f"No file {path}.")


def is_gguf(path: str | Path) -> bool:
    """Whether a path or a Hub id with a file ends as a GGUF does, in letters of either kind."""
    return str(path).lower().endswith(GGUF)


def _check_there(folder: Path, gguf: str | None, inner: str) -> None:
    """Raise `FileNotFoundError` where a folder has no such GGUF, or its model is in a folder or a form of its own."""
    if not folder.is_dir():
        return
    place = folder / inner
    if gguf:
        if not str(gguf).endswith(GGUF):
            raise ValueError(f"gguf_file={str(gguf)!r} does not end in {GGUF}, as transformers needs it; rename it.")
        if not (folder / gguf).is_file() and not (place / gguf).is_file():
            raise FileNotFoundError(f"{folder} has no {gguf}.")
        return
    if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
        return
    files = sorted(path.name for path in place.glob("*") if is_gguf(path))
    inside = sorted(path.parent for name in ("config", "adapter_config") for path in place.glob(f"*/{name}.json"))
    if files:
        raise FileNotFoundError(f"{place} has no config.json, and the GGUF {files[0]}; name it with gguf_file.")
    # The modules of a sentence-transformers model may all have folders, and so may adapters.
    models = [path for path in inside if (path / "adapter_config.json").is_file() or any(path.glob("*.safetensors"))]
    if models:
        raise FileNotFoundError(f"{place} has no config.json, and {models[0]} holds a model or an adapter; name that.")


@contextmanager
def reading_gguf(path: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Names the GGUF, where one is read, in whatever a file that is damaged ends in."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error) as error:
        file = options.get("gguf_file")
        if not file or file in str(error):
            raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"The GGUF {file} of {path} cannot be read ({type(error).__name__}: {said:.300}); download it again."
        ) from error


def dequantising(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Further options of `from_pretrained` with which the model of `config` comes as dense weights.

    What `config` says of quantised weights is changed in place, where they can be made dense.
    """
    if options.get("gguf_file"):
        made = getattr(transformers, "GgufConfig", None)  # releases without it make every GGUF dense
        return {} if made is None else {"quantization_config": made(dequantize=True)}
    for part in (config, config.get_text_config()):
        stated = getattr(part, "quantization_config", None)
        if isinstance(stated, dict) and can_be_dense(stated):
            part.quantization_config = {**stated, "dequantize": True}
    return {}


def method_of(stated: Any) -> str | None:
    """By which method the weights of a config.json's content are quantised; `None` where they are not, or by ours."""
    section = _section(stated)
    method = section.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in section else None)
    return str(method) if method not in (None, QUANT_METHOD) else None


def can_be_dense(section: Mapping[str, Any]) -> bool:
    """Whether transformers makes weights of a `quantization_config` dense while it loads them."""
    made = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(section.get("quant_method")))
    return made is not None and "dequantize" in inspect.signature(made.__init__).parameters


def check_unpacked(stated: Any, where: str | Path, loaded: bool = False) -> None:
    """Raise `ValueError` where weights are packed and stay so.

    Args:
        stated (`Any`): the content of a config.json, or the configuration of a `loaded` model as a dictionary.
        where (`str | Path`): what the message calls the model.
    """
    method, section = method_of(stated), _section(stated)
    if method is not None and loaded and can_be_dense(section):
        raise ValueError(
            f"{where} holds weights that are quantised with {method}; load it with DSAPruner.from_pretrained, which "
            "makes them dense."
        )
    if method is not None and not can_be_dense(section):
        bits = next((section[name] for name in ("bits", "w_bit", "nbits") if name in section), None)
        raise ValueError(
            f"{where} is quantised with {method}{f' ({bits} bits)' if bits else ''}, and transformers cannot make its "
            "weights dense: there is nothing in them that could be zero. Prune the model that it was made from, and "
            "quantise the result."
        )


def check_model(model: nn.Module) -> None:
    """Raise `ValueError` for a model that was loaded with packed weights."""
    config = getattr(inner_model(model), "config", None)
    check_unpacked(getattr(config, "to_dict", dict)(), type(model).__name__, loaded=True)


def form_of(stated: Any, options: Mapping[str, Any], folder: Path | None = None) -> dict[str, str]:
    """What a description's `base_model` says of a form that was made dense; nothing of an ordinary checkpoint."""
    if options.get("gguf_file"):
        kind = _file_type(folder / options["gguf_file"]) if folder is not None else None
        return {"gguf_file": options["gguf_file"], "form": f"GGUF{f' {kind}' if kind else ''}, made dense"}
    method = method_of(stated)
    return {"form": f"{method}, made dense"} if method and can_be_dense(_section(stated)) else {}


def _section(stated: Any) -> Mapping[str, Any]:
    """The `quantization_config` of a config.json's content, of the model or of its text part."""
    if not isinstance(stated, Mapping):
        return {}
    found = stated.get("quantization_config")
    if not found and isinstance(stated.get("text_config"), Mapping):
        found = stated["text_config"].get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _file_type(path: Path) -> str | None:
    """How most weights of a GGUF are stored, such as "Q4_K_M"; `None` where it does not say so."""
    try:
        from gguf import GGUFReader, LlamaFileType

        found = GGUFReader(path).get_field("general.file_type")
        return None if found is None else LlamaFileType(int(found.contents())).name.removeprefix("MOSTLY_")
    except (ImportError, ValueError, OSError, AttributeError):
        return None


def unknown_in_gguf(model: nn.Module, path: Path) -> dict[str, int]:
    """Part -> weights of what a GGUF holds and `model`, made from it, does not: blocks behind its last, such as heads.

    transformers passes them over. What a GGUF calls a weight, and into how many it takes one apart, differs from
    family to family; so names count only where the file holds more weights than the model, and these are no more.
    """
    try:
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        arch = next(row for row, name in MODEL_ARCH_NAMES.items() if field and name == field.contents())
        # ropes' frequencies are computed by the class
        sizes = {one.name: int(one.n_elements) for one in reader.tensors if not one.name.startswith("rope_")}
        blocks = model.config.get_text_config().num_hidden_layers
        names = get_tensor_name_map(arch, blocks)
    except (ImportError, ValueError, OSError, AttributeError, StopIteration):
        return {}
    more = sum(sizes.values()) - count_parameters(model)
    known = {names.get_name(name, (".weight", ".bias")) for name, _ in model.named_parameters()}
    behind = {name for name in sizes if (found := re.match(r"blk\.(\d+)\.", name)) and int(found[1]) >= blocks}
    strange = (sizes.keys() - known) | behind
    found = next((each for each in (behind, strange) if 0 < sum(sizes[name] for name in each) <= more), set())
    parts: dict[str, int] = {}
    for name in sorted(found):
        part = re.sub(r"^(blk\.\d+)\..*|\.(weight|bias)$", r"\1", name)
        parts[part] = parts.get(part, 0) + sizes[name]
    return parts
