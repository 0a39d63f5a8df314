"""Builds the native extension; everything else is in pyproject.toml, and how the build works is in build_tools."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # the build runs without this folder on the path

from build_tools import native  # noqa: E402
from build_tools.toolchain import BuildError  # noqa: E402


class BuildNative(build_ext):
    """Hands the extension to build_tools, which keeps its objects from one build to the next."""

    def run(self):
        """Build into the source tree for an editable install, else where setuptools collects the wheel."""
        package = ROOT / "wmkernels" if self.inplace or self.editable_mode else Path(self.build_lib) / "wmkernels"
        try:
            native.build(ROOT, package, self.distribution.get_version())
        except BuildError as error:
            raise SystemExit(f"error: {error}") from None


setup(ext_modules=[Extension("wmkernels._native", sources=[], optional=True)], cmdclass={"build_ext": BuildNative})
