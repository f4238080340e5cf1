"""Flow matching from stored latents and text states: how a pod pretrains, where frozen encoders have run beforehand.

The loss is that of `flow_matching`; the batch holds what the autoencoder and the text encoders made of images and
captions, so that the step is the UNet alone. One player, "model", holds one network: `unet`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from snapgen_jax.diffusion.guidance import drop_condition
from snapgen_jax.diffusion.timesteps import TimestepConfig
from snapgen_jax.evaluation.interfaces import EvaluationConfig
from snapgen_jax.networks.codec import CodecConfig, build_codec
from snapgen_jax.networks.module import Platform, build, for_platform, init
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, SamplingConfig
from snapgen_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from snapgen_jax.training.recipe import ExportPlan
from snapgen_jax.training.state import TrainState

Tree = Any
CONDITION = ("sequence", "mask", "pooled")


@dataclasses.dataclass(frozen=True)
class LatentFlowMatchingConfig:
    """Flow matching of a text-conditional UNet on latents.

    Attributes:
        batch_size, microbatches, train_steps: as for `flow_matching`.
        image_sizes: (height, width) of each aspect bucket, in pixels.
        reduction: pixels along the side of one cell of the latent; 8 for the autoencoders of Stable Diffusion.
        context_tokens: text states in a caption. 77 of CLIP and 128 of Gemma make 205.
        unet, timesteps, optimizer, ema_decay, sampling, evaluation: as for `flow_matching`.
        caption_dropout: share of captions whose states are replaced by none: zeros that are masked.
    """

    batch_size: int = 256
    microbatches: int = 1
    train_steps: int = 100_000
    image_sizes: tuple[tuple[int, int], ...] = ((256, 256),)
    reduction: int = 8
    context_tokens: int = 205
    unet: UNetConfig = UNetConfig.preset("t2i")
    timesteps: TimestepConfig = TimestepConfig()
    caption_dropout: float = 0.1
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.9999
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


class LatentFlowMatching(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`; what it shares with pixels it inherits."""

    Config = LatentFlowMatchingConfig
    conditions: tuple[str, ...] = CONDITION  # entries of a batch that are dropped together

    def __init__(self, config: LatentFlowMatchingConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes compute dtype and form of the depthwise convolution.

        Raises:
            ValueError: an image size does not divide by `reduction`.
        """
        self.config: Any = config
        for size in config.image_sizes:
            if size[0] % config.reduction or size[1] % config.reduction:
                raise ValueError(f"image size {size} does not divide by reduction={config.reduction}; change one")
        self.network_name, self.network_config, self.text_workdir = "unet", config.unet, ""
        self.codec = build_codec(CodecConfig("identity"))  # the latents are coded already
        self.network, self.network_spec = build(for_platform(config.unet, platform))
        self.optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)
        self.prediction, self.full_from = "velocity", 0.0

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """`(h, w, c)` of the latent of an image size."""
        config = self.config
        return size[0] // config.reduction, size[1] // config.reduction, config.unet.latent_channels

    def batch_specs(self) -> dict[str, Tree]:
        """One bucket per image size, all bfloat16 but the mask: `latent` `[B, h, w, c]`, scaled as the autoencoder's
        config says; `sequence` `[B, L, D]`, `mask` float32 `[B, L]` and `pooled` `[B, P]`."""
        config, b = self.config, self.config.batch_size

        def stored(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((b, *shape), jnp.bfloat16)

        return {
            f"{h}x{w}": {
                "latent": stored(*self.latent_shape((h, w))),
                "sequence": stored(config.context_tokens, config.unet.context_width),
                "mask": jax.ShapeDtypeStruct((b, config.context_tokens), jnp.float32),
                "pooled": stored(config.unet.pooled_width or 0),
            }
            for h, w in config.image_sizes
        }

    def init(self, key: jax.Array) -> TrainState:
        """Draws the UNet."""
        player = self._new_player({"unet": init(self.network, key)})
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the UNet."""
        return list(self.config.unet.rules())

    def condition(self, params: Tree, drawn: Tree) -> TextContext:
        """The stored text states."""
        del params
        return TextContext(*(drawn[name].astype(jnp.float32) for name in CONDITION))

    def clean_latents(self, frozen: Tree, batch: Tree) -> jax.Array:
        """The stored latents."""
        del frozen
        return batch["latent"].astype(jnp.float32)

    def draw_condition(self, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        """The stored text states, some of them dropped."""
        del frozen
        condition = {name: batch[name] for name in self.conditions}
        return drop_condition(key, condition, self._null(condition), self.config.caption_dropout)

    @staticmethod
    def _null(condition: Tree) -> Tree:
        return jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), condition)

    def contexts(self, params: Tree, conditions: Tree) -> tuple[TextContext, TextContext]:
        """What the network attends to of B `sequence` `[B, L, D]`, `mask` `[B, L]`, `pooled` `[B, P]`, and of none."""
        given = {name: conditions[name] for name in CONDITION}
        null = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), jnp.float32), given)
        return self.condition(params, given), self.condition(params, null)

    def pictures(self, frozen: Tree, latent: jax.Array) -> dict[str, jax.Array]:
        """None: an autoencoder turns the latents into images."""
        del frozen, latent
        return {}

    def exports(self) -> ExportPlan:
        """The UNet alone cannot draw; `export` it with its encoders and decoder.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(
            "a run on stored latents holds no text encoder and no decoder, which a bundle needs; export a run of "
            "`flow_matching`, or warm-start one from this"
        )


RECIPE = LatentFlowMatching
