"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022, appendix G).

At the size of Stable Diffusion 3, 8 x 8 pixels become one latent pixel of 16 channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.attention_kernels import attend_by
from snapgen_jax.networks.layers import Conv, GroupNorm, Linear, upsample_nearest
from snapgen_jax.networks.module import Network, Preset, Rules, Tree, apply, compute_dtype, frozen_spec, shard
from snapgen_jax.networks.sizes import reduced
from snapgen_jax.networks.tiling import decode_tiled

__all__ = ["Autoencoder", "AutoencoderCodec", "AutoencoderConfig"]

# Convolutions are split over their outputs alone: where some also sum over channels that `tensor` splits, XLA's CPU
# compiler (jax 0.10.2) gives wrong numbers on a mesh of data, fsdp and tensor.
_SPLIT = ("tensor", "fsdp")
_RULES: Rules = [
    (r"(conv_in|conv_1|conv_2|skip|sampler)/kernel$", PartitionSpec(None, None, None, _SPLIT)),
    (r"attention/(query|key|value)/kernel$", PartitionSpec(None, _SPLIT)),
    (r"attention/out/kernel$", PartitionSpec(_SPLIT, None)),
]

_FOUR_CHANNELS: dict[str, Any] = {"latent_channels": 4, "shift": 0.0, "quantisation": "convolutions"}
COLOURS = 3
EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Preset):
    """Architecture of an `Autoencoder`. The defaults are Stable Diffusion 3's, 83,819,683 parameters.

    Attributes:
        channels: width of each stage, from the highest resolution to the lowest. Each stage but the last halves it.
        layers: residual blocks of a stage of the encoder; the decoder has one more.
        latent_channels: channels of a latent.
        groups: groups of every GroupNorm.
        scale, shift: latents are `(mean - shift) * scale`, which gives them about zero mean and unit variance.
        quantisation: a 1x1 convolution follows the encoder and another precedes the decoder ("convolutions"), as in the
            autoencoders of Stable Diffusion before the third; or there are none.
        normalisation: "constant" for that; "measured" for mean and deviation of each channel, parameters that whoever
            trains the autoencoder measures and no gradient moves (as in FLUX.2).
        tile: side of the largest latent that is decoded whole; larger ones are decoded in tiles of this side.
        tile_overlap: least overlap of neighbouring tiles, in latent pixels.
        attention_chunk: queries at a time in the attention at the lowest resolution.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["autoencoder"] = "autoencoder"
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 16
    groups: int = 32
    scale: float = 1.5305
    shift: float = 0.0609
    quantisation: Literal["none", "convolutions"] = "none"
    normalisation: Literal["constant", "measured"] = "constant"
    tile: int = 128
    tile_overlap: int = 32
    attention_chunk: int = 2048
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if wrong := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"AutoencoderConfig: groups={self.groups} do not divide stages of {wrong} channels")
        if not 0 <= self.tile_overlap < self.tile:
            raise ValueError(f"AutoencoderConfig: tile_overlap={self.tile_overlap} must be below tile={self.tile}")

    @property
    def reduction(self) -> int:
        """Side, in pixels, of the square that becomes one latent pixel."""
        return 2 ** (len(self.channels) - 1)

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the autoencoder with freshly drawn parameters."""
        return Autoencoder(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, height: int = 256, width: int = 256) -> tuple[Any, ...]:
        """Shapes of the positional arguments of an `Autoencoder`: images."""
        return (jax.ShapeDtypeStruct((batch, height, width, COLOURS), jnp.float32),)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"channels": (8, 16), "layers": 1, "latent_channels": 4, "groups": 4, "tile": 8, "tile_overlap": 2},
        "shapes": {
            "channels": (32, 48, 64),
            "layers": 1,
            "latent_channels": 8,
            "groups": 16,
            "normalisation": "measured",
        },
        "sd1": {**_FOUR_CHANNELS, "scale": 0.18215},  # of Stable Diffusion 1 and 2, and of DiT
        "sdxl": {**_FOUR_CHANNELS, "scale": 0.13025},
        "sd3": {},
    }


class ResidualBlock(nnx.Module):
    """Twice GroupNorm, SiLU and a 3x3 convolution, around a skip that is 1x1 where the width changes."""

    def __init__(self, config: AutoencoderConfig, in_width: int, out_width: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.norm_1 = GroupNorm(in_width, config.groups, epsilon=EPSILON, dtype=dtype)
        self.conv_1 = Conv(in_width, out_width, dtype=dtype, rngs=rngs)
        self.norm_2 = GroupNorm(out_width, config.groups, epsilon=EPSILON, dtype=dtype)
        self.conv_2 = Conv(out_width, out_width, dtype=dtype, rngs=rngs)
        self.skip = Conv(in_width, out_width, 1, dtype=dtype, rngs=rngs) if in_width != out_width else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_1(jax.nn.silu(self.norm_1(x)))
        h = self.conv_2(jax.nn.silu(self.norm_2(h)))
        return h + (x if self.skip is None else self.skip(x))


class PixelAttention(nnx.Module):
    """Self-attention with one head over all pixels, with a GroupNorm before and a residual."""

    def __init__(self, config: AutoencoderConfig, width: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.norm = GroupNorm(width, config.groups, epsilon=EPSILON, dtype=dtype)
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.chunk = config.attention_chunk

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        pixels = self.norm(x).reshape(b, h * w, c)
        q, k, v = (part(pixels) for part in (self.query, self.key, self.value))
        if h * w <= self.chunk:  # without an axis for the one head, over which TFLite's converter stumbles
            scores = jnp.einsum("blc,bmc->blm", q * c**-0.5, k, preferred_element_type=jnp.float32)
            y = jnp.einsum("blm,bmc->blc", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
        else:
            y = attend_by("chunked", q[:, :, None], k[:, :, None], v[:, :, None], chunk=self.chunk)
        return x + self.out(y.reshape(b, h * w, c)).reshape(b, h, w, c)


class Middle(nnx.Module):
    """The lowest resolution: attention between two residual blocks."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        width = config.channels[-1]
        self.residual_1 = ResidualBlock(config, width, width, rngs)
        self.attention = PixelAttention(config, width, rngs)
        self.residual_2 = ResidualBlock(config, width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.residual_2(self.attention(self.residual_1(x)))


class Stage(nnx.Module):
    """Residual blocks of one resolution, then a convolution that halves the resolution, or doubles it first.

    Halving pads one row below and one column on the right, as the published weights were trained.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        in_width: int,
        out_width: int,
        layers: int,
        sampler: Literal["down", "up", "none"],
        rngs: nnx.Rngs,
    ):
        dtype = compute_dtype(config)
        self.residuals = nnx.List(
            [ResidualBlock(config, out_width if i else in_width, out_width, rngs) for i in range(layers)]
        )
        self.doubles = sampler == "up"
        match sampler:
            case "down":
                self.sampler = Conv(out_width, out_width, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)
            case "up":
                self.sampler = Conv(out_width, out_width, dtype=dtype, rngs=rngs)
            case "none":
                self.sampler = None

    def __call__(self, x: jax.Array) -> jax.Array:
        for residual in self.residuals:
            x = residual(x)
        if self.sampler is not None:
            x = self.sampler(upsample_nearest(x) if self.doubles else x)
        return shard(x, "image")


class Encoder(nnx.Module):
    """Images to the moments of a latent Gaussian."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        dtype, channels = compute_dtype(config), config.channels
        self.conv_in = Conv(COLOURS, channels[0], dtype=dtype, rngs=rngs)
        self.stages, width = nnx.List(), channels[0]
        for i, channel in enumerate(channels):
            sampler = "down" if i < len(channels) - 1 else "none"
            self.stages.append(Stage(config, width, channel, config.layers, sampler, rngs))
            width = channel
        self.middle = Middle(config, rngs)
        self.norm_out = GroupNorm(width, config.groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = Conv(width, 2 * config.latent_channels, dtype=dtype, rngs=rngs)
        self.quantisation = _quantisation(config, 2 * config.latent_channels, rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, H, W, 3]` -> mean and log variance, each `[B, h, w, c]` float32."""
        x = self.conv_in(shard(images, "image"))
        for stage in self.stages:
            x = stage(x)
        moments = self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))
        if self.quantisation is not None:
            moments = self.quantisation(moments)
        moments = moments.astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)


class Decoder(nnx.Module):
    """Latents, before normalisation, to images."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        dtype, channels = compute_dtype(config), config.channels[::-1]
        self.quantisation = _quantisation(config, config.latent_channels, rngs)
        self.conv_in = Conv(config.latent_channels, channels[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(config, rngs)
        self.stages, width = nnx.List(), channels[0]
        for i, channel in enumerate(channels):
            sampler = "up" if i < len(channels) - 1 else "none"
            self.stages.append(Stage(config, width, channel, config.layers + 1, sampler, rngs))
            width = channel
        self.norm_out = GroupNorm(width, config.groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = Conv(width, COLOURS, dtype=dtype, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """`[B, h, w, c]` -> `[B, H, W, 3]` float32."""
        z = shard(z, "image")
        x = self.middle(self.conv_in(z if self.quantisation is None else self.quantisation(z)))
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)


def _quantisation(config: AutoencoderConfig, width: int, rngs: nnx.Rngs) -> Conv | None:
    """The 1x1 convolution of one side, which is left of the codebook that the first such autoencoders had."""
    if config.quantisation == "none":
        return None
    return Conv(width, width, 1, dtype=compute_dtype(config), rngs=rngs)


class Statistics(nnx.Module):
    """Mean and standard deviation of each channel of the latents, which `encode` takes out and `decode` puts back."""

    def __init__(self, width: int):
        self.bias, self.scale = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.ones(width))

    def encode(self, z: jax.Array) -> jax.Array:
        return (z - self.bias[...]) / self.scale[...]

    def decode(self, latents: jax.Array) -> jax.Array:
        return latents * self.scale[...] + self.bias[...]


class Autoencoder(nnx.Module):
    """Encoder and decoder. Build it through `networks.module.build`; `AutoencoderCodec` makes it a `Codec`."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.statistics = Statistics(config.latent_channels) if config.normalisation == "measured" else None

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the latents of `[B, H, W, 3]` images in [-1, 1], before normalisation."""
        return self.encoder(images)

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Normalised latents `[B, h, w, c]` of `[B, H, W, 3]` images in [-1, 1]: the mean, or with a key a draw."""
        z, logvar = self.moments(images)
        if key is not None:
            z = z + jnp.exp(0.5 * logvar) * jax.random.normal(key, z.shape)
        if self.statistics is not None:
            return self.statistics.encode(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` of normalised latents `[B, h, w, c]`; in tiles where a side exceeds `config.tile`."""
        config = self.config
        z = latents / config.scale + config.shift if self.statistics is None else self.statistics.decode(latents)
        return decode_tiled(self.decoder, z, tile=config.tile, overlap=config.tile_overlap)

    def __call__(self, images: jax.Array, eps: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What training needs of `[B, H, W, 3]` images: the reconstruction, the mean and the log variance; the latents
        are not normalised on the way. With noise `[B, h, w, c]` it is the reconstruction of a draw, else of the mean.
        """
        mean, logvar = self.moments(images)
        z = mean if eps is None else mean + jnp.exp(0.5 * logvar) * eps
        return self.decoder(z), mean, logvar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoencoderCodec:
    """A `Codec` of an autoencoder and its parameters; a pytree, so that the parameters stay arguments of a step."""

    network: Network = dataclasses.field(metadata={"static": True})
    params: Tree = None

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`[..., H, W, 3]` -> `[..., h, w, c]`: the mean, or with a key a draw from the posterior.

        Raises:
            ValueError: a side is no multiple of the reduction.
        """
        *lead, height, width, _ = images.shape
        shape = self.latent_shape((height, width))
        flat = images.reshape(-1, height, width, COLOURS)
        return apply(self.network, self.params, flat, key, method="encode").reshape(*lead, *shape)

    def decode(self, latents: jax.Array) -> jax.Array:
        """`[..., h, w, c]` -> `[..., H, W, 3]`."""
        *lead, h, w, c = latents.shape
        images = apply(self.network, self.params, latents.reshape(-1, h, w, c), method="decode")
        return images.reshape(*lead, *images.shape[1:])

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c). Raises where a side is no multiple of the reduction."""
        config = self.network.config
        return (*reduced(image_size, config.reduction), config.latent_channels)

    def networks(self) -> dict[str, Network]:
        """`{"": the autoencoder}`: its parameters are the whole of `spec`."""
        return {"": self.network}

    def spec(self) -> Tree:
        """Shapes of the autoencoder's parameters, in the dtype in which it computes."""
        return frozen_spec(self.network)

    def bind(self, params: Tree) -> AutoencoderCodec:
        """The codec with these parameters."""
        return dataclasses.replace(self, params=params)

    def describe(self) -> dict[str, Any]:
        """The decoder is a network of its own, which takes normalised latents."""
        config = self.network.config
        return {"kind": "network", "reduction": config.reduction, "latent_channels": config.latent_channels}
