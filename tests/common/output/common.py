"""Small folders, written and read, and a writer that is killed."""

import sys
import textwrap

from optimum_dsa.common.manifest import MANIFEST
from optimum_dsa.common.output import OutputFolder


def fill(**files):
    """What fills a folder with files of this content; `__` in a name is a folder's end."""

    def into(folder):
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return into


def write(path, names=None, **files):
    with OutputFolder(path, names) as output:
        output.write(fill(**files))


def content(folder):
    """Every file under `folder` but manifests, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def python(code, *arguments):
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


# writes a folder, and is killed at a moment: while it is filled, or before a call of os.rename or os.replace
KILLED = """
    import os, signal, sys
    from pathlib import Path
    from optimum_dsa.common import output as module

    path, moment, place = sys.argv[1:]
    def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
    def before(name):
        real = getattr(module.os, name)
        calls = []
        def call(*arguments, **options):
            if moment == f"{name} {len(calls)}" and working:
                kill()
            if working:
                calls.append(name)
            elif name == "rename" and place == "in place" and Path(path) in arguments:
                raise OSError(16, "Device or resource busy")
            return real(*arguments, **options)
        setattr(module.os, name, call)
    working = False
    before("rename")
    before("replace")
    with module.OutputFolder(path) as output:
        def fill(folder):
            (folder / "config").write_text("new")
            if moment == "filling": kill()
            (folder / "weights").write_text("new")
        working = True
        output.write(fill)
"""
