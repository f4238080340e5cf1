"""Contrastive learning of images and captions: CLIP (Radford et al. 2021, section 2.3).

An image encoder and a text encoder learn to tell which caption of a batch belongs to which image. The text encoder is
what later stages condition on, frozen; the two together score how well an image fits its prompt. One player, "model",
holds `text`, `image` and the temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.losses.contrastive import contrastive_loss, normalised
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.codec import from_uint8
from snapgen_jax.networks.module import Platform, apply, build, for_platform, init
from snapgen_jax.networks.rules import within
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    clip_by_joint_norm,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import ExportPlan, Metrics
from snapgen_jax.training.state import TrainState

Tree = Any
FIRST_LOG_SCALE = float(np.log(1 / 0.07))  # section 2.5


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Contrastive learning of an image and a text encoder.

    Attributes:
        batch_size: pairs in a global batch; each is told apart from all others.
        microbatches: 1. A part of a batch would see fewer pairs to be told apart from.
        train_steps, optimizer, ema_decay, evaluation: as for `flow_matching`.
        image, text: the encoders; their `projection` must be equal.
    """

    batch_size: int = 64
    microbatches: int = 1
    train_steps: int = 1000
    image: ClipVisionConfig = ClipVisionConfig.preset("shapes")
    text: ClipTextConfig = ClipTextConfig.preset("shapes")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.999
    evaluation: EvaluationConfig = EvaluationConfig(during=("validation_loss",), final=("validation_loss",))


class Contrastive:
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = ContrastiveConfig

    def __init__(self, config: ContrastiveConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes the compute dtype.

        Raises:
            ValueError: the embeddings differ in width, or the batch is to be computed in parts.
        """
        if config.image.projection != config.text.projection:
            raise ValueError(
                f"image.projection={config.image.projection} and text.projection={config.text.projection} are to be "
                "compared; make them equal"
            )
        if config.microbatches != 1:
            raise ValueError(
                f"microbatches={config.microbatches} would compare a pair with fewer others; set it to 1 and use "
                "more devices or a smaller batch_size"
            )
        self.config = config
        self.image, _ = build(for_platform(config.image, platform))
        self.text, _ = build(for_platform(config.text, platform))
        self.optimizer = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)

    @property
    def vocab_size(self) -> int:
        """Token ids must be below this."""
        return self.config.text.vocab_size

    def batch_specs(self) -> dict[str, Tree]:
        """`image` uint8 `[B, H, W, 3]`, `tokens` int32 `[B, L]`, `mask` float32 `[B, L]`."""
        b, side, length = self.config.batch_size, self.config.image.image_size, self.config.text.max_tokens
        return {
            f"{side}x{side}": {
                "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
                "tokens": jax.ShapeDtypeStruct((b, length), jnp.int32),
                "mask": jax.ShapeDtypeStruct((b, length), jnp.float32),
            }
        }

    def init(self, key: jax.Array) -> TrainState:
        """Draws both encoders; the logits begin at 1 / 0.07 times the cosines."""
        image_key, text_key = jax.random.split(key)
        params = {
            "image": init(self.image, image_key),
            "text": init(self.text, text_key),
            "temperature": {"scale": jnp.float32(FIRST_LOG_SCALE)},
        }
        player = new_player(params, self.optimizer, ema=self.config.ema_decay > 0)
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from `{player: weights}` of an earlier run; optimizer, average and schedule begin anew."""
        player = new_player(earlier["model"], self.optimizer, ema=self.config.ema_decay > 0)
        return state.replace(players={"model": player})

    def frozen_spec(self) -> Tree:
        """Nothing is frozen."""
        return {}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Nothing is frozen."""
        del mesh
        return {}

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the two encoders."""
        return [*within("text", self.config.text.rules()), *within("image", self.config.image.rules())]

    def embed_text(self, params: Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, L]` tokens to unit vectors `[B, D]`."""
        return normalised(apply(self.text, params["text"], tokens, mask).pooled)

    def embed_image(self, params: Tree, images: jax.Array) -> jax.Array:
        """uint8 `[B, H, W, 3]` to unit vectors `[B, D]`."""
        return normalised(apply(self.image, params["image"], from_uint8(images)))

    def losses(self, params: Tree, batch: Tree) -> Metrics:
        """`loss` `[B]`, and `accuracy` `[B]`: 1 where the caption is nearer to its image than all others are."""
        image, text = self.embed_image(params, batch["image"]), self.embed_text(params, batch["tokens"], batch["mask"])
        nearest = jnp.argmax(image @ text.T, axis=1) == jnp.arange(len(image))
        loss = contrastive_loss(image, text, params["temperature"]["scale"])
        return {"loss": loss, "accuracy": nearest.astype(jnp.float32)}

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One AdamW step on the contrastive loss. Nothing in it is random."""
        del frozen, key
        player = state.players["model"]

        def loss(params: Tree) -> tuple[jax.Array, jax.Array]:
            found = self.losses(params, batch)
            return found["loss"].mean(), found["accuracy"].mean()

        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(player.params)
        grads, norm = clip_by_joint_norm(grads, self.config.optimizer.clip_norm)
        player = step_player(player, grads, self.optimizer, state.step, self.config.ema_decay)
        metrics = {
            "loss": value,
            "accuracy": accuracy,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(self.learning_rate(state.step)),
        }
        return state.replace(players={"model": player}), metrics

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, key: jax.Array, **options: Any
    ) -> dict[str, jax.Array]:
        """The embeddings of captions, `text` `[B, D]`, and of images where given, `image` `[B, D]`: unit vectors, whose
        product is the CLIP score.

        Args:
            params: `{"model": {"image", "text", "temperature"}}`.
            frozen, key, options: unused.
            conditions: `tokens` and `mask` `[B, L]`; optionally `image` uint8 `[B, H, W, 3]`.
        """
        del frozen, key, options
        weights = params["model"]
        found = {"text": self.embed_text(weights, conditions["tokens"], conditions["mask"])}
        if "image" in conditions:
            found["image"] = self.embed_image(weights, conditions["image"])
        return found

    def validation_losses(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """`mean` `[B]`, the loss, and `accuracy` `[B]`, among the pairs of a batch."""
        del frozen, key
        found = self.losses(params["model"], batch)
        return {"mean": found["loss"], "accuracy": found["accuracy"]}

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """The loss and the accuracy on the validation split."""
        return [self.config.evaluation.spec("validation_loss", function=self.validation_losses)]

    def exports(self) -> ExportPlan:
        """There is nothing to draw with.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError("a contrastive run draws nothing; export a run that was trained with its text encoder")


RECIPE = Contrastive
