"""LazyDiT: gates learn at which sampling steps a module's last output may be used again (arXiv 2412.12444).

    g = sigmoid(sum_n Z_n . W),   Y = g F(Z) + (1 - g) Y',   L = || v - v_full ||^2 + rho sum_l g_l

Z is the modulated input of a module F, an attention or a feed-forward network, and Y' is its output one step earlier.
W has a vector for each sampling step and module; it starts at zero, and nothing else is trained. The paper writes
s = 1 - g. In sampling a module runs where g >= 1/2, so that fresh gates change nothing, and elsewhere Y = Y'.

A training example is two steps of the sampler: the frozen network makes every Y' at the first and v_full at the second.
The second is always an even one, counted from one, as in the authors' code: at most every other step skips, and the
outputs that are used again are one step old (`refresh`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.path import expand_like, interpolate
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.module import Platform, build
from snapgen_jax.networks.registry import DenoiserConfig
from snapgen_jax.networks.taps import Blend, Reuse
from snapgen_jax.recipes._base import base_tokenizers, load_base
from snapgen_jax.recipes._gates import (
    ROLE,
    Kind,
    calls_to_skip,
    gated_modules,
    input_of,
    logit,
    majority_schedule,
    masks_of,
    new_gates,
    threshold,
    with_means,
)
from snapgen_jax.recipes._lazy_export import adaptive_plan, scheduled_plan
from snapgen_jax.recipes._sampling import SamplingConfig, sample_flow, sampling_grid
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, Point
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Metrics, Use
from snapgen_jax.training.state import TrainState

__all__ = ["LazyGates", "LazyGatesConfig", "LazySamplingConfig", "majority_schedule"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class LazySamplingConfig(SamplingConfig):
    """How images are made with gates. The gates are of `steps` of the run's config.

    Attributes:
        lazy: share of the module calls to skip, such as 0.3: the threshold of the gates moves to where training found
            that share. None leaves it at 1/2, where the gates were trained; 0 skips nothing and carries nothing.
        halves: under guidance, "joint" skips a module where both halves of an example agree; "separate" lets each half
            decide. Joint decisions skip less, and at one image what they skip does not run.
        schedule: in place of the gates, which modules run at each step, such as "111,010" of two steps and three
            modules in their order: 1 runs and 0 is reused. Every image then takes the same program.
    """

    steps: int = 20
    guidance: float = 1.5
    lazy: float | None = None
    halves: Literal["joint", "separate"] = "joint"
    schedule: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lazy is not None:
            check(self, lazy=SHARE)
        if self.is_lazy and self.method != "euler":
            raise ValueError(f"method={self.method!r} skips no module; set method='euler', or lazy=0")
        if not self.schedule:
            return
        if self.lazy is not None:
            raise ValueError(f"lazy={self.lazy} beside a schedule, which says what is skipped; leave one of them out")
        if (given := len(masks_of(self.schedule))) != self.steps:
            raise ValueError(f"schedule={self.schedule!r} is of {given} steps and steps={self.steps}; make them equal")

    @property
    def is_lazy(self) -> bool:
        """Whether anything may be skipped."""
        return bool(self.schedule) or self.lazy != 0


@dataclasses.dataclass(frozen=True)
class LazyGatesConfig(FlowMatchingConfig):
    """Gates of a trained network. The other fields are those of `flow_matching`: `network`, `prediction`, `schedule`
    and `inputs` are the trained run's, and the rest may differ.

    Attributes:
        base: the trained run whose averaged weights are used. A text encoder that was trained in it is read too.
        sampling: its number of steps is that of the gates.
        gate: at which modules gates stand: "attention", which in a UNet is self- and cross-attention, and "ffn". An
            extension is "residual": the convolutions of a UNet's residual blocks, whose price is that of a "ffn".
        rho_attention, rho_ffn: the price of a module that runs, beside the squared error of the velocity. A higher one
            skips more.
        refresh: when every module runs: at the "odd_steps", counted from one, as the authors' code does, or at the
            "first_step" alone, an extension under which reused outputs may be many steps old.
    """

    train_steps: int = 500
    network: DenoiserConfig = DiTConfig.preset("shapes")
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0)
    ema_decay: float = 0.0
    sampling: LazySamplingConfig = LazySamplingConfig()
    base: str = ""
    gate: tuple[Kind, ...] = ("attention", "ffn")
    rho_attention: float = 1e-4
    rho_ffn: float = 1e-4
    refresh: Literal["odd_steps", "first_step"] = "odd_steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, rho_attention=at_least(0), rho_ffn=at_least(0))
        if not self.gate:
            raise ValueError("gate=() leaves nothing to skip; give attention, ffn or both")
        if self.sampling.steps < 2:
            raise ValueError(f"sampling.steps={self.sampling.steps}: one step has no step before it; give 2 or more")


class LazyGates(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = LazyGatesConfig

    def __init__(self, config: LazyGatesConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the network does not fit what it is fed, or names no module that a gate can stand at.
        """
        super().__init__(config, platform)
        self.trains: Mapping[str, tuple[str, ...]] = {"model": (ROLE,)}
        self.modules = gated_modules(self.denoiser.network, config.gate)
        self.entering = tuple(input_of(module) for module in self.modules)
        steps = np.arange(config.sampling.steps)
        self.may_skip = steps % 2 == 1 if config.refresh == "odd_steps" else steps > 0

    # --- networks ---

    def first_params(self, key: jax.Array) -> dict[str, Tree]:
        """Gates under which every module runs."""
        del key
        return {ROLE: new_gates(self.denoiser.network, self.modules, len(self.may_skip))}

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the network from `base`, and what the inputs bring from where they say.

        Raises:
            ConfigError: there is no base, or it is not what the config says.
        """
        del use
        return load_base(self.config.base, self, mesh)

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the inputs; where the base run trained one, that."""
        return base_tokenizers(self.config.base, super().tokenizers())

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As `flow_matching`, with one sampling step for the whole batch, `step` int32 `[B]`, in place of the times."""
        drawn = super().draw(networks, batch, key, step)
        del drawn["level"]
        choices = jnp.asarray(np.flatnonzero(self.may_skip), jnp.int32)
        chosen = jax.random.choice(jax.random.fold_in(key, 3), choices)
        return {**drawn, "step": jnp.full(drawn["x_0"].shape[:1], chosen)}

    def examine(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree, Point]:
        """The loss of each example `[B]`, the mean logits of its gates, and what the network predicted with them."""
        del extra
        rolled = self._roll_out(networks, drawn)
        v, logits = self._gated(networks, drawn["step"], rolled, Blend, jax.nn.sigmoid)
        x_t, level, condition, _, full = rolled
        error = flow_matching_loss(v, full) * self.time_weight(level)
        price = sum(self._price(module) * jax.nn.sigmoid(logits[module]) for module in self.modules)
        aux = {
            "error": jnp.mean(error),
            "skipped": jnp.mean(jnp.stack([logits[module] < 0 for module in self.modules])),
            "logits": {module: jnp.mean(logits[module]) for module in self.modules},
        }
        return error + price, aux, Point(x_t, v, condition)

    def _price(self, module: str) -> float:
        return self.config.rho_attention if module.endswith("_attention") else self.config.rho_ffn

    def _roll_out(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, Level, Any, Tree, jax.Array]:
        """The frozen network at the step before a drawn one, and at it.

        Returns:
            `x_t` `[B, ...]` at the drawn step, where the step before led; its level; the condition; the outputs of all
            modules at the step before; and the velocity at the drawn step.
        """
        grid = jax.tree.map(jnp.asarray, sampling_grid(self.config.schedule, self.config.sampling))
        before, level = (jax.tree.map(lambda x, i=drawn["step"] - n: x[i], grid) for n in (1, 0))
        params, condition = networks[self.role], self.inputs.condition(networks, drawn["condition"])
        x_t = interpolate(drawn["x_0"], drawn["eps"], before.t)
        v, outputs = self.denoiser(params, x_t, before, condition, taps=self.modules)
        x_t = x_t + expand_like(level.t - before.t, x_t) * v
        return x_t, level, condition, outputs, self.denoiser(params, x_t, level, condition)[0]

    def _gated(
        self,
        networks: Tree,
        step: jax.Array,
        rolled: Tree,
        reuse: type[Reuse],
        run: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The velocity where each module runs as `run` of its gate's logit says, and the logits `{module: [B]}`.

        With `Reuse`, `run` decides; with `Blend` it gives the module's share.
        """
        x_t, level, condition, outputs, _ = rolled
        kernels = {module: networks[ROLE][module]["kernel"][step] for module in self.modules}  # [B, D]
        gated = {m: reuse(outputs[m], lambda z, m=m: run(logit(kernels[m], z))) for m in self.modules}
        v, found = self.denoiser(networks[self.role], x_t, level, condition, taps=self.entering, reuse=gated)
        return v, {module: logit(kernels[module], found[input_of(module)]) for module in self.modules}

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The mean logits, for `learn`, and the two metrics beside the loss."""
        return {**extra, "logits": aux["logits"]}, {"error": aux["error"], "skipped": aux["skipped"]}

    def learn(self, state: TrainState, frozen: Tree, drawn: Tree) -> tuple[TrainState, Metrics]:
        """As `flow_matching`; then the gates' running means move, which have no gradient."""
        state, metrics = super().learn(state, frozen, drawn)
        player, extra = state.players["model"], dict(state.extra)
        params = {**player.params, ROLE: with_means(player.params[ROLE], drawn["step"][0], extra.pop("logits"))}
        return state.replace(players={**state.players, "model": player.replace(params=params)}, extra=extra), metrics

    # --- use ---

    def first_carry(self, networks: Tree, noise: jax.Array, condition: Any, options: LazySamplingConfig) -> Any:
        """Room for the modules' outputs, and for what ran; None where nothing is skipped.

        Raises:
            ValueError: the gates are of another number of steps, or do not skip as much, or the schedule is of another
                number of modules.
        """
        if not options.is_lazy:
            return None
        if options.schedule:
            kept = self._reused(masks_of(options.schedule, len(self.modules)))
        else:
            kept = self.modules
            if options.steps != len(self.may_skip):
                raise ValueError(
                    f"steps={options.steps}, and the gates were trained for {len(self.may_skip)}; leave steps out, "
                    "train others with sampling.steps, or set lazy=0"
                )
            calls_to_skip(options.lazy or 0.0, self.may_skip, len(self.modules))
        batch, halves = noise.shape[0], _halves(options)
        level = sampling_grid(self.config.schedule, options).at(jnp.int32(0), batch)
        _, found = jax.eval_shape(
            lambda p, x, level, c: self.denoiser(p, x, level, c, taps=kept),
            networks[self.role],
            noise,
            level,
            condition,
        )
        outputs = {name: jnp.zeros((batch * halves, *x.shape[1:]), x.dtype) for name, x in found.items()}
        return {"outputs": outputs, "ran": jnp.zeros((options.steps, batch, halves, len(self.modules)), bool)}

    def denoise(
        self,
        networks: Tree,
        x_t: jax.Array,
        level: Level,
        i: jax.Array,
        carry: Any,
        condition: Any,
        options: LazySamplingConfig,
    ) -> tuple[jax.Array, Any]:
        """One call while sampling, in which modules are skipped as the gates or the schedule say."""
        if carry is None:
            return super().denoise(networks, x_t, level, i, carry, condition, options)
        call = self._scheduled if options.schedule else self._decided
        v, outputs, ran = call(networks, x_t, level, i, carry["outputs"], condition, options)
        ran = ran.reshape(-1, _halves(options), len(self.modules))
        return v, {"outputs": outputs, "ran": carry["ran"].at[i].set(ran)}

    def recorded(self, carry: Any) -> dict[str, jax.Array]:
        """ "ran" bool `[B, halves, T, modules]`, which modules ran; nothing where none could be skipped."""
        return {} if carry is None else {"ran": jnp.moveaxis(carry["ran"], 0, 2)}

    def _decided(
        self,
        networks: Tree,
        x_t: jax.Array,
        level: Level,
        i: jax.Array,
        outputs: Tree,
        condition: Any,
        options: LazySamplingConfig,
    ) -> tuple[jax.Array, Tree, jax.Array]:
        """The velocity, the modules' outputs, and which ran for whom, bool `[rows, modules]`, as the gates say."""
        gates, rows = networks[ROLE], x_t.shape[0]
        limit, refreshes = threshold(gates, self.modules, self.may_skip, options.lazy), jnp.asarray(~self.may_skip)[i]
        together = _halves(options) if options.halves == "joint" else 1

        def runs(module: str, entering: jax.Array) -> jax.Array:
            """`[rows]`. Ties run, and so does what is not a number."""
            run = refreshes | ~(logit(gates[module]["kernel"][i], entering) < limit)
            return jnp.repeat(jnp.any(run.reshape(-1, together), axis=1), together)

        def decide(module: str) -> Callable[[jax.Array], jax.Array]:
            # One decision for all rows is a branch, of which one side runs.
            return lambda entering: runs(module, entering)[0] if rows == together else runs(module, entering)

        reuse = {module: Reuse(outputs[module], decide(module)) for module in self.modules}
        taps = (*self.modules, *self.entering)
        v, found = self.denoiser(networks[self.role], x_t, level, condition, taps=taps, reuse=reuse)
        ran = jnp.stack([runs(module, found[input_of(module)]) for module in self.modules], axis=1)
        return v, {module: found[module] for module in self.modules}, ran

    def _scheduled(
        self,
        networks: Tree,
        x_t: jax.Array,
        level: Level,
        i: jax.Array,
        outputs: Tree,
        condition: Any,
        options: LazySamplingConfig,
    ) -> tuple[jax.Array, Tree, jax.Array]:
        """As `_decided`, by the static schedule: a program for each distinct mask."""
        masks = masks_of(options.schedule, len(self.modules))
        distinct, which = np.unique(masks, axis=0, return_inverse=True)

        def program(mask: np.ndarray) -> Callable[..., tuple[jax.Array, Tree]]:
            skipped = [module for module, runs in zip(self.modules, mask, strict=True) if not runs]

            def call(x_t: jax.Array, level: Level, condition: Any, outputs: Tree) -> tuple[jax.Array, Tree]:
                reuse = {module: Reuse(outputs[module]) for module in skipped}
                return self.denoiser(networks[self.role], x_t, level, condition, taps=self._reused(masks), reuse=reuse)

            return call

        number = jnp.asarray(which.reshape(-1))[i]
        v, outputs = jax.lax.switch(number, [program(mask) for mask in distinct], x_t, level, condition, outputs)
        return v, outputs, jnp.broadcast_to(jnp.asarray(masks)[i], (x_t.shape[0], len(self.modules)))

    def _reused(self, masks: np.ndarray) -> tuple[str, ...]:
        """The modules whose outputs a schedule uses again."""
        return tuple(module for module, runs in zip(self.modules, masks.T, strict=True) if not runs.all())

    # --- measuring and leaving ---

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Per-example squared error `[B]` of the velocity that skipping makes, at each step that may skip and in the
        mean, and the share of those steps' modules that is skipped."""
        networks = self.weights(params, frozen)
        drawn = self.draw(networks, batch, key)
        drawn["condition"] = self.inputs.draw_condition(networks, batch, jax.random.fold_in(key, 1), {})

        def at(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = {**drawn, "step": jnp.full_like(drawn["step"], step)}
            rolled = self._roll_out(networks, chosen)
            v, logits = self._gated(networks, chosen["step"], rolled, Reuse, lambda logits: ~(logits < 0))
            skipped = jnp.mean(jnp.stack([logits[module] < 0 for module in self.modules]), axis=0)
            return flow_matching_loss(v, rolled[-1]), skipped

        steps = np.flatnonzero(self.may_skip)
        errors, skipped = jax.lax.map(at, jnp.asarray(steps, jnp.int32))
        by_step = {f"step={step}": errors[n] for n, step in enumerate(steps.tolist())}
        return {"mean": errors.mean(axis=0), "skipped": skipped.mean(axis=0), **by_step}

    def similarity(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """How alike each module's outputs at successive steps are when the network samples without gates and without
        guidance: their cosine `[B]`, as "MODULE/step=07"; the first step has none before it."""
        networks, schedule = self.weights(params, frozen), self.config.schedule
        options = dataclasses.replace(self.options, lazy=0.0, schedule="", guidance=1.0, method="euler")
        told = self.inputs.draw_condition(networks, batch, jax.random.fold_in(key, 1), {})
        condition, null = self.inputs.condition(networks, told), self.inputs.null_condition(networks)
        noise = jax.random.normal(key, self.inputs.clean(networks, batch).shape)

        def call(x_t: jax.Array, level: Level, condition: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self.denoiser(networks[self.role], x_t, level, condition, taps=self.modules)

        def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
            a, b = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (a, b))
            return jnp.sum(a * b, axis=1) * jax.lax.rsqrt(jnp.sum(a * a, axis=1) * jnp.sum(b * b, axis=1) + 1e-30)

        def denoise(x_t: jax.Array, level: Level, i: jax.Array, carry: Any, condition: Any) -> tuple[jax.Array, Any]:
            last, cosines = carry
            v, outputs = call(x_t, level, condition)
            return v, (outputs, {m: cosines[m].at[i].set(cosine(outputs[m], last[m])) for m in self.modules})

        grid = sampling_grid(schedule, options)
        _, outputs = jax.eval_shape(call, noise, grid.at(jnp.int32(0), noise.shape[0]), condition)
        last = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        cosines = {module: jnp.zeros((options.steps, noise.shape[0])) for module in self.modules}
        _, (_, found) = sample_flow(denoise, schedule, noise, condition, null, options, (last, cosines))
        return {f"{m}/step={n:02d}": found[m][n] for m in self.modules for n in range(1, options.steps)}

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Also "similarity", when it is asked for."""
        has = self.config.evaluation.spec("similarity", function=self.similarity)
        return [*(spec for spec in super().evaluators() if spec.name != "similarity"), has]

    def exports(self) -> ExportPlan:
        """The network by the schedule of `sampling`, or with gates that decide at each call; the network alone where
        nothing is skipped.

        Raises:
            ConfigError: the gates decide for both halves of guidance together, which are two calls of a bundle.
        """
        plan, options = super().exports(), self.config.sampling
        if not options.is_lazy:
            return plan
        spec = {self.role: build(self.denoiser.network.config)[1]}
        if not options.schedule:
            if _halves(options) == 2 and options.halves == "joint":
                raise ConfigError(
                    "halves='joint' decides for both halves of guidance, which are two calls of a bundle; set "
                    "halves='separate', or give a schedule"
                )
            return adaptive_plan(plan, self.modules, self.may_skip, options.lazy, spec)
        return scheduled_plan(plan, self.modules, masks_of(options.schedule, len(self.modules)), spec)


def _halves(options: SamplingConfig) -> int:
    """Rows of an example in a call: without and with its condition under guidance."""
    return 1 if options.guidance == 1 else 2


RECIPE = LazyGates
