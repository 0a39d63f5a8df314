"""A policy that imitates: what is observed, such as pictures and a task -> a density of the next action.

    z_t = Enc(picture_t)                            perception, a variational autoencoder of the pictures
    s_t, m_t = D([z_t, task, joints], m_{t-1})      memory, three recurrent layers with skip connections
    a_t ~ p(a | s_t)                                an autoregressive mixture density

After Rahmatizadeh et al. 2018, arXiv 1707.02920, who clone the behaviour of a robot's demonstrator from pictures.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldmodel.data.batch import State
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.model.blocks import ScanBlock
from worldmodel.model.codecs import ImageCodec, StandardisedCodec, build_codec
from worldmodel.model.latents import GaussianConfig
from worldmodel.model.memory import MemoryConfig, build_memory
from worldmodel.model.mixture_density import MeanConfig, MixtureDensityConfig
from worldmodel.model.networks import mlp
from worldmodel.model.perception import Perception, PerceptionConfig
from worldmodel.runs.fields import Checked, ConfigurationError, Size

_PICTURES = PerceptionConfig(
    GaussianConfig(size=64, min_std=0.01), hidden=256, image_channels=32, image_stride=4, upsampling="transposed"
)
_QUIET = -3.0  # before softplus: a deviation of about 0.05


@dataclasses.dataclass(frozen=True)
class ImitationConfig(Checked):
    """A policy's networks.

    Attributes:
        pictures: perception of all modalities that are pictures; its latents are normal. Not used without pictures.
        hidden: width of the layer in which latents, task and joints meet.
        memory: blocks with skip connections, by default three selective scans; the source has LSTM layers.
        head: density of actions.
    """

    pictures: PerceptionConfig = _PICTURES
    hidden: Size = 256
    memory: MemoryConfig = MemoryConfig(width=128, blocks=(ScanBlock(),) * 3)  # noqa: RUF009
    head: MixtureDensityConfig | MeanConfig = MixtureDensityConfig()  # noqa: RUF009


class ImitationPolicy(nn.Module):
    """A density of actions from a memory of observations.

    Args:
        observation_spec: pictures, and what else is observed.
        action_spec: of numbers.
        config: of the networks.

    Raises:
        ConfigurationError: actions other than numbers, or latents that are not normal.

    Attributes:
        perception: of the pictures; None without.

    Example:
        >>> from gymnasium import spaces
        >>> seen = spaces.Dict(picture=spaces.Box(0, 255, (32, 32, 3), "uint8"), task=spaces.Discrete(4))
        >>> specs = ObservationSpec.from_space(seen), ActionSpec.from_space(spaces.Box(-1, 1, (3,)))
        >>> policy = ImitationPolicy(*specs)
        >>> observations = {"picture": torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "task": torch.tensor([[0], [3]])}
        >>> actions, state = policy.act(observations, policy.init_state(2))
        >>> actions.shape
        torch.Size([2, 3])
    """

    def __init__(
        self, observation_spec: ObservationSpec, action_spec: ActionSpec, config: ImitationConfig | None = None
    ) -> None:
        super().__init__()
        config = config or ImitationConfig()
        self.observation_spec, self.action_spec, self.config = observation_spec, action_spec, config
        modalities = observation_spec.modalities
        pictures = {name: modality for name, modality in modalities.items() if modality.kind == "image"}
        if action_spec.kind != "continuous":
            raise ConfigurationError(f"ImitationPolicy: actions are {action_spec.kind}, expected numbers, of a Box")
        if not isinstance(config.pictures.latent, GaussianConfig):
            raise ConfigurationError(
                f"ImitationPolicy: latents are {config.pictures.latent.kind}, expected gaussian ones, of an autoencoder"
            )
        self.perception = Perception(ObservationSpec(pictures), config.pictures) if pictures else None
        if self.perception is not None:  # of noise as large as the latents, a decoder learns nothing
            cast(nn.Linear, self.perception.encoder[-1]).bias.data[config.pictures.latent.size :] = _QUIET
        self.others = [name for name in modalities if name not in pictures]
        codecs = [build_codec(modalities[name], config.hidden, 1) for name in self.others]
        for codec in codecs:
            codec.drop_decoder()
        self.codecs = nn.ModuleList(codecs)
        inputs = (config.pictures.latent.size if pictures else 0) + sum(codec.width for codec in codecs)
        self.entry = mlp(inputs, config.hidden, 1, config.memory.width)
        self.memory = build_memory(config.memory)
        self.head = config.head.build(config.memory.width, action_spec.shape[0])

    def init_state(self, batch_size: int) -> State:
        return self.memory.init_state(batch_size)

    def forward(
        self, observations: Mapping[str, Tensor], state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Observations (batch, time, *shape), ``reset`` bool (batch, time), true where an episode begins.

        Returns:
            features s_t, (batch, time, width), for ``head``; the pictures' posteriors, None without pictures; and the
            state.
        """
        posterior = self._posterior(observations)
        features, state = self.memory(self._entry(posterior, observations), state, reset)
        return self.memory.pool(features), posterior, state

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Of what draws pictures from latents, which no action depends on."""
        if self.perception is None:
            return []
        images = [cast(ImageCodec, codec) for codec in self.perception.codecs]
        parts = [self.perception.decoder, *(part for image in images for part in (image.expand, image.decoder))]
        return [parameter for part in parts for parameter in part.parameters()]

    @torch.no_grad()
    def act(
        self,
        observations: Mapping[str, Tensor],
        state: State,
        is_first: Tensor | None = None,
        temperature: float = 0.0,
    ) -> tuple[Tensor, State]:
        """Actions of one step, (batch, entries) from -1 to 1, sampled as ``MixtureDensity.sample``, and the state.

        Args:
            observations: (batch, *shape).
            state: of the step before.
            is_first: bool (batch,), where the state is not to be used: an episode begins.
            temperature: of the samples' deviation.
        """
        entered = self._entry(self._posterior(observations), observations)
        features, state = self.memory.step(entered, state, is_first)
        return self.head.sample(self.memory.pool(features), temperature).clamp(-1, 1), state

    @torch.no_grad()
    def update_statistics(self, observations: Mapping[str, Tensor]) -> None:
        """Of the numbers that are standardised, from observations (batch, time, *shape)."""
        for name, codec in self._codecs():
            if isinstance(codec, StandardisedCodec):
                codec.update(codec.moments(observations[name].flatten(0, 1))[None])

    def _posterior(self, observations: Mapping[str, Tensor]) -> Tensor | None:
        return None if self.perception is None else self.perception(observations)

    def _entry(self, posterior: Tensor | None, observations: Mapping[str, Tensor]) -> Tensor:
        parts = [] if posterior is None or self.perception is None else [self.perception.latent.embed_mean(posterior)]
        for name, codec in self._codecs():
            modality = observations[name]
            lead = modality.shape[: modality.dim() - len(self.observation_spec.modalities[name].shape)]
            parts.append(codec.encode(modality.flatten(0, len(lead) - 1)).view(*lead, -1))
        return self.entry(torch.cat(parts, -1))

    def _codecs(self) -> Iterator[tuple[str, Any]]:
        return zip(self.others, self.codecs, strict=True)
