"""The projector of feature distillation: a student's map in the shape of a teacher's, dropped after training."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from snapgen_jax.networks.layers import Linear
from snapgen_jax.networks.module import Preset, Rules, compute_dtype

__all__ = ["Projector", "ProjectorConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Preset):
    """A `Projector` from one map to another; `between` reads it off their shapes.

    Attributes:
        in_width, out_width: channels of the student's and of the teacher's map.
        unshuffle: side of the squares of the student's cells that become one cell, their channels side by side.
        hidden: width of a middle layer with SiLU; None for one linear map.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["projector"] = "projector"
    in_width: int
    out_width: int
    unshuffle: int = 1
    hidden: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @classmethod
    def between(cls, student: tuple[int, ...], teacher: tuple[int, ...], hidden: int | None = None) -> ProjectorConfig:
        """From a map `[.., h, w, c]` to one `[.., H, W, D]`, by unshuffling where h / H = w / W is a whole number, else
        by resizing. Maps of another size for which this is equal may take the same projector."""
        (h, w, c), (to_h, to_w, d) = student[-3:], teacher[-3:]
        whole = h % to_h == 0 and w % to_w == 0 and h // to_h == w // to_w
        return cls(in_width=c, out_width=d, unshuffle=h // to_h if whole else 1, hidden=hidden)

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the projector with freshly drawn parameters."""
        return Projector(self, rngs)

    def rules(self) -> Rules:
        """None: it is small and stays whole on every device."""
        return ()

    def input_spec(self, batch: int = 1, height: int = 32, width: int = 32) -> tuple[jax.ShapeDtypeStruct]:
        """`ShapeDtypeStruct` of a `Projector`'s map; the size it is to have is a number and not an array."""
        return (jax.ShapeDtypeStruct((batch, height, width, self.in_width), jnp.float32),)


class Projector(nnx.Module):
    """Build it through `networks.module.build`."""

    def __init__(self, config: ProjectorConfig, rngs: nnx.Rngs):
        dtype, width = compute_dtype(config), config.in_width * config.unshuffle**2
        self.config = config
        self.inner = Linear(width, config.hidden, dtype=dtype, rngs=rngs) if config.hidden else None
        self.outer = Linear(config.hidden or width, config.out_width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """`[B, h, w, in_width]` to `[B, H, W, out_width]` float32, where `size` is (H, W) of the teacher's map, or
        None for the size that unshuffling gives."""
        p = self.config.unshuffle
        x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        if self.inner is not None:
            x = jax.nn.silu(self.inner(x))
        x = self.outer(x).astype(jnp.float32)
        shape = (x.shape[0], *(size or x.shape[1:3]), x.shape[3])
        return x if x.shape == shape else jax.image.resize(x, shape, "bilinear")
