"""Whether an image shows what a text says: image-text matching, as BLIP's (Li et al. 2022, arXiv 2201.12086).

The words of the text attend to each other and to the cells of the image, and the logit is read off the first of them.
Two embeddings that are compared by their angle, as in CLIP, hold little of what belongs to what; here a word looks for
its own object. As a reward (Xu et al. 2023, "ImageReward", arXiv 2304.05977, builds on BLIP) it is bounded: a
probability cannot be raised without end.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from snapgen_jax.networks.attention import Attention
from snapgen_jax.networks.attention_kernels import Mask, mask_bias
from snapgen_jax.networks.clip import ClipTextConfig, gelu
from snapgen_jax.networks.layers import Conv, GroupNorm, LayerNorm, Linear
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, draw, shard

__all__ = ["Matching", "MatchingConfig"]

MOST = 12.0  # of a logit; sigmoid(12) is below one in float32, and its gradient is not zero


@dataclasses.dataclass(frozen=True)
class MatchingConfig(Preset):
    """Architecture of a `Matching`. The defaults are those of the shapes world.

    Attributes:
        text: the text encoder; its vocabulary must be that of the tokens that are given. Its pooled state is not read.
        image_size: side to which images are resized, in pixels.
        channels: widths of the convolutions; each stage has half the height and width of the one before it.
        blocks: residual blocks of a stage.
        groups: of the norms between convolutions.
        layers, heads: of the layers in which the text attends to the image.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["matching"] = "matching"
    text: ClipTextConfig = ClipTextConfig.preset("shapes", attention="full", neighbours=4, embedding_std=1.0)
    image_size: int = 32
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 2
    groups: int = 16
    layers: int = 3
    heads: int = 4
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "text": ClipTextConfig.preset("smoke"),
            "image_size": 8,
            "channels": (8,),
            "blocks": 1,
            "groups": 4,
            "layers": 1,
            "heads": 2,
        },
        "shapes": {},
    }

    def __post_init__(self):
        factor = 2 ** len(self.channels)
        if not self.channels or self.image_size % factor:
            raise ValueError(
                f"MatchingConfig: channels={self.channels} halve the image {len(self.channels)} times, and "
                f"image_size={self.image_size} does not divide by {factor}; give at least one width, and such a size"
            )
        if wrong := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"MatchingConfig: groups={self.groups} do not divide channels={wrong}; change one of them")
        if self.text.width % self.heads:
            raise ValueError(
                f"MatchingConfig: {self.heads} heads do not divide text.width={self.text.width}; change one of them"
            )

    @property
    def cells(self) -> int:
        """Side of the image as the text sees it, in cells."""
        return self.image_size // 2 ** len(self.channels)

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the network with freshly drawn parameters."""
        return Matching(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        across, along = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
        return [
            (r"(query|key|value|inner)/kernel$", across),
            (r"(out|outer)/kernel$", along),
            (r"conv\w*/kernel$", PartitionSpec(None, None, None, "fsdp")),
            *self.text.rules(),
        ]

    def input_spec(
        self, batch: int = 1, height: int | None = None, width: int | None = None, tokens: int = 77
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`ShapeDtypeStruct`s of a `Matching`'s positional arguments: images, and up to `max_tokens` tokens."""
        height, width = (self.image_size if side is None else side for side in (height, width))
        images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
        return images, jax.ShapeDtypeStruct((batch, min(tokens, self.text.max_tokens)), jnp.int32)


class Matching(nnx.Module):
    """Images and texts to probabilities. Build it through `networks.module.build`."""

    def __init__(self, config: MatchingConfig, rngs: nnx.Rngs):
        width, dtype = config.text.width, compute_dtype(config)
        self.config = config
        self.text = config.text.module(rngs)
        self.stages = nnx.List(
            [
                Stage(before, after, config, rngs)
                for before, after in zip((3, *config.channels[:-1]), config.channels, strict=True)
            ]
        )
        self.norm_cells = LayerNorm(config.channels[-1], dtype=dtype)
        self.to_width = Linear(config.channels[-1], width, dtype=dtype, rngs=rngs)
        self.position_embedding = draw(rngs, nnx.initializers.normal(0.5), (config.cells**2, width))
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = LayerNorm(width, dtype=dtype)
        self.head = Linear(width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """The probability that an image shows what a text says, and nothing else.

        Args:
            images: `[B, H, W, 3]` float32 in [0, 1], of any size.
            tokens: `[B, L]` int32 of the texts, L <= text.max_tokens, padded with `text.pad_id`.

        Returns:
            `[B]` float32 in (0, 1).
        """
        return jax.nn.sigmoid(self.logits(images, tokens))

    def logits(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """The logits `[B]` float32 of these probabilities, from -12 to 12. Arguments as for a call."""
        return self.compare(self.see(images), tokens)

    def see(self, images: jax.Array) -> jax.Array:
        """Images as in a call to the cells `[B, N, width]` that a text attends to."""
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            images = jax.image.resize(images, (len(images), size, size, 3), "linear", antialias=True)
        x = shard(2 * images - 1, "image")
        for stage in self.stages:
            x = stage(x)
        cells = rearrange(self.norm_cells(x), "b h w c -> b (h w) c")
        return self.to_width(cells) + self.position_embedding[...].astype(cells.dtype)

    def compare(self, cells: jax.Array, tokens: jax.Array) -> jax.Array:
        """Logits `[B]` of texts `[B, L]` beside what `see` made of their images."""
        mask = (tokens != self.config.text.pad_id).astype(jnp.float32)
        x = self.text(tokens, mask).sequence  # type: ignore[operator]
        for layer in self.layers:
            x = layer(x, cells, Mask(mask_bias(mask)))
        logits = self.head(self.norm(x[:, 0])).astype(jnp.float32)[:, 0]
        return MOST * jnp.tanh(logits / MOST)


class StageConfig(Protocol):
    """What a `Stage` reads of a config: residual blocks, groups of its norms, and the dtype in which it computes."""

    @property
    def blocks(self) -> int: ...

    @property
    def groups(self) -> int: ...

    @property
    def dtype(self) -> str: ...


class Stage(nnx.Module):
    """Half the height and width by a convolution, and residual blocks behind it."""

    def __init__(self, before: int, after: int, config: StageConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.conv_down = Conv(before, after, 4, stride=2, padding=(1, 1), dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(after, config, rngs) for _ in range(config.blocks)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_down(x)
        for block in self.blocks:
            x = block(x)
        return x


class Block(nnx.Module):
    """Two convolutions with a residual, `[B, H, W, C] -> [B, H, W, C]`."""

    def __init__(self, width: int, config: StageConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.norm_1 = GroupNorm(width, config.groups, dtype=dtype)
        self.conv_1 = Conv(width, width, dtype=dtype, rngs=rngs)
        self.norm_2 = GroupNorm(width, config.groups, dtype=dtype)
        self.conv_2 = Conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_1(jax.nn.silu(self.norm_1(x)))
        return x + self.conv_2(jax.nn.silu(self.norm_2(h)))


class Layer(nnx.Module):
    """Attention of a text to itself and to an image, and a feed-forward network, each with a LayerNorm before and a
    residual."""

    def __init__(self, config: MatchingConfig, rngs: nnx.Rngs):
        width, heads, dtype = config.text.width, config.heads, compute_dtype(config)
        self.norm_1, self.norm_2, self.norm_3 = (LayerNorm(width, dtype=dtype) for _ in range(3))
        self.to_text = Attention(width, heads, width // heads, qkv_bias=True, dtype=dtype, rngs=rngs)
        self.to_image = Look(width, heads, dtype, rngs)
        self.inner = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.outer = Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, cells: jax.Array, mask: Mask) -> jax.Array:
        x = x + self.to_text(self.norm_1(x), mask=mask)
        x = x + self.to_image(self.norm_2(x), cells)
        return x + self.outer(gelu(self.inner(self.norm_3(x))))


class Look(nnx.Module):
    """Attention of a text to an image that also tells how well the image answers.

    The softmax of attention says where the cell is that a word looks for, and not whether there is one. The logarithm
    of its denominator, which is near the largest score, does; each word is told both. Without it a network learns only
    slowly that a colour or a kind is missing.
    """

    def __init__(self, width: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.answer = Linear(heads, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, cells: jax.Array) -> jax.Array:
        """`[B, L, width]`, `[B, N, width] -> [B, L, width]`."""
        q, k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=self.heads)
            for part in (self.query(x), self.key(cells), self.value(cells))
        )
        scores = jnp.einsum("bhld,bhnd->bhln", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        answers = jax.nn.logsumexp(scores, axis=-1, keepdims=True)  # [B, H, L, 1]
        weights = jnp.exp(scores - answers).astype(v.dtype)
        answers = answers - math.log(k.shape[2])  # of the mean: 0 where no cell answers
        seen = rearrange(jnp.einsum("bhln,bhnd->bhld", weights, v), "b h l d -> b l (h d)")
        return self.out(seen) + self.answer(rearrange(answers[..., 0], "b h l -> b l h"))
