"""Contrastive learning of images and captions: CLIP (Radford et al. 2021, section 2.3).

An image encoder and a text encoder learn to tell which caption of a batch belongs to which image. The text encoder is
what later stages condition on, frozen; the two together score how well an image fits its prompt. One player, "model",
holds `text`, `image` and the temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.contrastive import contrastive_loss, normalised
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.codec import CodecConfig, from_uint8
from snapgen_jax.networks.module import Platform, apply, build, for_platform, init
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.recipes._assembly import Specs
from snapgen_jax.recipes._one_network import NothingFrozen
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import Metrics, NoOptions
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
        inputs: images and captions; its `text` is the text encoder that learns.
        image: the image encoder; its `projection` must equal the text encoder's.
    """

    batch_size: int = 64
    microbatches: int = 1
    train_steps: int = 1000
    inputs: CaptionsConfig = CaptionsConfig(codec=CodecConfig("identity"), caption_dropout=0.0)
    image: ClipVisionConfig = ClipVisionConfig.preset("shapes")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.999
    evaluation: EvaluationConfig = EvaluationConfig(during=("validation_loss",), final=("validation_loss",))

    def __post_init__(self) -> None:
        check(self, batch_size=at_least(1), train_steps=at_least(1), ema_decay=SHARE)


class Contrastive(NothingFrozen):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = ContrastiveConfig
    role = "contrastive"

    def __init__(self, config: ContrastiveConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes the compute dtype.

        Raises:
            ConfigError: the encoders do not fit each other or the images, or the batch is to be computed in parts.
        """
        image, text = config.image, config.inputs.text
        if image.projection != text.projection:
            raise ConfigError(
                f"image.projection={image.projection} and inputs.text.projection={text.projection} are to be compared; "
                "make them equal"
            )
        if config.microbatches != 1:
            raise ConfigError(
                f"microbatches={config.microbatches} would compare a pair with fewer others; set it to 1 and use "
                "more devices or a smaller batch_size"
            )
        if config.inputs.image_sizes != ((image.image_size, image.image_size),):
            raise ConfigError(
                f"inputs.image_sizes={config.inputs.image_sizes}, and the image encoder reads {image.image_size} px; "
                f"set inputs.image_sizes=(({image.image_size}, {image.image_size}),), or image.image_size"
            )
        if config.inputs.text_workdir:
            raise ConfigError("inputs.text_workdir names a trained text encoder, and this one learns; leave it empty")
        self.config = config
        self.inputs = config.inputs.build(config.batch_size, platform)
        self.image, _ = build(for_platform(image, platform))
        self.text = self.inputs.text
        self.trains = {"model": ("image", "text", "temperature")}
        self.optimizer = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)

    def batch_specs(self) -> Specs:
        """`image` uint8 `[B, H, W, 3]`, `tokens` int32 `[B, L]`, `mask` float32 `[B, L]`."""
        return self.inputs.batch_specs()

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """That of the captions."""
        return self.inputs.tokenizers()

    def conditions(self) -> tuple[str, ...]:
        """Captions; an `image` beside them is embedded too."""
        return self.inputs.conditions()

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

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the two encoders."""
        return rules_of({"image": self.image, "text": self.text})

    def embed_text(self, networks: Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, L]` tokens to unit vectors `[B, D]`."""
        return normalised(apply(self.text, networks["text"], tokens, mask).pooled)

    def embed_image(self, networks: Tree, images: jax.Array) -> jax.Array:
        """uint8 `[B, H, W, 3]` to unit vectors `[B, D]`."""
        return normalised(apply(self.image, networks["image"], from_uint8(images)))

    def losses(self, networks: Tree, batch: Tree) -> Metrics:
        """`loss` `[B]`, and `accuracy` `[B]`: 1 where the caption is nearer to its image than all others are."""
        image = self.embed_image(networks, batch["image"])
        text = self.embed_text(networks, batch["tokens"], batch["mask"])
        nearest = jnp.argmax(image @ text.T, axis=1) == jnp.arange(len(image))
        loss = contrastive_loss(image, text, networks["temperature"]["scale"])
        return {"loss": loss, "accuracy": nearest.astype(jnp.float32)}

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One optimizer step on the contrastive loss. Nothing in it is random."""
        del key
        player = state.players["model"]

        def loss(params: Tree) -> tuple[jax.Array, jax.Array]:
            found = self.losses(self.weights({"model": params}, frozen), batch)
            return found["loss"].mean(), found["accuracy"].mean()

        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(player.params)
        config = self.config
        player, norm = step_player(
            player,
            grads,
            self.optimizer,
            state.step,
            clip_norm=config.optimizer.clip_norm,
            ema_decay=config.ema_decay,
        )
        metrics = {
            "loss": value,
            "accuracy": accuracy,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(self.learning_rate(state.step)),
        }
        return state.replace(players={"model": player}), metrics

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: NoOptions
    ) -> dict[str, jax.Array]:
        """The embeddings of captions, `text` `[B, D]`, and of images where given, `image` `[B, D]`: unit vectors, whose
        product is the CLIP score.

        Args:
            params: `{"model": {"image", "text", "temperature"}}`.
            frozen, keys, options: unused.
            conditions: `tokens` and `mask` `[B, L]`; optionally `image` uint8 `[B, H, W, 3]`.
        """
        del keys, options
        networks = self.weights(params, frozen)
        embedded = {"text": self.embed_text(networks, conditions["tokens"], conditions["mask"])}
        if "image" in conditions:
            embedded["image"] = self.embed_image(networks, conditions["image"])
        return embedded

    def validation_losses(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """`mean` `[B]`, the loss, and `accuracy` `[B]`, among the pairs of a batch."""
        del key
        found = self.losses(self.weights(params, frozen), batch)
        return {"mean": found["loss"], "accuracy": found["accuracy"]}

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """The loss and the accuracy on the validation split."""
        return [self.config.evaluation.spec("validation_loss", function=self.validation_losses)]

    def exports(self) -> ExportPlan:
        """There is nothing to draw with.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError("a contrastive run draws nothing; export a run that was trained with its text encoder")


RECIPE = Contrastive
