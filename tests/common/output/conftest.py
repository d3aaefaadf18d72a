import os

import pytest

from optimum_dsa.common import output as module


@pytest.fixture(params=["renamed", "in place"])
def out(request, tmp_path, monkeypatch):
    """An output, also one that cannot be renamed, as a mount point cannot."""
    path = tmp_path / "out"
    if request.param == "in place":
        rename = os.rename

        def refuse(source, target):
            if path in (source, target) and not str(target).startswith(f"{path}/"):
                raise OSError(16, "Device or resource busy")
            rename(source, target)

        monkeypatch.setattr(module.os, "rename", refuse)
        path.mkdir()
    return path
