"""Builds the native extension with build_tools; metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # not on the path during builds

from build_tools import native  # noqa: E402
from build_tools.toolchain import BuildError  # noqa: E402


class BuildNative(build_ext):
    """Builds the extension with build_tools, incrementally."""

    def run(self):
        """Build into the source tree (editable install) or the wheel's folder."""
        package = ROOT / "wmkernels" if self.inplace or self.editable_mode else Path(self.build_lib) / "wmkernels"
        try:
            self.report = native.build(ROOT, package, self.distribution.get_version())
        except BuildError as error:
            raise SystemExit(f"error: {error}") from None


class WheelOfWhatWasBuilt(bdist_wheel):
    """Tagged py3-none-any without the extension: pip takes the wheel with kernels where it has both."""

    def run(self):
        """Build first, since the tags depend on it."""
        self.run_command("build")
        if not self.get_finalized_command("build_ext").report.extension:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


setup(
    ext_modules=[Extension("wmkernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelOfWhatWasBuilt},
)
