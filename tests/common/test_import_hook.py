import importlib.util
import sys

import pytest

from optimum_dsa.common.import_hook import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that can be imported, and is not yet."""
    (tmp_path / "some_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    yield "some_module"
    sys.modules.pop("some_module", None)


def test_the_action_follows_the_import_once(module):
    seen = []
    after_import(module, lambda: seen.append(sys.modules[module].value))
    finders = len(sys.meta_path)
    assert seen == []
    importlib.import_module(module)
    assert seen == [1] and len(sys.meta_path) == finders - 1
    importlib.reload(sys.modules[module])
    del sys.modules[module]
    importlib.import_module(module)
    assert seen == [1]


def test_asking_whether_there_is_one_is_no_import(module):
    """transformers asks for peft so, before it or anybody imports it."""
    seen = []
    after_import(module, lambda: seen.append(1))
    for _ in range(2):
        assert importlib.util.find_spec(module) is not None and seen == []
    importlib.import_module(module)
    assert seen == [1]


def test_what_is_imported_already_is_followed_at_once():
    seen = []
    after_import("json", lambda: seen.append(1))
    assert seen == [1]


def test_an_action_that_fails_does_not_break_the_import(module, caplog):
    after_import(module, lambda: 1 / 0)
    assert importlib.import_module(module).value == 1
    assert "What should follow the import of some_module failed" in caplog.text


def test_a_module_that_is_not_there_is_still_not_there(module):
    after_import("no_such_module", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")


def test_registering_twice_changes_nothing():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from optimum_dsa.checkpoint.transformers_loader import DSAQuantizer, register

    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["optimum-dsa"] is DSAQuantizer
