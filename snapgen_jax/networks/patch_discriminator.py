"""The patch discriminator (Isola et al. 2017, "Image-to-Image Translation", section 3.2.2 and appendix 6.1.2).

It gives one logit for each patch of an image, so that it judges texture and leaves the picture to the other losses.

GroupNorm takes the place of the published BatchNorm, which mixes examples and keeps running means.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.layers import Conv, GroupNorm
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard

__all__ = ["PatchDiscriminator", "PatchDiscriminatorConfig"]

_RULES: Rules = [(r"convolutions/.*/kernel$", PartitionSpec(None, None, None, "fsdp"))]

COLOURS = 3
SLOPE = 0.2  # of the leaky ReLU


@dataclasses.dataclass(frozen=True)
class PatchDiscriminatorConfig(Preset):
    """Architecture of a `PatchDiscriminator`. The defaults are the published "70 x 70": a logit sees 70 px a side.

    Attributes:
        channels: width of the first convolution; each later one doubles it, up to eightfold.
        layers: convolutions that halve the resolution.
        groups: groups of every GroupNorm.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["patch_discriminator"] = "patch_discriminator"
    channels: int = 64
    layers: int = 3
    groups: int = 32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if self.channels % self.groups:
            raise ValueError(f"PatchDiscriminatorConfig: groups={self.groups} do not divide channels={self.channels}")

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the discriminator with freshly drawn parameters."""
        return PatchDiscriminator(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, height: int = 256, width: int = 256) -> tuple[Any, ...]:
        """Shapes of the positional arguments of a `PatchDiscriminator`: images."""
        return (jax.ShapeDtypeStruct((batch, height, width, COLOURS), jnp.float32),)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"channels": 8, "layers": 1, "groups": 4},
        "shapes": {"channels": 16, "layers": 2, "groups": 8},
        "patch70": {},
    }


class PatchDiscriminator(nnx.Module):
    """Images to logits, one a patch. Build it through `networks.module.build`."""

    def __init__(self, config: PatchDiscriminatorConfig, rngs: nnx.Rngs):
        dtype, width = compute_dtype(config), config.channels
        self.conv_in = _conv(COLOURS, width, 2, dtype, rngs)
        self.convolutions, self.norms = nnx.List(), nnx.List()
        for i in range(1, config.layers + 1):
            wider = config.channels * min(2**i, 8)
            self.convolutions.append(_conv(width, wider, 2 if i < config.layers else 1, dtype, rngs))
            self.norms.append(GroupNorm(wider, config.groups, dtype=dtype))
            width = wider
        self.conv_out = _conv(width, 1, 1, dtype, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` in [-1, 1] -> logits `[B, h, w, 1]` float32, with h about `H / 2^layers - 2`."""
        x = jax.nn.leaky_relu(self.conv_in(shard(images, "image")), SLOPE)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(convolution(x)), SLOPE)
        return self.conv_out(x).astype(jnp.float32)


def _conv(in_width: int, out_width: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> Conv:
    return Conv(in_width, out_width, 4, stride=stride, padding=(1, 1), dtype=dtype, rngs=rngs)
