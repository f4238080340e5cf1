"""The diffusion transformer DiT (Peebles and Xie 2023, arXiv 2212.09748), conditioned on a class.

Its condition is the pooled vector of a `TextContext`, which `networks.label.LabelEmbedding` makes of a label: the table
of classes is a network of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.bounds import above, at_least, check
from snapgen_jax.networks.attention_kernels import attend_by
from snapgen_jax.networks.attention_table import AttentionChoice, AttentionKernel, kernel_of
from snapgen_jax.networks.depth import Remat
from snapgen_jax.networks.layers import Conv, Linear
from snapgen_jax.networks.mmdit_blocks import FeedForward, layer_norm, modulate
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard
from snapgen_jax.networks.patches import on_tokens, position_axes, to_map
from snapgen_jax.networks.taps import Reuse, Taps
from snapgen_jax.networks.text import TextContext, check_widths, denoiser_spec
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

__all__ = ["DiT", "DiTConfig"]

# First match wins. Kernels are split over their outputs; those that lead back to the stream of tokens also over their
# inputs, among `tensor`.
_SPLIT = ("tensor", "fsdp")
_RULES: Rules = [
    (r"patch/kernel$", PartitionSpec(None, None, None, _SPLIT)),
    (r"(^|/)out/kernel$", PartitionSpec(_SPLIT, None)),
    (r"(back|outer)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"kernel$", PartitionSpec(None, _SPLIT)),
    (r"bias$", PartitionSpec(_SPLIT)),
]
_SIZES: dict[str, dict[str, int]] = {
    "s": {"depth": 12, "heads": 6, "head_dim": 64},
    "b": {"depth": 12, "heads": 12, "head_dim": 64},
    "l": {"depth": 24, "heads": 16, "head_dim": 64},
    "xl": {"depth": 28, "heads": 16, "head_dim": 72},
}


@dataclasses.dataclass(frozen=True)
class DiTConfig(Preset):
    """Architecture of a `DiT`. The defaults are DiT-XL/2's.

    That has 673,681,568 parameters. The published count, 675,129,632, is of these, of the table of 1,001 classes
    (1,153,152, in `LabelEmbedding`) and of the positions of 16 x 16 patches (294,912, which are computed here).

    Attributes:
        latent_channels: C of the latent.
        patch: side of a patch of the latent, one token each.
        depth: blocks.
        heads, head_dim: of every attention; their product is the width.
        ffn_ratio: hidden width of the feed-forward networks, as a multiple of the width.
        time_width: of the time features.
        sigma: "learned" networks have C channels more, of the variance, which are computed and left out of the output.
        base: side, in patches, of the latents that it was trained on: the positions of another grid are stretched over
            the same range, as diffusers does; None to count them in steps of one in every grid, as the first code did.
        ffn_epsilon: of the norm before the feed-forward network; diffusers has another one there than elsewhere.
        attention: kernel of the attention, a platform choice, see `attention_table`.
        attention_chunk: queries at a time, "chunked" only.
        remat: "block" keeps only what enters each block for the backward pass.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["dit"] = "dit"
    latent_channels: int = 4
    patch: int = 2
    depth: int = 28
    heads: int = 16
    head_dim: int = 72
    ffn_ratio: int = 4
    time_width: int = 256
    sigma: Literal["learned", "none"] = "learned"
    base: int | None = None
    ffn_epsilon: float = 1e-6
    attention: AttentionChoice = "auto"
    attention_chunk: int = 512
    remat: Remat = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    EIGHT_BITS: ClassVar[str] = r"^blocks/.*/(query|key|value|back|inner|outer)$"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"depth": 2, "heads": 2, "head_dim": 8, "time_width": 16},
        "shapes": {"latent_channels": 48, "patch": 1, "depth": 6, "heads": 4, "head_dim": 32, "sigma": "none"},
        **{f"{size}_{patch}": {**fields, "patch": patch} for size, fields in _SIZES.items() for patch in (2, 4, 8)},
    }

    def __post_init__(self):
        sizes = ("latent_channels", "patch", "depth", "heads", "head_dim", "ffn_ratio", "time_width", "base")
        check(self, ffn_epsilon=above(0), **dict.fromkeys((*sizes, "attention_chunk"), at_least(1)))
        if self.width % 4:
            raise ValueError(f"DiTConfig: heads * head_dim = {self.width} must be a multiple of 4")

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.heads * self.head_dim

    @property
    def context_width(self) -> int:
        """Width of the states of a class, which the network does not read."""
        return self.width

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.width

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the DiT with freshly drawn parameters."""
        return DiT(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(
        self, batch: int = 1, height: int = 32, width: int = 32, tokens: int = 1
    ) -> tuple[Any, Any, TextContext]:
        """`ShapeDtypeStruct`s of a `DiT`'s positional arguments: latent, time features, class."""
        return denoiser_spec(self, batch, (height, width), tokens)

    def tap_names(self) -> tuple[str, ...]:
        """Names of the intermediates in the order in which they are computed."""
        inner = ("attention_input", "attention", "ffn_input", "ffn")
        blocks = (f"block_{i:02d}" for i in range(self.depth))
        return tuple(name for block in blocks for name in (*(f"{block}_{role}" for role in inner), block))


class SelfAttention(nnx.Module):
    """Multi-head attention among tokens `[B, L, D]`."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width, dtype = config.width, compute_dtype(config)
        self.query, self.key, self.value, self.back = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))
        self.heads, self.chunk = config.heads, config.attention_chunk
        self.kernel: AttentionKernel = kernel_of(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (part(x).reshape(*x.shape[:2], self.heads, -1) for part in (self.query, self.key, self.value))
        y = attend_by(self.kernel, q, k, v, chunk=self.chunk)
        return self.back(y.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then a feed-forward network: each between a modulated norm and a gated residual ("adaLN-Zero")."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width, dtype = config.width, compute_dtype(config)
        self.modulation = Linear(width, 6 * width, init="zeros", dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(config, rngs)
        self.ffn = FeedForward(width, config.ffn_ratio * width, dtype=dtype, rngs=rngs)
        self.ffn_epsilon = config.ffn_epsilon

    def __call__(self, x: jax.Array, embedding: jax.Array, tap: Taps) -> jax.Array:
        """Updates tokens `[B, L, D]`.

        Args:
            x: the tokens.
            embedding: `[B, D]` of time and class, already activated.
            tap: of "attention" and "ffn", the outputs of the modules before they are gated, and of what enters them,
                modulated: "attention_input" and "ffn_input".
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split(self.modulation(embedding), 6, axis=-1)

        def run(name: str, module: Callable[[jax.Array], jax.Array], entering: jax.Array) -> jax.Array:
            return tap.entered(name, module, entering.astype(x.dtype), x.dtype)

        x = x + gate[:, None] * run("attention", self.attention, modulate(layer_norm(x), shift, scale))
        entering = modulate(layer_norm(x, self.ffn_epsilon), ffn_shift, ffn_scale)
        x = x + ffn_gate[:, None] * run("ffn", self.ffn, entering)
        return shard(x, "tokens")


class DiT(nnx.Module):
    """The noise in a latent, given its time and a class. Build it through `networks.module.build`."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width, patch, dtype = config.width, config.patch, compute_dtype(config)
        self.config = config
        self.patch = Conv(config.latent_channels, width, patch, stride=patch, padding=(0, 0), dtype=dtype, rngs=rngs)
        self.time = EmbeddingMLP(config.time_width, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.modulation_out = Linear(width, 2 * width, init="zeros", dtype=dtype, rngs=rngs)
        channels = config.latent_channels * (2 if config.sigma == "learned" else 1)
        self.out = Linear(width, patch**2 * channels, init="zeros", dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        context: TextContext,
        *,
        taps: Sequence[str] = (),
        reuse: Mapping[str, Reuse | jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts what the network was trained to: the noise, for the published ones.

        Args:
            x: `[B, H, W, C]` noisy latent; H and W multiples of the patch.
            time: `[B, time_width]` from `time_features`. diffusers spaces the frequencies by `shift=1`, the code that
                the published networks were trained with by `shift=0`.
            context: pooled `[B, width]` from `LabelEmbedding`; nothing else of it is read.
            taps: intermediates to return: "block_00" for what leaves a block, "block_00_attention" and "block_00_ffn"
                for what leaves its modules before it is gated, "block_00_attention_input" and "block_00_ffn_input" for
                what enters them, modulated.
            reuse: intermediates `[B, H/patch, W/patch, width]` to use in place of the network's own. What enters a
                module, and a function in `Reuse.run` is given, is modulated. Inside a block whose intermediates are
                tapped everything runs, even where the block itself is replaced.

        Returns:
            output: `[B, H, W, C]` float32.
            intermediates: `{tap: [B, H/patch, W/patch, width]}` in the compute dtype.

        Raises:
            ValueError: a shape does not fit the config, or a name is unknown.
        """
        config, dtype = self.config, compute_dtype(self.config)
        _check_inputs(config, x, time, context)
        tap = Taps(config.tap_names(), taps, reuse)
        x = self.patch(shard(x, "image"))
        b, h, w, _ = x.shape
        like = jax.ShapeDtypeStruct(x.shape, dtype)
        tap.reuse = {name: on_tokens(name, given, like) for name, given in tap.reuse.items()}
        for name, given in tap.reuse.items():
            if isinstance(given.run, jax.Array):
                given.checked(given.run, b, name)

        for places in _grid(config, h, w):
            x = x + places[None].astype(dtype)
        x = shard(rearrange(x, "b h w d -> b (h w) d"), "tokens")
        embedding = jax.nn.silu(shard(self.time(time) + context.pooled.astype(dtype), "vector"))
        remat = jax.checkpoint if config.remat == "block" else lambda function: function
        for i, block in enumerate(self.blocks):
            x = tap.block(f"block_{i:02d}", block, x, embedding, remat=remat)

        shift, scale = jnp.split(self.modulation_out(embedding), 2, axis=-1)
        x = self.out(modulate(layer_norm(x), shift, scale))
        x = to_map(x, h, config.patch)
        found = {name: rearrange(tap.found[name], "b (h w) d -> b h w d", h=h) for name in tap.found}
        return shard(x[..., : config.latent_channels].astype(jnp.float32), "image"), found


def _grid(config: DiTConfig, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Positions `[height, 1, D]` of rows and `[1, width, D]` of columns."""
    rows, columns = (np.arange(side) * ((config.base or side) / side) for side in (height, width))
    return position_axes(rows, columns, config.width)


def _check_inputs(config: DiTConfig, x: jax.Array, time: jax.Array, context: TextContext) -> None:
    _, h, w, c = x.shape
    if h % config.patch or w % config.patch:
        raise ValueError(
            f"DiT: a latent of {h} x {w}; both sides must be multiples of {config.patch}; change the image size"
        )
    check_widths(
        "DiT",
        ("latent channels", c, config.latent_channels),
        ("time features", time.shape[-1], config.time_width),
        ("pooled width", context.pooled.shape[-1], config.width),
    )
