"""SnapGen's decoder (Hu et al. 2025, section 3.2): latents to images on a phone, 36 times smaller than the usual one.

There is no attention; the convolutions are separable; a block has one GroupNorm; no block changes the width, so that
no skip needs a convolution: the upsamplers change it; and the higher the resolution the fewer the blocks. The paper
gives the size, 1.38M parameters, and not the widths: the preset `sd3` is one reading that meets it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.depthwise import DepthwiseConv, Form
from snapgen_jax.networks.layers import Conv, GroupNorm, Init, upsample_nearest
from snapgen_jax.networks.module import Network, Preset, Rules, Tree, apply, compute_dtype, frozen_spec, shard
from snapgen_jax.networks.sizes import reduced

__all__ = ["TinyDecoder", "TinyDecoderCodec", "TinyDecoderConfig"]

_RULES: Rules = [(r"(conv_in|pointwise|conv)/kernel$", PartitionSpec(None, None, None, "fsdp"))]

COLOURS = 3


@dataclasses.dataclass(frozen=True)
class TinyDecoderConfig(Preset):
    """Architecture of a `TinyDecoder`. The defaults decode Stable Diffusion 3's latents with 1,380,163 parameters.

    Attributes:
        channels: width of each stage, from the lowest resolution to the highest. Each stage but the first doubles it.
        blocks: residual blocks of each stage.
        middle_blocks: residual blocks before the first stage.
        latent_channels: channels of a latent.
        norm: "group" for one GroupNorm a block, "none" for none (an ablation: colours then shift).
        groups: groups of every GroupNorm.
        convolution: "separable", or "ordinary" 3x3 convolutions (an ablation).
        scale, shift: latents come as `(z - shift) * scale`, as the encoder that made them normalises them.
        dtype, depthwise: platform choices, fixed by `module.for_platform`.
    """

    kind: Literal["tiny_decoder"] = "tiny_decoder"
    channels: tuple[int, ...] = (320, 256, 128, 64)
    blocks: tuple[int, ...] = (2, 2, 2, 1)
    middle_blocks: int = 2
    latent_channels: int = 16
    norm: Literal["group", "none"] = "group"
    groups: int = 32
    convolution: Literal["separable", "ordinary"] = "separable"
    scale: float = 1.5305
    shift: float = 0.0609
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    depthwise: Form = "auto"

    def __post_init__(self):
        if len(self.blocks) != len(self.channels):
            raise ValueError(
                f"TinyDecoderConfig.blocks = {self.blocks} has {len(self.blocks)} entries and `channels` "
                f"{len(self.channels)}; give one entry a stage"
            )
        if wrong := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"TinyDecoderConfig: groups={self.groups} do not divide stages of {wrong} channels")

    @property
    def reduction(self) -> int:
        """Side, in pixels, of the square that one latent pixel becomes."""
        return 2 ** (len(self.channels) - 1)

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the decoder with freshly drawn parameters."""
        return TinyDecoder(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, height: int = 32, width: int = 32) -> tuple[Any, ...]:
        """Shapes of the positional arguments of a `TinyDecoder`: normalised latents."""
        return (jax.ShapeDtypeStruct((batch, height, width, self.latent_channels), jnp.float32),)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"channels": (16, 8), "blocks": (1, 1), "middle_blocks": 1, "latent_channels": 4, "groups": 4},
        "shapes": {
            "channels": (64, 32, 32),
            "blocks": (2, 2, 1),
            "latent_channels": 8,
            "groups": 16,
            "scale": 1.0,  # the autoencoder of the shapes world measures what it needs
            "shift": 0.0,
        },
        "sd3": {},
    }


class Block(nnx.Module):
    """Two 3x3 convolutions with one norm and one SiLU between their halves, around an identity; starts as that."""

    def __init__(self, config: TinyDecoderConfig, width: int, rngs: nnx.Rngs):
        self.first = _Convolution(config, width, width, rngs=rngs)
        self.second = _Convolution(config, width, width, norm=config.norm == "group", init="zeros", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.second(self.first(x))


class _Convolution(nnx.Module):
    """3x3 in space, norm and SiLU where asked for, then 1x1 in channels; in its ordinary form norm, SiLU and 3x3."""

    def __init__(
        self,
        config: TinyDecoderConfig,
        in_width: int,
        out_width: int,
        *,
        norm: bool | None = None,
        bias: bool = False,
        init: Init = "fan_in",
        rngs: nnx.Rngs,
    ):
        dtype = compute_dtype(config)
        self.separable, self.active = config.convolution == "separable", norm is not None
        self.norm = GroupNorm(in_width, config.groups, dtype=dtype) if norm else None
        if self.separable:
            self.depthwise = DepthwiseConv(in_width, form=config.depthwise, dtype=dtype, rngs=rngs)
            self.pointwise = Conv(in_width, out_width, 1, bias=bias, init=init, dtype=dtype, rngs=rngs)
        else:
            self.conv = Conv(in_width, out_width, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.depthwise(x) if self.separable else x
        h = h if self.norm is None else self.norm(h)
        h = jax.nn.silu(h) if self.active else h
        return self.pointwise(h) if self.separable else self.conv(h)


class TinyDecoder(nnx.Module):
    """Normalised latents to images. Build it through `networks.module.build`; `TinyDecoderCodec` makes it a `Codec`."""

    def __init__(self, config: TinyDecoderConfig, rngs: nnx.Rngs):
        dtype, channels = compute_dtype(config), config.channels
        self.config = config
        self.conv_in = Conv(config.latent_channels, channels[0], dtype=dtype, rngs=rngs)
        self.middle = nnx.List([Block(config, channels[0], rngs) for _ in range(config.middle_blocks)])
        self.stages, self.upsamplers = nnx.List(), nnx.List()
        for i, (width, blocks) in enumerate(zip(channels, config.blocks, strict=True)):
            if i:
                self.upsamplers.append(_Convolution(config, channels[i - 1], width, bias=True, rngs=rngs))
            self.stages.append(nnx.List([Block(config, width, rngs) for _ in range(blocks)]))
        self.norm_out = GroupNorm(channels[-1], config.groups, dtype=dtype) if config.norm == "group" else None
        self.conv_out = Conv(channels[-1], COLOURS, dtype=dtype, rngs=rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """`[B, h, w, c]` normalised latents -> `[B, H, W, 3]` float32 images; values may leave [-1, 1] a little."""
        x = self.conv_in(shard(latents / self.config.scale + self.config.shift, "image"))
        for block in self.middle:
            x = block(x)
        for i, stage in enumerate(self.stages):
            if i:
                x = self.upsamplers[i - 1](upsample_nearest(x))
            for block in stage:
                x = block(x)
            x = shard(x, "image")
        x = x if self.norm_out is None else self.norm_out(x)
        return self.conv_out(jax.nn.silu(x)).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TinyDecoderCodec:
    """A `Codec` that decodes with a tiny decoder and encodes as the codec does whose latents it has learnt to decode.

    Attributes:
        network: of `TinyDecoder`.
        params: its parameters.
        encoder: the other codec; None where only decoding is wanted, as on a phone.
    """

    network: Network = dataclasses.field(metadata={"static": True})
    params: Tree = None
    encoder: Any = None

    def encode(self, images: jax.Array) -> jax.Array:
        """`[..., H, W, 3]` -> `[..., h, w, c]`.

        Raises:
            ValueError: the codec was made without an encoder.
        """
        if self.encoder is None:
            raise ValueError("this codec holds a decoder alone; give it the `encoder` whose latents it decodes")
        return self.encoder.encode(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """`[..., h, w, c]` -> `[..., H, W, 3]`."""
        *lead, h, w, c = latents.shape
        images = apply(self.network, self.params, latents.reshape(-1, h, w, c))
        return images.reshape(*lead, *images.shape[1:])

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c). Raises where a side is no multiple of the reduction."""
        config = self.network.config
        return (*reduced(image_size, config.reduction), config.latent_channels)

    def networks(self) -> dict[str, Network]:
        """`{"decoder"}`, and `{"encoder"}` where there is another codec; a path "encoder/..." if that has several."""
        others = {} if self.encoder is None else self.encoder.networks()
        encoder = {f"encoder/{name}".rstrip("/"): network for name, network in others.items()}
        return {"decoder": self.network, **encoder}

    def spec(self) -> Tree:
        """`{"decoder", "encoder"}`: shapes of this decoder's parameters and of the other codec's."""
        encoder = {} if self.encoder is None else {"encoder": self.encoder.spec()}
        return {"decoder": frozen_spec(self.network), **encoder}

    def bind(self, params: Tree) -> TinyDecoderCodec:
        """The codec with these parameters, a tree like `spec`; without "encoder" it only decodes."""
        encoder = self.encoder.bind(params["encoder"]) if self.encoder and "encoder" in params else None
        return TinyDecoderCodec(self.network, params["decoder"], encoder)

    def describe(self) -> dict[str, Any]:
        """The decoder is a network of its own; it takes normalised latents."""
        config = self.network.config
        return {"kind": "network", "reduction": config.reduction, "latent_channels": config.latent_channels}
