"""One file of a model on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


_REPOSITORY = re.compile(r"models--(.+)")  # the cache's name of a model's folder


def hub_commit(repo_id: str, names: Sequence[str] = ("config.json",), **options) -> str | None:
    """The commit that a model on the Hub is read from, as the cache's folder of it says; `None` for a local one.

    Args:
        names (`Sequence[str]`): files of which it has at least one.
    """
    if Path(repo_id).is_dir():
        return None
    found = next(filter(None, (hub_file(repo_id, name, **options) for name in names)), None)
    cached = snapshot_of(found) if found else None
    return cached and cached[1]


def snapshot_of(path: str | Path) -> tuple[str, str] | None:
    """Hub id and commit of the model in whose folder of the Hub's cache `path` is; `None` for any other path."""
    # Not resolved: the files there are links to where all commits keep theirs.
    parts = Path(os.path.abspath(path)).parts
    for at in range(len(parts) - 2, 0, -1):
        repository = _REPOSITORY.fullmatch(parts[at - 1])
        if repository and parts[at] == "snapshots":
            return repository[1].replace("--", "/"), parts[at + 1]
    return None


def model_name(source: str | Path) -> str:
    """What a model at a path or Hub id is called: that id; of a folder its own name.

    In the Hub's cache, where that is a commit, it is the last part of the model's id.
    """
    if not Path(source).is_dir():
        return str(source)
    cached = snapshot_of(source)
    return cached[0].rpartition("/")[2] if cached else Path(source).resolve().name


def hub_file(repo_id: str, name: str, **options) -> Path | None:
    """The file in the cache, downloaded if it is not there; `None` where the model has none, or none can be had.

    Args:
        repo_id (`str`): of the model.
        name (`str`): of the file.
        options (`dict`): `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`; as for `from_pretrained`.

    Raises:
        OSError: there is no such model or revision.
    """
    try:
        return Path(hf_hub_download(repo_id, name, **options))
    except (EntryNotFoundError, GatedRepoError):  # also: not in the cache, and the Hub cannot be asked
        return None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise OSError(f"{repo_id} is neither a folder nor a model that the Hub gives: {error}") from error
    except HfHubHTTPError:
        return None
