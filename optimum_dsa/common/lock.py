"""One writer per output, across processes and machines that share its file system."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


class OutputBusyError(OSError):
    """Another process writes this output."""


class OutputLock:
    """A lock file that is there while it is held, and freed by the system when its process dies.

    Raises:
        OutputBusyError: another process, or another output of this one, holds it.
        OSError: the file cannot be made.
    """

    def __init__(self, file: Path, shown: Path):
        while True:
            descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                lock = FileLock(file, timeout=0)
                try:
                    lock.acquire()
                except Timeout:
                    raise OutputBusyError(
                        f"{shown} is being written by another process (it holds {file}); wait for it, or choose "
                        "another path."
                    ) from None
                # the one who held it before may have removed the file after we opened it: then ours locks nothing
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                        break
                lock.release()
            finally:
                os.close(descriptor)
        self._file, self._lock = file, lock

    def release(self) -> None:
        """Remove the file and let others in; a second call changes nothing."""
        if self._lock.is_locked:
            with suppress(OSError):  # a system that keeps open files
                self._file.unlink()
            self._lock.release()
