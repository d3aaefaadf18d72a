"""What belongs to a model beside what its class saves: processors, licences, code, modules behind it.

Every file goes along that is there beside the weights, but for those that are written anew, that tell of another model
or of a run, and that are too large; what stays is named, with the reason.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from ..common.escaping import one_line
from ..common.fences import transport_error
from ..common.files import read_json
from ..common.folder_files import TOKENIZER, is_part, own_file
from ..common.hub_file import hub_file, snapshot_of
from ..common.manifest import MANIFEST, files_in, read_manifest
from ..pruning.configuration import CONFIG_NAME
from .unknown_tensors import bytes_of, sizes_by_part


logger = logging.getLogger(__name__)

MODULES = "modules.json"  # sentence-transformers' list of what comes after the model, each in a folder of its own
LARGEST = 2**30  # bytes; nothing beside weights is larger, but data and archives that somebody put there are
# Weights in other formats, which would be another copy of the same ones: dense, where these are pruned.
OTHER_WEIGHTS = (
    *("*.bin", "*.bin.index.json", "*.h5", "*.h5.index.json", "*.msgpack", "*.msgpack.index.json", "*.safetensors"),
    *("*.safetensors.index.json", "*.gguf", "*.onnx*", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.tflite", "*.ot"),
)
RUN = ("training_args.bin", "trainer_state.json", "optimizer.*", "scheduler.*", "rng_state*", "events.out.*")
_PARTS = r"(-\d+-of-\d+)?"
_OWN_WEIGHTS = (
    rf"(dsa_)?model{_PARTS}\.safetensors(\.index\.json)?",
    rf"pytorch_model{_PARTS}\.bin(\.index\.json)?",
)
_WHOLE = ("model.safetensors", "pytorch_model.bin")
WRITTEN = ("config.json", "README.md", CONFIG_NAME, MANIFEST)  # by us; a push writes the card
_PICTURES = "plots/"  # of a card that a push wrote
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # what is pruned is dense
REPLACED = ("added_tokens.json", "special_tokens_map.json")  # both are in what a tokenizer writes today

WEIGHTS = "weights in another form"
PACKED = "of weights that were quantised"
TRACE = "of a training run"
ADAPTERS = "of an adapter"  # beside a model they are attached to it whenever it is loaded
ANOTHER = "another model's"
LARGE = "too large"
LINK = "a link out of its folder"
MEASURED = "measured of another model"
MISSING = "could not be downloaded"


@dataclass(frozen=True)
class BaseFiles:
    """The files beside a model's weights.

    Attributes:
        folder (`Path`): where they are, in the Hub's cache for a model of the Hub.
        source (`str`): path or Hub id of the model.
        kept (`tuple[str, ...]`): names of those that go along, relative to the folder.
        left (`Mapping[str, str]`): names of those that do not, and why.
        public (`frozenset[str]`): those of the kept that are in a repository on the Hub.
        tensors (`Mapping[str, Path]`): tensors that the model's class does not know, and the files that hold them.
        lost (`Mapping[str, int]`): part of the model -> weights of such tensors that cannot go along.
    """

    folder: Path
    source: str
    kept: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    public: frozenset[str] = frozenset()
    tensors: Mapping[str, Path] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of those that go along."""
        files = sum((self.folder / name).stat().st_size for name in self.kept if (self.folder / name).is_file())
        return files + bytes_of(self.tensors)

    def copy_to(self, folder: Path, tokenizer: Any = None) -> tuple[str, ...]:
        """Put the kept files into `folder`, but for those that are there; names of those that were put.

        Args:
            tokenizer (`Any`, *optional*): what was saved there. One from elsewhere replaces this model's files of its
                tokenizer; without any, they go along as they are.
        """
        own = tokenizer is None or str(getattr(tokenizer, "name_or_path", "")) == self.source
        put = []
        for name in self.kept:
            replaced = tokenizer is not None and (name in REPLACED or (not own and is_part(name, TOKENIZER)))
            if replaced or (folder / name).exists():
                continue
            if not (self.folder / name).is_file():
                logger.warning("%s was there before the work and is gone now; it is not in the output.", name)
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
            put.append(name)
        return tuple(put)

    def said(self) -> str:
        """What stays behind and might be missed, in one line; empty where nothing does."""
        # What was measured of another model would be wrong beside this one.
        return ", ".join(f"{name} ({why})" for name, why in self.left.items() if why != MEASURED)

    def described(self, put: Iterable[str]) -> dict[str, Any]:
        """For `dsa_config.json`: the files that were put beside the model, the public of them, those that were left.

        And the weights that its class does not know, by part of the model: those that went along and others.
        """
        put = sorted(put)
        found = {"kept": put, "public": [name for name in put if name in self.public], "left": dict(self.left)}
        found |= {"not_pruned": sizes_by_part(self.tensors)} if self.tensors else {}
        return found | ({"not_kept": dict(self.lost)} if self.lost else {})


def find_base_files(path: str, description: Mapping[str, Any] | None = None, **options) -> BaseFiles | None:
    """The files beside the weights of the model at a path or Hub id; of the Hub they are downloaded.

    `None` where there is no such model any more.

    Args:
        description (`Mapping[str, Any]`, *optional*): its `dsa_config.json`: what was kept before is kept again.
        options (`dict`): `revision`, `subfolder`, ... as for `from_pretrained`.
    """
    known = (description or {}).get("base_files") or {}
    inner, gguf = options.get("subfolder") or "", options.pop("gguf_file", None)
    folder = Path(path, inner)
    if folder.is_dir():
        found = _sorted({name: _size(folder / name) for name in files_in(folder)}, _reader(folder), gguf)
        public = frozenset(found.kept if snapshot_of(folder) else known.get("public") or ())
        # what an earlier command wrote of its own, such as a report, is of the model as it was
        ours = read_manifest(folder).keys() - set(known.get("kept") or ())
    elif Path(path).exists() or Path(path).is_absolute():
        return None
    else:
        try:
            config = hub_file(path, gguf or "config.json", **options)
        except OSError as error:
            logger.info("No files beside the weights of %s: %s", path, one_line(str(error)))
            return None
        if config is None:
            return None
        folder, ours = config.parents[len(PurePosixPath(gguf or "").parts[1:])], set()
        found = _downloaded(path, inner, folder, options, gguf)
        public = frozenset(found.kept)
    kept, left = [], {**(known.get("left") or {}), **found.left}
    for name in found.kept:
        why = LINK if not _is_own(folder / name, folder) else MEASURED if _is_measurement(folder / name) else None
        if why:
            left[name] = why
        elif name not in ours and not (description and name.startswith(_PICTURES)):
            kept.append(name)
    return BaseFiles(folder, path, tuple(kept), left, public & set(kept))


def _downloaded(path: str, inner: str, folder: Path, options: Mapping[str, Any], gguf: str | None) -> _Sorted:
    """The files of a model on the Hub, those that go along in the cache."""

    def read(name: str) -> Any:
        file = hub_file(path, name, **options)
        return {} if file is None else read_json(file)

    found = _sorted(_hub_sizes(path, inner, folder, options), read, gguf)
    missing = {name: MISSING for name in found.kept if hub_file(path, name, **options) is None}
    return _Sorted(tuple(name for name in found.kept if name not in missing), {**found.left, **missing})


def _hub_sizes(path: str, inner: str, folder: Path, options: Mapping[str, Any]) -> dict[str, int]:
    """Name -> bytes of every file of a model on the Hub; of what the cache has, where the Hub cannot be asked."""
    # of the very commit that the cache's folder is
    cached = snapshot_of(folder)
    try:
        if options.get("local_files_only"):
            raise ConnectionError("only local files are asked for")
        tree = HfApi(token=options.get("token")).list_repo_tree(path, recursive=True, revision=cached and cached[1])
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except (HfHubHTTPError, transport_error(), OSError, ValueError) as error:
        logger.info("The files of %s are those in the cache: %s", path, one_line(str(error)))
        return {name: _size(folder / name) for name in files_in(folder)}
    within = f"{inner.strip('/')}/" if inner else ""
    return {name[len(within) :]: size for name, size in sizes.items() if name.startswith(within)}


@dataclass(frozen=True)
class _Sorted:
    kept: tuple[str, ...]
    left: dict[str, str]


def _sorted(sizes: Mapping[str, int], read: Callable[[str], Any], gguf: str | None = None) -> _Sorted:
    """The files of these sizes that go along, and those that stay and why; what is written anew is in neither.

    Args:
        read: the content of the JSON file of a name.
        gguf: the file that the weights are read from, where it is one of these.
    """
    # Hidden files are of tools such as git and the Hub's client, and no part of a model.
    names = [name for name in sizes if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    modules = module_folders(read(MODULES)) if MODULES in names else ()
    others = _models_in(names, modules)
    weights = {gguf} if gguf else _own_weights(names, read)
    kept, left = [], {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if name in WRITTEN or name in weights:
            continue
        if any(folder == other or folder.startswith(f"{other}/") for other in others):
            left[f"{next(other for other in others if f'{folder}/'.startswith(f'{other}/'))}/"] = ANOTHER
        elif name in ADAPTER:
            left[name] = ADAPTERS
        elif any(fnmatch(last, pattern) for pattern in RUN) or folder.split("/")[0] == "runs":
            left[name] = TRACE
        elif folder.split("/")[0] not in modules and _is_weights(last):
            left[name] = WEIGHTS
        elif name in QUANTISED:
            left[name] = PACKED
        elif sizes[name] > LARGEST:
            left[name] = LARGE
        else:
            kept.append(name)
    return _Sorted(tuple(kept), left)


def _is_weights(name: str) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in OTHER_WEIGHTS)


def _own_weights(names: Collection[str], read: Callable[[str], Any]) -> set[str]:
    """The files that hold the weights of the model itself, and their index: what transformers reads first.

    An index may name others, such as a shard of heads that were added.
    """
    for pattern in _OWN_WEIGHTS:
        found = {name for name in names if re.fullmatch(pattern, name)}
        indices = [name for name in found if name.endswith(".index.json")]
        for index in indices if found.isdisjoint(_WHOLE) else ():  # one file is read before an index
            content = read(index)
            named = content.get("weight_map") if isinstance(content, Mapping) else None
            found = found | {name for name in (named or {}).values() if isinstance(name, str) and name in names}
        if found:
            return found
    return set()


def module_folders(content: Any) -> tuple[str, ...]:
    """The folders that a modules.json names, but for the model's own."""
    rows = content if isinstance(content, list) else []
    paths = [row.get("path") for row in rows if isinstance(row, Mapping)]
    return tuple(path.split("/")[0] for path in paths if isinstance(path, str) and path)


def _models_in(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The folders that hold a model of their own, with its configuration and weights, such as a run's checkpoints."""
    weighed = {name.rpartition("/")[0] for name in names if _is_weights(name.rpartition("/")[2])}
    described = {name.rpartition("/")[0] for name in names if name.endswith(("/config.json", "/adapter_config.json"))}
    return sorted(folder for folder in weighed & described if folder and folder.split("/")[0] not in modules)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reader(folder: Path) -> Callable[[str], Any]:
    return lambda name: read_json(folder / name)


def _is_own(path: Path, folder: Path) -> bool:
    try:
        own_file(path, folder)
    except ValueError:
        return False
    return True


def _is_measurement(path: Path) -> bool:
    """Whether a file is one of `evaluate --output`, whose numbers would be taken for the new model's."""
    if path.suffix != ".json" or "/" in path.name or _size(path) > 2**20:
        return False
    try:
        content = read_json(path)
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and ({"models", "versions"} <= content.keys() or "perplexity" in content)
