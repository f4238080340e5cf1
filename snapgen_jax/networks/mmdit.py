"""The MMDiT of Stable Diffusion 3.5 (Esser et al. 2024, arXiv 2403.03206): SnapGen's teacher.

Latent patches and text tokens pass through `depth` equal blocks. Those of one kind are one stack of parameters and one
scan, so that the program is as large for 38 blocks as for 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks import depth
from snapgen_jax.networks.attention_kernels import key_mask, real_first
from snapgen_jax.networks.attention_table import kernel_of
from snapgen_jax.networks.layers import Conv, Linear
from snapgen_jax.networks.mmdit_blocks import Block, inner_names, layer_norm, modulate
from snapgen_jax.networks.mmdit_config import MMDiTArchitecture
from snapgen_jax.networks.module import Rules, compute_dtype, shard
from snapgen_jax.networks.patches import on_tokens, positions, to_map
from snapgen_jax.networks.taps import Reuse, Taps
from snapgen_jax.networks.text import TextContext, check_widths, denoiser_spec
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

__all__ = ["MMDiT", "MMDiTConfig"]

# First match wins. Everything of size is split, over its outputs; only the gains of the head width stay whole. What
# leads back to the stream of tokens is split over its inputs among `tensor`, so that the heads and hidden units of one
# device need no other before their sum (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
_SPLIT = ("tensor", "fsdp")
_RULES: Rules = [
    (r"patch/kernel$", PartitionSpec(None, None, None, _SPLIT)),
    (r"(dual|joint)_blocks/.*(back|outer)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(dual|joint)_blocks/.*kernel$", PartitionSpec(None, None, _SPLIT)),
    (r"(dual|joint)_blocks/.*bias$", PartitionSpec(None, _SPLIT)),
    (r"position$", PartitionSpec(None, None, _SPLIT)),
    (r"(back|outer)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"kernel$", PartitionSpec(None, _SPLIT)),
    (r"bias$", PartitionSpec(_SPLIT)),
]


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(MMDiTArchitecture):
    """Architecture of an `MMDiT`; `mmdit_config.MMDiTArchitecture` says what each field is."""

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the MMDiT with freshly drawn parameters."""
        return MMDiT(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(
        self, batch: int = 1, height: int | None = None, width: int | None = None, tokens: int = 333
    ) -> tuple[Any, Any, TextContext]:
        """`ShapeDtypeStruct`s of an `MMDiT`'s positional arguments: latent, time features, text.

        `height` and `width` are the latent's: 128 where none is given, or what the position table covers.
        """
        largest = min(128, self.position_size * self.patch)
        height, width = (largest if side is None else side for side in (height, width))
        return denoiser_spec(self, batch, (height, width), tokens)

    def tap_names(self) -> tuple[str, ...]:
        """Names of the intermediates in the order in which they are computed: those inside each block, see
        `mmdit_blocks.inner_names`, and the image tokens after it."""
        names: list[str] = []
        for i, block in enumerate(self.block_names()):
            kind = "dual" if i < self.dual else "joint" if i < self.depth - 1 else "last"
            names += [*(f"{block}_{name}" for name in inner_names(kind)), block]
        return tuple(names)

    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(f"block_{i:02d}" for i in range(self.depth))


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
        self,
        x: jax.Array,
        time: jax.Array,
        context: TextContext,
        *,
        taps: Sequence[str] = (),
        reuse: Mapping[str, Reuse | jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts the velocity.

        Nothing mixes the examples of a batch: guidance is one call on the conditional and unconditional halves of a
        doubled batch.

        Args:
            x: `[B, H, W, C]` noisy latent; H and W multiples of the patch, at most `position_size` patches.
            time: `[B, time_width]` from `time_features`.
            context: sequence `[B, L, context_width]`, pooled `[B, pooled_width]`, and mask `[B, L]`, which only
                `text_mask="attend"` reads: Stable Diffusion 3 attends to padding too.
            taps: blocks whose image tokens to return, "block_00" ...; each costs the memory of one such array. Or what
                enters and leaves a block's modules, such as "block_00_ffn_input" and "block_00_ffn", see
                `mmdit_blocks.inner_names`; it costs as much for one block as for all of its kind.
            reuse: image tokens `[B, H/patch, W/patch, width]` to use in place of a block's, or tokens `[B, ..., width]`
                in place of what is inside, always or where `Reuse.run` says. The text tokens pass a block that does not
                run unchanged. Inside a block whose intermediates are tapped everything runs.

        Returns:
            v: `[B, H, W, C]` float32.
            intermediates: `{tap: [B, H/patch, W/patch, width]}`, and of those inside blocks `[B, tokens, width]`, in
                the compute dtype.

        Raises:
            ValueError: a shape does not fit the config, or a name is unknown.
        """
        config, dtype = self.config, compute_dtype(self.config)
        _check_inputs(config, x, time, context)
        tap, names = Taps(config.tap_names(), taps, reuse), config.block_names()
        wanted = [i for i, name in enumerate(names) if name in tap.wanted]

        image = self.patch(shard(x, "image"))
        b, h, w, _ = image.shape
        like = jax.ShapeDtypeStruct(image.shape, image.dtype)
        tap.reuse |= {name: on_tokens(name, tap.reuse[name], like) for name in names if name in tap.reuse}
        image = image + self._positions(h, w).astype(dtype)
        image = shard(rearrange(image, "b h w d -> b (h w) d"), "tokens")
        kernel, sequence, real, mask = kernel_of(config), context.sequence, context.mask, None
        if config.text_mask == "attend":
            sequence, real = real_first(kernel, sequence, real)
        text = shard(self.context(sequence), "tokens")
        embedding = jax.nn.silu(shard(self.time(time) + self.pooled(context.pooled), "vector"))
        if config.text_mask == "attend":
            mask = key_mask(kernel, jnp.concatenate([jnp.ones((b, h * w)), real], axis=1))

        def run(block: Block, streams: tuple[jax.Array, jax.Array], tap: Taps) -> tuple[jax.Array, jax.Array]:
            return block(*streams, embedding, mask, tap)

        streams, first = (image, text), 0
        for blocks, count in ((self.dual_blocks, config.dual), (self.joint_blocks, config.depth - config.dual - 1)):
            if blocks is None:
                continue
            here = dict(enumerate(names[first : first + count]))
            inside = [tap.inside(name) for name in here.values()]
            streams, tapped = depth.scan(
                run,
                blocks,
                streams,
                taps=[i - first for i in wanted if i - first in here],
                reuse={i: tap.reuse[name] for i, name in here.items() if name in tap.reuse},
                inside=inside,
                feature=lambda streams: streams[0],
                replace=lambda streams, image: (image, streams[1]),
                remat=config.remat,
            )
            tap.found |= {here[i]: feature for i, feature in tapped.items()}
            for name, inner in zip(here.values(), inside, strict=True):
                tap.take(name, inner)
            first += count
        image, text = streams
        image = tap.block(names[-1], lambda image, tap: run(self.last_block, (image, text), tap)[0], image)

        scale, shift = jnp.split(self.modulation_out(embedding), 2, axis=-1)
        v = self.out(modulate(layer_norm(image), shift, scale))
        v = to_map(v, h, config.patch)
        maps = {names[i]: rearrange(tap.found[names[i]], "b (h w) d -> b h w d", h=h) for i in wanted}
        return shard(v.astype(jnp.float32), "image"), {**tap.found, **maps}

    def _positions(self, height: int, width: int) -> jax.Array:
        """`[height, width, D]` from the middle of the table."""
        size = self.config.position_size
        top, left = (size - height) // 2, (size - width) // 2
        return self.position[...].reshape(size, size, -1)[top : top + height, left : left + width]


def _position_table(config: MMDiTArchitecture) -> jax.Array:
    """`[1, S*S, D]` of positions that count in steps of one in images of `position_base` patches a side."""
    size = config.position_size
    axis = np.arange(size) * (config.position_base / size)
    return positions(axis, axis, config.width).reshape(1, size * size, config.width)


def _check_inputs(config: MMDiTArchitecture, x: jax.Array, time: jax.Array, context: TextContext) -> None:
    _, h, w, c = x.shape
    most = config.position_size * config.patch
    if h % config.patch or w % config.patch or max(h, w) > most:
        raise ValueError(
            f"MMDiT: a latent of {h} x {w}; both sides must be multiples of {config.patch} and at most {most}; "
            "change the image size"
        )
    check_widths(
        "MMDiT",
        ("latent channels", c, config.latent_channels),
        ("time features", time.shape[-1], config.time_width),
        ("text state width", context.sequence.shape[-1], config.context_width),
        ("pooled text width", context.pooled.shape[-1], config.pooled_width),
    )
