"""Distillation from stored latents and text states: how a pod learns from Stable Diffusion 3.5.

The losses are those of `distillation`. The batch holds, beside what the student reads, the text states that the
teacher's own encoders made of the same captions. Where a caption is dropped, the states of both are zeros that are
masked, as they were when Stable Diffusion 3 was trained (Esser et al. 2024, section B.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.networks.text import TextContext
from snapgen_jax.recipes.distillation import Distilled, TeachingConfig
from snapgen_jax.recipes.latent_flow_matching import CONDITION, LatentFlowMatching, LatentFlowMatchingConfig

Tree = Any
TEACHER_CONDITION = tuple(f"teacher_{name}" for name in CONDITION)


@dataclasses.dataclass(frozen=True)
class LatentDistillationConfig(TeachingConfig, LatentFlowMatchingConfig):
    """Distillation on latents: the fields of `latent_flow_matching` and of `distillation.TeachingConfig`.

    Attributes:
        teacher_context_tokens: text states of the teacher in a caption: 77 of CLIP and 256 of T5 make 333.
    """

    teacher_context_tokens: int = 333


class LatentDistillation(Distilled, LatentFlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = LatentDistillationConfig
    conditions = (*CONDITION, *TEACHER_CONDITION)

    def batch_specs(self) -> dict[str, Tree]:
        """As for `latent_flow_matching`, and the teacher's text states: `teacher_sequence` bfloat16 `[B, L, D]`,
        `teacher_mask` float32 `[B, L]`, `teacher_pooled` bfloat16 `[B, P]`; `teacher_latent` where he has such."""
        teacher, length, b = self.teacher_config, self.config.teacher_context_tokens, self.config.batch_size

        def stored(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((b, *shape), jnp.bfloat16)

        states = {
            "teacher_sequence": stored(length, teacher.context_width),
            "teacher_mask": jax.ShapeDtypeStruct((b, length), jnp.float32),
            "teacher_pooled": stored(teacher.pooled_width or 0),
        }
        specs = {name: {**spec, **states} for name, spec in super().batch_specs().items()}
        if self.has_own_latents:
            for size in self.config.image_sizes:
                specs[f"{size[0]}x{size[1]}"]["teacher_latent"] = stored(*self.teacher_latent_shape(size))
        return specs

    def frozen_spec(self) -> Tree:
        """As for `distillation`, without what made the latents and text states of the teacher, which are stored."""
        spec = super().frozen_spec()
        for name in ("codec", "text"):
            spec.get("teacher", {}).pop(name, None)
        return spec

    def _check_inputs(self, run: Mapping[str, Any]) -> None:
        """Nothing: a run does not say of what its stored latents and text states were made."""

    def teacher_latents(self, frozen: Tree, batch: Tree) -> jax.Array:
        """The teacher's stored latents."""
        del frozen
        return batch["teacher_latent"].astype(jnp.float32)

    def teacher_context(self, params: Tree, drawn: Tree, context: TextContext) -> TextContext:
        """The teacher's stored text states."""
        del params, context
        return TextContext(*(drawn[name].astype(jnp.float32) for name in TEACHER_CONDITION))

    def teacher_null_context(self, params: Tree) -> TextContext:
        """Zeros that are masked."""
        del params
        length, teacher = self.config.teacher_context_tokens, self.teacher_config
        shapes = (length, teacher.context_width), (length,), (teacher.pooled_width or 0,)
        return TextContext(*(jnp.zeros((1, *shape)) for shape in shapes))


RECIPE = LatentDistillation
