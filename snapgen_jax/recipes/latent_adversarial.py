"""Adversarial step distillation from stored latents and text states. See `adversarial` and `latent_distillation`."""

from __future__ import annotations

import dataclasses

from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.recipes.adversarial import FewStep, FewStepConfig
from snapgen_jax.recipes.flow_matching import SamplingConfig
from snapgen_jax.recipes.latent_distillation import LatentDistillation, LatentDistillationConfig


@dataclasses.dataclass(frozen=True)
class LatentAdversarialConfig(FewStepConfig, LatentDistillationConfig):
    """Step distillation on latents: the fields of `latent_distillation` and of `adversarial.FewStepConfig`."""

    feature_weight: float = 0.0
    discriminator: DiscriminatorConfig = DiscriminatorConfig.preset("t2i")
    sampling: SamplingConfig = SamplingConfig(steps=4, guidance=1.0, method="renoise", shift=3.0)


class LatentAdversarial(FewStep, LatentDistillation):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = LatentAdversarialConfig


RECIPE = LatentAdversarial
