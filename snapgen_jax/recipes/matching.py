"""Image-text matching: a network learns whether an image shows what a caption says, and so becomes a reward.

    L = - (log p(image, caption) + log (1 - p(image, other caption))) / 2

A true and a false caption of each image are told apart by binary cross-entropy (Li et al. 2022, "BLIP", section 3.2).
What false captions say decides what is learnt: those of other images differ in most words, and those that the data give
(`negatives="caption"`) may differ in one fact. As a reward it meets images that a generator made, which are noisy or
blurred while it learns, so images are altered so in training. One player, "model", holds `matching`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import SHARE, at_least, check, check_texts
from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.matching import matching_loss
from snapgen_jax.networks.matching import MatchingConfig
from snapgen_jax.networks.module import Platform, apply
from snapgen_jax.recipes._assembly import Specs
from snapgen_jax.recipes._one_network import OneNetwork
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
)
from snapgen_jax.training.recipe import Metrics, NoOptions
from snapgen_jax.training.state import TrainState

Tree = Any
ROLE = "matching"
TOKENS, OTHER, CHANGED = "tokens", "other_tokens", "changed"
BLUR_REACH = 3  # pixels on either side


@dataclasses.dataclass(frozen=True)
class MatchingRecipeConfig:
    """Image-text matching.

    Attributes:
        batch_size: images in a global batch, each with a true and a false caption.
        microbatches, train_steps, optimizer, ema_decay, evaluation: as for `flow_matching`.
        inputs: the images; `codec` is not used.
        network: what learns. `text.max_tokens` is the length of a caption in tokens.
        tokenizer_workdir: the run whose tokenizer is used, such as the generator's that is to be rewarded; "" trains
            one on the true captions of the data.
        negatives: where false captions are from: "batch", those of other images of the batch; "caption", the array
            `other_tokens` of the data (`data.texts={"other_tokens": "other_caption"}`).
        batch_share: with "caption", share of the false captions in training that are those of other images after all.
            They are false in most words, and so teach what words mean, before one fact alone can be told.
        changes: what the numbers of the data's array `changed` mean, one name each, so that accuracy is told for each;
            () where the data have no such array.
        noise: training images have Gaussian noise, of a standard deviation from 0 to this, in [0, 1] of an image.
        blur: and are blurred, by a Gaussian of a standard deviation from 0 to this, in pixels.
    """

    batch_size: int = 64
    microbatches: int = 1
    train_steps: int = 1000
    inputs: ImagesConfig = ImagesConfig()
    network: MatchingConfig = MatchingConfig()
    tokenizer_workdir: str = ""
    negatives: Literal["batch", "caption"] = "batch"
    batch_share: float = 0.0
    changes: tuple[str, ...] = ()
    noise: float = 0.1
    blur: float = 1.0
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.999
    evaluation: EvaluationConfig = EvaluationConfig(during=("matching",), final=("matching",))

    def __post_init__(self) -> None:
        check(self, batch_size=at_least(1), microbatches=at_least(1), train_steps=at_least(1))
        check(self, ema_decay=SHARE, batch_share=SHARE, noise=SHARE, blur=at_least(0))
        check_texts(self, "changes")


class MatchingRecipe(OneNetwork):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = MatchingRecipeConfig
    role = ROLE

    def __init__(self, config: MatchingRecipeConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes the compute dtype.

        Raises:
            ConfigError: the batch holds no false caption, or its false captions have no name.
        """
        if config.negatives == "batch":
            if config.batch_size < 2:
                raise ConfigError(
                    "batch_size=1 with negatives='batch': there is no other image whose caption is false of this one; "
                    "set batch_size to 2 or more"
                )
            if config.changes:
                raise ConfigError(
                    f"changes={config.changes} with negatives='batch': captions of other images are not sorted by what "
                    "they change; set changes=(), or negatives='caption'"
                )
        super().__init__(config, platform)

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """`image` uint8 `[B, H, W, 3]` and `tokens` int32 `[B, L]`; of the data's false captions `other_tokens`
        `[B, L]`, and `changed` int32 `[B]`."""
        config, count = self.config, self.config.batch_size
        tokens = jax.ShapeDtypeStruct((count, config.network.text.max_tokens), jnp.int32)
        specs = {TOKENS: tokens}
        if config.negatives == "caption":
            specs[OTHER] = tokens
            if config.changes:
                specs[CHANGED] = jax.ShapeDtypeStruct((count,), jnp.int32)
        return {bucket: {**images, **specs} for bucket, images in self.inputs.batch_specs().items()}

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """One for both captions, trained on the true ones alone, as that of a generator is."""
        text, config = self.config.network.text, self.config
        own = TokenizerSpec("trained", text.max_tokens, text.vocab_size, config.tokenizer_workdir)
        others = {OTHER: dataclasses.replace(own, like=TOKENS)} if config.negatives == "caption" else {}
        return {TOKENS: own, **others}

    def conditions(self) -> tuple[str, ...]:
        """Captions and the images beside them."""
        return TOKENS, "image"

    # --- training ---

    def draw(self, batch: Tree, key: jax.Array) -> Tree:
        """`image` float32 `[B, H, W, 3]` in [0, 1], altered at random, `tokens` and `other_tokens` `[B, L]`."""
        images_key, rows_key = jax.random.split(key)
        images = altered(unit(batch["image"]), images_key, self.config.noise, self.config.blur)
        rows = jax.random.bernoulli(rows_key, self.config.batch_share, (len(images), 1))
        false = jnp.where(rows, of_others(batch), self.false(batch))
        return {"image": images, TOKENS: batch[TOKENS], OTHER: false}

    def false(self, batch: Tree) -> jax.Array:
        """Captions that are false of the images of a batch, `[B, L]`."""
        return batch[OTHER] if self.config.negatives == "caption" else of_others(batch)

    def logits(self, networks: Tree, images: jax.Array, *texts: jax.Array) -> list[jax.Array]:
        """Logits `[B]` of each of several `[B, L]` texts beside images `[B, H, W, 3]` in [0, 1]."""
        params = networks[ROLE]
        cells = apply(self.network, params, images, method="see")
        logits = apply(
            self.network,
            params,
            jnp.concatenate([cells] * len(texts)),
            jnp.concatenate(texts),
            method="compare",
        )
        return jnp.split(logits, len(texts))

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One optimizer step on the cross-entropy of a batch's true and false captions."""

        def loss(params: Tree, drawn: Tree) -> tuple[jax.Array, jax.Array]:
            networks = self.weights({"model": params}, frozen)
            true, false = self.logits(networks, drawn["image"], drawn[TOKENS], drawn[OTHER])
            return matching_loss(true, false).mean(), _correct(true, false).mean()

        state, metrics, accuracy = self.learn(state, loss, self.draw(batch, key))
        return state, {**metrics, "accuracy": accuracy}

    # --- use ---

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: NoOptions
    ) -> dict[str, jax.Array]:
        """`match` `[B]`: the probability that an image shows what its caption says.

        Args:
            params: `{"model": {"matching"}}`.
            frozen, keys, options: unused.
            conditions: `tokens` `[B, L]` and `image` uint8 `[B, H, W, 3]`.
        """
        del keys, options
        networks = self.weights(params, frozen)
        (logits,) = self.logits(networks, unit(conditions["image"]), conditions[TOKENS])
        return {"match": jax.nn.sigmoid(logits)}

    def judge(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """What the evaluator `matching` counts, `[B]` each: the loss, whether the true caption was taken for true, the
        false one for false, the true one for the better, and `changed`, where the data say what was."""
        del key
        networks = self.weights(params, frozen)
        true, false = self.logits(networks, unit(batch["image"]), batch[TOKENS], self.false(batch))
        found = {"loss": matching_loss(true, false), "true": true > 0, "false": false <= 0, "ranked": true > false}
        return {**found, CHANGED: batch[CHANGED]} if CHANGED in batch else found

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names."""
        when = self.config.evaluation
        parts = {"matching": {"function": self.judge, "options": {"changes": self.config.changes}}}
        return [when.spec(name, **parts.get(name, {})) for name in when.names]


def of_others(batch: Tree) -> jax.Array:
    """Beside each image of a batch the caption of another, `[B, L]`."""
    return jnp.roll(batch[TOKENS], 1, axis=0)


def unit(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def _correct(true: jax.Array, false: jax.Array) -> jax.Array:
    """Share of an image's two captions that are judged rightly, `[B]`."""
    return 0.5 * ((true > 0).astype(jnp.float32) + (false <= 0).astype(jnp.float32))


def altered(images: jax.Array, key: jax.Array, noise: float, blur: float) -> jax.Array:
    """Images as a generator may make them: each blurred, and with noise, by amounts of its own.

    Args:
        images: `[B, H, W, 3]` float32 in [0, 1].
        key: the only source of randomness.
        noise: largest standard deviation of the noise.
        blur: largest standard deviation of the blur, in pixels.

    Returns:
        `[B, H, W, 3]` float32 in [0, 1].
    """
    blur_key, amount_key, noise_key = jax.random.split(key, 3)
    count = (len(images), 1, 1, 1)
    if blur:
        deviation = jax.random.uniform(blur_key, count, minval=1e-3, maxval=blur)
        for axis in (1, 2):
            images = _blurred(images, deviation, axis)
    if noise:
        amount = jax.random.uniform(amount_key, count, maxval=noise)
        images = jnp.clip(images + amount * jax.random.normal(noise_key, images.shape), 0, 1)
    return images


def _blurred(images: jax.Array, deviation: jax.Array, axis: int) -> jax.Array:
    """Convolved with a Gaussian along an axis; edges are repeated. A sum of shifted images: a grouped convolution is
    many times as slow on CPU."""
    padding = [(BLUR_REACH, BLUR_REACH) if i == axis else (0, 0) for i in range(images.ndim)]
    padded, size = jnp.pad(images, padding, mode="edge"), images.shape[axis]
    offsets = range(-BLUR_REACH, BLUR_REACH + 1)
    taps = [jnp.exp(-0.5 * jnp.square(offset / deviation)) for offset in offsets]
    shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(len(taps)))
    return sum(tap * part for tap, part in zip(taps, shifted, strict=True)) / sum(taps)  # type: ignore[return-value]


RECIPE = MatchingRecipe
