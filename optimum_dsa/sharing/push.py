"""Pushing a pruned model to the Hub: one commit with weights, tokenizer, metadata, card and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.adapter_base import is_same_model
from ..checkpoint.description import read_description
from ..common.escaping import one_line
from ..common.fences import transport_error
from ..common.files import read_json
from ..common.folder_files import WEIGHTS
from ..common.version import VERSION
from ..pruning.configuration import CONFIG_NAME
from ..pruning.structured.described import parameters_before
from .allocation_alone import allocation_alone, files_of
from .card import base_repository, model_card
from .upload import Upload, collect, count, pictures


logger = logging.getLogger(__name__)

TRANSPORT_ERROR = transport_error()
REASONS = {
    401: "the Hub does not accept the token; log in with 'hf auth login', or give another",
    403: "the token may not write there; take one with the role 'write', or another repository",
    404: "there is no such repository or revision, or the token may not see it",
    409: "it is in conflict with what is there",
    412: "it was changed at the same moment",
    413: "a file is too large for the Hub",
    429: "too many requests; wait a while",
}


class PushError(OSError):
    """The Hub or the way there failed. What is here is whole."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    kept: str | None = None,
    base: str | None = None,
) -> str:
    """Push the pruned model in `folder`, in one commit; returns the address of the repository or pull request.

    An allocation, in a JSON file or in the folder of a search, goes alone: the file, and a card.
    An adapter goes without the pruned model under it, which has to be in a repository already, with the same zeros.

    The repository and the branch `revision` are made where they are missing. Weight files there that the model does
    not have go in the same commit. A `README.md` in the folder is taken as it is; without one a card is written. What
    arrived before a failure is not sent again.

    Args:
        folder (`str | Path`): of a pruned model; nothing in it is changed.
        repo_id (`str`): "user/name", or "name" for the token's own.
        private (`bool`, *optional*): of a repository that is made; by default what the account or organisation has
            chosen.
        revision (`str`, *optional*): branch to push to; "main" by default.
        create_pr (`bool`, defaults to `False`): open a pull request instead of pushing.
        commit_message (`str`, *optional*): by default says what was removed.
        token (`str`, *optional*): by default the one that `hf auth login` stored.
        endpoint (`str`, *optional*): of the Hub; by default `HF_ENDPOINT`.
        kept (`str`, *optional*): what an error says about where the model is; by default the folder.
        base (`str`, *optional*): of an adapter, the repository of the pruned model under it; by default the one
            that it names.

    Raises:
        PushError: the Hub refused, or the network failed.
        ValueError: `repo_id` is not one; the weights are not what `dsa_config.json` says, which is counted before
            anything is sent; or a link leads out of the folder.
        FileNotFoundError: the folder holds no pruned model.
    """
    validate_repo_id(repo_id)
    alone = allocation_alone(folder)
    upload = collect(folder, base) if alone is None else None
    if upload is not None and upload.left_out:
        logger.warning("Of %s, these files are not sent: %s.", folder, one_line(", ".join(upload.left_out)))
    kept = kept or f"{folder} is whole, and the same command goes on."
    api = HfApi(endpoint=endpoint, token=token, library_name="optimum-dsa", library_version=VERSION)
    if upload is not None and upload.base is not None:
        with explained(repo_id, kept):
            upload = _on_its_base(upload, api)
    if upload is not None:
        upload, uncounted = count(upload, folder)
    with explained(repo_id, kept):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        validate_repo_id(repo_id)  # it goes into the card's code
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        metadata = {} if upload is None else _base_metadata(api, upload)
        there = api.list_repo_files(repo_id, revision=revision)
    if upload is None:
        contents = files_of(alone, repo_id)
        if "config.json" in there:  # beside a model, whose card it is
            del contents["README.md"]
    else:
        contents = {**upload.files, **pictures(upload.outcome, repo_id.rpartition("/")[2])}
        contents.setdefault("README.md", _card(upload, repo_id, metadata, contents, uncounted))
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    # In the same commit: no reader ever meets weights of two models.
    stale = [name for name in there if upload is not None and _is_stale(name, contents)]
    operations += [CommitOperationDelete(name) for name in stale]
    message = commit_message or (f"Allocation {alone.name}" if upload is None else _message(upload))
    with explained(repo_id, kept):
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return done.pr_url or str(done.repo_url)


def push_saved(save: Callable[[Path], None], repo_id: str, **options) -> str:
    """`save` a model to a folder and push that; returns the address. `options` go to `push_folder`."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model")
        save(path)
        kept = "The model is as it was; save_pretrained keeps it, and the same call goes on."
        return push_folder(path, repo_id, kept=kept, **options)


@contextmanager
def explained(repo_id: str, kept: str) -> Iterator[None]:
    """Turns what the client raises into one sentence: what failed, why, and that nothing is lost."""
    try:
        yield
    except (HfHubHTTPError, TRANSPORT_ERROR, ConnectionError, TimeoutError, RuntimeError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        reason = "the Hub cannot be reached"
        if cause is not None:
            status = cause.response.status_code
            unknown = (
                "the Hub does not accept it" if status < 500 else "the Hub has a problem of its own; try again later"
            )
            reason = REASONS.get(status, unknown)
            said = cause.server_message or (detail if cause is error else "")
            detail = ": ".join(filter(None, [str(status), said, detail if cause is not error else ""]))
        raise PushError(f"Not pushed to {repo_id}: {reason} ({detail}). {kept}") from error


def _on_its_base(upload: Upload, api: HfApi) -> Upload:
    """An adapter's `upload` with the configuration of its base.

    Raises:
        ValueError: the base's repository does not hold the zeros that the adapter was trained on.
    """
    try:
        found = read_description(api.hf_hub_download(upload.base, CONFIG_NAME))
        model_config = read_json(api.hf_hub_download(upload.base, "config.json"))
    except LocalEntryNotFoundError:  # no answer, which is not the same as no file
        raise
    except EntryNotFoundError:
        found = None
    if found is None or not is_same_model(found, upload.outcome.facts):
        raise ValueError(
            f"{upload.base} is not the pruned model that the adapter belongs to: its {CONFIG_NAME} tells of other "
            "zeros, or there is none. Push that model there first."
        )
    return replace(upload, model_config=model_config)


def _card(
    upload: Upload, repo_id: str, base: dict[str, str], contents: Mapping[str, Path | bytes], uncounted: str
) -> bytes:
    """A card's bytes, with the pictures that are among the contents."""
    plots = {Path(name).stem: name for name in contents if name.startswith("plots/")}
    card = model_card(
        upload.outcome, repo_id, upload.model_config, base, plots, upload.files.keys(), uncounted, upload.base
    )
    return str(card).encode()


def _base_metadata(api: HfApi, upload: Upload) -> dict[str, str]:
    """Licence and language of the base model, where the Hub knows it."""
    base_id, _ = base_repository(upload.outcome.facts)
    if base_id is None:
        return {}
    try:
        card = api.model_info(base_id).card_data
    except HfHubHTTPError:
        return {}
    keys = ("license", "license_name", "license_link", "language")
    return {key: card.get(key) for key in keys} if card else {}


def _is_stale(name: str, contents: Mapping[str, Path | bytes]) -> bool:
    """Whether a file there holds weights that this model does not have: a loader might take them for its own."""
    return name not in contents and "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)


def _message(upload: Upload) -> str:
    found, outcome = upload.outcome.counted, upload.outcome
    cut = ""
    if outcome.structured:
        share = 1 - outcome.achieved["parameters"] / parameters_before(outcome.structured)
        cut = f"{share:.2%} of the parameters cut out with {outcome.structured['config']['importance']}"
    if outcome.is_only_cut:
        return cut
    cut = cut and f"{cut}, "
    by = "" if outcome.is_found else f" with {outcome.config['method']}"
    if found is None:
        return f"{cut}pruned{by}" if cut else f"Pruned{by}"
    return f"{cut}{found.removed / max(found.prunable, 1):.2%} of the prunable weights removed{by}"
