"""The MMDiT of Stable Diffusion 3.5 (Esser et al. 2024, arXiv 2403.03206): SnapGen's teacher.

Latent patches and text tokens pass through `depth` equal blocks. Those of one kind are one stack of parameters and one
scan, so that the program is as large for 38 blocks as for 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks import depth
from snapgen_jax.networks.attention import mask_bias
from snapgen_jax.networks.layers import Conv, Linear
from snapgen_jax.networks.long_attention import AttentionKernel
from snapgen_jax.networks.mmdit_blocks import Block, layer_norm, modulate
from snapgen_jax.networks.module import Preset, compute_dtype, shard
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

__all__ = ["RULES", "MMDiT", "MMDiTConfig", "input_spec", "tap_names"]

# First match wins. Everything of size is split, over its outputs; only the gains of the head width stay whole. What
# leads back to the stream of tokens is split over its inputs among `tensor`, so that the heads and hidden units of one
# device need no other before their sum (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
_SPLIT = ("tensor", "fsdp")
RULES: list[tuple[str, PartitionSpec]] = [
    (r"patch/kernel$", PartitionSpec(None, None, None, _SPLIT)),
    (r"(dual|joint)_blocks/.*(back|outer)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(dual|joint)_blocks/.*kernel$", PartitionSpec(None, None, _SPLIT)),
    (r"(dual|joint)_blocks/.*bias$", PartitionSpec(None, _SPLIT)),
    (r"position$", PartitionSpec(None, None, _SPLIT)),
    (r"(back|outer)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"kernel$", PartitionSpec(None, _SPLIT)),
    (r"bias$", PartitionSpec(_SPLIT)),
]

_SD35_LARGE: dict[str, Any] = {"depth": 38, "heads": 38, "position_size": 192}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(Preset):
    """Architecture of an `MMDiT`. The defaults are Stable Diffusion 3.5 Large, 8,056,627,520 parameters beside the
    position table.

    Attributes:
        latent_channels: C of the latent `[B, H, W, C]` that goes in and of the velocity that comes out.
        patch: side of a patch of the latent, one token each.
        depth: blocks, counted with the dual ones and the last.
        dual: how many of the first blocks also attend among the image tokens alone.
        heads, head_dim: of every attention; their product is the width.
        ffn_ratio: hidden width of the feed-forward networks, as a multiple of the width.
        context_width, pooled_width, time_width: of the text states, the pooled text vector and the time features.
        position_size: side of the stored position table in patches; a latent takes the middle of it.
        position_base: side, in patches, of the images whose positions a fresh table counts in steps of one.
        text_mask: whether padding is hidden from attention ("attend") or taken for text ("ignore", as SD3 was trained).
        attention: kernel of the attention, see `long_attention`.
        attention_chunk: queries at a time, "chunked" only.
        remat: what the backward pass recomputes, see `depth.scan`.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    latent_channels: int = 16
    patch: int = 2
    depth: int = 38
    dual: int = 0
    heads: int = 38
    head_dim: int = 64
    ffn_ratio: int = 4
    context_width: int = 4096
    pooled_width: int = 2048
    time_width: int = 256
    position_size: int = 192
    position_base: int = 64
    text_mask: Literal["ignore", "attend"] = "ignore"
    attention: AttentionKernel = "whole"
    attention_chunk: int = 512
    remat: depth.Remat = "block"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if not 0 <= self.dual < self.depth:
            raise ValueError(
                f"MMDiTConfig: dual={self.dual} of depth={self.depth} blocks; the last block cannot be dual, so give "
                f"0 to {self.depth - 1}"
            )
        if self.width % 4:
            raise ValueError(f"MMDiTConfig: heads * head_dim = {self.width} must be a multiple of 4")

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.heads * self.head_dim

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the MMDiT with freshly drawn parameters."""
        return MMDiT(self, rngs)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "latent_channels": 4,
            "depth": 3,
            "dual": 1,
            "heads": 2,
            "head_dim": 8,
            "context_width": 16,
            "pooled_width": 16,
            "time_width": 16,
            "position_size": 8,
            "position_base": 4,
            "text_mask": "attend",
            "remat": "none",
        },
        "shapes": {
            "latent_channels": 48,
            "patch": 1,
            "depth": 6,
            "heads": 4,
            "head_dim": 32,
            "context_width": 128,
            "pooled_width": 128,
            "position_size": 16,
            "position_base": 8,
            "text_mask": "attend",
            "remat": "none",
        },
        "sd35_large": _SD35_LARGE,
        "sd35_large_turbo": _SD35_LARGE,
        "sd35_medium": {"depth": 24, "dual": 13, "heads": 24, "position_size": 384},
    }


class MMDiT(nnx.Module):
    """Velocity of a noisy latent, given its time and a text. Build it through `networks.module.build`."""

    def __init__(self, config: MMDiTConfig, rngs: nnx.Rngs):
        width, dtype = config.width, compute_dtype(config)
        self.config = config
        self.patch = Conv(
            config.latent_channels, width, config.patch, stride=config.patch, padding=(0, 0), dtype=dtype, rngs=rngs
        )
        self.position = nnx.Param(_position_table(config))
        self.time = EmbeddingMLP(config.time_width, width, dtype=dtype, rngs=rngs)
        self.pooled = EmbeddingMLP(config.pooled_width, width, dtype=dtype, rngs=rngs)
        self.context = Linear(config.context_width, width, dtype=dtype, rngs=rngs)

        joint = config.depth - config.dual - 1
        self.dual_blocks = depth.stack(lambda r: Block(config, "dual", r), config.dual, rngs) if config.dual else None
        self.joint_blocks = depth.stack(lambda r: Block(config, "joint", r), joint, rngs) if joint else None
        self.last_block = Block(config, "last", rngs)

        self.modulation_out = Linear(width, 2 * width, init="zeros", dtype=dtype, rngs=rngs)
        self.out = Linear(width, config.patch**2 * config.latent_channels, init="zeros", dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, time: jax.Array, context: TextContext, *, taps: Sequence[str] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts the velocity.

        Nothing mixes the examples of a batch: guidance is one call on the conditional and unconditional halves of a
        doubled batch.

        Args:
            x: `[B, H, W, C]` noisy latent; H and W multiples of the patch, at most `position_size` patches.
            time: `[B, time_width]` from `time_features`.
            context: sequence `[B, L, context_width]`, pooled `[B, pooled_width]`, and mask `[B, L]`, which only
                `text_mask="attend"` reads: Stable Diffusion 3 attends to padding too.
            taps: blocks whose image tokens to return, "block_00" ...; each costs the memory of one such array.

        Returns:
            v: `[B, H, W, C]` float32.
            intermediates: `{tap: [B, H/patch, W/patch, width]}` in the compute dtype.

        Raises:
            ValueError: a shape does not fit the config, or a tap is unknown.
        """
        config, dtype = self.config, compute_dtype(self.config)
        _check_inputs(config, x, time, context)
        wanted = _tapped_blocks(config, taps)

        image = self.patch(shard(x, "image"))
        b, h, w, _ = image.shape
        image = image + self._positions(h, w).astype(dtype)
        image = shard(rearrange(image, "b h w d -> b (h w) d"), "tokens")
        text = shard(self.context(context.sequence), "tokens")
        embedding = jax.nn.silu(shard(self.time(time) + self.pooled(context.pooled), "vector"))
        bias = None
        if config.text_mask == "attend":
            bias = mask_bias(jnp.concatenate([jnp.ones((b, h * w)), context.mask], axis=1))

        def run(block: Block, streams: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return block(*streams, embedding, bias)

        streams, found, first = (image, text), {}, 0
        for blocks, count in ((self.dual_blocks, config.dual), (self.joint_blocks, config.depth - config.dual - 1)):
            if blocks is None:
                continue
            streams, tapped = depth.scan(
                run,
                blocks,
                streams,
                taps=[i - first for i in wanted if first <= i < first + count],
                feature=lambda streams: streams[0],
                remat=config.remat,
            )
            found |= {first + i: feature for i, feature in tapped.items()}
            first += count
        image, _ = run(self.last_block, streams)
        if first in wanted:
            found[first] = image

        scale, shift = jnp.split(self.modulation_out(embedding), 2, axis=-1)
        v = self.out(modulate(layer_norm(image), shift, scale))
        v = rearrange(v, "b (h w) (p q c) -> b (h p) (w q) c", h=h, p=config.patch, q=config.patch)
        maps = {_tap_name(i): rearrange(found[i], "b (h w) d -> b h w d", h=h) for i in wanted}
        return shard(v.astype(jnp.float32), "image"), maps

    def _positions(self, height: int, width: int) -> jax.Array:
        """`[height, width, D]` from the middle of the table."""
        size = self.config.position_size
        top, left = (size - height) // 2, (size - width) // 2
        return self.position[...].reshape(size, size, -1)[top : top + height, left : left + width]


def tap_names(config: MMDiTConfig) -> tuple[str, ...]:
    """Names of the intermediates in the order in which they are computed, one a block."""
    return tuple(_tap_name(i) for i in range(config.depth))


def input_spec(
    config: MMDiTConfig, batch: int = 1, height: int = 128, width: int = 128, tokens: int = 333
) -> tuple[Any, Any, TextContext]:
    """`ShapeDtypeStruct`s of an `MMDiT`'s positional arguments: latent, time features, text.

    `height` and `width` are the latent's.
    """

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    context = TextContext(
        sequence=array(batch, tokens, config.context_width),
        mask=array(batch, tokens),
        pooled=array(batch, config.pooled_width),
    )
    return array(batch, height, width, config.latent_channels), array(batch, config.time_width), context


def _tap_name(block: int) -> str:
    return f"block_{block:02d}"


def _tapped_blocks(config: MMDiTConfig, taps: Sequence[str]) -> list[int]:
    names = tap_names(config)
    if unknown := [tap for tap in taps if tap not in names]:
        raise ValueError(f"unknown intermediate {', '.join(unknown)}; the network has {names[0]} to {names[-1]}")
    return sorted({names.index(tap) for tap in taps})


def _position_table(config: MMDiTConfig) -> jax.Array:
    """`[1, S*S, D]`: sines, then cosines, of the column in the first half of D and of the row in the second.

    Only the two axes are computed eagerly, so that the shapes of a full-size network cost nothing.
    """
    size, quarter = config.position_size, config.width // 4
    positions = np.arange(size) * (config.position_base / size)
    angles = positions[:, None] / 10_000 ** (np.arange(quarter) / quarter)
    axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)  # [S, D/2]
    shape = (size, size, 2 * quarter)
    columns, rows = jnp.broadcast_to(axis, shape), jnp.broadcast_to(axis[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size * size, 4 * quarter)


def _check_inputs(config: MMDiTConfig, x: jax.Array, time: jax.Array, context: TextContext) -> None:
    _, h, w, c = x.shape
    most = config.position_size * config.patch
    if h % config.patch or w % config.patch or max(h, w) > most:
        raise ValueError(
            f"MMDiT: a latent of {h} x {w}; both sides must be multiples of {config.patch} and at most {most}; "
            "change the image size"
        )
    for name, given, expected in (
        ("latent channels", c, config.latent_channels),
        ("time features", time.shape[-1], config.time_width),
        ("text state width", context.sequence.shape[-1], config.context_width),
        ("pooled text width", context.pooled.shape[-1], config.pooled_width),
    ):
        if given != expected:
            raise ValueError(f"MMDiT: {name} {given} given, but the config says {expected}")
