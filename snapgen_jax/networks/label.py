"""Class labels as a context: one state for each class, and one for none (Peebles and Xie 2023, section 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.module import Preset
from snapgen_jax.networks.rules import Rules
from snapgen_jax.networks.text import TextContext


@dataclasses.dataclass(frozen=True)
class LabelEmbeddingConfig(Preset):
    """A table of class states.

    Attributes:
        classes: how many there are; the class after the last stands for none.
        width: of the state, and of the pooled vector.
        dtype: platform choice, fixed by `module.for_platform`; of frozen parameters alone.
    """

    kind: Literal["label_embedding"] = "label_embedding"
    classes: int = 1000
    width: int = 768
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {"classes": 10, "width": 16}, "imagenet": {}}

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the table with freshly drawn parameters."""
        return LabelEmbedding(self, rngs)

    def rules(self) -> Rules:
        """None: the table is small and stays whole."""
        return []

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Labels int32 `[B]`."""
        return (jax.ShapeDtypeStruct((batch,), jnp.int32),)


class LabelEmbedding(nnx.Module):
    """Build it through `networks.module.build`."""

    def __init__(self, config: LabelEmbeddingConfig, rngs: nnx.Rngs):
        self.config = config
        rows = 0.02 * jax.random.normal(rngs.params(), (config.classes + 1, config.width))
        self.table = nnx.Param(rows)

    def __call__(self, labels: jax.Array) -> TextContext:
        """`[B]` int32 labels, `classes` for none, to one state `[B, 1, width]`, which is the pooled vector too."""
        states = self.table[...].astype(jnp.float32)[labels]
        return TextContext(states[:, None], jnp.ones((*labels.shape, 1), jnp.float32), states)
