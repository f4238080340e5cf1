"""Diffusion-DPO: a trained network learns from pairs of images of which one is preferred (arXiv 2311.12908, eq. 14).

    L = - log sigmoid( - beta T w(t) [ (|v_w - v_theta|^2 - |v_w - v_ref|^2) - (|v_l - v_theta|^2 - |v_l - v_ref|^2) ] )

Both images of a pair are noised by the same noise to the same time. The reference is the trained network as it was, and
frozen; where the two are equal the loss is log 2. The paper's errors are of eps; here they are of the velocity, times
the weight w(t) that makes them those of the network's own output (`FlowMatching.time_weight`): under the schedule of a
network that predicts eps the two are the same. There is no reward network and no sampling in training.

What learns are adapters, or the whole network as its difference to the reference. The batch holds `image`, the
preferred one, `other_image` and one caption of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from snapgen_jax.bounds import above, check
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.losses.preference import preference_loss, preference_margin
from snapgen_jax.networks.module import Platform
from snapgen_jax.recipes._assembly import Specs
from snapgen_jax.recipes.adapters import Adapters, AdaptersConfig
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import step_player
from snapgen_jax.training.recipe import Metrics
from snapgen_jax.training.state import TrainState

Tree = Any
DIFFERENCE = "difference"
TIE = 1e-3  # a smaller margin is the rounding of two errors, times a large beta
IMAGE, OTHER = "image", "other_image"


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(AdaptersConfig):
    """Diffusion-DPO. The other fields are those of `adapters`: `base` is the run that learns and that is the reference;
    `network`, `prediction`, `schedule` and `inputs` are that run's.

    Attributes:
        trains: "adapters", as `lora` says; or "network", all weights of the denoiser, as their difference to `base`.
        beta: `beta T` of the paper, for errors that are means over an example: how strongly the network is held to the
            reference. The authors' code has 2500 (half of `beta_dpo=5000`).
    """

    trains: Literal["adapters", "network"] = "adapters"
    beta: float = 2500.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, beta=above(0))


class Preference(Adapters):
    """See the top of this file. Implements `training.recipe.Recipe`. What learns beside a frozen network, and its
    use, are as in `adapters`."""

    Config = PreferenceConfig

    def __init__(self, config: PreferenceConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the inputs read no images.
            ValueError: the network does not fit what it is fed, or a target of the adapters finds nothing.
        """
        super().__init__(config, platform)
        if any(IMAGE not in specs for specs in self.method.batch_specs().values()):
            raise ConfigError(
                f"inputs.kind={config.inputs.kind!r} reads no {IMAGE!r}, and a pair is two of them; choose inputs of "
                "images, such as 'captions'"
            )
        if config.trains == "network":
            self.trains = {"model": (DIFFERENCE,)}

    # --- networks ---

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks with the adapters merged or the difference added, and what was added."""
        if self.config.trains == "adapters":
            return super().weights(params, frozen)
        change = params["model"][DIFFERENCE]
        moved = {role: jax.tree.map(_plus, frozen[role], change[role]) for role in change}
        return {**frozen, **moved, DIFFERENCE: change}

    def init(self, key: jax.Array) -> TrainState:
        """What changes nothing yet."""
        if self.config.trains == "adapters":
            return super().init(key)
        role = self.method.role
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), self._shapes[role])
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": self._new_player({DIFFERENCE: {role: zeros}})}, {})

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Adapters are replicated; the networks, and a difference to one, lie as they say."""
        return super().rules() if self.config.trains == "adapters" else self.method.rules()

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """Those of the inputs, and `other_image` like `image`."""
        return {bucket: {**specs, OTHER: specs[IMAGE]} for bucket, specs in self.method.batch_specs().items()}

    # --- training ---

    def _draw(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        networks = self.weights({"model": state.players["model"].params}, frozen)
        return self.pair(networks, batch, key, state.step)

    def pair(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> dict[str, Tree]:
        """`{"better", "worse"}`, each as `FlowMatching.draw` gives it: other images, all else the same."""
        other = {**batch, IMAGE: batch[OTHER]}
        return {
            "better": self.method.draw(networks, batch, key, step),
            "worse": self.method.draw(networks, other, key, step),
        }

    def margin(self, networks: Tree, reference: Tree, drawn: Tree) -> jax.Array:
        """The implicit reward of the better image over the worse, `[B]`.

        Args:
            networks: `{role: parameters}` that learn.
            reference: those that do not.
            drawn: as from `pair`.
        """
        both = jax.tree.map(lambda *x: jnp.concatenate(x), drawn["better"], drawn["worse"])

        def errors(networks: Tree) -> list[jax.Array]:
            return jnp.split(self.method.task_loss(both, self.method.predict(networks, both)[0]), 2)

        (better, worse), (better_reference, worse_reference) = errors(networks), errors(reference)
        scale = self.config.beta * self.method.time_weight(drawn["better"]["level"])
        return preference_margin(better, better_reference, worse, worse_reference, scale)

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step on the preferences of a batch."""
        config, player = self.config, state.players["model"]

        def loss(params: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
            margin = self.margin(self.weights({"model": params}, frozen), frozen, drawn)
            return preference_loss(margin).mean(), {"accuracy": ranked(margin).mean(), "margin": margin.mean()}

        drawn = self._draw(state, frozen, batch, key)
        grads, value, found = accumulate_gradients(loss, player.params, drawn, config.microbatches)
        clip, decay = config.optimizer.clip_norm, config.ema_decay
        player, norm = step_player(player, grads, self.optimizer, state.step, clip_norm=clip, ema_decay=decay)
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics = {"loss": value, **found, "grad_norm": norm, "learning_rate": rate}
        return state.replace(players={"model": player}), metrics

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Of pairs `[B]`: `mean`, the loss; `margin`; and `accuracy`, whether the better image has the higher implicit
        reward; each over `validation_levels`, with the same noise at each."""
        networks, levels = self.weights(params, frozen), self.method.validation_levels
        drawn = self.pair(networks, batch, key)
        kept = self.method.inputs.draw_condition(networks, batch, key, {})

        def at(level: Level) -> jax.Array:
            level = Level(*(jnp.full(len(batch[IMAGE]), value) for value in level))
            return self.margin(
                networks,
                frozen,
                {name: {**one, "level": level, "condition": kept} for name, one in drawn.items()},
            )

        margins = jax.lax.map(at, jax.tree.map(jnp.asarray, levels))  # [T, B]
        mean = margins.mean(axis=0)
        return {"mean": preference_loss(margins).mean(axis=0), "margin": mean, "accuracy": ranked(mean)}


def _plus(weight: jax.Array, difference: jax.Array) -> jax.Array:
    """In float32: in bfloat16 the first changes would be rounded away."""
    return weight.astype(jnp.float32) + difference


def ranked(margin: jax.Array) -> jax.Array:
    """1 where the better of a pair has the higher implicit reward, 0 where the worse has, 1/2 where neither: `[B]`."""
    return jnp.where(jnp.abs(margin) < TIE, 0.5, (margin > 0).astype(jnp.float32))


RECIPE = Preference
