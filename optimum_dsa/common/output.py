"""The folder that a command writes: the only code that locks, writes a manifest, swaps and deletes.

Beside an output `out` there are, while it is written, `.out.dsa-lock` and `.out.dsa-work`:

| in the work folder | content                                                                                      |
|--------------------|----------------------------------------------------------------------------------------------|
| `work.json`        | the mark by which the folder is known to be ours                                             |
| `result/`          | what will be `out`; whole as soon as it holds a manifest                                     |
| `old/`             | what `out` was, for an instant                                                               |
| anything else      | what a run that can be resumed keeps (`OutputFolder.scratch`)                                |

Where `out` cannot be renamed (a mount point, a parent that may not be written), the work folder is `out/.dsa-work`,
and the files change places one by one. A process that is killed leaves what the next call on `out` brings to an end: a
whole result is put in place, half of one is removed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .files import free_name, remove_empty, umask, write_text
from .lock import OutputBusyError, OutputLock
from .manifest import (
    MANIFEST,
    Stamp,
    entries,
    files_in,
    read_manifest,
    recognised,
    recognised_by,
    stamp,
    write_manifest,
)


logger = logging.getLogger(__name__)

MARK = "work.json"
WORK = "dsa-work"
LOCK = "dsa-lock"
WRITING = (OSError, SafetensorError)  # what is raised where a disk does not take what is written


class OutputError(OSError):
    """An output cannot be written; what was to be in it is not lost."""


class ForeignFileError(FileExistsError):
    """An output holds what optimum-dsa did not write, or not so."""


class OutputFolder:
    """A folder to write, whole or not at all.

    ```python
    with OutputFolder("out") as output:  # refused here, before work, where it must not or cannot be written
        output.write(lambda folder: model.save_pretrained(folder))
    ```

    It is replaced only where everything in it was written by this class and is unchanged, as its manifest tells. With
    `names`, these files are added to what is there, and those of them that are there must be ours.

    Args:
        path (`str | Path`): the folder; of a link, the folder that it leads to is written and the link stays.
        names (`Sequence[str]`, *optional*): the only files that will be written.
        resume (`bool`, defaults to `False`): keep what an interrupted run left to go on with. Otherwise such a rest is
            an error, as it may be hours of work.
        kept (`Sequence[str]`): files in the folder that `write` will bring along, bit for bit. Those that are not ours
            stay so.

    Raises:
        OutputBusyError: another process writes it.
        ForeignFileError: it holds what must not be replaced.
        OutputError: it cannot be written.
        ValueError: it has no name.
    """

    def __init__(
        self, path: str | Path, names: Sequence[str] | None = None, resume: bool = False, kept: Sequence[str] = ()
    ):
        if not str(path):
            raise ValueError("The output has no name; name a folder to write.")
        self.shown = Path(path)
        self.path = Path(os.path.realpath(path))
        self.names, self.resume, self.kept = names, resume, kept
        self.work: Path | None = None
        self._lock: OutputLock | None = None
        self._known: dict[str, Stamp] = {}
        self._foreign: set[str] = set()
        self.done = False  # whether the result is in place
        self._made = False

    # -- before work

    def begin(self) -> OutputFolder:
        """Lock the folder and make sure that it can be written. Entering the context is the same."""
        try:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = self._locked()
                # looked at only now: whoever held the lock may have been changing folders
                if self.path.exists() and not self.path.is_dir():
                    raise ForeignFileError(
                        f"{self.shown} is a file, and a folder is to be written; choose another path."
                    )
                if self.names is not None and not self.path.exists():
                    self.path.mkdir()
                    self._made = True
                self.work = self._work_folder()
            except (OutputBusyError, ForeignFileError):
                raise
            except OSError as error:
                raise OutputError(f"{self.shown} cannot be written: {error}; choose another path.") from None
            self._end_earlier_run()
            self._known = self._check()
            self.result.mkdir(exist_ok=True)
            self.result.chmod(0o777 & ~umask())
        except BaseException:
            self._leave()
            raise
        return self

    @property
    def result(self) -> Path:
        """The folder that is filled."""
        return self.work / "result"

    def scratch(self, name: str) -> Path:
        """A folder for what a later run needs to go on; it goes when the result is in place, or if it stays empty."""
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        return folder

    def require(self, size: int) -> None:
        """Raise `OSError` where the disk has no room for `size` bytes more."""
        if size > (free := self.free):
            raise OutputError(
                f"{self.shown} needs {size:,} bytes, and {free:,} are free there; make room, or choose another path."
            )

    @property
    def free(self) -> int:
        """Bytes that the disk has room for."""
        return shutil.disk_usage(self.work).free

    def carry(self, base: Path, names: Iterable[str], folder: Path) -> None:
        """Put the named files of `base` into `folder`: linked where they only change places, copied otherwise."""
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if base.resolve() == self.path:
                with suppress(OSError):
                    # A hard link takes no room and no time; a copy where the file system has none.
                    os.link(base / name, target, follow_symlinks=False)
                    continue
            shutil.copy2(base / name, target)

    # -- after work

    def write(self, fill: Callable[[Path], object], rescue: bool = True) -> None:
        """Have `fill` fill the result and put it in place.

        Where it cannot be written after all, the result goes somewhere safe (with `rescue`), and the error says where.
        """
        try:
            fill(self.result)
            self._complete(self.result)
        except WRITING as error:
            safe = self._elsewhere(fill) if rescue else None
            if safe is None:
                raise
            raise OutputError(
                f"{self.shown} could not be written ({error}). The result is whole in {safe}."
            ) from error
        try:
            self._swap()
        except OSError as error:
            self.done = True  # so that the only copy stays
            raise OutputError(
                f"{self.shown} could not be replaced ({error}). The result is whole in {self.result}."
            ) from error
        self.done = True
        self._remove(self.work)

    def __enter__(self) -> OutputFolder:
        return self.begin()

    def __exit__(self, kind, error, traceback) -> None:
        if not self.done:
            self._remove(self.result)
        self._leave()

    # -- how

    def _locked(self) -> OutputLock:
        try:
            return OutputLock(self.path.with_name(f".{self.path.name}.{LOCK}"), self.shown)
        except OutputBusyError:
            raise
        except OSError:
            if not self.path.is_dir():
                raise
            return OutputLock(self.path / f".{LOCK}", self.shown)

    def _work_folder(self) -> Path:
        """Beside the folder, or in it where the folder cannot be renamed; made, and marked as ours."""
        beside, inside = self.path.with_name(f".{self.path.name}.{WORK}"), self.path / f".{WORK}"
        if self.names is not None or inside.is_dir():
            return _marked(inside)
        try:
            work = _marked(beside)
            if self.path.exists():
                probe = work / "probe"
                # Tried, not asked: rights do not tell of mount points.
                os.rename(self.path, probe)
                os.rename(probe, self.path)
            return work
        except ForeignFileError:
            raise
        except OSError:
            if not self.path.is_dir():
                raise
            if beside.is_dir() and sorted(file.name for file in beside.iterdir()) == [MARK]:
                self._remove(beside)
            return _marked(inside)

    @property
    def _in_place(self) -> bool:
        """Whether files change places one by one."""
        return self.work.parent == self.path

    def _end_earlier_run(self) -> None:
        """Bring to an end what a killed process left."""
        for name in ("probe", "old"):
            left = self.work / name
            if left.is_dir() and not self.path.exists():
                os.rename(left, self.path)
        if (self.result / MANIFEST).is_file():
            names = files_in(self.path) if self.path.is_dir() else []
            self._known = recognised(self.path, names)
            ours = self._known.keys() | recognised_by(self.result, self.path, names)
            foreign = [name for name in names if name not in ours and not self._is_own(name)]
            if foreign and self.names is None:
                raise ForeignFileError(
                    f"{self.result} holds the result of an earlier run, which could not replace {self.shown} because "
                    f"of {foreign[0]} in it; move the one or the other away."
                )
            self._swap()
            # What it could have been made from once more is of no use but to who asks to go on.
            for rest in self._rests() if not self.resume else ():
                self._remove(rest)
        for name in ("result", "old"):
            self._remove(self.work / name)
        rests = sorted(path.name for path in self._rests())
        if rests and not self.resume:
            raise ForeignFileError(
                f"An interrupted run left {rests[0]} in {self.work}; resume it, or remove that folder to begin anew."
            )

    def _rests(self) -> list[Path]:
        """What a run kept to go on from (`scratch`); folders of it in which nothing is are removed."""
        found = [path for path in self.work.iterdir() if path.name not in (MARK, "result", "old")]
        for path in found:
            remove_empty(path)
        return [path for path in found if path.exists()]

    def _check(self) -> dict[str, Stamp]:
        """What will be replaced; `ForeignFileError` for anything that must not be."""
        if not self.path.is_dir():
            return {}
        names = [name for name in files_in(self.path) if not self._is_own(name)]
        if self.names is not None:
            names = [name for name in names if name in self.names or name == MANIFEST]
        found = recognised(self.path, names)
        self._foreign = {name for name in names if name in self.kept and name not in found}
        found |= {name: stamp(self.path / name) for name in self._foreign}
        for name in names:
            if name not in found and not (name == MANIFEST and self.names is not None):
                why = "which was not written by optimum-dsa"
                if name in read_manifest(self.path):
                    why = "which was changed after optimum-dsa wrote it"
                elif not read_manifest(self.path):
                    why += f" (no {MANIFEST} in it says so)"
                raise ForeignFileError(
                    f"{self.shown} exists and holds {name}, {why}; move it away or choose another path."
                )
        return found

    def _is_own(self, name: str) -> bool:
        return name == f".{LOCK}" or name.startswith(f".{WORK}/")

    def _complete(self, folder: Path) -> None:
        """Rights as the user's other files have, and the manifest."""
        for file in folder.rglob("*"):  # some writers make files that only their owner may read
            if not file.is_symlink():
                file.chmod((0o777 if file.is_dir() else 0o666) & ~umask())
        names = [name for name in files_in(folder) if name != MANIFEST and name not in self._foreign]
        if self.names is not None and (odd := [name for name in names if name not in self.names]):
            raise ValueError(f"{odd[0]} was written, which was not announced: {', '.join(self.names)}.")
        earlier = read_manifest(self.path) if self.names is not None else {}
        write_manifest(folder, earlier | entries(folder, [name for name in names if not (folder / name).is_symlink()]))

    def _swap(self) -> None:
        """Put a complete result in place, and remove what it replaces."""
        if not self._in_place:
            old = self.work / "old"
            if self.path.exists():
                os.rename(self.path, old)
            os.rename(self.result, self.path)
            self._remove_known(old)
            return
        # the manifest last: until then the next call goes on here; and no configuration before its weights
        new = sorted(files_in(self.result), key=lambda name: (name == MANIFEST, name == "config.json", name))
        for name in new if self.names is not None else {*new, *self._known}:
            self._make_way(self.path / name, self._known.get(name))
        for name in new:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.result / name, self.path / name)

    def _make_way(self, file: Path, known: Stamp | None) -> None:
        """Remove a file that is known, and the folders that it leaves empty; set another one aside."""
        if not os.path.lexists(file):
            return
        if stamp(file) != known:
            os.rename(file, aside := free_name(file))
            logger.warning(
                "%s was not there, or another, when work on %s began; it is %s now.", file, self.shown, aside
            )
            return
        file.unlink()
        for folder in file.parents:
            if folder == self.path or any(folder.iterdir()):
                break
            folder.rmdir()

    def _remove_known(self, old: Path) -> None:
        """Remove what was replaced; what appeared or changed there in the meantime is set aside."""
        if not old.is_dir():
            return
        for name, known in self._known.items():
            if (old / name).exists() and stamp(old / name) == known:
                (old / name).unlink()
        remove_empty(old)
        if old.exists():
            os.rename(old, aside := free_name(self.path))
            logger.warning("Files that were put into %s while it was written are in %s.", self.shown, aside)

    def _elsewhere(self, fill: Callable[[Path], object]) -> Path | None:
        """A folder of another place that `fill` could fill; `None` where none could be."""
        places = {self.path.parent, Path.cwd(), Path.home(), Path(tempfile.gettempdir())}
        # The most room first: a full disk is what mostly happens.
        for place in sorted(filter(Path.is_dir, places), key=lambda place: -shutil.disk_usage(place).free):
            safe = None
            try:
                safe = Path(tempfile.mkdtemp(dir=place, prefix=f"{self.path.name}-rescued-"))
                fill(safe)
                self._complete(safe)
                return safe
            except WRITING:
                logger.info("Nor could it be written to %s.", place, exc_info=True)
                if safe is not None:
                    self._remove(safe)
        return None

    def _leave(self) -> None:
        """Let others in; a work folder in which there is something to go on with stays."""
        there = self.work is not None and self.work.is_dir() and not self._rests()
        if there and [file.name for file in self.work.iterdir()] == [MARK]:
            self._remove(self.work)
        if self._lock is not None:
            self._lock.release()
        if self._made and not self.done:
            with suppress(OSError):
                self.path.rmdir()

    @staticmethod
    def _remove(folder: Path) -> None:
        """Remove a folder that this class made."""
        shutil.rmtree(folder, ignore_errors=True)


def _marked(work: Path) -> Path:
    """A work folder, made where it is missing; `ForeignFileError` for one that is not ours."""
    if work.is_dir() and any(work.iterdir()) and not (work / MARK).is_file():
        raise ForeignFileError(f"{work} is where optimum-dsa works, and was not made by it; move it away.")
    work.mkdir(exist_ok=True)
    write_text(work / MARK, json.dumps({"made_by": "optimum-dsa"}) + "\n")
    return work
