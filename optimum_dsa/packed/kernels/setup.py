"""The distribution `optimum-dsa-kernels`: one library of one platform, for any Python 3 and torch from 2.10 on."""

import re
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from compiling import compile_library  # noqa: E402


class Compiled(build_py):
    """Puts the library beside the module."""

    def run(self):
        super().run()
        compile_library(Path(self.build_lib) / "optimum_dsa_kernels" / "optimum_dsa_kernels.so")


class Wheel(bdist_wheel):
    """`py3-none-<platform>`: nothing in it depends on Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class OfOnePlatform(Distribution):
    """So that the wheel is named after the platform."""

    def has_ext_modules(self):
        return True


if __name__ == "__main__":  # as tools that build run it; it lies in a package whose modules others may import
    setup(
        version=re.search(r'VERSION = "(.+)"', (HERE.parents[1] / "common/version.py").read_text())[1],
        packages=["optimum_dsa_kernels"],
        package_dir={"optimum_dsa_kernels": "torch-ext/optimum_dsa_kernels"},
        cmdclass={"build_py": Compiled, "bdist_wheel": Wheel},
        distclass=OfOnePlatform,
    )
