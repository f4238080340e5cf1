"""Quantisation-aware training: a trained network goes on in weights of few levels (BitsFusion, arXiv 2406.04333).

    w' = s clip(round(w / s), low, high)
    stage I:    L = || v' - v ||^2 + 0.01 sum_i || f'_i - f_i ||^2        stage II:    L = || v' - (eps - x_0) ||^2

v' and f' are the velocity and the outputs of the stages with the weights w', v and f those of the network as it was,
which is frozen. Both are told the same condition, dropped for the same examples. Times are drawn towards noise, where
the error of the predicted image is largest: Beta(3, 1), section 5. The weights w and the scales s are both trained, see
`networks/quantise.py`; an export has the integers beside the weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.bounds import at_least, check, check_texts
from snapgen_jax.diffusion.path import interpolate, velocity
from snapgen_jax.diffusion.schedules import FlowSchedule, Schedule
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.module import Platform
from snapgen_jax.networks.quantise import ROUNDS, Levels, bits_of, first_scales, quantisable, quantised, stored_integers
from snapgen_jax.recipes._assembly import specs_of, taken_from, trained_roles
from snapgen_jax.recipes._base import base_tokenizers, load_base
from snapgen_jax.recipes._flow_export import Time
from snapgen_jax.recipes._run import run_config
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, Point
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan, Stored
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Metrics, Use
from snapgen_jax.training.state import TrainState

Tree = Any
SCALES = "scales"
STAGES = r"(down|up)_\d+|block_\d+"  # the names of the outputs of stages, or of blocks


@dataclasses.dataclass(frozen=True)
class QuantisedConfig(FlowMatchingConfig):
    """Quantisation-aware training. The other fields are those of `flow_matching`: `network`, `prediction`, `schedule`
    and `inputs` are the trained run's, and the rest may differ, the schedule's density with it.

    Attributes:
        base: the trained run: stage I learns from it, and a text encoder that was trained in it is read from it; ""
            for `init_from`.
        init_from: of the experiment: where the weights begin, the trained run, or the run of stage I.
        learns_from: the trained network ("network", stage I), or the data ("data", stage II).
        bits: `{layer: bits}` from 1 to 8, such as {"mid_residual/conv_1/pointwise": 3, "*/project_*": 4}; see
            `networks.quantise.bits_of`.
        default_bits: of layers that `bits` does not name; depthwise kernels and the first and the last layer have 8.
        levels: "balanced" around zero, 2^b + 1 of them, or "unbalanced", 2^b.
        initialisation: of the scales: fitted to the weights in turn ("alternating"), or from the smallest to the
            largest weight ("min_max").
        feature_weight: of the distance of the stages' outputs, stage I.
        feature_taps: whose outputs are compared; () for all stages, or blocks where there are no stages.
        exported_time: what an exported network is told: which time of the sampler's grid, whose embeddings are a
            "table"; or "features" of any time, and then the layers that embed it stay in the file as floats.
    """

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, warmup_steps=0, weight_decay=0.0)
    schedule: Schedule = FlowSchedule(density="power")
    ema_decay: float = 0.0
    base: str = ""
    init_from: str = ""
    learns_from: Literal["network", "data"] = "network"
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    default_bits: int = 2
    levels: Levels = "balanced"
    initialisation: Literal["alternating", "min_max"] = "alternating"
    feature_weight: float = 0.01
    feature_taps: tuple[str, ...] = ()
    exported_time: Time = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, feature_weight=at_least(0), default_bits=at_least(1))
        check_texts(self, "feature_taps")


class Quantised(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = QuantisedConfig

    def __init__(self, config: QuantisedConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the network does not fit what it is fed, or a layer or a tap that is named is not there.
        """
        super().__init__(config, platform)
        self.trains: Mapping[str, tuple[str, ...]] = {"model": (self.role, SCALES)}
        self.exported_time: Time = config.exported_time
        self.teacher = f"teacher/{self.role}"
        self.layers = quantisable(config.network)
        self.bits = bits_of(self.layers, config.bits, config.default_bits)
        names = config.network.tap_names()
        if unknown := [name for name in config.feature_taps if name not in names]:
            raise ValueError(f"feature_taps: the network has no {', '.join(unknown)}; it has {', '.join(names)}")
        chosen = config.feature_taps or tuple(name for name in names if re.fullmatch(STAGES, name))
        self.taps = chosen if config.feature_weight else ()

    @property
    def distils(self) -> bool:
        """Whether it learns from the network as it was."""
        return self.config.learns_from == "network"

    # --- networks ---

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks, with the quantised weights in the place of those that are trained, and the scales."""
        model = params["model"]
        used = quantised(model[self.role], model[SCALES], self.bits, self.config.levels)
        return {**frozen, **model, self.role: used}

    def first_params(self, key: jax.Array) -> dict[str, Tree]:
        """A network that is drawn, and its first scales."""
        return self._with_scales(self._drawn(key))

    def _drawn(self, key: jax.Array) -> dict[str, Tree]:
        return {role: tree for role, tree in super().first_params(key).items() if role == self.role}

    def _with_scales(self, params: dict[str, Tree]) -> dict[str, Tree]:
        rounds = ROUNDS if self.config.initialisation == "alternating" else 0
        return {**params, SCALES: first_scales(params[self.role], self.bits, self.config.levels, rounds)}

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from the weights of the trained run, to which the scales are fitted; or from weights and scales of an
        earlier stage.

        Raises:
            ConfigError: it holds other weights, or scales of other bits.
        """
        new, old = state.players["model"].params, earlier.get("model", {})
        wanted = (self.role, SCALES) if SCALES in old else (self.role,)
        params = taken_from({r: new[r] for r in wanted}, {r: old[r] for r in wanted if r in old})
        params = params if SCALES in params else self._with_scales(params)
        return state.replace(players={"model": self.new_player(params)})

    def frozen_spec(self) -> Tree:
        """`{role: shapes}` of what the inputs bring, and in stage I of the network as it was."""
        specs = specs_of(self.networks(), self.networks())
        own = specs.pop(self.role)
        return {**specs, **({self.teacher: own} if self.distils else {})}

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the network from `base`, and what the inputs bring from where they say.

        Raises:
            ConfigError: there is no base, or it is not what the config says; or nothing to start from.
        """
        base = self._base()
        if use == "train" and not self.config.init_from:
            raise ConfigError(
                "there are no weights to quantise: set init_from to the trained run, or to the run of stage I"
            )
        taught = self.distils and use == "train"
        if taught and run_config(base).get("recipe") == "quantised":
            raise ConfigError(
                f"{base!r} is a quantised run, and stage I learns from the network as it was: set base to the run "
                "that it was trained in, or learns_from to 'data'"
            )
        if not taught and not trained_roles(self.inputs):
            return self.inputs.load(self.inputs.pretrained(), mesh)
        loaded = load_base(base, self, mesh)
        own = loaded.pop(self.role)
        return {**loaded, **({self.teacher: own} if taught else {})}

    def _base(self) -> str:
        return self.config.base or self.config.init_from

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the inputs; where the base run trained one, that."""
        return base_tokenizers(self._base(), super().tokenizers())

    # --- training ---

    def examine(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree, Point]:
        """The loss of each example `[B]`, its parts, and what the quantised network predicted."""
        if not self.distils:
            return super().examine(networks, drawn, extra)
        level = drawn["level"]
        point, features = self.predict(networks, drawn, self.taps)
        v, taught = jax.lax.stop_gradient(
            self.denoiser(networks[self.teacher], point.x_t, level, point.condition, taps=self.taps)
        )
        losses = {"output": flow_matching_loss(point.v, v) * self.time_weight(level)}
        total = losses["output"]
        if self.taps:
            distances = [flow_matching_loss(features[tap], taught[tap]) for tap in self.taps]
            losses["feature"] = sum(distances[1:], distances[0])
            total = total + self.config.feature_weight * losses["feature"]
        return total, {f"loss/{name}": jnp.mean(loss) for name, loss in losses.items()}, point

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The parts of the loss."""
        return extra, aux

    # --- measuring and leaving ---

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """As `flow_matching`. Where the network as it was is loaded, as while stage I trains, also "unquantised", the
        mean loss of that; and "image_error", in the mean and at each time, how far the predicted images lie apart: t^2
        times the squared distance of the velocities (section 5)."""
        numbers = super().validation_loss(params, frozen, batch, key)
        if self.teacher not in frozen:
            return numbers
        networks = self.weights(params, frozen)
        told = self.inputs.draw_condition(networks, batch, jax.random.fold_in(key, 1), {})
        x_0, condition = self.inputs.clean(networks, batch), self.inputs.condition(networks, told)
        eps = jax.random.normal(key, x_0.shape)

        def at(level: Any) -> tuple[jax.Array, jax.Array]:
            level = jax.tree.map(lambda value: jnp.full(x_0.shape[:1], value), level)
            x_t = interpolate(x_0, eps, level.t)
            v, taught = (self.denoiser(networks[role], x_t, level, condition)[0] for role in (self.role, self.teacher))
            apart = jnp.square(level.t) * flow_matching_loss(v, taught)
            return apart, flow_matching_loss(taught, velocity(x_0, eps))

        errors, losses = jax.lax.map(at, jax.tree.map(jnp.asarray, self.validation_levels))
        times = self.validation_levels.t.tolist()
        by_time = {f"image_error.t={t:.2f}": errors[i] for i, t in enumerate(times)}
        return {**numbers, "unquantised": losses.mean(axis=0), "image_error": errors.mean(axis=0), **by_time}

    def exports(self) -> ExportPlan:
        """That of `flow_matching`, with the integers and scales of the network's weights."""
        plan = super().exports()
        units = [
            dataclasses.replace(unit, storage=self.stored) if self.role in unit.roles else unit for unit in plan.units
        ]
        return dataclasses.replace(plan, units=units)

    def stored(self, weights: Mapping[str, Tree]) -> dict[str, Stored]:
        """`{path: Stored}` of the network's weights, as from `weights`."""
        found = jax.jit(lambda used, scales: stored_integers(used, scales, self.bits, self.config.levels))(
            weights[self.role], weights[SCALES]
        )
        return {
            f"{self.role}/{name}/kernel": Stored(np.asarray(q), np.asarray(scale), self.bits[name])
            for name, (q, scale) in found.items()
        }


RECIPE = Quantised
