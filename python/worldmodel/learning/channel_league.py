"""A radar and jammers that learn in turn, the radar from games against a pool of past jammers as well.

Against the newest jammer alone, a radar forgets what earlier ones did, and the two may go round in a cycle; a best
response to a mixture of all that came before does not (fictitious play, Brown 1951; leagues of past players, Vinyals et
al. 2019). How far a radar may be exploited is what a jammer reaches that is trained against it alone, from nothing.
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch

from worldmodel.environments.radar.game import RadarGameConfig, RadarGames
from worldmodel.environments.radar.policies import score
from worldmodel.learning.channel_agent import ChannelAgent, JammerPlayer, RadarPlayer, jammer_agent, radar_agent
from worldmodel.learning.channel_trainer import ChannelLearner, ChannelTrainConfig, play
from worldmodel.runs.fields import Checked, Limit, Share


@dataclasses.dataclass(frozen=True)
class LeagueConfig(Checked):
    """Of a league.

    Attributes:
        train: both sides' networks and learning; ``updates`` and ``minutes`` are not used.
        turn: updates of a side, before the other's turn.
        past: share of the radar's games against any jammer of the pool; the others are against the newest.
    """

    train: ChannelTrainConfig = ChannelTrainConfig()  # noqa: RUF009
    turn: Limit = 40
    past: Share = 0.5


class League:
    """A radar, a jammer that learns, and the pool of its past selves.

    The first of the pool is the game's own jammer, None. A round is a turn of the jammer, which joins the pool as it is
    then, and one of the radar.

    Attributes:
        radar: that learns.
        jammer: that learns.
        pool: past jammers, frozen; None for the game's own.

    Example:
        >>> train = ChannelTrainConfig(batch_size=2, steps=4)
        >>> league = League(RadarGameConfig(channels=3), LeagueConfig(train, turn=1))
        >>> league.round()
        >>> len(league.pool)
        2
    """

    def __init__(self, game: RadarGameConfig, config: LeagueConfig) -> None:
        torch.manual_seed(config.train.seed)
        self.game, self.config = game, config
        self.generator = torch.Generator().manual_seed(config.train.seed)
        self.radar, self.jammer = radar_agent(game, config.train.agent), jammer_agent(game, config.train.agent)
        self.pool: list[ChannelAgent | None] = [None]
        self._learners = [ChannelLearner(agent, config.train) for agent in (self.radar, self.jammer)]

    def round(self) -> None:
        """A turn of each side."""
        radar, jammer = self._learners
        turn = range(self.config.turn)
        for _ in turn:
            respond(jammer, self.radar, self.game, self.generator)
        self.pool.append(copy.deepcopy(self.jammer).requires_grad_(False))
        for _ in turn:
            games = RadarGames(self.config.train.batch_size, self.game, self.generator, player(self._opponent()))
            played, _ = play(games, self.config.train.steps, RadarPlayer(self.radar, greedy=False))
            radar.update(played)

    def _opponent(self) -> ChannelAgent | None:
        past, which = torch.rand(2, generator=self.generator).tolist()
        return self.pool[int(which * len(self.pool))] if past < self.config.past else self.pool[-1]


def player(jammer: ChannelAgent | None) -> JammerPlayer | None:
    """Plays a jammer of a pool, sampled."""
    return None if jammer is None else JammerPlayer(jammer, greedy=False)


def respond(learner: ChannelLearner, radar: ChannelAgent, game: RadarGameConfig, generator: torch.Generator) -> None:
    """One update of a jammer in games against ``radar``."""
    train = learner.config
    games = RadarGames(train.batch_size, game, generator, player(learner.agent))
    _, played = play(games, train.steps, RadarPlayer(radar, greedy=False))
    learner.update(played)


def best_response(radar: ChannelAgent, game: RadarGameConfig, train: ChannelTrainConfig, updates: int) -> ChannelAgent:
    """A jammer trained from nothing, by ``train.seed``, against ``radar`` alone."""
    torch.manual_seed(train.seed)
    generator = torch.Generator().manual_seed(train.seed)
    jammer = jammer_agent(game, train.agent)
    learner = ChannelLearner(jammer, train)
    for _ in range(updates):
        respond(learner, radar, game, generator)
    return jammer


def hits(
    radar: ChannelAgent,
    jammers: Sequence[ChannelAgent | None],
    game: RadarGameConfig,
    steps: int,
    games: int = 256,
    seed: int = 0,
) -> list[float]:
    """Share of ``steps`` intervals in which each jammer hits the radar, both sampled, in games that begin alike."""
    policy = {"radar": RadarPlayer(radar, greedy=False)}
    scores = [score(game, policy, steps, games, seed, player(jammer)) for jammer in jammers]
    return [found["radar"]["hits"] for found in scores]
