import importlib
import sys

import pytest

import optimum_dsa
from optimum_dsa.common.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_by_its_earlier_name_with_a_warning(old):
    sys.modules.pop(f"optimum_dsa.{old}", None)
    with pytest.warns(FutureWarning, match=f"optimum_dsa.{old} is optimum_dsa.{MOVED[old]} now"):
        found = importlib.import_module(f"optimum_dsa.{old}")
    new = importlib.import_module(f"optimum_dsa.{MOVED[old]}")
    name = next(name for name in vars(new) if not name.startswith("_"))
    assert getattr(found, name) is getattr(new, name) and found.__doc__ == new.__doc__
    with pytest.raises(AttributeError):
        _ = found.no_such_name


def test_no_earlier_name_hides_what_is_there():
    for old in MOVED:
        file = importlib.util.find_spec("optimum_dsa").submodule_search_locations[0]
        found = importlib.machinery.PathFinder.find_spec(f"optimum_dsa.{old}", [file])
        assert found is None or found.loader is None  # a folder without code may be left behind by an update
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("optimum_dsa.no_such_module")
    assert not hasattr(optimum_dsa, "no_such_module")
