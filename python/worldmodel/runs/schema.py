"""Meanings of a checkpoint's tensors. Format: ``docs/state_files.md``."""

import re

_PACKS = "(replay.sequences.packs.[0-9]+|segment)"
_PACK = f"{_PACKS}.{{}}"

# The first full match wins.
MEANINGS = {
    "(world_model|ema).reward_scale.count": "number of rewards other than zero in the running mean",
    "(world_model|ema).reward_scale.mean_square": "running mean of the squared rewards other than zero; the model's "
    "rewards and values, times its square root or 1 if it is 0, are in the environment's units",
    "(world_model|ema).{}.v_min": "lower end of the support of a scalar head's bins",
    "(world_model|ema).{}.v_max": "upper end of the support of a scalar head's bins",
    "(world_model|ema).perception.codecs.{}.count": "number of observations in the running mean and variance",
    "(world_model|ema).perception.codecs.{}.mean": "running mean of an observation's numbers through symlog",
    "(world_model|ema).perception.codecs.{}.variance": "running variance of an observation's numbers through symlog",
    "(world_model|ema).perception.{}": "parameter of perception: encoder, decoder, codecs",
    "(world_model|ema).entry.{}": "parameter of the projection of latent and previous action to memory's input",
    "(world_model|ema).memory.{}": "parameter of memory",
    "(world_model|ema).prediction.{}": "parameter of prediction: prior, reward, continuation",
    "(world_model|ema).evaluation.network.{}": "parameter of evaluation",
    "(world_model|ema).evaluation.target.{}": "parameter of the target network of evaluation",
    "(world_model|ema).decision.{}": "parameter of the policy",
    "learner.optimizer.state.{}.step": "Adam: updates of the parameter",
    "learner.optimizer.state.{}.exp_avg": "Adam: running mean of the parameter's gradient",
    "learner.optimizer.state.{}.exp_avg_sq": "Adam: running mean of the parameter's squared gradient",
    f"{_PACK}.slices": "slices of the array, (slices, 3): sequence chunk, first row, rows",
    f"{_PACK}.rows.zlib": "the rows compressed; the outline has their dtype and shape",
    f"{_PACKS}.observations.{{}}.rows": "observations of sequence chunks, (sum of transitions + 1, ...)",
    f"{_PACKS}.actions.rows": "actions of sequence chunks, (sum of transitions, ...)",
    f"{_PACKS}.rewards.rows": "rewards of sequence chunks in the environment's units, (sum of transitions,)",
    f"{_PACKS}.reward_mask.rows": "whether each reward is known, (sum of transitions,)",
    f"{_PACKS}.elapsed.rows": "time since the observation before, in steps, (sum of transitions + 1,)",
    f"{_PACKS}.state.{{}}.rows": "memory state before the first step of chunks with inside, (chunks, ...)",
    f"{_PACKS}.terminated.rows": "whether the last transition of each finished chunk terminated its episode",
    f"{_PACKS}.inside.rows": "whether each finished chunk begins inside an episode",
    f"{_PACKS}.burn_in.rows": "transitions at the start of each finished chunk that carry no loss",
    f"{_PACKS}.version.rows": "updates of the weights that made the state of each finished chunk",
    "replay.sequences.ids": "sequence chunks, in order: finished ones from the oldest, then unfinished ones",
    "replay.writer.(state|later).{}": "memory state of an unfinished chunk, or of those after it",
    "collector.state.{}": "memory state of the world model in each environment",
    "collector.returns": "return so far of each running episode",
    "collector.lengths": "actions so far of each running episode",
    "collector.episodes.actions.{}": "actions since the start of a running episode, in the environment's form, but of "
    "a Tuple or Dict all entries",
    "collector.episodes.observations.{}": "observation that the next action follows, in each environment",
    "collector.episodes.reset": "whether an episode begins at the next observation",
    "collector.episodes.elapsed": "time since the observation before, in steps, in each environment",
    "collector.episodes.ignored": "whether the next action only starts an episode",
    "collector.episodes.pickle": "the environments, pickled: reading it runs what is written there",
    "trainer.random.{}": "state of PyTorch's random generator",
    "trainer.source.{}": "state of the source of views",
    "token_model.starts": "views that episodes began with, as tokens: (views, places, ...)",
    "token_model.codec.codebook": "patches of pixels in [0, 1], one per class",
    "token_model.codec.used": "entries of the codebook that are in use",
    "token_model.codec.{}": "parameter of the tokens' embedding",
    "token_model.place.{}": "parameter of the map of places: gate, prior of the moves",
    "token_model.stack.{}": "parameter of the memory blocks",
    "token_model.{}": "parameter of the world model of views",
    "optimizer.state.{}.step": "Adam: updates of the parameter",
    "optimizer.state.{}.exp_avg": "Adam: running mean of the parameter's gradient",
    "optimizer.state.{}.exp_avg_sq": "Adam: running mean of the parameter's squared gradient",
    "{}.bodies.{}.view": "tokens that a body sees, (1, places, ...)",
    "{}.bodies.{}.certainty": "probability of the likeliest token when the view was imagined",
    "{}.bodies.{}.position": "row and column of a body from the start, on the torus",
    "{}.bodies.{}.state.{}": "memory state of a body",
    "{}.last_seen": "time at which each place was last in view or edited, -1 never",
}

_PATTERNS = [
    (re.compile(pattern.replace(".", r"\.").replace("{}", ".+")), meaning) for pattern, meaning in MEANINGS.items()
]


def meaning_of(name: str) -> str:
    """The meaning of a checkpoint's tensor, else empty.

    Example:
        >>> meaning_of("collector.lengths")
        'actions so far of each running episode'
        >>> meaning_of("mine.weight")
        ''
    """
    return next((meaning for pattern, meaning in _PATTERNS if pattern.fullmatch(name)), "")
