"""Detection: a network learns which objects an image shows and where, and so becomes a reward of what a text demands.

The objects of rendered scenes are known, so that every image teaches all of its facts at once, without a caption. When
it judges, the network reads what a caption demands (`data.shapes_demands`). As a reward it meets images that a
generator made. So training images are blurred and noisy, as in `matching`, and some are mixtures, with another image
(Zhang et al. 2018, "mixup", arXiv 1710.09412) or with nothing, whose objects count in part: mass then grows with how
clearly an object shows, and there is a way from an object that is missing to one that is there. One player, "model",
holds `detection`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import SHARE, at_least, check, check_texts
from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.detection import detection_loss
from snapgen_jax.networks.detection import DetectionConfig
from snapgen_jax.networks.module import apply
from snapgen_jax.recipes._assembly import Specs
from snapgen_jax.recipes._one_network import OneNetwork
from snapgen_jax.recipes.matching import CHANGED, altered, unit
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Metrics, NoOptions
from snapgen_jax.training.state import TrainState

Tree = Any
ROLE = "detection"
DEMANDS, OTHER = "demands", "other_demands"
OBJECTS, PLACES, AMOUNTS = "objects", "places", "amounts"


@dataclasses.dataclass(frozen=True)
class DetectionRecipeConfig:
    """Detection.

    Attributes:
        batch_size: images in a global batch.
        microbatches, train_steps, optimizer, ema_decay, evaluation: as for `flow_matching`.
        inputs: the images; `codec` is not used.
        network: what learns.
        most_objects: N, how many objects the data list of an image at most.
        changes: what the numbers of the data's array `changed` mean, one name each, as for `matching`.
        noise, blur: of training images, as for `matching`.
        mixed: share of the training images that are a mixture, half of them with another image of the batch and half
            with their own background, the colour of their corners.
    """

    batch_size: int = 64
    microbatches: int = 1
    train_steps: int = 1000
    inputs: ImagesConfig = ImagesConfig()
    network: DetectionConfig = DetectionConfig()
    most_objects: int = 4
    changes: tuple[str, ...] = ()
    noise: float = 0.1
    blur: float = 1.0
    mixed: float = 0.25
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.999
    evaluation: EvaluationConfig = EvaluationConfig(during=("matching",), final=("matching",))

    def __post_init__(self) -> None:
        check(self, batch_size=at_least(1), microbatches=at_least(1), train_steps=at_least(1))
        check(self, most_objects=at_least(1), ema_decay=SHARE, noise=SHARE, blur=at_least(0), mixed=SHARE)
        check_texts(self, "changes")


class DetectionRecipe(OneNetwork):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = DetectionRecipeConfig
    role = ROLE

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """`image` uint8 `[B, H, W, 3]`; its `objects` int32 `[B, N, 2]` and their `places` float32 `[B, N, 2]`; what a
        true and a false caption demand, `demands` and `other_demands` int32 `[B, L]`; and `changed` int32 `[B]`, if
        there are `changes`."""
        config, count = self.config, self.config.batch_size
        demands = jax.ShapeDtypeStruct((count, config.network.length), jnp.int32)
        specs = {
            OBJECTS: jax.ShapeDtypeStruct((count, config.most_objects, 2), jnp.int32),
            PLACES: jax.ShapeDtypeStruct((count, config.most_objects, 2), jnp.float32),
            DEMANDS: demands,
            OTHER: demands,
        }
        if config.changes:
            specs[CHANGED] = jax.ShapeDtypeStruct((count,), jnp.int32)
        return {bucket: {**images, **specs} for bucket, images in self.inputs.batch_specs().items()}

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """What makes demands of both captions."""
        network = self.config.network
        return dict.fromkeys((DEMANDS, OTHER), TokenizerSpec("demands", network.length, network.demand_ids))

    def conditions(self) -> tuple[str, ...]:
        """Captions, as what they demand, and the images beside them."""
        return DEMANDS, "image"

    # --- training ---

    def draw(self, batch: Tree, key: jax.Array) -> Tree:
        """`image` float32 `[B, H, W, 3]` in [0, 1], altered at random; and what it shows, `objects` and `places`
        `[B, 2 N, 2]`, and of each object how much, `amounts` `[B, 2 N]`."""
        config, count = self.config, len(batch["image"])
        images_key, rows_key, amounts_key, others_key = jax.random.split(key, 4)
        rows = jax.random.bernoulli(rows_key, config.mixed, (count,))
        own = jnp.where(rows, jax.random.uniform(amounts_key, (count,)), 1.0)
        with_next = jax.random.bernoulli(others_key, 0.5, (count,))
        images, shares = unit(batch["image"]), own[:, None, None, None]
        plain = images[:, :: images.shape[1] - 1, :: images.shape[2] - 1].mean((1, 2), keepdims=True)  # of the corners
        mixed = shares * images + (1 - shares) * jnp.where(with_next[:, None, None, None], _of_next(images), plain)
        amounts = jnp.stack([own, jnp.where(with_next, 1 - own, 0.0)], axis=1).repeat(config.most_objects, axis=1)
        both = {name: jnp.concatenate([batch[name], _of_next(batch[name])], axis=1) for name in (OBJECTS, PLACES)}
        return {"image": altered(mixed, images_key, config.noise, config.blur), **both, AMOUNTS: amounts}

    def losses(self, networks: Tree, images: jax.Array, shown: Tree) -> jax.Array:
        """The loss `[B]` of images `[B, H, W, 3]` in [0, 1] and what they show."""
        mass, kind, colour = apply(self.network, networks[ROLE], images, method="see")
        return detection_loss(mass, kind, colour, shown[OBJECTS], shown[PLACES], shown[AMOUNTS])

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One optimizer step on the loss of a batch's objects."""

        def loss(params: Tree, drawn: Tree) -> tuple[jax.Array, Tree]:
            return self.losses(self.weights({"model": params}, frozen), drawn["image"], drawn).mean(), {}

        state, metrics, _ = self.learn(state, loss, self.draw(batch, key))
        return state, metrics

    # --- use ---

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: NoOptions
    ) -> dict[str, jax.Array]:
        """`match` `[B]`: the reward of an image by what its caption demands, in (0, 1); and `density`
        `[B, h, w, K * C]`, where it saw how much of each kind and colour.

        Args:
            params: `{"model": {"detection"}}`.
            frozen, keys, options: unused.
            conditions: `demands` `[B, L]` and `image` uint8 `[B, H, W, 3]`.
        """
        del keys, options
        params = self.weights(params, frozen)[ROLE]
        density = apply(self.network, params, unit(conditions["image"]), method="density")
        return {
            "match": apply(self.network, params, density, conditions[DEMANDS], method="reward"),
            "density": density,
        }

    def judge(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """What the evaluator `matching` counts, `[B]` each: the loss, whether the reward of the true caption is above
        1/2, that of the false one at most that, the true one's the higher; and `changed`, where the data have it."""
        del key
        networks, images = self.weights(params, frozen), unit(batch["image"])
        loss = self.losses(networks, images, {**batch, AMOUNTS: jnp.ones(batch[OBJECTS].shape[:2])})
        density = apply(self.network, networks[ROLE], images, method="density")
        true, false = (
            apply(self.network, networks[ROLE], density, batch[name], method="reward") for name in (DEMANDS, OTHER)
        )
        found = {"loss": loss, "true": true > 0.5, "false": false <= 0.5, "ranked": true > false}
        return {**found, CHANGED: batch[CHANGED]} if CHANGED in batch else found

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names."""
        when = self.config.evaluation
        parts = {"matching": {"function": self.judge, "options": {"changes": self.config.changes}}}
        return [when.spec(name, **parts.get(name, {})) for name in when.names]


def _of_next(x: jax.Array) -> jax.Array:
    """Beside each example of a batch another one's `[B, ...]`."""
    return jnp.roll(x, 1, axis=0)


RECIPE = DetectionRecipe
