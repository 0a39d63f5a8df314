import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Variants = Mapping[str, Mapping[str, Any]]

MEMORIES: dict[str, Mapping[str, Any]] = {
    "scan": {},
    "convolution and scan off": {"memory": "none"},
    "scan off": {"memory": "gated_conv"},
    "unrotated": {"memory": "scan", "model.memory.blocks.0.d_state": 32, "model.memory.blocks.0.groups": 8},
    "GRU": {"memory": "gru"},
}
"""Memory -> changes to the preset; the first has none."""

MAMBA3: dict[str, Mapping[str, Any]] = {"Mamba-3": {"memory": "mamba3", "model.memory.blocks.0.groups": 8}}


def policy_gradients(*names: str) -> Variants:
    return {name: {"model.decision.gradient": name} for name in names}


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of someone else's.

    Attributes:
        method: and its year.
        value: mean score.
        steps: of the environment.
    """

    method: str
    value: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment to train on.

    Attributes:
        name: of the task, and of its environment if ``env`` is empty.
        minutes: of training.
        variants: name -> preset changes; the first has the targets.
        at_least: target of the score.
        aim: beyond the target.
        floor: chart's lower end, about random play.
        ceiling: chart's upper end.
        steps: limit of environment steps.
        aim_minutes: aim for reaching ``at_least``.
        checkpoint_minutes: between evaluated checkpoints; None: only the end.
        published: best mean return of the task's benchmark, and its GRU's.
        env: id of the environment.
        env_args: its arguments, NAME=VALUE.
        options: of training, beside the preset.
        score: the mean return of the greedy policy with the best weights that training's own evaluations found, or
            the share of the last ``last`` episodes of training with a return above 0.
        last: episodes.
        others: published figures.
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
    env: str = ""
    env_args: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    score: Literal["return", "share right"] = "return"
    last: int = 200
    others: tuple[Published, ...] = ()

    @property
    def environment(self) -> str:
        return self.env or self.name

    @property
    def ours(self) -> str:
        """The variant with targets."""
        return next(iter(self.variants))


def _repeat_previous(
    name: str,
    minutes: float,
    at_least: float,
    aim: float | None,
    published: tuple[float, float],
    variants: Variants = MEMORIES,
) -> Task:
    """Published: POPGym (Morad et al. 2023), after 15 million steps."""
    return Task(name, minutes, variants, at_least, aim, floor=-1.05, ceiling=1.1, published=published)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _repeat_previous("RepeatPreviousEasy", 5, 0.97, None, (1.0, 1.0)),
        _repeat_previous("RepeatPreviousMedium", 15, 0.9, 0.98, (0.789, -0.315), MEMORIES | MAMBA3),
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


BY_STEPS = 120.0  # minutes, of tasks that end by their steps, on however busy a machine


def _memory_length(length: int, train_ratio: int, at_least: float) -> Task:
    """2,000 episodes of ``length`` + 1 actions."""
    return Task(
        f"MemoryLength-{length}",
        BY_STEPS,
        {"scan": {}, "scan off": {"memory": "gated_conv"}},
        at_least,
        None,
        floor=-1.1,
        ceiling=1.1,
        steps=2_000 * (length + 1),
        env="worldmodel/MemoryLength-v0",
        env_args=(f"length={length}",),
        options={"prefill": 100 * (length + 1), "train-ratio": train_ratio},
        score="share right",
    )


def _others(*figures: tuple[str, float, int]) -> tuple[Published, ...]:
    return tuple(Published(*figure) for figure in figures)


# Sources. RL-Zoo: benchmark.md of rl-baselines3-zoo, one run each. dm_control: result files of TD-MPC2 (arXiv
# 2310.16828; 3 seeds, evaluation, with its runs of DreamerV3) and of DreamerV3 (arXiv 2301.04104; 5 seeds, training);
# steps are frames. POPGym: Morad et al. 2023, arXiv 2303.01859, appendix B, the best of 13 models; R2I: Samsami et al.
# 2024, arXiv 2403.04253, read off a figure, to 0.01, with the steps of its configuration; SHM: Le et al. 2024, arXiv
# 2410.10132, as quoted by others, steps as of POPGym.
_DM_CONTROL = {
    "cartpole-swingup": (839.4, 676.7, 527.7),
    "ball_in_cup-catch": (981.2, 870.5, 729.6),
    "finger-spin": (947.5, 328.3, 765.8),
    "pendulum-swingup": (724.0, 699.3, 830.4),
}  # TD-MPC2, DreamerV3 in its comparison, DreamerV3's own


_POPGYM = {  # best of 13 models, then newer
    "AutoencodeEasy": (-0.283, (("R2I 2024", 0.52, 200_000_000), ("SHM 2024", 0.495, 15_000_000))),
    "AutoencodeMedium": (-0.420, (("R2I 2024", 0.45, 200_000_000),)),
    "AutoencodeHard": (-0.448, ()),
    "CountRecallEasy": (0.509, ()),
    "CountRecallMedium": (-0.519, ()),
    "CountRecallHard": (-0.470, ()),
}


def _popgym(
    name: str, minutes: float, rows: int, window: int, at_least: float, aim: float, variants: Variants, **options: Any
) -> Task:
    """``window`` holds an episode."""
    best, newer = _POPGYM[name]
    return Task(
        name,
        minutes,
        variants,
        at_least,
        aim,
        floor=-1.05,
        ceiling=1.1,
        env=f"popgym-{name}-v0",
        options={
            "replay.batch-size": rows,
            "replay.window": window,
            "replay.burn-in": 0,
            "model.prediction.reward.kind": "two_hot",
            **options,
        },
        others=_others(("best of 13, Morad et al. 2023", best, 15_000_000), *newer),
    )


TURNING: Variants = {
    "all": {},
    "angles turn one way": {"model.memory.blocks.0.no-selective-speed": None},
    "no action gate": {"model.prediction.no-action-gate": None},
    "reward counts as the rest": {"learner.objective.reward": 1},
}
COUNTING: Variants = {"all": {}, "scan off": {"memory": "gated_conv"}}
FEW_STARTS = {"learner.objective.imagination-starts": 2, "learner.objective.horizon": 1}  # each has up to 27 actions


def _dm_control(task: str, at_least: float, aim: float) -> Task:
    methods = ("TD-MPC2 2024", "DreamerV3, TD-MPC2's run", "DreamerV3 2023, while training")
    return Task(
        f"dm_control {task}",
        BY_STEPS,
        {"pathwise": {}},
        at_least,
        aim,
        floor=-20,
        ceiling=1020,
        preset="continuous",
        steps=50_000,
        env="worldmodel/DMControl-v0",
        env_args=(f"task={task}",),
        options={"train-ratio": 64},
        others=_others(*((method, value, 100_000) for method, value in zip(methods, _DM_CONTROL[task], strict=True))),
    )


def _pictures(name: str, at_least: float, aim: float) -> Task:
    """MiniGrid seen as RGB pictures of the whole grid, 64 by 64 pixels."""
    return Task(
        f"MiniGrid-{name} pictures",
        30,
        {"reinforce": {}},
        at_least,
        aim,
        floor=-0.05,
        ceiling=1.05,
        preset="pixels",
        env="worldmodel/MiniGridPictures-v0",
        env_args=(f"task=MiniGrid-{name}-v0",),
        score="share right",
    )


COMMON: dict[str, Task] = {
    task.name: task
    for task in (
        _memory_length(10, 64, 0.9),
        _memory_length(30, 32, 0.9),
        _memory_length(100, 16, 0.9),
        _memory_length(300, 8, 0.9),
        _popgym("AutoencodeEasy", 8, 6, 108, 0.0, 0.9, TURNING),
        _popgym("AutoencodeMedium", 12, 3, 212, -0.2, 0.7, TURNING),
        _popgym("AutoencodeHard", 20, 3, 316, -0.3, 0.5, TURNING),
        _popgym("CountRecallEasy", 20, 12, 56, 0.6, 0.9, COUNTING, **FEW_STARTS),
        _popgym("CountRecallMedium", 20, 6, 108, 0.0, 0.6, COUNTING, **FEW_STARTS),
        _popgym("CountRecallHard", 20, 3, 212, -0.2, 0.4, COUNTING, **FEW_STARTS),
        Task(
            "MiniGrid-DoorKey-5x5-v0",
            15,
            {"rare classes": {}, "all classes alike": {"model.perception.rare": 0}},
            at_least=0.9,
            aim=None,
            floor=-0.05,
            ceiling=1.05,
            preset="grid",
            others=_others(("PPO, RL-Zoo", 0.964, 100_000)),
        ),
        Task(
            "Acrobot-v1",
            BY_STEPS,
            {"reinforce": {}},
            at_least=-90,
            aim=None,
            floor=-500,
            ceiling=0,
            preset="control",
            steps=20_000,
            options={"train-ratio": 64},
            others=_others(
                ("QR-DQN, RL-Zoo", -69.1, 100_000), ("PPO, RL-Zoo", -73.5, 1_000_000), ("DQN, RL-Zoo", -76.6, 100_000)
            ),
        ),
        Task(
            "MountainCar-v0",
            BY_STEPS,
            {"exploration": {}, "no exploration": {"model.exploration.bonus": 0}},
            at_least=-130,
            aim=-110,
            floor=-205,
            ceiling=-85,
            preset="explore",
            steps=50_000,
            others=_others(
                ("DQN, RL-Zoo", -100.8, 120_000), ("TRPO, RL-Zoo", -107.3, 100_000), ("PPO, RL-Zoo", -110.4, 1_000_000)
            ),
        ),
        _pictures("Empty-8x8", 0.95, 0.99),
        _pictures("FourRooms", 0.6, 0.9),
        _dm_control("cartpole-swingup", 609, 839.4),
        _dm_control("ball_in_cup-catch", 783, 981.2),
        _dm_control("finger-spin", 295.5, 947.5),
        _dm_control("pendulum-swingup", 629.4, 724.0),
        Task(
            "LunarLander-v3",
            BY_STEPS,
            {"reinforce": {}},
            at_least=200,
            aim=None,
            floor=-400,
            ceiling=320,
            preset="control",
            steps=100_000,
            options={"train-ratio": 64},
            others=_others(
                ("PPO, RL-Zoo, v2", 242.1, 1_000_000),
                ("A2C, RL-Zoo, v2", 155.8, 200_000),
                ("DQN, RL-Zoo, v2", 154.4, 100_000),
            ),
        ),
    )
}
"""Tasks that others publish figures of, trained for a given number of steps."""

SUITES = {"world_model": TASKS, "world_tasks": COMMON}
ALL = {**TASKS, **COMMON}
