"""A perceptual distance of images (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features", LPIPS).

Two images are far apart where the features of a trained VGG-16 (Simonyan and Zisserman 2015) differ, channel by channel
with learnt weights. With drawn parameters the same network is a distance of edges and textures too, which serves where
there are no weights (see `evaluation.features`); its numbers compare with each other alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.layers import Conv
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard

__all__ = ["LPIPSConfig", "PerceptualDistance"]

_RULES: Rules = [(r"convolutions/.*/kernel$", PartitionSpec(None, None, None, "fsdp"))]

COLOURS = 3
# Mean and deviation of the photographs that VGG-16 was trained on, for pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10


@dataclasses.dataclass(frozen=True)
class LPIPSConfig(Preset):
    """Architecture of a `PerceptualDistance`. The defaults are VGG-16's, of which the classifier is left out.

    Attributes:
        channels: width of each stage. Each stage but the first halves the resolution first.
        layers: convolutions of each stage; the output of the last is compared.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["lpips"] = "lpips"
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if len(self.layers) != len(self.channels):
            raise ValueError(
                f"LPIPSConfig.layers = {self.layers} has {len(self.layers)} entries and `channels` "
                f"{len(self.channels)}; give one entry a stage"
            )

    @property
    def least_size(self) -> int:
        """The least side of an image, in pixels."""
        return 2 ** (len(self.channels) - 1)

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the distance with freshly drawn parameters."""
        return PerceptualDistance(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, height: int = 64, width: int = 64) -> tuple[Any, ...]:
        """Shapes of the positional arguments of a `PerceptualDistance`: two batches of images."""
        return (jax.ShapeDtypeStruct((batch, height, width, COLOURS), jnp.float32),) * 2

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"channels": (4, 8), "layers": (1, 2)},
        "shapes": {"channels": (16, 32, 48), "layers": (1, 1, 1)},
        "vgg16": {},
    }


class Lin(nnx.Module):
    """Learnt weights of the channels of one stage, `[1, 1, C, 1]`; fresh ones count all alike."""

    def __init__(self, width: int):
        self.kernel = nnx.Param(jnp.ones((1, 1, width, 1)))

    def __call__(self, differences: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(differences * self.kernel[0, 0, :, 0], axis=-1), axis=(1, 2))


class PerceptualDistance(nnx.Module):
    """Two batches of images to their distances. Build it through `networks.module.build`."""

    def __init__(self, config: LPIPSConfig, rngs: nnx.Rngs):
        dtype, width = compute_dtype(config), COLOURS
        self.least_size = config.least_size
        self.convolutions = nnx.List()
        for channels, layers in zip(config.channels, config.layers, strict=True):
            stage = nnx.List()
            for _ in range(layers):
                stage.append(Conv(width, channels, dtype=dtype, rngs=rngs))
                width = channels
            self.convolutions.append(stage)
        self.lins = nnx.List([Lin(channels) for channels in config.channels])

    def features(self, images: jax.Array) -> list[jax.Array]:
        """`[B, H, W, 3]` in [-1, 1] -> the output of each stage, `[B, H / 2^i, W / 2^i, C_i]`, with unit norm in C."""
        x = (shard(images, "image") - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        found = []
        for i, stage in enumerate(self.convolutions):
            x = x if i == 0 else nnx.max_pool(x, (2, 2), (2, 2))
            for convolution in stage:
                x = jax.nn.relu(convolution(x))
            y = x.astype(jnp.float32)
            found.append(y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + EPSILON))
        return found

    def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
        """Distances of two batches of images, section 3 and eq. 1.

            d(x, y) = sum_l mean_hw w_l . (f_l(x) - f_l(y))^2

        Args:
            images, others: `[B, H, W, 3]` in [-1, 1].

        Returns:
            `[B]` float32.

        Raises:
            ValueError: the images are too small to be halved as often as there are stages.
        """
        if min(images.shape[1:3]) < self.least_size:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} px are too small for this distance, which takes "
                f"{self.least_size} px or more; choose fewer stages, such as the preset 'shapes', or larger images"
            )
        pairs = zip(self.features(images), self.features(others), strict=True)
        distances = [lin(jnp.square(x - y)) for lin, (x, y) in zip(self.lins, pairs, strict=True)]
        return jnp.sum(jnp.stack(distances), axis=0)
