import dataclasses
from collections.abc import Mapping
from typing import Any

Variants = Mapping[str, Mapping[str, Any]]

MEMORIES: Variants = {
    "scan": {},
    "convolution and scan off": {"memory": "none"},
    "scan off": {"memory": "gated_conv"},
    "unrotated": {"memory": "scan", "model.memory.blocks.0.d_state": 32, "model.memory.blocks.0.groups": 8},
    "GRU": {"memory": "gru"},
}
"""Memory -> changes to the preset; the first has none."""


def policy_gradients(*names: str) -> Variants:
    return {name: {"model.decision.gradient": name} for name in names}


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment to train on.

    Attributes:
        minutes: of training.
        variants: name -> preset changes; the first has the targets.
        at_least: target of the mean return.
        aim: beyond the target.
        floor: chart's lower end, about random play.
        ceiling: chart's upper end.
        steps: limit of environment steps.
        aim_minutes: aim for reaching ``at_least``.
        checkpoint_minutes: between evaluated checkpoints; None: only the end.
        published: best mean return of the task's benchmark, and its GRU's.
    """

    name: str
    minutes: float
    variants: Variants
    at_least: float
    aim: float | None
    floor: float
    ceiling: float
    preset: str = "popgym"
    steps: int | None = None
    aim_minutes: float | None = None
    checkpoint_minutes: float | None = None
    published: tuple[float, float] | None = None

    @property
    def ours(self) -> str:
        """The variant with targets."""
        return next(iter(self.variants))


def _repeat_previous(
    name: str, minutes: float, at_least: float, aim: float | None, published: tuple[float, float]
) -> Task:
    """Published: POPGym (Morad et al. 2023), after 15 million steps."""
    return Task(name, minutes, MEMORIES, at_least, aim, floor=-1.05, ceiling=1.1, published=published)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _repeat_previous("RepeatPreviousEasy", 5, 0.97, None, (1.0, 1.0)),
        _repeat_previous("RepeatPreviousMedium", 15, 0.9, 0.98, (0.789, -0.315)),
        _repeat_previous("RepeatPreviousHard", 60, 0.5, 0.9, (0.191, -0.428)),
        Task(
            "CartPole-v1",
            8,
            policy_gradients("reinforce", "all_action", "pathwise"),
            at_least=475,
            aim=None,
            floor=0,
            ceiling=510,
            preset="control",
            steps=10_000,
            aim_minutes=5,
            checkpoint_minutes=0.5,
        ),
        Task(
            "Pendulum-v1",
            15,
            policy_gradients("pathwise", "reinforce"),
            at_least=-200,
            aim=None,
            floor=-1700,
            ceiling=0,
            preset="continuous",
            steps=20_000,
            aim_minutes=10,
            checkpoint_minutes=0.5,
        ),
    )
}
