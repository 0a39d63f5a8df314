"""Training of an ``ImitationPolicy`` on recorded episodes: behaviour cloning, with the pictures reconstructed beside.

No expert is asked for what was not recorded. The gradient of the actions' density runs through the memory into the
encoder; a reconstruction of some of the pictures keeps in z_t what the few actions that are recorded do not tell.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from worldmodel.data.batch import Batch
from worldmodel.data.datasets import RecordedSource
from worldmodel.data.selection import SelectedEpisodes, open_episodes
from worldmodel.data.source import Source
from worldmodel.learning.timed import ScheduledConfig, Timed, scheduled_step, set_gradients
from worldmodel.model.imitation import ImitationConfig, ImitationPolicy
from worldmodel.model.vae_gan import VaeGan
from worldmodel.runs.fields import Bounds, ConfigurationError, Size, Weight

Reconstruction = Literal["vae_gan", "vae", "none"]


@dataclasses.dataclass(frozen=True)
class ImitationTrainConfig(ScheduledConfig):
    """How a policy is trained.

    Attributes:
        policy: its networks.
        batch_size: rows per update.
        window: steps of a row.
        reconstruction: of pictures, by a discriminator's features, by squared error of pixels, or none: without
            pictures.
        pictures: per update that are reconstructed.
        reconstruction_weight: of that loss, per picture, beside nats per action, for the encoder.
        kl: weight of the latents' KL from a standard normal, beside the squared error of pixels.
        features: weight of the error of the discriminator's features, beside that of pixels.
        adversarial: weight of deceiving the discriminator, beside the error of pixels.

    The others are of ``ScheduledConfig``; policy, decoder and discriminator have an optimizer each.
    """

    policy: ImitationConfig = ImitationConfig()  # noqa: RUF009
    batch_size: Size = 16
    window: Annotated[int, Bounds(2, 2**20)] = 32
    reconstruction: Reconstruction = "vae_gan"
    pictures: Size = 32
    reconstruction_weight: Weight = 0.01
    kl: Weight = 0.01
    features: Weight = 0.1
    adversarial: Weight = 0.2


def demonstrations(path: Path, config: ImitationTrainConfig) -> RecordedSource:
    """Batches of recorded episodes, as ``train --data`` reads them; the raises of ``open_episodes`` as well."""
    return RecordedSource(SelectedEpisodes(open_episodes(path)), config.batch_size, config.window, config.seed)


class ImitationTrainer(Timed):
    """Trains on batches of a source.

    Args:
        config: of the training.
        source: such as ``demonstrations``.

    Raises:
        ConfigurationError: as ``ImitationPolicy``, or a reconstruction without pictures.

    Attributes:
        policy: what is trained.
        updates: so far.
        seconds: of training, by ``config.clock``.
    """

    def __init__(self, config: ImitationTrainConfig, source: Source) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.config, self.source = config, source
        self.policy = ImitationPolicy(source.observation_spec, source.action_spec, config.policy)
        perception = self.policy.perception
        if perception is None and config.reconstruction != "none":
            raise ConfigurationError(
                f"ImitationTrainer: reconstruction is {config.reconstruction!r}, and no picture is observed: expected "
                "'none'"
            )
        decoder = self.policy.decoder_parameters()
        drawing = {id(parameter) for parameter in decoder}
        acting = [parameter for parameter in self.policy.parameters() if id(parameter) not in drawing]
        # Apart, as the gradient of an exact action's density is a hundred times that of a picture.
        self.optimizers = {"policy": self._optimizer(acting)}
        if config.reconstruction != "none":
            self.optimizers["decoder"] = self._optimizer(decoder)
        self.vae_gan: VaeGan | None = None
        if config.reconstruction == "vae_gan" and perception is not None:
            pictures = config.policy.pictures
            self.vae_gan = VaeGan(perception, pictures.image_channels, pictures.image_stride)
            self.optimizers["discriminator"] = self._optimizer(list(self.vae_gan.discriminator.parameters()))

    def _optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        config = self.config
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses of the policy by name, weighted, and the discriminator's, if there is one."""
        features, posterior, _ = self.policy(batch.observations, batch.state, batch.is_first)
        acts = batch.valid & ~batch.is_last
        losses = {"action": self.policy.head.loss(features[acts], batch.actions[acts]).mean()}
        config, perception = self.config, self.policy.perception
        if config.reconstruction == "none" or perception is None or posterior is None:
            return losses, None
        chosen = torch.randperm(acts.numel())[: config.pictures]
        posterior = posterior.flatten(0, 1)[chosen]
        pictures = {name: batch.observations[name].flatten(0, 1)[chosen] for name in perception.names}
        prior = torch.stack([torch.zeros_like(posterior[..., 0, :]), torch.ones_like(posterior[..., 1, :])], -2)
        losses["kl"] = config.reconstruction_weight * config.kl * perception.latent.kl(posterior, prior).mean()
        # The decoder gets the whole gradient, the encoder its share beside that of the actions.
        latent = perception.latent.sample(posterior)
        latent = latent.detach().lerp(latent, config.reconstruction_weight)
        if self.vae_gan is None:
            return losses | {"pixels": perception.reconstruction_loss(latent, pictures).mean()}, None
        found, own = self.vae_gan.losses(latent, pictures)
        found["features"], found["adversarial"] = (
            config.features * found["features"],
            config.adversarial * found["adversarial"],
        )
        return losses | found, own

    def iterate(self) -> dict[str, float]:
        """An update; returns its losses.

        Raises:
            ArithmeticError: a loss or gradient that is not finite.
            RunError: recorded values that the specs do not have, with episode and step.
        """
        with self.timing():
            batch, _ = self.source.sample(self.updates)
            self.policy.update_statistics(batch.observations)
            losses, own = self.losses(batch)
            metrics = {name: float(loss.detach()) for name, loss in losses.items()}
            set_gradients(list(self.policy.parameters()), sum(losses.values(), torch.zeros(())))
            if own is not None and self.vae_gan is not None:
                metrics["discriminator"] = float(own.detach())
                set_gradients(list(self.vae_gan.discriminator.parameters()), own)
            for name, optimizer in self.optimizers.items():
                metrics[f"{name}_grad_norm"] = scheduled_step(optimizer, self.config, self.updates, self.progress, name)
            self.updates += 1
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """For ``Run.save``: parts by name."""
        saved: dict[str, Any] = {"policy": self.policy.state_dict()}
        if self.vae_gan is not None:
            saved["discriminator"] = self.vae_gan.discriminator.state_dict()
        saved |= {f"{name}_optimizer": optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        trainer = {"updates": self.updates, "seconds": self.seconds, "random": {"torch": torch.get_rng_state()}}
        return saved | {"trainer": trainer | {"source": self.source.state_dict()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(saved["policy"])
        if self.vae_gan is not None:
            self.vae_gan.discriminator.load_state_dict(saved["discriminator"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[f"{name}_optimizer"])
        self.updates, self.seconds = int(saved["trainer"]["updates"]), float(saved["trainer"]["seconds"])
        torch.set_rng_state(saved["trainer"]["random"]["torch"])
        self.source.load_state_dict(saved["trainer"]["source"])
