"""Problems: small and large maps, few and many channels; forward, training and single steps."""

from dataclasses import dataclass, replace

import torch

from conv_lstms.baselines import Implementation, baselines, ours
from conv_lstms.problems import Problem

# (batch, channels, hidden, size, kernel, time)
CPU_SIZES = ((1, 16, 16, 64, 3, 16), (1, 16, 16, 8, 3, 64), (1, 32, 32, 32, 3, 16), (1, 64, 64, 16, 3, 16))
GPU_SIZES = ((1, 64, 64, 16, 3, 64), (16, 128, 128, 16, 5, 16), (16, 64, 64, 128, 3, 16))
QUICK_SIZES = ((1, 4, 4, 6, 3, 3),)
MEASURES = ("step", "forward", "training")


@dataclass
class Group:
    """The first implementation is the base of ratios."""

    title: str
    measure: str
    problem: Problem
    implementations: list[Implementation]
    budget: float


def groups(backends: list[str], dtype: torch.dtype, device: torch.device, quick: bool) -> list[Group]:
    on_gpu = device.type == "cuda"
    sizes = QUICK_SIZES if quick else GPU_SIZES if on_gpu else CPU_SIZES
    others = baselines(on_gpu, compile_too=not quick)
    found = []
    for measure in MEASURES:
        for numbers in sizes:
            problem = Problem(*numbers, dtype=dtype)
            if measure == "step":
                problem = replace(problem, time=1, carried=True)
            implementations = [ours(backend) for backend in backends]
            if measure == "training":
                implementations += [ours(backend, keep_gates=False) for backend in backends]
            title = f"{measure}, {problem.name}" + ("" if measure == "step" else f", {problem.time} steps")
            found.append(Group(title, measure, problem, [*implementations, *others], 0.2 if quick else 3.0))
    return found
