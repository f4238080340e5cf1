"""What the recipes share that freeze no network and draw nothing, and those of them that train a single one.

One player, "model", holds what learns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.networks.module import Platform, build, for_platform, init
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.recipes._assembly import taken_from
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.optimizer import learning_rate_schedule, make_optimizer, new_player, step_player
from snapgen_jax.training.recipe import Metrics, NoOptions, Part, Use
from snapgen_jax.training.state import Player, TrainState

Tree = Any


class NothingFrozen:
    """A recipe's answers to what it has none of: frozen networks, pieces of a step, latents.

    Attributes:
        role: the name of the recipe in messages; a subclass says it.
    """

    role: str
    options = NoOptions()

    def frozen_spec(self) -> Tree:
        """Nothing is frozen."""
        return {}

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Nothing is frozen."""
        del mesh, use
        return {}

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The player's networks."""
        return {**frozen, **params["model"]}

    def parts(self) -> Mapping[str, Part]:
        """None: the step is one piece."""
        return {}

    def codec(self, params: Tree, frozen: Tree) -> Any:
        """There is none.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError(f"a {self.role} run makes no latents; name a run of an autoencoder, or of a generator")


class OneNetwork(NothingFrozen):
    """A recipe without its batches, loss and use.

    Attributes:
        role: of the network, and the name of the recipe in messages; a subclass says it.
        network: what learns.
    """

    def __init__(self, config: Any, platform: Platform):
        """`config` has `batch_size`, `microbatches`, `train_steps`, `inputs`, `network`, `optimizer` and `ema_decay`;
        `platform` is the one compiled for, which fixes the compute dtype."""
        self.config = config
        self.inputs = config.inputs.build(config.batch_size, platform)
        self.network, _ = build(for_platform(config.network, platform))
        self.trains: Mapping[str, tuple[str, ...]] = {"model": (self.role,)}
        self.optimizer = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)

    # --- networks ---

    def init(self, key: jax.Array) -> TrainState:
        """Draws the network."""
        player = self._new_player({self.role: init(self.network, key)})
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from `{player: weights}` of an earlier run; optimizer, average and schedule begin anew."""
        params = taken_from(state.players["model"].params, earlier.get("model", {}))
        return state.replace(players={"model": self._new_player(params)})

    def _new_player(self, params: Tree) -> Player:
        return new_player(params, self.optimizer, ema=self.config.ema_decay > 0)

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the network."""
        return rules_of({self.role: self.network})

    # --- training and leaving ---

    def learn(
        self, state: TrainState, loss: Callable[[Tree, Tree], tuple[jax.Array, Tree]], drawn: Tree
    ) -> tuple[TrainState, Metrics, Tree]:
        """One optimizer step on `loss(params, drawn) -> (mean, aux)`: the next state, the metrics that all recipes
        report, and `aux`."""
        config, player = self.config, state.players["model"]
        grads, value, aux = accumulate_gradients(loss, player.params, drawn, config.microbatches)
        clip, decay = config.optimizer.clip_norm, config.ema_decay
        player, norm = step_player(player, grads, self.optimizer, state.step, clip_norm=clip, ema_decay=decay)
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics = {"loss": value, "grad_norm": norm, "learning_rate": rate}
        return state.replace(players={"model": player}), metrics, aux

    def exports(self) -> ExportPlan:
        """There is nothing to draw with.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError(f"a {self.role} run draws nothing; export a generator that it was the reward of")
