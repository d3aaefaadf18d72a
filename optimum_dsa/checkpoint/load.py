"""Models and tokenizers from a path or Hub id, by the class that the checkpoint names."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from ..common.devices import own_share
from ..common.escaping import one_line
from ..common.fence_rows import DependencyError
from ..common.files import read_json
from ..common.folder_files import TOKENIZER, check_read_files, is_part
from ..common.hub_file import hub_commit, hub_file
from ..model.adapters import has_adapters
from ..model.own_code import check_trusted
from ..pruning.configuration import CONFIG_NAME
from .adapter_base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_under, is_adapter, task_under, with_adapter
from .adapter_task import AdapterTask
from .base_files import find_base_files
from .description import Description, read_description
from .encodings import DENSE, Encoding, encoding_in
from .forms import dequantising, is_gguf, located, reading_gguf
from .layouts import layout_of
from .limits import Contents, check_counts, read_contents, within
from .missing import check_loaded
from .shards import find_shards, index_files, index_name


logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
_FILE_OPTIONS = tuple(name for name in _HUB_OPTIONS if name != "trust_remote_code")
# With these, weights come from other files than those that are counted here.
_OTHER_WEIGHTS = ("variant", "gguf_file", "state_dict", "use_safetensors")

# what other libraries read, or pickles
_NO_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"]


def load_model(path: str, adapter: bool = True, task: AdapterTask | None = None, **kwargs) -> nn.Module:
    """The model at `path` in its own architecture (language model, encoder, vision model, ...), for inference.

    Of an adapter, the model that it names as its base, with the adapter on it, or with `adapter=False` without.

    Args:
        task (`AdapterTask`, *optional*): of an adapter that the model is the base of, whose head it then has.

    Raises:
        ValueError: its `config.json` cannot be a model's, names no model class, or asks for more than the checkpoint
            holds; a file that would be saved again is a link out of the folder.
        OSError: there is none.
    """
    path, kwargs = located(path, kwargs)
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    folder = Path(path, kwargs.get("subfolder") or "")
    if folder.is_dir():
        check_read_files(folder)
    if not kwargs.get("gguf_file") and (found := _adapter_at(path, folder, shared)) is not None:
        # They say where the adapter is, not its base.
        others = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        base = _load_base(path, found, others)
        return with_adapter(base, found) if adapter else base
    stated = {} if kwargs.get("gguf_file") else stated_in(path, folder, shared)
    contents = None if kwargs.keys() & set(_OTHER_WEIGHTS) else contents_of(path, folder, stated, shared)
    config = kwargs.pop("config", None)
    if config is None:
        # AutoConfig already makes lists as long as the numbers say.
        check_counts(stated, contents, path)
        check_trusted(stated, path, bool(shared.get("trust_remote_code")))
        config = read_configuration(path, kwargs)
    loader = layout_of(stated).model_class(config, path, shared)
    if kwargs.get("gguf_file") and config.is_encoder_decoder:
        loader = transformers.AutoModelForSeq2SeqLM  # a GGUF names no class
    if task is not None:
        loader = task.model_class(loader, config)
    kwargs = {**dequantising(config, kwargs), **kwargs, **_own_devices(kwargs)}
    scratch = _scratch(kwargs)
    if scratch is not None:
        kwargs["offload_folder"] = scratch.name
    told = explained(f"The checkpoint at {path} cannot be loaded")
    with within(contents, path), told, reading_gguf(path, kwargs), _as_asked(kwargs):
        found = loader.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    model, info = found if isinstance(found, tuple) else (found, {})  # a class of its own may not tell
    if scratch is not None:
        weakref.finalize(model, scratch.cleanup)
    brought = () if task is None else task.modules
    if has_adapters(model):
        logger.warning("%s holds a model and an adapter beside it, which transformers attaches to it.", path)
    check_loaded(model, info, "/".join(filter(None, (path, kwargs.get("gguf_file")))), brought)
    return model.eval()


def _is_spread(places: Any) -> bool:
    """Whether a device map is a name with which accelerate spreads a model over all there is, the disk among it."""
    return isinstance(places, str) and places in ("auto", "balanced", "balanced_low_0", "sequential")


def _own_devices(options: Mapping[str, Any]) -> dict[str, Any]:
    """What keeps a model that is spread over what there is to the devices of this process."""
    asked = _is_spread(options.get("device_map")) and options.get("max_memory") is None
    limits = own_share() if asked else None
    return {} if limits is None else {"max_memory": limits}


def _scratch(options: Mapping[str, Any]) -> tempfile.TemporaryDirectory | None:
    """A folder for weights that go to the disk and are in no file as they are (experts that are fused), if asked for.

    `None` where `options` name one, or place nothing on the disk.
    """
    places = options.get("device_map")
    on_disk = _is_spread(places) or isinstance(places, Mapping) and "disk" in places.values()
    if options.get("offload_folder") or not on_disk:
        return None
    return tempfile.TemporaryDirectory(prefix="optimum-dsa-")


def _load_base(path: str, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """The model under the adapter at `path`, in `folder`, with the head that it was trained with."""
    base = base_under(folder)
    try:
        return load_model(base, task=task_under(folder), **options)
    except OSError as error:
        raise OSError(
            f"{path} holds an adapter on {base}, which cannot be had; name where its base is as "
            f"base_model_name_or_path in its {ADAPTER_CONFIG} ({error})"
        ) from error


def weights_of(path: str) -> str:
    """Where the weights at `path` are: of an adapter in a folder, the base that it names; else `path` itself."""
    return base_under(path) if is_adapter(path) else path


def _adapter_at(path: str, folder: Path, options: Mapping[str, Any]) -> Path | None:
    """The folder of the adapter at `path`, in the cache if it is of the Hub; `None` where a model is."""
    if folder.is_dir():
        return folder if is_adapter(folder) else None
    if _cached(path, "config.json", options) is not None:
        return None
    found = _cached(path, ADAPTER_CONFIG, options)
    if found is not None:
        # Into the same folder of the cache, from which PEFT then reads.
        _cached(path, ADAPTER_WEIGHTS, options)
    return None if found is None else found.parent


def stated_in(path: str, folder: Path, options: Mapping[str, Any]) -> Any:
    """The content of the `config.json` at `path`, in `folder` or on the Hub; nothing where there is none."""
    found = folder / "config.json" if folder.is_dir() else _cached(path, "config.json", options)
    # read here first: larger than any configuration, it is refused before transformers reads it
    return read_json(found) if found is not None and found.is_file() else {}


def read_configuration(path: str, options: Mapping[str, Any]) -> Any:
    """The configuration at `path`; `options` may be more than those that say where it is."""
    # Said in any case: asked nothing, transformers asks whoever sits at the terminal.
    options = {"trust_remote_code": False} | {
        name: options[name] for name in (*_HUB_OPTIONS, "gguf_file") if options.get(name) is not None
    }
    try:
        with explained(f"The config.json of {path} is none that transformers reads"), reading_gguf(path, options):
            return transformers.AutoConfig.from_pretrained(path, **options)
    except OSError as error:
        if str(path) in str(error):
            raise
        said = " ".join(str(error).split())  # of the network alone, and not which model was asked for
        raise OSError(f"{path} is no folder, and the Hub does not give it: {said}") from error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Makes a `ValueError` of whatever a wrong value in `config.json` ends in: transformers checks few of them."""
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError, DependencyError):
        raise
    except ImportError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{what}, as a library is missing: {said:.300}") from error
    except Exception as error:
        said = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"{what} ({type(error).__name__}: {said:.500}); download the checkpoint again, or correct its config.json."
        ) from error


@contextmanager
def _as_asked(options: Mapping[str, Any]) -> Iterator[None]:
    """Keeps back accelerate's warning that weights were offloaded, where `options` asked for all of them on disk.

    Of a map that puts there what does not fit elsewhere it is news, and stays.
    """
    places = options.get("device_map")
    asked = isinstance(places, Mapping) and set(places.values()) == {"disk"}

    def heard(record: logging.LogRecord) -> bool:
        return not (asked and "on the meta device because they were offloaded" in record.getMessage())

    theirs = logging.getLogger("accelerate.big_modeling")
    theirs.addFilter(heard)
    try:
        yield
    finally:
        theirs.removeFilter(heard)


def contents_of(path: str, folder: Path, stated: Any, options: Mapping[str, Any]) -> Contents | None:
    """What the weights at `path` hold; `None` where they are not in safetensors, and so not counted.

    Raises:
        ValueError: they are quantised, and nothing says how.
    """
    files = weight_files(path, folder, stated, options)
    if not files:
        return None
    contents = read_contents(files)
    if encoding_in(stated) is None:
        return replace(contents, weights=None)
    if contents.whole is not None:
        raise ValueError(
            f"{path} holds whole numbers for {contents.whole}, and its config.json has no quantization_config that "
            "says what they stand for; prune the model that it was made from."
        )
    return contents


def weight_files(path: str, folder: Path, stated: Any, options: Mapping[str, Any]) -> list[Path]:
    """The files of the weights at `path`, downloaded for a Hub model; none where they are not in safetensors."""
    encoding = encoding_in(stated) or DENSE  # one that nobody knows is refused before its files are missed
    if not folder.is_dir():
        return _cached_weights(path, encoding, options)
    if not (folder / CONFIG_NAME).is_file() and not any(folder.glob("*.safetensors*")):
        return []
    try:
        # what is pruned is safetensors, and its index leads nowhere else
        return [folder / name for name in find_shards(folder).files]
    except FileNotFoundError:
        if (folder / CONFIG_NAME).is_file():
            raise
        return []


def file_bytes(path: str, options: Mapping[str, Any]) -> int | None:
    """Bytes of the files that the weights at `path` are in; `None` where they are not safetensors, or another file."""
    path, options = located(path, dict(options))
    folder = Path(path, options.get("subfolder") or "")
    if options.keys() & set(_OTHER_WEIGHTS) or (folder.is_dir() and is_adapter(folder)):
        return None
    files = weight_files(path, folder, stated_in(path, folder, options), options)
    return sum(file.stat().st_size for file in files) or None


def _cached_weights(path: str, encoding: Encoding, options: Mapping[str, Any]) -> list[Path]:
    """The weights of a Hub model, in the cache; what is not there yet is downloaded, as for loading it."""
    single = _cached(path, f"{encoding.stem}.safetensors", options)
    if single is not None:
        return [single]
    index = _cached(path, index_name(encoding.stem), options)
    names = () if index is None else index_files(read_json(index), index)
    files = [_cached(path, name, options) for name in names]
    if None in files:
        raise FileNotFoundError(f"{path} lacks {names[files.index(None)]}, which its index names.")
    return files


def _cached(path: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """A file of a Hub model, in the cache; `None` where it has no such file."""
    return hub_file(path, name, **{option: options[option] for option in _FILE_OPTIONS if option in options})


def load_tokenizer(source: Any, required: bool = False, **kwargs) -> Any:
    """`source` itself if it is a tokenizer; else the one at that path or Hub id, `None` if there is none.

    Args:
        required (`bool`, defaults to `False`): raise where there is none.

    Raises:
        ValueError: a file of it is a link out of its folder, which would be saved with it.
        ValueError: there is none, and one is required.
    """
    if source is None or not isinstance(source, (str, Path)):
        return source
    source = str(source)
    if is_gguf(source):
        source, kwargs = located(source, kwargs)
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    folder = Path(source, kwargs.get("subfolder") or "")
    if folder.is_dir():
        check_read_files(folder)
    if kwargs.get("gguf_file") and not (
        (folder / "tokenizer.json").is_file() if folder.is_dir() else _cached(source, "tokenizer.json", shared)
    ):
        # The tokenizer beside a GGUF is the model's own; the one in it is made again from its tables.
        shared["gguf_file"] = kwargs["gguf_file"]
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **shared})
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        # A tokenizer that is there and broken is none that is missing.
        if required or any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            why = " ".join(str(error).split())
            raise ValueError(f"No tokenizer can be loaded from {source!r}: {why:.300}") from error
        lost = (
            any(is_part(path.name, TOKENIZER) for path in folder.iterdir())
            if folder.is_dir()
            else _cached(source, "tokenizer_config.json", shared) is not None
        )
        said = one_line(" ".join(str(error).split()))
        if lost:
            logger.warning("The tokenizer of %s is not loaded, and its files are kept as they are: %s", source, said)
        else:
            logger.info("No tokenizer at %s: %s", source, said)
        return None


def find_description(path: str, **kwargs) -> Description | None:
    """The content of the `dsa_config.json` beside the model at a path or Hub id; `None` where nothing was pruned.

    Raises:
        DescriptionError: it does not follow its schema.
    """
    if Path(path).is_dir():
        found = Path(path, kwargs.get("subfolder") or "", CONFIG_NAME)
        return read_description(found) if found.is_file() else None
    found = _cached(path, CONFIG_NAME, kwargs)
    return None if found is None else read_description(found)


def find_commit(path: str, **kwargs) -> str | None:
    """The commit of the model at a Hub id; `None` for a folder, or where it is not known."""
    names = (kwargs["gguf_file"],) if kwargs.get("gguf_file") else ("config.json", ADAPTER_CONFIG)
    return hub_commit(path, names, **{name: kwargs[name] for name in _FILE_OPTIONS if name in kwargs})


def local_folder(path: str, revision: str | None = None) -> Path:
    """`path` if it is a folder; else a folder with the files of that Hub model, in the cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(path, revision=revision, ignore_patterns=["*/*", *_NO_WEIGHTS])
        )
    except (huggingface_hub.errors.HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{path} is neither a folder nor a model that the Hub gives: {error}") from None
    # what lies in folders of it, such as the modules behind an embedder, comes into the same snapshot
    find_base_files(path, revision=revision)
    return folder
