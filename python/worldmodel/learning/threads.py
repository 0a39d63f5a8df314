"""The number of CPU threads that work keeps busy.

It depends on the settings, the machine and the environment's variables, never on how busy the machine is: runs of one
seed stay equal.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from worldmodel.model.world_model import WorldModel

# Elements per thread. A loop over 2**18 takes about 0.1 ms, several times what it costs to wake a thread.
GRAIN = 2**18
# Where waiting threads spin, as by default, a loop on a busy machine can wait for a time slice of the scheduler.
SPINNING_GRAIN = 2**20


def threads_for(world_model: WorldModel, steps: int) -> int:
    """CPU threads for ``steps`` steps at once, over all rows: as the widest array asks, at most PyTorch's own number.

    Arrays are an observation, the memory's features and a layer's weights.
    """
    modalities = world_model.observation_spec.modalities.values()
    observation = sum(max(math.prod(modality.shape), sum(modality.sizes)) for modality in modalities)
    memory = world_model.config.memory
    weights = max(parameter.numel() for parameter in world_model.parameters())
    at_once = min(steps, world_model.perception.chunk_steps or steps)
    widest = max(at_once * observation, steps * memory.width * memory.tokens, weights)
    useful = widest // (GRAIN if waiting_threads_sleep() else SPINNING_GRAIN)
    return max(1, min(useful, torch.get_num_threads(), usable_cores()))


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """PyTorch's number of threads is the process's, so a caller gets it back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waiting_threads_sleep() -> bool:
    """Whether the environment makes OpenMP's waiting threads sleep, as ``python -m worldmodel`` does."""
    spins = os.environ.get("GOMP_SPINCOUNT", "0")  # a number, or "infinity"
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    return passive and spins.isdigit() and int(spins) <= 10_000


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that the affinity mask and the control group's quota leave this process; ``root`` is for tests."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota in _quotas(root):
        cores = min(cores, max(1, math.ceil(quota)))
    return cores


def _quotas(root: Path) -> list[float]:
    """CPU limits in cores, of this process's control group and those above it, for versions 1 and 2."""
    found: list[float | None] = []
    groups = root / "sys" / "fs" / "cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top = groups if not controllers else groups / controllers
            if controllers and "cpu" not in controllers.split(","):
                continue
            inner = top / path.strip("/")
            for folder in [inner, *inner.parents]:
                if folder.is_relative_to(top):
                    found.append(_quota(folder))
    return [quota for quota in found if quota is not None]


def _quota(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):
        limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(limit) < 0 else int(limit) / int(period)
    return None
