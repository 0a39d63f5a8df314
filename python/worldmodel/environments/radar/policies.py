"""Baselines of the game of channels: fixed, round robin, random, memoryless, and an oracle.

A policy takes ``RadarGames`` and returns actions; only the oracle looks at what is hidden. The others send a random
waveform.

    >>> from worldmodel.environments.radar.game import RadarGameConfig
    >>> scores = score(RadarGameConfig(look_back=(8, 8)), baselines(RadarGameConfig(look_back=(8, 8))), 32)
    >>> scores["oracle"]["hits"], scores["random"]["hits"] > 0.1
    (0.0, True)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.environments.radar.game import Policy, RadarGameConfig, RadarGames

_SETTLE = 8  # intervals after the longest look-back that are not scored
_EXPLORED = 0.2  # share of random actions while the memoryless policy counts


def fixed(games: RadarGames) -> Tensor:
    """The free channel of the lowest number."""
    return _sent(games, torch.arange(games.config.channels).expand(games.batch, -1))


def round_robin(games: RadarGames) -> Tensor:
    """The free channel that comes next from the interval's number on."""
    channels = games.config.channels
    return _sent(games, ((torch.arange(channels) - games.time) % channels).expand(games.batch, -1))


def random(games: RadarGames) -> Tensor:
    """Any free channel."""
    return _sent(games, torch.rand(games.batch, games.config.channels, generator=games.generator))


def oracle(games: RadarGames) -> Tensor:
    """The action of the highest detection probability, any of them where several are equal; it knows the jammer."""
    values = games.expected
    return (values + 1e-6 * torch.rand(values.shape, generator=games.generator)).argmax(1)


class Memoryless:
    """The free channel that was jammed least often after the same ``last_sent`` and ``last_sensed``.

    It counts in games that it plays itself, at random in the first pass, then by the counts so far.

    Args:
        config: of the games.
        passes: of counting.
        games: played at once.
        steps: of each game.
        seed: of the games.
    """

    def __init__(
        self, config: RadarGameConfig, passes: int = 4, games: int = 256, steps: int = 64, seed: int = 0
    ) -> None:
        channels = config.channels
        # By channel sent and channel jammed before, from 1, 0 for none; then by channel jammed.
        self._counts = torch.ones(channels + 1, channels + 1, channels)
        for number in range(passes):
            play = RadarGames(games, config, torch.Generator().manual_seed(seed + number))
            for _ in range(steps):
                explore = torch.rand(games, generator=play.generator) < (_EXPLORED if number else 1)
                actions = torch.where(explore, random(play), self(play))
                jammed = play.jammed
                sent, sensed, jammed = (x[jammed >= 0] for x in (play.last_sent + 1, play.last_sensed + 1, jammed))
                self._counts.index_put_((sent, sensed, jammed), torch.ones(len(jammed)), accumulate=True)
                play.step(actions)

    def __call__(self, games: RadarGames) -> Tensor:
        counts = self._counts[games.last_sent + 1, games.last_sensed + 1]
        noise = torch.rand(counts.shape, generator=games.generator)
        return _sent(games, counts / counts.sum(1, keepdim=True) + 1e-6 * noise)


def baselines(config: RadarGameConfig) -> dict[str, Policy]:
    """Policies by name, for games of ``config``."""
    return {
        "fixed": fixed,
        "round robin": round_robin,
        "random": random,
        "memoryless": Memoryless(config),
        "oracle": oracle,
    }


def score(
    config: RadarGameConfig,
    policies: Mapping[str, Policy],
    steps: int,
    games: int = 256,
    seed: int = 0,
    jammer: Policy | None = None,
) -> dict[str, dict[str, float]]:
    """Share of intervals in which the radar was hit, and mean reward, by policy, all in the same games.

    Args:
        config: of the games.
        policies: by name.
        steps: scored, after the first ones that the longest look-back and 8 more take.
        games: played at once.
        seed: of the games.
        jammer: instead of the configuration's.

    Returns:
        By name, ``hits`` and ``detections``, from 0 to 1.
    """
    found = {}
    for name, policy in policies.items():
        play = RadarGames(games, config, torch.Generator().manual_seed(seed), jammer)
        play.rollout(config.look_back[1] + _SETTLE, policy)
        happened = play.rollout(steps, policy)
        found[name] = {
            "hits": happened["hit"].double().mean().item(),
            "detections": happened["reward"].double().mean().item(),
        }
    return found


def _sent(games: RadarGames, cost: Tensor) -> Tensor:
    """The free channel of the least ``cost`` (batch, channels), with a random waveform."""
    channel = cost.double().masked_fill(~games.available, float("inf")).argmin(1)
    waveform = torch.randint(0, games.config.waveforms, (games.batch,), generator=games.generator)
    return channel * games.config.waveforms + waveform
