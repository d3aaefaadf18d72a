"""What is touched of dependencies beyond their documented API stands in one module, guarded and listed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import optimum_dsa
from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.common import fences
from optimum_dsa.common.fence_rows import FENCES, DependencyError

from ..test_commands import run
from ..tiny import tiny_llama


ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "optimum_dsa").rglob("*.py") if path.name != "fences.py")
PRIVATE = re.compile(r"_[A-Za-z]\w*$")
# names without an underscore that no documentation of their package has
UNDOCUMENTED = {"all_tied_weights_keys", "callback_handler", "hf_device_map", "place_submodules", "weights_map"}
UNDOCUMENTED |= {"save_folder", "__bases__", "__subclasses__"}
# functions and methods that are given a name as text
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "get", "pop", "setdefault", "attrgetter", "methodcaller"}


def own_names(trees) -> set[str]:
    """Every private name that this package itself gives to a function, a class, a variable or an attribute."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def foreign_names(tree: ast.AST, own: set[str]) -> set[str]:
    """Names in `tree` that reach into a package beyond what it documents."""
    found: set[str] = set()
    for node in ast.walk(tree):
        constants = []
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.name for alias in node.names} | set((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            constants = node.args
        elif isinstance(node, ast.Compare):
            constants = [node.left]
        elif isinstance(node, ast.Subscript):
            constants = [node.slice]
        found |= {constant.value for constant in constants if isinstance(constant, ast.Constant)}
    names = {name for name in found if isinstance(name, str)}
    return {name for name in names if PRIVATE.match(name) and name not in own} | names & UNDOCUMENTED


def test_no_module_but_the_fence_reaches_into_a_dependency():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    assert len(trees) > 80
    own = own_names(trees.values())
    offences = {str(path.relative_to(ROOT)): names for path in trees if (names := foreign_names(trees[path], own))}
    assert not offences, f"move these into optimum_dsa/common/fences.py, with a row each: {offences}"


@pytest.mark.parametrize(
    "code,name",
    [
        ("tensor._version", "_version"),
        ("tensor._version = 3", "_version"),
        ("getattr(module, '_hf_hook', None)", "_hf_hook"),
        ("vars(module)['_old_forward']", "_old_forward"),
        ("vars(module).pop('_old_forward', None)", "_old_forward"),
        ("'_old_forward' in vars(module)", "_old_forward"),
        ("cached_file(path, _raise_exceptions_for_gated_repo=False)", "_raise_exceptions_for_gated_repo"),
        ("from transformers.modeling_utils import _get_device_map", "_get_device_map"),
        ("import huggingface_hub._commit_api", "_commit_api"),
        ("model.hf_device_map", "hf_device_map"),
        ("getattr(model, 'all_tied_weights_keys', None)", "all_tied_weights_keys"),
        ("AcceleratorState._shared_state.get(plugin)", "_shared_state"),
        ("self._check_forward_args(x)", "_check_forward_args"),
        ("Error.__bases__[0]", "__bases__"),
    ],
)
def test_the_search_finds_every_way_in(code, name):
    assert foreign_names(ast.parse(code), {"_mine"}) == {name}
    assert not foreign_names(ast.parse("self._mine; x._mine(); getattr(x, '_mine'); config.name_or_path"), {"_mine"})


def classes():
    """Every class of the package."""
    for found in pkgutil.walk_packages(optimum_dsa.__path__, "optimum_dsa."):
        if found.name.endswith("_kernel") and not importlib.util.find_spec("triton"):
            continue  # it has functions alone
        if found.name.endswith("kernels.setup"):
            continue  # it builds another distribution, and needs what builds
        if ".register" not in found.name and not found.name.startswith("optimum_dsa.tiny_llama"):
            module = importlib.import_module(found.name)
            yield from (cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == found.name)


def test_private_methods_that_are_overridden_are_listed():
    listed = " ".join(fence.touched for fence in FENCES.values())
    overridden = {
        f"{cls.__name__}.{name}"
        for cls in classes()
        for base in cls.__mro__[1:]
        if not base.__module__.startswith(("optimum_dsa", "builtins", "typing", "enum", "abc"))
        for name in vars(cls).keys() & vars(base).keys()
        if PRIVATE.match(name) and not name.startswith("_abc_") and inspect.isroutine(getattr(cls, name))
    }
    assert "DSAQuantizer._process_model_after_weight_loading" in overridden
    assert not {name for name in overridden if name.partition(".")[2] not in listed}


def test_every_row_names_a_module_that_uses_it_and_a_contract_test():
    assert len({(fence.package, fence.touched) for fence in FENCES.values()}) == len(FENCES)
    for fence in FENCES.values():
        for module in fence.where.split(", "):
            path = ROOT / "optimum_dsa" / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module
        assert "pytest.mark.contract" in (ROOT / fence.test).read_text(encoding="utf-8"), fence.test
        assert fence.package in str(fence.missing()) and fence.touched in str(fence.missing())


def hooked(**attributes):
    """A module with a hook that lacks everything but the attributes."""
    from accelerate.hooks import AlignDevicesHook

    hook = AlignDevicesHook.__new__(AlignDevicesHook)
    vars(hook).update(attributes)
    module = nn.Linear(2, 2)
    module._hf_hook = hook
    return module


class Renamed(nn.Module):
    """A model of a release that calls its ties differently."""

    def tie_weights(self):
        pass


@pytest.mark.parametrize(
    "touch,message",
    [
        (lambda: fences.tensor_version(object()), "torch .* has no Tensor._version"),
        (lambda: fences.parameters_in(object()), "torch .* has no Module._parameters"),
        (lambda: fences.hooks_of(hooked(offload=True)), "accelerate .* has no AlignDevicesHook.offload"),
        (lambda: fences.innermost_forward(hooked()), "accelerate .* has no _old_forward"),
        (lambda: fences.in_memory(object()), "accelerate .* has no OffloadedWeightsLoader.state_dict"),
        (lambda: fences.point_to(object(), "a", Path("b"), "float32"), "accelerate .* has no OffloadedWeightsLoader"),
        (lambda: fences.scratch_folder(SimpleNamespace()), "accelerate .* has no OffloadedWeightsLoader"),
        (lambda: fences.plain_store(SimpleNamespace(prefix="a."), "b"), "accelerate .* has no OffloadedWeightsLoader"),
        (lambda: fences.tied_names(Renamed()), "transformers .* has no PreTrainedModel.all_tied_weights_keys"),
        (lambda: fences.check_adapter_arguments(object(), torch.zeros(1)), "peft .* has no tuners.lora"),
    ],
)
def test_a_release_without_it_is_an_error_that_says_so(touch, message):
    with pytest.raises(DependencyError, match=message) as raised:
        touch()
    assert "constraints.txt" in str(raised.value)


def test_a_plain_module_has_no_ties_and_no_hooks():
    module = nn.Linear(2, 2)
    assert fences.tied_names(module) == {} and fences.hooks_of(module) == []
    assert fences.innermost_forward(module) == "forward"


def test_weights_that_nobody_knows_the_place_of_are_an_error():
    from optimum_dsa.model.offload import resident

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with resident(model, ["0"]):
        pass
    with pytest.raises(DependencyError, match="weights of 1 are on the device 'meta'"), resident(model, ["1"]):
        pass


def test_a_scratch_folder_lives_as_long_as_its_store(tmp_path):
    class Store:
        save_folder = tmp_path

    store, other = Store(), Store()
    folder = Path(fences.scratch_folder(store))
    assert fences.scratch_folder(store) == str(folder) != fences.scratch_folder(other)
    assert folder.is_dir() and folder.parent == tmp_path
    del store
    assert not folder.exists()


def test_a_trainer_without_a_list_of_callbacks_gets_it_as_usual():
    added = []
    fences.insert_callback(SimpleNamespace(add_callback=added.append), "callback")
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=["reporter"]))
    fences.insert_callback(trainer, "callback")
    assert added == ["callback"] and trainer.callback_handler.callbacks == ["callback", "reporter"]


@pytest.mark.contract
def test_a_release_that_cannot_load_compressed_checkpoints_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    pruner = DSAPruner(tiny_llama(hidden_size=64))
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out", compressed=True)
    monkeypatch.delattr(HfQuantizer, "get_new_dtype", raising=False)
    message = r"load with transformers 5\.21 or newer .* and this is .*, without .*get_new_dtype; .*--to dense`\.$"
    with pytest.raises(DependencyError, match=message) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "\n" not in str(raised.value)
    code, output, errors = run(monkeypatch, capsys, "verify", str(tmp_path / "out"))
    assert code == 2 and re.search(message, errors.strip().splitlines()[-1])
