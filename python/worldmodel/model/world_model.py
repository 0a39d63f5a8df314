"""The world model: five functions in one differentiable loop.

    z_t ~ D(o_t)                          perception: the posterior, from this observation alone
    s_t, m_t = D(z_t, a_{t-1}, m_{t-1})   memory
    a_t ~ π(s_t)                          decision
    v_t = E(s_t)                          evaluation
    r_t, end_t, z'_{t+1} = P(s_t, a_t)    prediction: the prior, before the action enters memory

The state is a flat dict of tensors (batch, ...): "memory.*", the previous "action", encoded, and s_t as "features";
z_t as "latent" where predictions are its changes.
Where the environment gives masks of legal actions, "action_mask" is that of o_t, in imagination as decoded from z_t.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from wmkernels.nn.memory_module import forward_with_states
from worldmodel.data.actions import MASK
from worldmodel.data.batch import Batch, State
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.model.deciders import Decider
from worldmodel.model.decision import Decision, DecisionConfig
from worldmodel.model.evaluation import Evaluation, EvaluationConfig
from worldmodel.model.exploration import Exploration, ExplorationConfig
from worldmodel.model.latents import EmbeddingConfig
from worldmodel.model.memory import MemoryConfig, build_memory
from worldmodel.model.native_rollout import roll_out, roll_out_latents
from worldmodel.model.networks import polyak_update
from worldmodel.model.perception import Perception, PerceptionConfig
from worldmodel.model.policies import Policy, predicted_mask
from worldmodel.model.prediction import InverseDynamics, Predicted, Prediction, PredictionConfig
from worldmodel.model.reward_scale import RewardScale
from worldmodel.runs.fields import Checked, ConfigurationError
from worldmodel.runs.memory import machine_memory
from worldmodel.runs.migration import upgrade_weights

PREFIX = "memory."
Sampler = Callable[[Tensor], Tensor]  # distribution -> latent


@dataclasses.dataclass(frozen=True)
class WorldModelConfig(Checked):
    """The five functions, and exploration."""

    perception: PerceptionConfig = dataclasses.field(default_factory=PerceptionConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    prediction: PredictionConfig = dataclasses.field(default_factory=PredictionConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    decision: DecisionConfig = dataclasses.field(default_factory=DecisionConfig)
    exploration: ExplorationConfig = dataclasses.field(default_factory=ExplorationConfig)


@dataclasses.dataclass
class Observed:
    """Output of ``WorldModel.observe``.

    Attributes:
        features: s_t, (batch, time, features).
        latent: z_t, a posterior sample, (batch, time, *latent shape).
        posterior: parameters, (batch, time, *parameter shape).
        state: after the last step.
        states_after: the states asked for, step-major, (steps * batch, ...).
        steps: the step counts they were asked for.
    """

    features: Tensor
    latent: Tensor
    posterior: Tensor
    state: State
    states_after: State
    steps: tuple[int, ...] = ()


@dataclasses.dataclass
class Imagined:
    """Output of ``WorldModel.imagine``.

    Attributes:
        features: s_t, (batch, horizon + 1, features), with the initial state's.
        latent: (batch, horizon, *latent shape).
        actions: (batch, horizon, action width).
        rewards: divided by the reward scale, (batch, horizon).
        continues: continuation probability, (batch, horizon).
        state: after the last step.
        action_masks: predicted legal classes, bool (batch, horizon + 1, classes), with the initial state's; None
            without masks.
    """

    features: Tensor
    latent: Tensor
    actions: Tensor
    rewards: Tensor
    continues: Tensor
    state: State
    action_masks: Tensor | None = None


class WorldModel(nn.Module):
    """The five functions; ``Learner`` trains them.

    Example:
        >>> from gymnasium import spaces
        >>> from worldmodel.model.deciders import policy_sample
        >>> observations, actions = spaces.Discrete(4), spaces.Discrete(2)
        >>> specs = ObservationSpec.from_space(observations), ActionSpec.from_space(actions)
        >>> model = WorldModel(*specs, WorldModelConfig())
        >>> state, reset = model.init_state(3), torch.ones(3, dtype=torch.bool)
        >>> actions, state = model.act({"observation": torch.tensor([[0], [3], [1]])}, state, reset, policy_sample)
        >>> actions.shape
        torch.Size([3])
        >>> imagined = model.imagine(state, model.decision, horizon=5)
        >>> imagined.rewards.shape
        torch.Size([3, 5])
    """

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec, config: WorldModelConfig) -> None:
        super().__init__()
        entries = observation_spec.modalities[MASK].shape if observation_spec.action_mask else (action_spec.classes,)
        if entries != (action_spec.classes,):
            raise ConfigurationError(
                f"WorldModel: masks have {entries} entries, expected the {action_spec.classes} classes of the actions"
            )
        self.observation_spec = observation_spec
        self.action_spec = action_spec
        self.config = config
        self.perception = Perception(observation_spec, config.perception)
        width = config.memory.width
        latent = self.perception.latent
        if observation_spec.action_mask and not latent.decodes:
            raise ConfigurationError("WorldModel: legal actions are decoded, and latent.reconstruction is 0: raise it")
        self.entry = nn.Linear(latent.width + action_spec.width, config.memory.tokens * width)
        self.memory = build_memory(config.memory)
        self.prediction = Prediction(width, action_spec.width, latent, config.prediction)
        self.evaluation = Evaluation(width, config.evaluation)
        self.decision = Decision(width, action_spec, config.decision)
        explores, learned = config.exploration.bonus > 0, config.perception.latent
        if explores and isinstance(learned, EmbeddingConfig):
            raise ConfigurationError(
                f"WorldModel: exploration.bonus is {config.exploration.bonus:g}, and an embedding has the same entropy "
                "whatever it predicts, so no step would tell anything: set it to 0, or choose another latent"
            )
        self.exploration = Exploration(width, action_spec.width, latent, config.exploration) if explores else None
        self.reward_scale = RewardScale()
        self.slow_perception: Perception | None = None
        self.inverse: InverseDynamics | None = None
        if isinstance(learned, EmbeddingConfig):
            if learned.tau:
                self.slow_perception = copy.deepcopy(self.perception).requires_grad_(False)
            if learned.inverse:
                self.inverse = InverseDynamics(latent.width, action_spec, config.prediction)
        self.register_load_state_dict_pre_hook(_upgrade_names)

    @property
    def features(self) -> int:
        """Width of s_t."""
        return self.config.memory.width

    def init_state(self, batch_size: int) -> State:
        """Zeros, and every action legal."""
        like = self.entry.weight
        masks = {MASK: like.new_ones(batch_size, self.action_spec.classes, dtype=torch.bool)}
        return {
            **_prefixed(self.memory.init_state(batch_size)),
            "action": like.new_zeros(batch_size, self.action_spec.width),
            "features": like.new_zeros(batch_size, self.features),
            **self._held(like.new_zeros(batch_size, self.perception.latent.width)),
            **(masks if self.observation_spec.action_mask else {}),
        }

    def policy(self, state: State) -> Policy:
        """The policy in ``state``, of its legal actions."""
        return self.decision(state["features"], state.get(MASK))

    def observe(
        self,
        batch: Batch,
        state: State | None = None,
        states_after: Sequence[int] = (),
        sample: Sampler | None = None,
        sampled: Tensor | None = None,
    ) -> Observed:
        """Observes all steps in parallel.

        Args:
            batch: (batch, time) steps.
            state: before the first step; by default the batch's, or zeros.
            states_after: step counts, increasing from 1 to time, else ValueError.
            sample: distribution -> latent; ``Latent.sample`` if None.
            sampled: bool (batch,), the rows whose memory sees latents, as in ``imagine``, and not their means, as in
                ``act``; none by default.
        """
        bounds = [0, *states_after, batch.shape[1] + 1]
        if any(low >= high for low, high in itertools.pairwise(bounds)):
            raise ValueError(
                f"WorldModel.observe: states_after is {list(states_after)}, expected to rise from 1 to {batch.shape[1]}"
            )
        posterior = self.perception(batch.observations)
        space = self.perception.latent
        latent = (sample or space.sample)(posterior)
        embedded = space.embed_mean(posterior)  # (batch, time, latent width)
        if sampled is not None:
            embedded = torch.where(sampled[:, None, None], space.embed(latent), embedded)
        actions = self.action_spec.encode(batch.actions).to(embedded.dtype)  # (batch, time, action width)
        actions = actions * ~batch.is_last[..., None]
        state = state if state is not None else batch.state
        first = torch.zeros_like(actions[:, 0]) if state is None else state["action"].to(actions.dtype)
        previous = torch.cat([first[:, None], actions[:, :-1]], 1)
        previous = torch.where(batch.is_first[..., None], 0, previous)
        inputs = self.entry(torch.cat([embedded, previous], -1))

        elapsed = torch.where(batch.is_first, 1, batch.elapsed) if batch.irregular else None
        masks = self.observation_spec.legal(batch.observations)
        carried = None if state is None else _memory_part(state)
        stops = sorted({*states_after, batch.shape[1]})
        s, memories = forward_with_states(self.memory, inputs, stops, carried, batch.is_first, elapsed=elapsed)
        features, after = self.memory.pool(s), []
        for stop, memory in zip(stops, memories, strict=True):
            last = {"action": actions[:, stop - 1], "features": features[:, stop - 1]}
            last |= self._held(embedded[:, stop - 1])
            if masks is not None:
                last[MASK] = masks[:, stop - 1]
            after.append({**_prefixed(memory), **last})
        kept = after[: len(states_after)]
        joined = {name: torch.cat([part[name] for part in kept]) for name in after[-1]} if kept else {}
        return Observed(features, latent, posterior, after[-1], joined, tuple(states_after))

    def observe_step(
        self,
        observation: Mapping[str, Tensor],
        previous_action: Tensor,
        state: State,
        reset: Tensor,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """One step of ``observe``.

        Args:
            observation: by modality, (batch, *shape).
            previous_action: (batch, action width).
            state: after the previous step.
            reset: bool (batch,); zeroes state and previous action.
            elapsed: (batch,), steps since the previous observation; None for 1.

        Returns:
            s_t, (batch, features), and the new state.
        """
        embedded = self.perception.latent.embed_mean(self.perception(observation))
        previous = torch.where(reset[:, None], 0, previous_action)
        elapsed = None if elapsed is None else torch.where(reset, 1, elapsed)
        features, memory = self._step_memory(embedded, previous, _memory_part(state), reset, elapsed)
        after = {**_prefixed(memory), "action": previous, "features": features, **self._held(embedded)}
        mask = self.observation_spec.legal(observation)
        return features, after if mask is None else {**after, MASK: mask}

    def imagine(
        self,
        state: State,
        policy: Callable[..., Policy],
        horizon: int,
        first_action: Tensor | None = None,
        sample: Sampler | None = None,
    ) -> Imagined:
        """Differentiable rollout.

        Args:
            state: after an observation.
            policy: s_t -> distribution over actions; s_t and the mask of legal ones, where there are masks.
            horizon: at least 1, else ValueError.
            first_action: replaces the policy's, (batch, action width).
            sample: as for ``observe``.
        """
        if horizon < 1:
            raise ValueError(f"WorldModel.imagine: horizon is {horizon}, expected at least 1")

        if policy is self.decision and sample is None and MASK not in state:
            found = roll_out(self, state["features"], _memory_part(state), horizon, first_action)
            if found is not None:
                outcome = self.prediction.outcome_in_one_call(found.features[:, :-1], found.actions)
                carried = _prefixed(found.memory)
                return self._imagined(found.features, found.latents, found.actions, outcome, carried, [])

        def choose(step: int, features: Tensor, masks: list[Tensor]) -> Tensor:
            if not step and first_action is not None:
                return first_action
            return policy(features, *masks[-1:]).sample()

        return self._imagine(state, choose, horizon, sample)

    def imagine_actions(self, state: State, actions: Tensor, sample: Sampler | None = None) -> Imagined:
        """``imagine`` with ``actions`` (batch, horizon, action width); raises ValueError for other shapes."""
        self._check_actions(state, actions, "imagine_actions")
        return self._imagine(state, lambda step, *_: actions[:, step], actions.shape[1], sample)

    def imagine_latents(self, state: State, actions: Tensor, sample: Sampler | None = None) -> Tensor:
        """The latents of ``imagine_actions``, (batch, horizon, *latent shape), without rewards and continuation."""
        self._check_actions(state, actions, "imagine_latents")
        latent_space = self.perception.latent
        features, held, memory = state["features"], state.get("latent"), _memory_part(state)
        if sample in (None, latent_space.sample, latent_space.mode):
            found = roll_out_latents(self, state, memory, actions)
            if found is not None:
                return found
        sample = sample or latent_space.sample
        latents: list[Tensor] = []
        for step, action in enumerate(actions.unbind(1)):
            latents.append(sample(self.prediction.prior(features, action, held)))
            if step + 1 < actions.shape[1]:
                held = latent_space.embed(latents[-1])
                features, memory = self._step_memory(held, action, memory, None, None)
        return torch.stack(latents, 1)

    def _check_actions(self, state: State, actions: Tensor, caller: str) -> None:
        rows, width = state["features"].shape[0], self.action_spec.width
        if actions.dim() != 3 or actions.shape[1] < 1 or (actions.shape[0], actions.shape[2]) != (rows, width):
            raise ValueError(
                f"WorldModel.{caller}: actions has shape {tuple(actions.shape)}, expected (batch={rows}, horizon of at "
                f"least 1, action width={width})"
            )

    def _imagine(
        self,
        state: State,
        choose: Callable[[int, Tensor, list[Tensor]], Tensor],
        horizon: int,
        sample: Sampler | None,
    ) -> Imagined:
        """A step computes what the next one needs; what is read from all of them is computed once, for all together.

        ``choose`` gets the step, s_t, and the masks of legal actions so far.
        """
        latent_space = self.perception.latent
        sample = sample or latent_space.sample
        features, latents, actions = [state["features"]], [], []
        memory = _memory_part(state)
        held = [state["latent"]] if latent_space.residual else []
        masks = [state[MASK]] if MASK in state else []
        for step in range(horizon):
            action = choose(step, features[-1], masks)
            latent = sample(self.prediction.prior(features[-1], action, *held[-1:]))
            embedded = latent_space.embed(latent)
            after, memory = self._step_memory(embedded, action, memory, None, None)
            if held:
                held.append(embedded)
            features.append(after)
            latents.append(latent)
            actions.append(action)
            if masks:  # one that is given for observations without masks is the first step's
                masks = [*masks, self._predicted_mask(latent)] if self.observation_spec.action_mask else []
        every, chosen = torch.stack(features, 1), torch.stack(actions, 1)
        before = [torch.stack(held[:-1], 1)] if held else []
        outcome = self.prediction.outcome(every[:, :-1], chosen, *before)
        carried = {**_prefixed(memory), **self._held(embedded)}
        return self._imagined(every, torch.stack(latents, 1), chosen, outcome, carried, masks)

    def _imagined(
        self,
        features: Tensor,
        latents: Tensor,
        actions: Tensor,
        outcome: tuple[Tensor, Tensor],
        carried: State,
        masks: list[Tensor],
    ) -> Imagined:
        reward, continues = outcome
        rewards = self.prediction.reward.mean(reward)
        last = {**carried, "action": actions[:, -1], "features": features[:, -1]}
        if not masks:
            return Imagined(features, latents, actions, rewards, continues.sigmoid(), last)
        last[MASK], legal = masks[-1], torch.stack(masks, 1)
        return Imagined(features, latents, actions, rewards, continues.sigmoid(), last, legal)

    def _predicted_mask(self, latent: Tensor) -> Tensor:
        return predicted_mask(self.perception.log_odds_of_legality(latent), self.action_spec.sizes)

    def act(
        self,
        observation: Mapping[str, Tensor],
        state: State,
        reset: Tensor,
        decider: Decider,
        action_mask: Tensor | None = None,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Acts for one step, without gradients; arguments as for ``observe_step``.

        ``action_mask``, bool (batch, classes), restricts the actions of a world model whose observations have no masks.

        Returns:
            Actions (batch, *ActionSpec.shape), and the new state, which holds them.
        """
        with torch.no_grad():
            _, state = self.observe_step(observation, state["action"], state, reset, elapsed)
            chosen = decider(self, state if action_mask is None else {**state, MASK: action_mask})
            return self.action_spec.decode(chosen), {**state, "action": chosen}

    def predict(self, observed: Observed, batch: Batch) -> Predicted:
        """Predictions from every step of ``batch``, (batch, time, ...)."""
        return self.prediction(observed.features, self.action_spec.encode(batch.actions), observed.latent)

    def _step_memory(
        self, embedded: Tensor, action: Tensor, memory: State, reset: Tensor | None, elapsed: Tensor | None
    ) -> tuple[Tensor, State]:
        inputs = self.entry(torch.cat([embedded, action.to(embedded.dtype)], -1))
        s, memory = self.memory.step(inputs, memory, reset, elapsed=elapsed)
        return self.memory.pool(s), memory

    def _held(self, latent: Tensor) -> State:
        """What a state holds of z_t."""
        return {"latent": latent} if self.perception.latent.residual else {}

    @property
    def chunk_steps(self) -> int | None:
        """``Perception.chunk_steps``, also of the slow encoder."""
        return self.perception.chunk_steps

    @chunk_steps.setter
    def chunk_steps(self, steps: int | None) -> None:
        self.perception.chunk_steps = steps
        if self.slow_perception is not None:
            self.slow_perception.chunk_steps = steps

    def begin(self, batch: Batch, gather: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """Before the first update: as ``Perception.begin``. The slow encoder begins as the encoder then is."""
        self.perception.begin(batch.observations, batch.valid, gather)
        if self.slow_perception is not None and not self.slow_perception.begun:
            self.slow_perception.load_state_dict(self.perception.state_dict())

    def update_targets(self) -> None:
        """Moves the slow networks towards those that learn."""
        self.evaluation.update_target()
        learned = self.config.perception.latent
        if self.slow_perception is not None and isinstance(learned, EmbeddingConfig):
            polyak_update(self.slow_perception, self.perception, learned.tau)


def outline(
    observation_spec: ObservationSpec, action_spec: ActionSpec, config: WorldModelConfig, copies: int
) -> WorldModel:
    """A world model on the device "meta", whose weights have shapes and no memory.

    Raises ConfigurationError if ``copies`` of its weights are more than the machine's memory.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = WorldModel(observation_spec, action_spec, config)
        needed = copies * sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    except (RuntimeError, ArithmeticError) as error:  # sizes beyond 64 bits
        raise ConfigurationError(f"WorldModel: these sizes are too large: {str(error).splitlines()[0]}") from error
    if needed > machine_memory():
        raise ConfigurationError(
            f"WorldModel: {copies} copies of its weights need {needed / 2**30:,.1f} GiB, more than this machine's "
            f"{machine_memory() / 2**30:,.1f} GiB; smaller layers or spaces need less"
        )
    return model


def _upgrade_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *unused: object) -> None:
    own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    for name in own:
        del state_dict[name]
    state_dict.update(upgrade_weights(own))


def _prefixed(state: Mapping[str, Tensor]) -> State:
    return {PREFIX + name: value for name, value in state.items()}


def _memory_part(state: Mapping[str, Tensor]) -> State:
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
