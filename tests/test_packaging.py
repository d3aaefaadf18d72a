import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import optimum_dsa


ROOT = Path(optimum_dsa.__file__).resolve().parent.parent
REGISTER = "optimum/commands/register/register_dsa.py"
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy")


def python(code, path=None, folder=None):
    """What `code` prints; with `path`, in place of an editable install (-S: its path hooks are not loaded)."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = []
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [*path, sysconfig.get_path("purelib")]))
        options = ["-S"]
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cli(path=None, folder=None, after="pass"):
    """Output of `optimum-cli --help`, and of `after` in the same process."""
    code = f"""
import sys
sys.argv = ["optimum-cli", "--help"]
from optimum.commands.optimum_cli import main
try:
    main()
except SystemExit:
    {after}
"""
    return python(code, path, folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked as pip would install it."""
    if not (ROOT / "setup.cfg").is_file():
        pytest.skip("only in a checkout")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (built,) = folder.glob("optimum_dsa-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.contract
def test_the_command_is_registered_where_this_is_installed():
    assert "Prune transformers models" in " ".join(cli().split())


def test_the_wheel_brings_the_command_the_model_and_no_init_in_the_namespace(wheel):
    names = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert REGISTER in names
    assert {"optimum/__init__.py", "optimum/commands/__init__.py"}.isdisjoint(names)
    assert {"optimum_dsa/checkpoint/dsa_config.schema.json", "optimum_dsa/py.typed"} <= names
    assert {"optimum_dsa/tiny_llama/model.safetensors", "optimum_dsa/tiny_llama/training.json"} <= names
    assert not any(name.startswith("tests/") for name in names)
    packaged = {name for name in names if name.startswith("optimum_dsa/") and name.endswith(".py")}
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "optimum_dsa").rglob("*.py")
        if not {"register", "namespace"} & set(path.parts)
    }
    assert packaged == source


def test_the_wheel_works_beside_another_plugin(wheel, tmp_path):
    other = tmp_path / "other" / "optimum" / "commands" / "register"
    other.mkdir(parents=True)
    (other / "register_other.py").write_text(
        "from optimum.commands.base import BaseOptimumCLICommand, CommandInfo\n"
        "class Other(BaseOptimumCLICommand):\n"
        "    COMMAND = CommandInfo('other', 'Another plugin.')\n"
        "REGISTER_COMMANDS = [Other]\n"
    )
    output = cli([wheel, tmp_path / "other"], tmp_path, after="import optimum_dsa; print(optimum_dsa.__file__)")
    assert "Prune transformers models" in " ".join(output.split()) and "Another plugin." in output
    assert output.splitlines()[-1] == str(wheel / "optimum_dsa" / "__init__.py")


def test_it_is_in_the_namespace_of_optimum_beside_optimum_and_another_plugin(wheel, tmp_path):
    """As `from optimum.intel import ...` and `from optimum.quanto import ...` are."""
    other = tmp_path / "other" / "optimum" / "other"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("name = 'another plugin'\n")
    code = (
        "import sys; from optimum.dsa import DSAConfig; import optimum.dsa, optimum.other, optimum.commands.base; "
        "import optimum_dsa; assert DSAConfig is optimum_dsa.DSAConfig; assert 'DSAPruner' in dir(optimum.dsa); "
        "assert not hasattr(optimum.dsa, 'DSAPrune'); print(optimum.other.name, optimum.dsa.__version__)"
    )
    output = python(code, [wheel, tmp_path / "other"], tmp_path)
    assert output.strip() == f"another plugin {optimum_dsa.__version__}"


def test_the_wheel_finds_its_own_model(wheel, tmp_path):
    output = python("from optimum_dsa.commands.embedded import demo_model; print(demo_model())", [wheel], tmp_path)
    assert output.strip() == str(wheel / "optimum_dsa" / "tiny_llama")


def test_help_imports_nothing_heavy():
    output = cli(after=f"print([m for m in sys.modules if m in {HEAVY!r}])")
    assert output.splitlines()[-1] == "[]"


def test_public_names_are_lazy_and_all_there():
    output = python(
        f"import sys, optimum_dsa; print([m for m in sys.modules if m in {HEAVY!r}]); print(dir(optimum_dsa))"
    )
    assert output.splitlines()[0] == "[]"
    for name in optimum_dsa.__all__:
        assert getattr(optimum_dsa, name) is not None and name in output
    with pytest.raises(AttributeError, match="no attribute 'DSAPrune'"):
        optimum_dsa.DSAPrune  # noqa: B018


def test_dependencies_have_lower_bounds():
    for requirement in importlib.metadata.requires("optimum-dsa"):
        assert ">=" in requirement or "==" in requirement, requirement
    assert importlib.metadata.version("optimum-dsa") == optimum_dsa.__version__
