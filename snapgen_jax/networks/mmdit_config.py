"""What an MMDiT is made of: the sizes in which the published ones differ, and how it attends and saves memory."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from snapgen_jax.bounds import at_least, check
from snapgen_jax.networks.attention_table import AttentionChoice
from snapgen_jax.networks.depth import Remat
from snapgen_jax.networks.module import Preset

_SD35_LARGE: dict[str, Any] = {"depth": 38, "heads": 38, "position_size": 192}


@dataclasses.dataclass(frozen=True)
class MMDiTArchitecture(Preset):
    """The fields of `networks.mmdit.MMDiTConfig`, which its blocks read. The defaults are Stable Diffusion 3.5 Large,
    8,056,627,520 parameters beside the position table.

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
        attention: kernel of the attention, a platform choice, see `attention_table`.
        attention_chunk: queries at a time, "chunked" only.
        remat: what the backward pass recomputes, see `depth.scan`.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["mmdit"] = "mmdit"
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
    attention: AttentionChoice = "auto"
    attention_chunk: int = 512
    remat: Remat = "block"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        sizes = ("latent_channels", "patch", "depth", "heads", "head_dim", "ffn_ratio", "time_width", "attention_chunk")
        check(self, **dict.fromkeys((*sizes, "position_size", "position_base"), at_least(1)))
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

    EIGHT_BITS: ClassVar[str] = r"_blocks?/.*/(query|key|value|back|inner|outer)$"
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
