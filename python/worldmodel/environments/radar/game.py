"""A radar chooses a channel and a waveform in each interval; a jammer answers with what it heard before.

    python -m worldmodel train --env worldmodel/RadarGame-v0

In each interval a radar sends on one of ``channels``, of which ``available`` random ones are free. A look-back jammer
sends, in the channel that the radar used L intervals ago, a copy of the pulse that it heard there; L is hidden, and
constant in a game. Spot, sweep and random jammers fill a channel with noise: always the same, the next one in each
interval, or any. The reward is the detection probability of a Swerling 1 target behind a CA-CFAR, exact
(``expectation``) or, with ``sampled``, one detection of the sampled chain (``interval``).

``RadarGames`` plays many games at once, for training; ``RadarGame`` is a gymnasium environment of one of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.data.actions import MASK
from worldmodel.environments.ids import register
from worldmodel.environments.radar.config import CFARConfig, Decibels, RadarConfig
from worldmodel.environments.radar.expectation import expected_detection
from worldmodel.environments.radar.interval import Interval, Jamming, sample_interval
from worldmodel.environments.radar.theory import power
from worldmodel.environments.radar.waveforms import LFM, PhaseCode
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Limit, Unit, checked_value
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

Past = Annotated[int, Bounds(1, 4096), Unit("intervals")]
SILENT = -1  # no channel


@dataclasses.dataclass(frozen=True)
class RadarGameConfig(Checked):
    """The radar's choices, the jammer and the powers.

    Attributes:
        channels: to choose from.
        available: random ones of them that are free in each interval; 0 for all.
        waveforms: to choose from: a rising LFM, a falling one, then random phase codes.
        jammer: look-back copies, or noise in one channel (spot), each in turn (sweep), or a random one.
        look_back: smallest and largest L of a look-back jammer, intervals; uniform and drawn for each game.
        sensed: whether the radar observes which channel the jammer sent in.
        snr: mean signal-to-noise ratio in the target's cell without jamming, dB.
        jnr: jammer-to-noise ratio before the receiver's filters, dB.
        sampled: whether the reward is a detection of the sampled chain instead of its probability.
        radar: its pulses; waveforms have as many chips as a pulse has samples.
        cfar: of the detector.

    Example:
        >>> RadarGameConfig(channels=1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        worldmodel...ConfigurationError: RadarGameConfig: channels is 1, expected a whole number, at least 2 and ...
    """

    channels: Annotated[int, Bounds(2, 1024)] = 8
    available: Annotated[int, Bounds(0, 1024)] = 2
    waveforms: Annotated[int, Bounds(1, 16)] = 1
    jammer: Literal["look_back", "spot", "sweep", "random"] = "look_back"
    look_back: tuple[Past, Past] = (1, 8)
    sensed: bool = True
    snr: Decibels = 16.0
    jnr: Decibels = 10.0
    sampled: bool = False
    radar: RadarConfig = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=8)  # noqa: RUF009
    cfar: CFARConfig = CFARConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.available > self.channels:
            raise ConfigurationError(
                f"RadarGameConfig: available is {self.available} channels, expected at most channels ({self.channels})"
            )
        if self.look_back[0] > self.look_back[1]:
            raise ConfigurationError(
                f"RadarGameConfig: look_back is {self.look_back} (intervals), expected the smallest first"
            )
        self.cfar.check(self.radar.cells)

    @property
    def actions(self) -> int:
        """Pairs of channel and waveform: action = channel × waveforms + waveform."""
        return self.channels * self.waveforms

    @property
    def features(self) -> int:
        """Numbers of an observation."""
        return 2 * self.channels + self.waveforms + 2 + (self.channels if self.sensed else 0)

    @property
    def smear(self) -> int:
        """Cells around the target that copies are smeared over: all that the CFAR reads."""
        return 2 * self.cfar.reach + 1

    def pulses(self) -> Tensor:
        """The waveforms: complex64 (waveforms, samples)."""
        samples = self.radar.samples
        band = self.radar.bandwidth / self.radar.sample_rate
        modules = [LFM(samples, band), LFM(samples, band, falling=True)][: self.waveforms]
        seeds = range(self.waveforms - len(modules))
        codes = [PhaseCode.sampled(samples, torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack([module().detach() for module in [*modules, *codes]])


_UNUSED: dict[str, Any] = {
    "channels": 2,
    "available": 0,
    "look_back": (1, 1),
    "jammer": "spot",
    "sensed": True,
    "sampled": False,
}
"""Fields on which ``detection_table`` does not depend, each with a value."""


def detection_table(config: RadarGameConfig, pulses: Tensor | None = None) -> Tensor:
    """Exact detection probabilities, averaged over Doppler rows: float64 (waveforms, waveforms + 2).

    A row for the waveform sent; columns: a copy of each waveform, noise in the channel, no jamming.

    Args:
        config: of the game.
        pulses: complex (waveforms, samples), with respect to which the table is differentiable; without, those of
            ``config``, whose table is computed once.
    """
    if pulses is not None:
        return _table(config, pulses)
    return _cached_table(dataclasses.replace(config, **_UNUSED))


@functools.lru_cache(maxsize=64)
def _cached_table(config: RadarGameConfig) -> Tensor:
    return _table(config, config.pulses())


def _table(config: RadarGameConfig, pulses: Tensor) -> Tensor:
    pulses, radar = pulses.to(torch.complex128), config.radar
    snr, jnr = torch.tensor(power(config.snr), dtype=torch.float64), power(config.jnr)
    turns = radar.doppler_of_row(torch.arange(radar.pulses)).tolist()
    rows = []
    for pulse in pulses:
        jamming = [(1.0, copied) for copied in pulses] + [(1 + jnr, None), (1.0, None)]
        for noise, copied in jamming:
            given = (snr, config.cfar, radar.cells, noise, copied, jnr, config.smear)
            rows.append(torch.stack([expected_detection(pulse, *given, doppler=doppler) for doppler in turns]).mean())
    return torch.stack(rows).view(len(pulses), -1)


class RadarGames:
    """``batch`` games of one configuration, of random L, availability and noise from ``generator``.

    ``jammer`` replaces the configuration's: it chooses, before each interval, the channel that it fills with noise,
    from what is ``heard``.

    Attributes:
        available: channels that are free in this interval: bool (batch, channels).
        look_back: L of each game, intervals, int64 (batch,); hidden from the radar.
        time: intervals so far.
        last_sent: channel of the interval before, or ``SILENT``: int64 (batch,).
        last_sensed: channel in which the radar noticed the jammer then, or ``SILENT``: int64 (batch,). Without
            ``sensed`` it notices it in its own channel alone.
        last_jammed: channel in which the jammer was then, or ``SILENT``: int64 (batch,).

    Example:
        >>> games = RadarGames(4, RadarGameConfig(), torch.Generator().manual_seed(0))
        >>> happened = games.step(games.available.int().argmax(1))
        >>> happened["reward"].shape, games.observations.shape
        (torch.Size([4]), torch.Size([4, 27]))
    """

    def __init__(
        self,
        batch: int,
        config: RadarGameConfig,
        generator: torch.Generator | None = None,
        jammer: "Policy | None" = None,
    ) -> None:
        self.batch, self.config, self.generator, self.time = batch, config, generator, 0
        self.jammer = jammer
        shortest, longest = config.look_back
        self.look_back = torch.randint(shortest, longest + 1, (batch,), generator=generator)
        # Before a game the jammer heard random choices.
        self._heard = torch.randint(0, config.actions, (batch, longest), generator=generator)
        self._spot = torch.randint(0, config.channels, (batch,), generator=generator)
        self._table = detection_table(config).float()
        self._pulses = config.pulses()
        self._games = torch.arange(batch)
        self._last = torch.zeros(batch, config.features - config.channels)
        self.last_sent, self.last_sensed, self.last_jammed = torch.full((3, batch), SILENT)
        self._draw()

    def _draw(self) -> None:
        """Draws what is free, and what a random or given jammer does, in the next interval."""
        config = self.config
        order = torch.rand(self.batch, config.channels, generator=self.generator)
        count = config.available or config.channels
        self.available = torch.zeros(self.batch, config.channels, dtype=torch.bool)
        self.available.scatter_(1, order.topk(count, 1).indices, True)
        self._random = torch.randint(0, config.channels, (self.batch,), generator=self.generator)
        if self.jammer is not None:
            self._chosen = self._given(self.jammer(self), "jammed channels", config.channels)

    @property
    def heard(self) -> Tensor:
        """What a jammer knows before it chooses: float32 (batch, 2 × channels + 1).

        One-hot channels that the radar and the jammer sent in in the interval before, and whether they were the same;
        what is free now is the radar's alone.
        """
        sent, jammed = (_one_hot(channel, self.config.channels) for channel in (self.last_sent, self.last_jammed))
        return torch.cat([sent, jammed, (sent * jammed).sum(1, keepdim=True)], 1)

    @property
    def observations(self) -> Tensor:
        """What the radar knows before it acts: float32 (batch, features).

        One-hot channel and waveform sent in the interval before, whether the target was detected (its probability,
        without ``sampled``), whether its channel was jammed, with ``sensed`` the one-hot channel of the jammer, and
        the channels that are free now. All but the last are 0 in the first interval; nothing is sent on a channel that
        is not free.
        """
        return torch.cat([self._last, self.available.float()], 1)

    @property
    def _copied(self) -> Tensor:
        """Actions L intervals ago, or ``SILENT``."""
        return self._heard[self._games, (self.time - self.look_back) % self._heard.shape[1]]

    @property
    def jammed(self) -> Tensor:
        """Channel that the jammer sends in in this interval, or ``SILENT``: int64 (batch,); hidden from the radar."""
        if self.jammer is not None:
            return self._chosen
        kind, channels = self.config.jammer, self.config.channels
        if kind == "look_back":
            copied = self._copied
            return torch.where(copied < 0, SILENT, copied // self.config.waveforms)
        return {"spot": self._spot, "sweep": (self._spot + self.time) % channels, "random": self._random}[kind]

    @property
    def _column(self) -> Tensor:
        """Of ``detection_table``, where the jammer's channel is hit: int64 (batch,)."""
        if self.config.jammer == "look_back" and self.jammer is None:
            return self._copied.clamp_min(0) % self.config.waveforms
        return torch.full((self.batch,), self.config.waveforms)

    @property
    def expected(self) -> Tensor:
        """Detection probability of each action in this interval: float32 (batch, actions); hidden from the radar."""
        config = self.config
        clear = self._table[:, -1].expand(self.batch, config.channels, -1)
        there = self.jammed[:, None] == torch.arange(config.channels)
        values = torch.where(there[..., None], self._table[:, self._column].T[:, None], clear)
        return (values * self.available[..., None]).flatten(1)

    def tried(self, temperature: float = 0.1) -> Tensor:
        """What one sample of the chain finds with each action in this interval: float32 (batch, actions).

        Soft detections, 0 to 1, by ``receiver.soft_detect``, each of its own target and noise; 0 for a channel that is
        not free. Hidden from the radar; a game goes on as though nothing had been tried, but for the generator.

        Args:
            temperature: of the soft CFAR, nepers of power.
        """
        config = self.config
        values = torch.zeros(self.batch, config.actions)
        game, action = self.available.repeat_interleave(config.waveforms, 1).nonzero(as_tuple=True)
        hit = action // config.waveforms == self.jammed[game]
        column = torch.where(hit, self._column[game], config.waveforms + 1)
        found = self._interval(action % config.waveforms, column).score(config.cfar, temperature)
        return values.index_put((game, action), found)

    def step(self, actions: Tensor) -> dict[str, Tensor]:
        """One interval.

        Args:
            actions: int64 (batch,), channel × waveforms + waveform; a channel that is not free stays silent.

        Returns:
            Tensors of (batch,): ``reward`` float32, 0 where the radar was silent; ``hit`` bool, whether the jammer was
            in its channel; ``jammed`` int64, the jammer's channel or ``SILENT``; ``silent`` bool.

        Raises:
            ValueError: actions of another shape or dtype, or outside 0 to ``actions`` − 1.
        """
        config = self.config
        actions = self._given(actions, "actions", config.actions)
        channel, waveform = actions // config.waveforms, actions % config.waveforms
        silent = ~self.available[self._games, channel]
        jammed = self.jammed
        hit = (channel == jammed) & ~silent
        column = torch.where(hit, self._column, config.waveforms + 1)
        if config.sampled:
            reward = self._interval(waveform, column).detected(config.cfar).float()
        else:
            reward = self._table[waveform, column]
        reward = torch.where(silent, 0.0, reward)
        self._heard[:, self.time % self._heard.shape[1]] = torch.where(silent, SILENT, actions)
        self.last_sent = torch.where(silent, SILENT, channel)
        self.last_jammed = jammed
        self.last_sensed = jammed if config.sensed else torch.where(hit, jammed, SILENT)
        sent = (~silent).float()[:, None]
        parts = [_one_hot(self.last_sent, config.channels), F.one_hot(waveform, config.waveforms) * sent]
        parts += [reward[:, None], hit[:, None].float()]
        if config.sensed:
            parts.append(_one_hot(jammed, config.channels))
        self._last = torch.cat(parts, 1)
        self.time += 1
        self._draw()
        return {"reward": reward, "hit": hit, "jammed": jammed, "silent": silent}

    def rollout(self, steps: int, policy: "Policy") -> dict[str, Tensor]:
        """The next ``steps`` intervals: what ``step`` returns, ``actions``, ``observations``; (batch, time, ...)."""
        happened: dict[str, list[Tensor]] = {}
        for _ in range(steps):
            before, actions = self.observations, policy(self)
            for name, value in {"observations": before, "actions": actions, **self.step(actions)}.items():
                happened.setdefault(name, []).append(value)
        return {name: torch.stack(values, 1) for name, values in happened.items()}

    def _interval(self, waveform: Tensor, column: Tensor) -> Interval:
        """The sampled chain with ``column`` of ``detection_table`` as the jamming; both int64 (intervals,)."""
        config, jnr = self.config, power(self.config.jnr)
        noise = torch.where(column == config.waveforms, jnr, 0.0)
        copies = torch.where(column < config.waveforms, jnr, 0.0)
        copied = self._pulses[column.clamp_max(config.waveforms - 1)]
        jamming = Jamming(noise, copied, copies, config.smear)
        snr = torch.full((len(waveform),), power(config.snr))
        return sample_interval(config.radar, self._pulses[waveform], snr, jamming, 1, self.generator)

    def _given(self, chosen: Tensor, name: str, choices: int) -> Tensor:
        if tuple(chosen.shape) != (self.batch,) or chosen.dtype != torch.int64:
            raise ValueError(
                f"RadarGames: {name} have shape {tuple(chosen.shape)} and dtype {chosen.dtype}, expected "
                f"({self.batch},) and torch.int64"
            )
        if self.batch and not 0 <= int(chosen.min()) <= int(chosen.max()) < choices:
            raise ValueError(
                f"RadarGames: {name} from {int(chosen.min())} to {int(chosen.max())}, expected 0 to {choices - 1}"
            )
        return chosen


def _one_hot(channel: Tensor, channels: int) -> Tensor:
    """float32 (batch, channels), all 0 for ``SILENT``."""
    return F.one_hot(channel + 1, channels + 1)[:, 1:].float()


Policy = Callable[[RadarGames], Tensor]
"""Actions, or a jammer's channels, int64 (batch,), of games; ``worldmodel.environments.radar.policies`` has some."""


class RadarGame(gymnasium.Env[Any, Any]):
    """One game; ``options`` are the fields of ``RadarGameConfig``. An episode is a new game of ``length`` intervals.

    Observes what ``RadarGames.observations`` says; ``info`` has the mask of actions whose channel is free, and after a
    step ``hit``, ``jammed`` and ``silent``.

    Example:
        >>> game = RadarGame(channels=4)
        >>> first, info = game.reset(seed=1)
        >>> following, reward, terminated, truncated, info = game.step(int(info["action_mask"].argmax()))
        >>> following.shape, sorted(info)
        ((15,), ['action_mask', 'hit', 'jammed', 'silent'])

    Raises:
        ConfigurationError: options of other values.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, length: int = 128, **options: Any) -> None:
        self.render_mode = render_mode
        self.length = checked_value(Limit, length, "RadarGame: length")
        self.config = RadarGameConfig(**options)
        self.observation_space = gymnasium.spaces.Box(0, 1, (self.config.features,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.config.actions)
        self._games: RadarGames | None = None

    @property
    def games(self) -> RadarGames:
        """The present game, a batch of one; gymnasium's ResetNeeded before ``reset``."""
        if self._games is None:
            raise gymnasium.error.ResetNeeded("RadarGame: there is no game yet: call reset first")
        return self._games

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2**62)))
        self._games = RadarGames(1, self.config, generator)
        return self._observation(), {MASK: self._mask()}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Raises ConfigurationError for an action that is none of ``action_space``."""
        known = Annotated[int, Bounds(0, self.config.actions - 1)]
        index = checked_value(known, action, "RadarGame: action")
        happened = self.games.step(torch.tensor([index]))
        info = {name: value[0].item() for name, value in happened.items() if name != "reward"}
        ended = self.games.time >= self.length
        return self._observation(), float(happened["reward"]), False, ended, {MASK: self._mask(), **info}

    def _observation(self) -> np.ndarray:
        return self.games.observations[0].numpy()

    def _mask(self) -> np.ndarray:
        return self.games.available[0].numpy().repeat(self.config.waveforms).astype(np.int8)


register(gymnasium, "worldmodel.environments.radar.game:RadarGame")
