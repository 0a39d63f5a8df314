"""What is trained on, for how long, what is compared there, and what is to be reached: a ``Task`` each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Variants = Mapping[str, Mapping[str, Any]]

MEMORIES: Variants = {
    "scan": {},
    "convolution and scan off": {"model.memory.kind": "none"},
    "scan off": {"model.memory.scan": False},
    "unrotated": {"model.memory.rotated": False},
    "GRU": {"model.memory.kind": "gru"},
}
"""What is changed of the preset, by the name of the memory. The first one is ours."""


def ways(*names: str) -> Variants:
    """Ways of improving the policy, of which the first one is the preset's."""
    return {name: {"model.decision.improve": name} for name in names}


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment to train on.

    Attributes:
        name: of the environment.
        minutes: of training.
        variants: option -> value that is changed of the preset, by the name of the variant. The first one is ours.
        at_least: mean return to be reached by ours.
        aim: mean return that is aimed at.
        floor: return at which a chart begins; of about random play.
        ceiling: return at which a chart ends.
        preset: settings that training starts from.
        steps: of the environments, after which training ends even before its minutes.
        aim_minutes: by when ``at_least`` is aimed at.
        checkpoint_minutes: between checkpoints that are evaluated, too, to say when ``at_least`` was reached; None
            where only the end counts.
        published: the best mean return of the benchmark that the task is from, and its GRU's.
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
        """The variant that the targets are meant for."""
        return next(iter(self.variants))


def _repeat_previous(
    name: str, minutes: float, at_least: float, aim: float | None, published: tuple[float, float]
) -> Task:
    """Published figures are those of the POPGym benchmark (Morad et al. 2023), after 15 million steps."""
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
            ways("reinforce", "exact", "dynamics"),
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
            ways("dynamics", "reinforce"),
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
