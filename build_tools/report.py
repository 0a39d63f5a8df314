"""The build report, saved as JSON for `python -m wmkernels.info`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .ninja_file import write_if_changed

FILE = "_build_info.json"


@dataclass
class Report:
    """Built components; reasons are empty for these."""

    version: str
    extension: str = ""
    extension_reason: str = ""
    objects: str = ""  # relative folder
    compiler: str = ""
    compiler_version: str = ""
    openmp: bool = False
    openmp_reason: str = ""
    cpu_levels: list[str] = field(default_factory=list)
    cpu_levels_missing: dict[str, str] = field(default_factory=dict)
    cuda: bool = False
    cuda_reason: str = ""
    nvcc: str = ""
    nvcc_version: str = ""
    cuda_architectures: list[str] = field(default_factory=list)

    def write(self, package: Path) -> None:
        """Save in the package."""
        package.mkdir(parents=True, exist_ok=True)
        write_if_changed(package / FILE, json.dumps(asdict(self), indent=2) + "\n")

    def block(self) -> str:
        """As text."""
        levels = [", ".join(self.cpu_levels) or "none"]
        levels += [f"not {level}: {reason}" for level, reason in self.cpu_levels_missing.items()]
        architectures = ", ".join(f"sm_{a}" for a in self.cuda_architectures)
        newest = self.cuda_architectures[-1] if self.cuda_architectures else ""
        rows = {
            "extension": self.extension or f"not built: {self.extension_reason}",
            "C++ compiler": f"{self.compiler} ({self.compiler_version})" if self.compiler else "none",
            "OpenMP": "yes" if self.openmp else f"no, one thread only: {self.openmp_reason}",
            "CPU kernels": "; ".join(levels),
            "CUDA kernels": f"{architectures}, PTX {newest}" if self.cuda else f"not built: {self.cuda_reason}",
            "nvcc": f"{self.nvcc} ({self.nvcc_version})" if self.nvcc else "not used",
        }
        if not self.extension:
            rows |= {name: "not built" for name in ("OpenMP", "CPU kernels", "CUDA kernels")}
        title = f"wmkernels {self.version}: what was built"
        return "\n".join([title, *(f"  {name:<13} {text}" for name, text in rows.items())])
