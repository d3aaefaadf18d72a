"""One file of a model on the Hub."""

from __future__ import annotations

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


def hub_commit(repo_id: str, **options) -> str | None:
    """The commit that a model on the Hub is read from, as the cache's folder of it says; `None` for a local one."""
    if Path(repo_id).is_dir():
        return None
    found = hub_file(repo_id, "config.json", **options)
    parts = found.parts if found else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


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
