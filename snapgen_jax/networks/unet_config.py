"""What a SnapGen UNet is made of: every choice that the paper leaves open, or that its ablation changes, is a field."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from snapgen_jax.bounds import above, at_least, check
from snapgen_jax.networks.attention_table import AttentionChoice
from snapgen_jax.networks.depthwise import Form
from snapgen_jax.networks.module import Preset
from snapgen_jax.networks.remat import Remat

_SNAPGEN: dict[str, Any] = {"channels": (256, 512, 896), "down_depth": (1, 2, 4), "mid_depth": 4, "up_depth": (0, 2, 4)}


def copy_name(block: str, i: int) -> str:
    """The name of the i-th of the blocks that stand where `block` stands."""
    return f"{block}.{i}" if i else block


@dataclasses.dataclass(frozen=True)
class UNetArchitecture(Preset):
    """The fields of `networks.unet.UNetConfig`, which its blocks read. The defaults are the text-to-image network of
    379.04M parameters.

    Where the paper (arXiv 2412.09619) and its descriptions leave a choice open, the default is the reading whose
    parameter counts and compute fit the published ones best; the other readings are other values of these fields.

    Attributes:
        latent_channels: C of the latent `[B, H, W, C]` that goes in and of the velocity that comes out.
        channels: width of each stage, from the highest resolution to the lowest. Each stage halves the resolution.
        units: residual-and-transformer units of a stage on the way down; the way up has one more.
        down_depth, up_depth: transformer blocks of a unit, for each stage; 0 for units without a transformer.
        mid_depth: transformer blocks of the middle.
        first_stage: units of the first stage on the way down: a residual block and a transformer ("res+tf"), a
            transformer alone ("tf"), or a residual block alone ("res", which ignores `down_depth[0]`).
        mid: the middle is a residual block and a transformer ("ra"), or the same and a second residual block ("rar").
        self_attention, cross_attention: for each stage, whether its transformer blocks hold it.
        convolution: the two convolutions of a residual block: depthwise 3x3 and pointwise, or ordinary 3x3.
        expand_ratio: width between those two, as a multiple of the base width.
        expand_base: the base width: that of the block's output, of its input, or the larger.
        sampler: the convolutions that halve or follow the doubling of the resolution: ordinary, or separable.
        ffn_ratio: hidden width of the gated feed-forward network, as a multiple of its width.
        head_dim: width of an attention head.
        kv_heads: key and value heads of self- and cross-attention (1 is multi-query); None for as many as queries.
        qk_norm: RMSNorm of queries and keys.
        rope: 2-D rotary positions in self-attention, with base `rope_theta`.
        context_width: width of the text states.
        pooled_width: width of the pooled text vector that is added to the time embedding; None or 0 to ignore it.
        absolute_positions: each transformer adds sines and cosines of row and column to its input, as DiT does (Peebles
            and Xie 2023). Rotary positions say how cells lie to each other; text that speaks of places needs to know
            which of them is left.
        time_width: number of time features that go in.
        embedding_width: width of the time embedding.
        groups: groups of every GroupNorm.
        remat: what the backward pass finds computed: everything ("none"); what matrix products, convolutions and
            attention made ("products"); the inputs of each unit alone ("blocks"), or beside these the outputs of
            attention ("attention"). The less, the less memory and the more arithmetic; see `networks/remat.py`.
        separable_block: how norm, SiLU and separable convolution of a residual block run on a TPU: as XLA's operations,
            or as one kernel ("fused", see `networks.fused_separable`). Elsewhere they are always composed.
        blocks: how often a block stands where it does not stand once, as (name, count): 0 takes it out, 2 puts another
            behind it. `base_blocks` names them; an evolved architecture is such a list (`networks/evolved.py`).
        dtype, depthwise: platform choices, fixed by `module.for_platform`.
        attention: kernel of the attention, a platform choice, see `attention_table`.
        attention_chunk: queries at a time, "chunked" only.
    """

    kind: Literal["unet"] = "unet"
    latent_channels: int = 16
    channels: tuple[int, ...] = (256, 512, 896)
    units: int = 2
    down_depth: tuple[int, ...] = (1, 2, 4)
    mid_depth: int = 4
    up_depth: tuple[int, ...] = (0, 2, 4)
    first_stage: Literal["res+tf", "tf", "res"] = "tf"
    mid: Literal["ra", "rar"] = "ra"
    self_attention: tuple[bool, ...] = (False, False, True)
    cross_attention: tuple[bool, ...] = (True, True, True)
    convolution: Literal["separable", "ordinary"] = "separable"
    expand_ratio: int = 2
    expand_base: Literal["out", "in", "max"] = "out"
    sampler: Literal["conv", "sep"] = "conv"
    ffn_ratio: int = 3
    head_dim: int = 64
    kv_heads: int | None = 1
    qk_norm: bool = True
    rope: bool = True
    rope_theta: float = 10_000.0
    context_width: int = 2048
    pooled_width: int | None = 2048
    absolute_positions: bool = False
    time_width: int = 256
    embedding_width: int = 1024
    groups: int = 32
    remat: Remat = "none"
    separable_block: Literal["composed", "fused"] = "composed"
    blocks: tuple[tuple[str, int], ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    depthwise: Form = "auto"
    attention: AttentionChoice = "auto"
    attention_chunk: int = 512

    def __post_init__(self):
        sizes = ("latent_channels", "channels", "units", "expand_ratio", "ffn_ratio", "head_dim", "kv_heads", "groups")
        check(self, **dict.fromkeys((*sizes, "time_width", "embedding_width", "attention_chunk"), at_least(1)))
        check(self, context_width=at_least(0))
        check(self, down_depth=at_least(0), mid_depth=at_least(0), up_depth=at_least(0), rope_theta=above(0))
        stages = len(self.channels)
        for name in ("down_depth", "up_depth", "self_attention", "cross_attention"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"UNetConfig.{name} = {getattr(self, name)} has {len(getattr(self, name))} entries, but `channels` "
                    f"has {stages} stages; give one entry a stage"
                )
        for width in self.channels:
            if width % self.groups or width % self.head_dim:
                raise ValueError(
                    f"UNetConfig: a stage of {width} channels must be a multiple of groups={self.groups} and of "
                    f"head_dim={self.head_dim}; change `channels`, `groups` or `head_dim`"
                )
        if self.first_stage == "tf" and self.down_depth[0] == 0:
            raise ValueError(
                "UNetConfig: first_stage='tf' with down_depth[0]=0 leaves the first stage empty; "
                "set first_stage='res' or down_depth[0] to 1"
            )

        self._check_blocks()

    def _check_blocks(self) -> None:
        known = [name for name, same in self.base_blocks().items() if same]
        for name, count in self.blocks:
            if name not in known:
                raise ValueError(
                    f"UNetConfig.blocks: {name!r} is no block that may be taken out or repeated; these are "
                    f"{', '.join(known)}"
                )
            if count < 0:
                raise ValueError(f"UNetConfig.blocks: {name!r} cannot stand {count} times; give 0 or more")
        if len(dict(self.blocks)) < len(self.blocks):
            raise ValueError(f"UNetConfig.blocks: a name stands twice in {self.blocks}; give one count a block")

    def base_blocks(self) -> dict[str, bool]:
        """`{block: whether its input and its output have one shape}` of the network without `blocks`, in the order in
        which they run. On the way up a residual block takes a skip, so that its shapes differ."""
        found, width = {}, self.channels[0]
        for stage, channel in enumerate(self.channels):
            for i in range(self.units):
                depth, residual = self.down_unit(stage)
                if residual:
                    found[f"down_{stage}_{i}_residual_block"] = width == channel
                if depth:
                    found[f"down_{stage}_{i}_transformer"] = True
                width = channel
        found["mid_residual_block"] = True
        found |= {"mid_transformer": True} if self.mid_depth else {}
        found |= {"mid_second_residual_block": True} if self.mid == "rar" else {}
        for stage in reversed(range(len(self.channels))):
            for i in range(self.units + 1):
                found[f"up_{stage}_{i}_residual_block"] = False
                found |= {f"up_{stage}_{i}_transformer": True} if self.up_depth[stage] else {}
        return found

    def count(self, block: str) -> int:
        """How often a block of `base_blocks` stands."""
        return dict(self.blocks).get(block, 1)

    def down_unit(self, stage: int) -> tuple[int, bool]:
        """Of a unit on the way down: its transformer blocks, and whether it has a residual block."""
        only_residual = stage == 0 and self.first_stage == "res"
        return 0 if only_residual else self.down_depth[stage], stage > 0 or self.first_stage != "tf"

    def droppable_blocks(self) -> tuple[str, ...]:
        """The blocks whose input may stand in for their output, in the order in which they run. The second of a block
        that stands twice is called `NAME.1`."""
        return tuple(
            copy_name(name, i) for name, same in self.base_blocks().items() if same for i in range(self.count(name))
        )

    @property
    def reduction(self) -> int:
        """Height and width of a latent must be multiples of this."""
        return 2 ** (len(self.channels) - 1)

    EIGHT_BITS: ClassVar[str] = r"transformer/"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "latent_channels": 4,
            "channels": (8, 16),
            "units": 1,
            "down_depth": (1, 1),
            "mid_depth": 1,
            "up_depth": (0, 1),
            "self_attention": (False, True),
            "cross_attention": (True, True),
            "head_dim": 4,
            "context_width": 16,
            "pooled_width": 16,
            "time_width": 16,
            "embedding_width": 16,
            "groups": 4,
        },
        "shapes": {
            "latent_channels": 48,
            "channels": (64, 128),
            "units": 1,
            "down_depth": (1, 1),
            "mid_depth": 1,
            "up_depth": (1, 1),
            "first_stage": "res+tf",
            "self_attention": (False, True),
            "cross_attention": (True, True),
            "head_dim": 32,
            "context_width": 128,
            "pooled_width": 128,
            "embedding_width": 256,
            "groups": 16,
        },
        "imagenet": {**_SNAPGEN, "latent_channels": 4, "context_width": 768, "pooled_width": 768},
        "t2i": {**_SNAPGEN, "latent_channels": 16, "context_width": 2048, "pooled_width": 2048},
    }
