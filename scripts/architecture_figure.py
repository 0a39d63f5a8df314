"""Draws docs/architecture.png, transparent, with colours for white and black pages."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

TARGET = Path(__file__).resolve().parents[1] / "docs" / "architecture.png"
INK, PYTHON, NATIVE, DEVICE, WORLD = "#7d8590", "#3b82f6", "#10a37f", "#c08a00", "#a855f7"
Box = tuple[float, float, float, float]  # left, bottom, width, height


def box(
    axes: Any, left: float, bottom: float, width: float, title: str, text: str, colour: str, height: float = 1
) -> Box:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc="none", ec=colour, lw=1.6
        )
    )
    middle, lines = left + width / 2, text.count("\n") + 1
    axes.text(middle, bottom + height - 0.14, title, ha="center", va="top", color=colour, fontsize=10.5, weight="bold")
    axes.text(
        middle, bottom + (height - 0.34) / 2, text, ha="center", va="center", color=INK, fontsize=8.3, linespacing=1.25
    )
    assert lines <= 4
    return left, bottom, width, height


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    if label:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.07)
        axes.text(*middle, label, ha="center", va="bottom", color=INK, fontsize=8)


def right(of: Box) -> tuple[float, float]:
    return of[0] + of[2], of[1] + of[3] / 2


def left(of: Box) -> tuple[float, float]:
    return of[0], of[1] + of[3] / 2


def top(of: Box) -> tuple[float, float]:
    return of[0] + of[2] / 2, of[1] + of[3]


def bottom(of: Box) -> tuple[float, float]:
    return of[0] + of[2] / 2, of[1]


def call(axes: Any) -> None:
    axes.text(0, 4.75, "A call: wmkernels/<op>/, csrc/", color=INK, fontsize=12, weight="bold")
    checks = box(axes, 0, 1.75, 2.3, "function.py", "validation.py: checks,\ncanonical form", PYTHON)
    choice = box(axes, 2.8, 1.75, 2.1, "dispatch.py", "registry.py: which\nbackend runs", PYTHON)
    graph = box(axes, 5.4, 1.75, 2.3, "autograd.py", "torch.library ops,\nmeta.py, Functions", PYTHON)
    arrow(axes, right(checks), left(choice))
    arrow(axes, right(choice), left(graph))
    slow = box(axes, 8.4, 3.45, 2.5, "reference.py", "loop over time,\nany device", PYTHON)
    chunked = box(axes, 8.4, 2.3, 2.5, "chunked.py", "log-depth scan,\nany device", PYTHON)
    native = box(axes, 8.4, 1.15, 2.5, "native.py", "outputs, argument\nmembers", PYTHON)
    triton = box(axes, 8.4, 0, 2.5, "triton_kernels.py", "Triton kernels,\nlaunchers", DEVICE)
    for target in (slow, chunked, native, triton):
        arrow(axes, right(graph), left(target))
    binding = box(axes, 11.4, 1.15, 2.2, "csrc/python", "pack, check,\nworkspace, run", NATIVE)
    arrow(axes, right(native), left(binding))
    cpu = box(axes, 14.1, 1.95, 2.5, "csrc/cpu/<op>", "C++, one build per\ninstruction set", NATIVE)
    cuda = box(axes, 14.1, 0.35, 2.5, "csrc/cuda/<op>", "CUDA C++, on the\ncurrent stream", DEVICE)
    arrow(axes, right(binding), left(cpu))
    arrow(axes, right(binding), left(cuda))


def rooms(axes: Any) -> None:
    heading = "The world model: python/worldmodel/, arrows from a room to what imports it"
    axes.text(0, 3.55, heading, color=INK, fontsize=12, weight="bold")
    kernels = box(axes, 0, 2.1, 2.3, "wmkernels.nn", "Mamba, ConvLSTM,\nRotaryMamba", PYTHON)
    runs = box(axes, 0, -0.3, 2.3, "runs", "folder, storage,\nconfiguration", WORLD)
    data = box(axes, 3.0, -0.3, 2.3, "data", "spaces, batches,\nreplay, sources", WORLD)
    model = box(axes, 3.0, 2.1, 2.3, "model", "five functions,\nlatents, blocks", WORLD)
    pictures = box(axes, 6.2, 2.1, 2.3, "pictures", "renderers, panels,\npage", WORLD)
    environments = box(axes, 6.2, -0.3, 2.3, "environments", "ids, vectors,\nhidden worlds", WORLD)
    learning = box(axes, 9.3, 0.9, 2.3, "learning", "learner, objectives,\ntrainer, collector", WORLD)
    acting = box(axes, 12.3, 0.9, 1.8, "acting", "agent, rollout,\nvideo", WORLD)
    demo = box(axes, 15.0, -0.3, 1.9, "demo", "demonstrations", WORLD)
    commands = box(axes, 15.0, 2.1, 1.9, "commands", "one file per\ncommand", WORLD)
    arrow(axes, right(runs), left(data))
    arrow(axes, right(kernels), left(model))
    arrow(axes, top(data), bottom(model))
    arrow(axes, right(model), left(pictures))
    arrow(axes, right(data), left(environments))
    arrow(axes, right(pictures), left(learning))
    arrow(axes, right(environments), left(learning))
    arrow(axes, right(learning), left(acting))
    arrow(axes, right(acting), left(demo))
    arrow(axes, right(acting), left(commands))
    arrow(axes, top(demo), bottom(commands))


def main() -> None:
    figure, axes = plt.subplots(figsize=(13.4, 7.6))
    axes.set_axis_off()
    lower = axes.inset_axes((0, 0, 1, 0.45))
    upper = axes.inset_axes((0, 0.48, 1, 0.52))
    for part, (low, high), draw in ((upper, (-0.1, 5.1), call), (lower, (-0.6, 3.9), rooms)):
        part.set_xlim(-0.1, 17.05)
        part.set_ylim(low, high)
        part.set_axis_off()
        draw(part)
    figure.savefig(TARGET, dpi=110, transparent=True, bbox_inches="tight", pad_inches=0.05)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
