"""What was written into a folder, so that it is recognised before anything of it is replaced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import read_json, write_text


MANIFEST = "dsa_manifest.json"
VERSION = 1

Stamp = tuple[int, int, int]  # inode, bytes, nanoseconds of the last change: another one means another content


def files_in(folder: Path) -> list[str]:
    """Every file and link under `folder`, as paths relative to it; a link to a folder is one file."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def stamp(path: Path) -> Stamp:
    """What tells a file from the one that it was, without reading it."""
    # Of a link the link itself, which is what would be replaced.
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of the named files."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in names}


def write_manifest(folder: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest of `folder`."""
    write_text(folder / MANIFEST, json.dumps({"format_version": VERSION, "files": dict(files)}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The entries in `folder`'s manifest; none where it has none, or one that cannot be read: then nothing is ours."""
    try:
        data = read_json(folder / MANIFEST)
    except (ValueError, OSError):
        return {}
    files = data.get("files") if isinstance(data, dict) and data.get("format_version") == VERSION else None
    return files if isinstance(files, dict) else {}


def recognised(folder: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """Those of the named files that are, bit for bit, what the manifest says was written; the manifest is one."""
    known = read_manifest(folder)
    found = {}
    for name in names:
        path, entry = folder / name, known.get(name)
        if path.is_symlink() or not path.is_file():
            continue
        # Before it is read: what changes while it is hashed has another stamp afterwards.
        before = stamp(path)
        if name == MANIFEST:
            ours = bool(known)
        else:
            ours = isinstance(entry, dict) and entry.get("size") == before[1] and entry.get("sha256") == digest(path)
        if ours:
            found[name] = before
    return found


def recognised_by(result: Path, folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the named files in `folder` that came from `result`, whose manifest names them."""
    known = read_manifest(result)
    return {name for name in names if name in known and entries(folder, [name])[name] == known[name]}


def record(path: Path) -> None:
    """Add the file at `path` to its folder's manifest, where there is one."""
    known = read_manifest(path.parent)
    if known:
        write_manifest(path.parent, known | entries(path.parent, [path.name]))
