"""The code that a checkpoint brings along: which of its classes loads it; none runs that is not trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..common.files import read_json, write_text


AUTO_MODEL = "AutoModel"
_REFERENCE = re.compile(r"([\w./-]+--)?\w+\.\w+")  # "repository--module.Class", or without the repository its own
_PLACES = ("revision", "code_revision", "token", "cache_dir", "local_files_only")


def code_map(config: Any, where: str | Path) -> dict[str, str]:
    """Auto class -> "module.Class" of the checkpoint's own code, from a configuration or a config.json's content.

    Raises:
        ValueError: it is no such map.
    """
    stated = config.get("auto_map") if isinstance(config, Mapping) else getattr(config, "auto_map", None)
    if not stated:
        return {}
    # A tokenizer's entry is a pair, of which no model is made.
    if not isinstance(stated, Mapping) or not all(isinstance(key, str) for key in stated):
        raise ValueError(f"The config.json of {where} has auto_map={stated!r:.80}; expected names and classes.")
    found = {key: value for key, value in stated.items() if isinstance(value, str)}
    for key, value in found.items():
        if not _REFERENCE.fullmatch(value):
            raise ValueError(
                f"The config.json of {where} has {value!r:.80} as {key} in auto_map; expected module.Class."
            )
    return found


def check_trusted(stated: Any, where: str | Path, trusted: bool) -> None:
    """Raise `ValueError` where transformers has no class of its own for a config.json, and its code is not trusted."""
    code = code_map(stated, where) if isinstance(stated, Mapping) else {}
    if trusted or not code or stated.get("model_type") in transformers.CONFIG_MAPPING:
        return
    raise ValueError(
        f"{where} brings its own code ({', '.join(sorted(set(code.values())))}), and transformers has none for "
        f"model_type {stated.get('model_type')!r}; read that code, and run it with trust_remote_code=True."
    )


def own_class(code: Mapping[str, str], names: Sequence[str], where: str | Path, options: Mapping[str, Any]) -> type:
    """The model class among `code`, a checkpoint's auto_map, that loads it; its code is run.

    That of an architecture in `names`; else the one with a head.

    Raises:
        ValueError: the code cannot be run, or has no such class.
    """

    def rank(key: str) -> tuple[bool, int, bool, bool]:
        name = code[key].rpartition(".")[2]
        at = names.index(name) if name in names else len(names)
        return name not in names, at, key == AUTO_MODEL, key != "AutoModelForCausalLM"

    key = min(code, key=rank)
    places = {name: options[name] for name in _PLACES if name in options}
    try:
        found = get_class_from_dynamic_module(code[key], str(where), **places)
    except Exception as error:
        # A stranger's code may raise anything; a package that it needs is the usual reason.
        said = " ".join(str(error).split())
        raise ValueError(
            f"The code of {where} cannot be run: {code[key]} ends in {type(error).__name__}: {said:.300}"
        ) from error
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(f"The code of {where} names {code[key]} as {key}, which is no model class of transformers.")
    if hasattr(transformers, key):
        found.register_for_auto_class(key)  # so that saving it writes its code, too
    return found


def make_own_code_local(folder: Path) -> None:
    """Have the config.json in `folder` name the code that lies there, and not the repository that it came from."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    code = code_map(config, folder)
    here = {
        key: value.partition("--")[2]
        for key, value in code.items()
        if "--" in value and (folder / f"{value.partition('--')[2].partition('.')[0]}.py").is_file()
    }
    if here:
        write_text(path, json.dumps({**config, "auto_map": {**config["auto_map"], **here}}, indent=2) + "\n")
