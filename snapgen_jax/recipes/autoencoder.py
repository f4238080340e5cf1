"""An autoencoder from nothing (Rombach et al. 2022, section 3.1 and appendix G).

    L = |x - D(z)| + LPIPS(x, D(z)) + w_kl KL(q(z|x), N(0, 1)) + a L_G(D(z)),   z ~ q(z|x) = N(mean, exp(logvar))

Differences are means over the N values of an image, and the divergence, a sum over its latent, is divided by the same
N, so that w_kl is to the differences what it is in the paper, where both are sums.
The latents' mean and deviation are measured along the way, so that a later stage gets them with zero mean and unit
variance whatever the weight of the divergence; no gradient passes there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import at_least, check
from snapgen_jax.losses.gaussian import kl_to_standard_normal
from snapgen_jax.networks.autoencoder import AutoencoderCodec, AutoencoderConfig
from snapgen_jax.networks.codec import from_uint8
from snapgen_jax.networks.module import Platform, apply, build, for_platform
from snapgen_jax.recipes._reconstruction import Reconstruction, ReconstructionConfig, ReconstructionLoss

Tree = Any
ROLE = "autoencoder"
LEAST_SHARE = 0.01  # of the newest batch in the measured statistics


@dataclasses.dataclass(frozen=True)
class AutoencoderTrainingConfig(ReconstructionConfig):
    """Training of an autoencoder; the common fields are those of `ReconstructionConfig`.

    Attributes:
        autoencoder: the network.
        kl_weight: w_kl, of the divergence of a latent from a standard normal distribution, a sum over its elements.
    """

    autoencoder: AutoencoderConfig = AutoencoderConfig.preset("shapes")
    kl_weight: float = 1e-6
    loss: ReconstructionLoss = ReconstructionLoss(l1=1.0, l2=0.0, adversarial=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, kl_weight=at_least(0))


class AutoencoderTraining(Reconstruction):
    """See the top of this file. Implements `training.recipe.Recipe`; the model is `{"autoencoder"}`."""

    Config = AutoencoderTrainingConfig
    last_layer = (ROLE, "decoder", "conv_out", "kernel")

    def __init__(self, config: AutoencoderTrainingConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: an image size does not divide by the autoencoder's reduction.
        """
        self.autoencoder, _ = build(for_platform(config.autoencoder, platform))
        self.model = {ROLE: self.autoencoder}
        super().__init__(config, platform)
        for size in config.inputs.image_sizes:
            AutoencoderCodec(self.autoencoder).latent_shape(size)

    def draw(self, networks: Tree, batch: Tree, key: jax.Array) -> Tree:
        """The images, and the noise of the latents."""
        del networks
        b, h, w, _ = batch["image"].shape
        shape = AutoencoderCodec(self.autoencoder).latent_shape((h, w))
        return {"image": from_uint8(batch["image"]), "eps": jax.random.normal(key, (b, *shape))}

    def make(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, dict[str, tuple[float, jax.Array]], Tree]:
        """The reconstruction, the divergence of the latents, and the latents."""
        made, mean, logvar = apply(self.autoencoder, networks[ROLE], drawn["image"], drawn["eps"])
        divergence = kl_to_standard_normal(mean, logvar) / math.prod(made.shape[1:])
        return made, {"kl": (self.config.kl_weight, divergence)} if self.config.kl_weight else {}, mean

    def measure(self, params: Tree, found: Tree, step: jax.Array) -> Tree:
        """Takes mean and variance of the batch into those of the latents: all batches alike at first, then the last
        hundred or so."""
        if "statistics" not in params[ROLE]:
            return params
        old = params[ROLE]["statistics"]
        share = jnp.maximum(LEAST_SHARE, 1 / (1 + step.astype(jnp.float32)))
        mean, square = jnp.mean(found, axis=(0, 1, 2)), jnp.mean(jnp.square(found), axis=(0, 1, 2))
        bias = old["bias"] + share * (mean - old["bias"])
        second = jnp.square(old["scale"]) + jnp.square(old["bias"])
        second = second + share * (square - second)
        scale = jnp.sqrt(jnp.maximum(second - jnp.square(bias), 1e-8))
        return {ROLE: {**params[ROLE], "statistics": {"bias": bias, "scale": scale}}}

    def decoders(self, networks: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """The reconstruction from the mean."""
        codec = AutoencoderCodec(self.autoencoder, networks[ROLE])
        return {ROLE: codec.decode(codec.encode(images))}

    def codec(self, params: Tree, frozen: Tree) -> AutoencoderCodec:
        """The autoencoder as it is trained so far."""
        return AutoencoderCodec(self.autoencoder, self.weights(params, frozen)[ROLE])


RECIPE = AutoencoderTraining
