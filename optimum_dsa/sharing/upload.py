"""What of a pruned model's folder goes to the Hub: an allow-list, with nothing of this computer in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.utils import validate_repo_id

from ..checkpoint.adapter_base import ADAPTER_CONFIG, base_under, is_adapter
from ..checkpoint.base_files import MODULES, module_folders
from ..checkpoint.description import checksum, report_from, seal_of
from ..checkpoint.load import load_model
from ..checkpoint.shards import open_shard
from ..checkpoint.verify import verify
from ..common.escaping import one_line
from ..common.files import read_json
from ..common.folder_files import OTHERS, TOKENIZER, WEIGHTS, is_part, own_file, own_files
from ..common.manifest import MANIFEST, recognised
from ..pruning.configuration import CONFIG_NAME
from .outcome import Outcome
from .provenance import is_repository, last_part, without_places


logger = logging.getLogger(__name__)

ALLOWED = (*WEIGHTS, *TOKENIZER, *OTHERS)


@dataclass(frozen=True)
class Upload:
    """What will be sent.

    Attributes:
        outcome: the model, as its folder tells it.
        model_config: the content of `config.json`.
        files: path in the repository -> a file here, or content that differs from it.
        left_out: names in the folder that stay here.
        base: of an adapter, the repository of the pruned model under it.
    """

    outcome: Outcome
    model_config: Mapping[str, Any]
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    base: str | None = None


def collect(folder: str | Path, base: str | None = None) -> Upload:
    """What of `folder` goes to the Hub.

    Args:
        folder: of a pruned model, or of an adapter on one.
        base: of an adapter, the repository that the pruned model under it is in; by default the one that it names.

    Raises:
        FileNotFoundError: the folder holds no pruned model, or no weights.
        ValueError: what would go is a link out of the folder, or to a file in it that does not go; or an adapter would
            go whose base is in no repository.
    """
    path = Path(folder)
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{path} holds no {CONFIG_NAME}; give the folder of a pruned model.")
    own_file(path / CONFIG_NAME, path)
    base = _base_repository(path, base)
    outcome = Outcome.read(path)
    of_base = _of_base(path, outcome.facts)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for name, file in own_files(path):
        if name in (CONFIG_NAME, MANIFEST):
            continue
        if is_part(name, ALLOWED) or name in of_base or any(pattern.startswith(f"{name}/") for pattern in ALLOWED):
            files[name] = _sendable(file, path, of_base)
        else:
            left_out.append(name)
    if not any(fnmatch(name, WEIGHTS[0]) for name in files):
        raise FileNotFoundError(f"{path} holds no weights (*.safetensors).")
    for name in files:
        if fnmatch(name, WEIGHTS[0]):
            with open_shard(path / name, "np"):  # a file that was cut off is not sent
                pass
    if base is not None:
        own_file(path / ADAPTER_CONFIG, path)
        files[ADAPTER_CONFIG] = _json({**read_json(path / ADAPTER_CONFIG), "base_model_name_or_path": base})
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if name in files:
            content = read_json(path / name)
            cut = _without_paths(content)
            if cut != content:
                files[name] = _json(cut)
    files[CONFIG_NAME] = _description(path / CONFIG_NAME, files)
    model_config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    left_out = [name for name in left_out if name not in files]
    return Upload(outcome, model_config, files, tuple(left_out), base)


def _base_repository(path: Path, base: str | None) -> str | None:
    """The repository of the pruned model under the adapter in `path`; `None` where a model is."""
    if not is_adapter(path):
        if base is not None:
            raise ValueError(f"{path} holds a whole model, which is pushed without a base; leave {base!r} out.")
        return None
    named = base_under(path)
    if base is None and is_repository(named) and not Path(named).exists():
        base = named
    if base is None:
        raise ValueError(
            f"{path} holds an adapter, which has no zeros without its base, {named}. Push that first "
            f"(optimum-cli dsa push {named} USER/NAME) and name its repository: --base USER/NAME; or push the merged "
            "model."
        )
    validate_repo_id(base)
    return base


def count(upload: Upload, folder: str | Path) -> tuple[Upload, str]:
    """`upload` with its outcome's zeros counted in the weights, and an empty text; else as it is, and why not.

    Weights are read block by block. Code that a model brings along is not run for it.

    Raises:
        ValueError: the weights are not what `dsa_config.json` says.
    """
    facts = upload.outcome.facts
    try:
        report = report_from(facts)
        with TemporaryDirectory(prefix="optimum-dsa-") as scratch:
            options = {"device_map": {"": "disk"}, "offload_folder": scratch, "dtype": "auto"}
            found = verify(load_model(str(folder), adapter=False, trust_remote_code=False, **options), report)
    except (ValueError, OSError, ImportError) as error:
        logger.warning(
            "The zeros of %s cannot be counted, so its card does not tell them: %s", folder, one_line(str(error))
        )
        return upload, f"the model could not be loaded ({type(error).__name__})"
    if not found.holds:
        raise ValueError(
            f"{folder} is not what its {CONFIG_NAME} says: {found.problems[0]}. Nothing was sent; see "
            f"'optimum-cli dsa verify {folder}', and save the model again with save_pretrained."
        )
    shares = {unit: found.zeros[unit] / max(size, 1) for unit, size in found.sizes.items()}
    allocation = upload.outcome.allocation and replace(
        upload.outcome.allocation, sparsity=shares, sizes=dict(found.sizes)
    )
    return replace(upload, outcome=replace(upload.outcome, counted=found, allocation=allocation)), ""


def pictures(outcome: Outcome, name: str) -> dict[str, bytes]:
    """Path in the repository -> PNG: "plots/allocation.png", "plots/heatmap.png", "plots/widths.png".

    None without matplotlib, and none of shares that were not counted.
    """
    from ..pruning.structured.described import by_kind
    from .charts import allocation_chart, heat_map, width_chart
    from .tables import compared

    if outcome.counted is None:
        return {}
    try:
        figures = {}
        if outcome.structured:
            figures["widths"] = width_chart(by_kind(outcome.widths), "Structures that stay in every block")
        if outcome.allocation is not None:
            shown = compared([replace(outcome, name=name)])
            figures["allocation"] = allocation_chart(shown, "Weights removed per block")
            figures["heatmap"] = heat_map(outcome.allocation, "Weights removed per matrix")
    except ImportError as error:
        logger.info("No pictures in the card: %s", error)
        return {}
    found = {}
    for title, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200)
        found[f"plots/{title}.png"] = buffer.getvalue()
    return found


def _of_base(path: Path, facts: Mapping[str, Any]) -> set[str]:
    """The files that came from the base and are as they were: the public, and those of modules behind the model.

    Others of a base in a folder may be of whoever keeps that folder; what a model needs has known names.
    """
    stated = facts.get("base_files") or {}
    modules = module_folders(read_json(path / MODULES)) if (path / MODULES).is_file() else ()
    names = [
        name
        for name in stated.get("kept") or ()
        if name in (stated.get("public") or ()) or ("/" in name and name.split("/")[0] in modules)
    ]
    return set(recognised(path, [name for name in names if (path / name).is_file()]))


def _sendable(file: Path, folder: Path, of_base: Collection[str] = ()) -> Path:
    """`file`; `ValueError` where it is a link to something that would not go under its own name."""
    target, whole = own_file(file, folder).resolve(), folder.resolve()
    name = target.relative_to(whole).as_posix() if target.is_relative_to(whole) else None
    if name is not None and name not in of_base and not is_part(name, ALLOWED):
        raise ValueError(f"{file} is a link to {target.name}, which does not go to the Hub; replace or remove it.")
    return file


def _description(file: Path, sent: Collection[str]) -> Path | bytes:
    """`dsa_config.json` as it is where there is nothing to cut; else cut, and signed again if it was kept as it was.

    It stays in its version: a checksum vouches for nothing that had none when it was written.
    """
    written = read_json(file)
    cut = without_places(written)
    if "base_files" in cut:
        # Names of files that are not sent are nobody's business, but where everybody may read them.
        found, public = cut["base_files"], bool((cut.get("base_model") or {}).get("revision"))
        kept = {"kept": [name for name in found["kept"] if name in sent], "left": found["left"] if public else {}}
        cut["base_files"] = {**found, **kept}
    if cut == written:
        return file
    # Whoever changed it before gets no seal from us.
    if seal_of(written) == "kept":
        cut["checksum"] = checksum(cut)
    return _json(cut)


def _without_paths(data: Any) -> Any:
    """JSON in which what is called a path or file is cut to its last part."""
    if isinstance(data, list):
        return [_without_paths(part) for part in data]
    if not isinstance(data, dict):
        return data
    return {
        name: last_part(value)
        if isinstance(value, str) and name.endswith(("path", "file", "dir", "folder"))
        else _without_paths(value)
        for name, value in data.items()
    }


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
