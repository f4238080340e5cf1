"""Adapters: a trained network learns something new from a few images, through small matrices beside its weights.

    W' = W + s B A,   L = E_new ||v - v_target||^2 + w E_prior ||v - v_target||^2

W is frozen and comes from a trained run or from published weights; A and B are the only parameters (Hu et al. 2021,
"LoRA"). The second term is DreamBooth's prior preservation (Ruiz et al. 2022, eq. 2): examples of what the network
drew before, or data that it was trained on, keep it from forgetting. They are a source of `data.mixture`, and w is its
weight over that of the new examples.

The loss, the sampling and the export are those of `flow_matching`, asked with the merged weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.diffusion.stages import Stages
from snapgen_jax.inputs.interfaces import Inputs, TokenizerSpec
from snapgen_jax.networks.lora import A, B, LoraConfig, adapted, init_adapters, merge
from snapgen_jax.networks.module import Platform, build
from snapgen_jax.recipes._assembly import Specs, specs_of, taken_from
from snapgen_jax.recipes._base import base_tokenizers, load_base
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.optimizer import learning_rate_schedule, make_optimizer, new_player, step_player
from snapgen_jax.training.recipe import Metrics, Part, Use
from snapgen_jax.training.state import Player, TrainState

Tree = Any
ROLE = "adapters"


@dataclasses.dataclass(frozen=True)
class AdaptersConfig(FlowMatchingConfig):
    """Adapters of a trained network. The other fields are those of `flow_matching`: `network`, `prediction`, `schedule`
    and `inputs` are the trained run's, and the rest may differ.

    Attributes:
        base: the trained run whose averaged weights are adapted; or the folder `transformer/` of a published Stable
            Diffusion 3.5. A text encoder that was trained in that run is read from there too.
        lora: which weights, and how.
    """

    base: str = ""
    lora: LoraConfig = LoraConfig()


class Adapters:
    """See the top of this file. Implements `training.recipe.Recipe`; holds the recipe whose loss it takes."""

    Config = AdaptersConfig

    def __init__(self, config: AdaptersConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the network does not fit what it is fed, or a target of the adapters finds nothing.
        """
        self.config: Any = config
        self.method = FlowMatching(config, platform)
        self.inputs: Inputs = self.method.inputs
        self.options: Any = self.method.options
        self.trains: Mapping[str, tuple[str, ...]] = {"model": (ROLE,)}
        self.optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)
        self._shapes = {role: build(network.config)[1] for role, network in self.method.networks().items()}
        adapted(config.lora, self._shapes)

    # --- networks ---

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks with the adapters merged, and the adapters."""
        adapters = params["model"][ROLE]
        return {**merge(frozen, adapters, self.config.lora.scale), ROLE: adapters}

    def init(self, key: jax.Array) -> TrainState:
        """Draws adapters that change nothing yet."""
        player = self._new_player({ROLE: init_adapters(self.config.lora, self._shapes, key)})
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from the adapters of an earlier run of this recipe."""
        params = taken_from(state.players["model"].params, earlier.get("model", {}))
        return state.replace(players={"model": self._new_player(params)})

    def _new_player(self, params: Tree) -> Player:
        return new_player(params, self.optimizer, ema=self.config.ema_decay > 0)

    def frozen_spec(self) -> Tree:
        """`{role: shapes}` of all networks."""
        networks = self.method.networks()
        return specs_of(networks, networks)

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the network from `base`, and what the inputs bring from where they say.

        Raises:
            ConfigError: there is no base, or it is not what the config says.
        """
        del use
        return load_base(self.config.base, self.method, mesh)

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Adapters are replicated; the networks lie as they say."""
        return [(f"/({A}|{B})$", PartitionSpec()), *self.method.rules()]

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """Those of the inputs."""
        return self.method.batch_specs()

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the inputs; where the base run trained one, that."""
        return base_tokenizers(self.config.base, self.method.tokenizers())

    def conditions(self) -> tuple[str, ...]:
        """Those of the inputs."""
        return self.method.conditions()

    # --- training ---

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step of the adapters."""
        config, player = self.config, state.players["model"]
        drawn = self._draw(state, frozen, batch, key)
        grads, loss, _ = accumulate_gradients(
            lambda params, drawn: self.method.loss(self.weights({"model": params}, frozen), drawn, {}),
            player.params,
            drawn,
            config.microbatches,
        )
        clip, decay = config.optimizer.clip_norm, config.ema_decay
        player, norm = step_player(player, grads, self.optimizer, state.step, clip_norm=clip, ema_decay=decay)
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        return state.replace(players={"model": player}), metrics

    def _draw(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        networks = self.weights({"model": state.players["model"].params}, frozen)
        return self.method.draw(networks, batch, key, state.step)

    def parts(self) -> Mapping[str, Part]:
        """ "draw", all that comes before the loss."""
        return {"draw": self._draw}

    # --- use ---

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: SamplingConfig
    ) -> dict[str, jax.Array]:
        """As `flow_matching`, by the merged weights."""
        return self.method.generate(*self._merged(params, frozen), conditions, keys, options)

    def stages(self, options: SamplingConfig) -> Stages:
        """As `flow_matching`; of merged weights, `{role: parameters}`."""
        return self.method.stages(options)

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """As `flow_matching`, by the merged weights."""
        return self.method.validation_loss(*self._merged(params, frozen), batch, key)

    def codec(self, params: Tree, frozen: Tree) -> Any:
        """That of the inputs."""
        return self.method.codec(*self._merged(params, frozen))

    def _merged(self, params: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        """The arguments `params` and `frozen` of the method: nothing trained, and all networks frozen."""
        return {"model": {}}, self.weights(params, frozen)

    def evaluators(self) -> Sequence[Any]:
        """Those that `config.evaluation` names."""
        return [
            spec if spec.function is None else dataclasses.replace(spec, function=self.validation_loss)
            for spec in self.method.evaluators()
        ]

    def exports(self) -> ExportPlan:
        """That of `flow_matching`; its weights are the merged ones."""
        return self.method.exports()


RECIPE = Adapters
