"""The import paths, signatures and in-place states of mamba_ssm, causal_conv1d and accelerated_scan, on wmkernels.

``wmkernels.compat.mamba_ssm.ops.selective_scan_interface`` mirrors ``mamba_ssm.ops.selective_scan_interface``, and so
on. ``install`` makes them importable under the names of the packages. Every difference is listed in docs/compat.md.
"""

import importlib
import importlib.util
import pkgutil
import sys

PACKAGES = ("accelerated_scan", "causal_conv1d", "mamba_ssm")


def install(*packages: str) -> tuple[str, ...]:
    """Puts the modules of ``wmkernels.compat`` into ``sys.modules`` under the names of packages that are absent.

    A package that is installed or imported stays as it is. Calling it again changes nothing.

    Args:
        packages: of ``accelerated_scan``, ``causal_conv1d`` and ``mamba_ssm``; none for all three.

    Returns:
        The packages that now lead here, in alphabetical order.

    Raises:
        ValueError: another name.
    """
    unknown = [name for name in packages if name not in PACKAGES]
    if unknown:
        raise ValueError(f"install: there is no package {unknown[0]!r} here, expected some of {', '.join(PACKAGES)}")
    served = [name for name in sorted(packages or PACKAGES) if is_served(name) or _is_absent(name)]
    for name in served:
        _install(name)
    return tuple(served)


def is_served(package: str) -> bool:
    """Whether the name ``package`` leads to wmkernels."""
    module = sys.modules.get(package)
    return module is not None and module.__name__ == f"{__name__}.{package}"


def _is_absent(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


def _install(package: str) -> None:
    root = importlib.import_module(f"{__name__}.{package}")
    sys.modules[package] = root
    for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        sys.modules[found.name.removeprefix(f"{__name__}.")] = importlib.import_module(found.name)
