"""Meanings of a checkpoint's tensors. Format: ``docs/state_files.md``."""

import re

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
    "replay.chunks.observations.{}": "observations of all chunks, (sum of length + 1, ...)",
    "replay.chunks.actions": "actions of all chunks, (sum of length, ...)",
    "replay.chunks.rewards": "rewards of all chunks in the environment's units, (sum of length,)",
    "replay.chunks.reward_mask": "whether each reward is known, (sum of length,)",
    "replay.chunks.elapsed": "time since the observation before, in steps, (sum of length + 1,)",
    "replay.chunks.states.{}": "memory state before the first step of each chunk with inside, (number of them, ...)",
    "replay.chunks.length": "transitions of each chunk",
    "replay.chunks.terminated": "whether the last transition of each chunk terminated its episode",
    "replay.chunks.inside": "whether each chunk begins inside an episode",
    "replay.chunks.burn_in": "transitions at the start of each chunk that carry no loss",
    "replay.chunks.version": "updates of the weights that made the state of each chunk",
    "replay.writer.observations.{}": "observations of the unfinished chunks, (environments, window, ...)",
    "replay.writer.(state|next_state).{}": "memory state of an unfinished chunk, or of the one after it",
    "replay.writer.length": "transitions of each unfinished chunk",
    "replay.writer.episode_step": "transitions of each running episode",
    "replay.writer.repeated": "transitions of each unfinished chunk that the chunk before carries the loss of",
    "replay.writer.{}": "field of the unfinished chunk of each environment, (environments, steps, ...)",
    "collector.state.{}": "memory state of the world model in each environment",
    "collector.returns": "return so far of each running episode",
    "collector.lengths": "actions so far of each running episode",
    "collector.episodes.actions.{}": "actions since the start of a running episode, in the environment's form",
    "collector.episodes.observations.{}": "observation that the next action follows, in each environment",
    "collector.episodes.reset": "whether an episode begins at the next observation",
    "collector.episodes.ignored": "whether the next action only starts an episode",
    "collector.episodes.pickle": "the environments, pickled: reading it runs what is written there",
    "trainer.random.{}": "state of PyTorch's random generator",
}

_PATTERNS = [
    (re.compile(pattern.replace(".", r"\.").replace("{}", ".+")), meaning) for pattern, meaning in MEANINGS.items()
]


def meaning_of(name: str) -> str:
    """The meaning of a checkpoint's tensor, else empty.

    Example:
        >>> meaning_of("replay.chunks.length")
        'transitions of each chunk'
        >>> meaning_of("mine.weight")
        ''
    """
    return next((meaning for pattern, meaning in _PATTERNS if pattern.fullmatch(name)), "")
