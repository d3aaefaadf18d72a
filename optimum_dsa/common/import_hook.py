"""Something to do when a module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


logger = logging.getLogger(__name__)


def after_import(module: str, action: Callable[[], None]) -> None:
    """Run `action` now if `module` is imported already, and right after it is imported otherwise."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(module, action))


class _Finder(MetaPathFinder):
    """Leaves the finding to all others, and has the module that they find followed by an action. Works once.

    It stays until the module is really imported: whoever only asks whether there is one calls `find_spec` too.
    """

    def __init__(self, module: str, action: Callable[[], None]):
        self._module = module
        self._action = action
        self._asking = False  # the others, of whom this is one

    def find_spec(self, name, path=None, target=None):
        if name != self._module or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                try:
                    self._action()
                except Exception:  # whoever imports that module is not to suffer
                    logger.warning("What should follow the import of %s failed.", name, exc_info=True)

            spec.loader.exec_module = execute_and_act
        return spec
