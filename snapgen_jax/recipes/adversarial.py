"""Adversarial step distillation: a generator that makes the image in four steps, or eight.

    x0^ = x_t - t v_theta(x_t, t, c),   t one of the few times of sampling
    min_G max_D  hinge(D(x_s, s, c), D(x~_s, s, c)) + S(L_task, L_kd)

SnapGen (arXiv 2412.09619, section 3.4), as a diffusion GAN (`_discriminator.py`). Sampling jumps to x0^ and back to
the next time with fresh noise, without guidance. An optional critic follows what is generated for distribution matching
(`_critic.py`): with it, unit weights of a few-step teacher's output and features, and no adversary, this is the K-DMD
of SnapGen++ (arXiv 2601.08303).

One update is a turn of the opponents, the players "discriminator" and "critic", and then, every so many updates, of
"model", the generator, against both as they now are. What is random is drawn for each turn anew: an opponent that has
just been trained on a draw of noise and time would be asked there for what it remembers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.diffusion.path import expand_like, interpolate, x0_from_velocity
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.inputs.interfaces import TokenizerSpec, prefixed
from snapgen_jax.losses.distillation import TASK
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.module import Network, Platform, init
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.recipes._adversarial_config import AdversarialConfig
from snapgen_jax.recipes._assembly import Specs, merged_tokenizers
from snapgen_jax.recipes._critic import Critic
from snapgen_jax.recipes._discriminator import DISCRIMINATOR, Discriminator
from snapgen_jax.recipes._sampling import own_states, sampling_grid
from snapgen_jax.recipes._teacher import Teacher
from snapgen_jax.recipes.distillation import OWN_KEYS, Distillation
from snapgen_jax.recipes.flow_matching import Point
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import learning_rate_schedule, make_optimizer, new_player, step_player
from snapgen_jax.training.recipe import Metrics, Part, Use
from snapgen_jax.training.state import Player, TrainState

Tree = Any
CRITIC = "critic"
LATEST = "generator"  # in `extra`: the metrics of the generator's latest step


class Opponent(Protocol):
    """What the generator plays against: the attributes and functions that `Discriminator` and `Critic` share."""

    weight: float
    term: str

    @property
    def role(self) -> str: ...
    def networks(self) -> dict[str, Network]: ...
    def draw(self, key: jax.Array, shape: tuple[int, ...], t: jax.Array, level: Level) -> Tree: ...
    def loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: Any) -> tuple[jax.Array, Metrics]: ...
    def generator_loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: Any) -> jax.Array: ...


class Adversarial(Distillation):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = AdversarialConfig

    def __init__(self, config: AdversarialConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the heads do not fit the trunk, sampling is not the generator's, or the teacher is not what is
                needed.
        """
        super().__init__(config, platform)
        config.check(bool(self.loss_weights))
        self.grid = sampling_grid(config.schedule, config.sampling)
        # At other times the generator is never asked.
        self.levels = self.validation_levels = Level(*(value[:-1] for value in self.grid))
        # Its optimizer counts its own steps.
        own_steps = max(1, config.train_steps // config.generator_every)
        self.optimizer = make_optimizer(config.optimizer, own_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, own_steps)
        if self.teacher.has_own_latents:
            raise ConfigError(
                "a generator of few steps needs a teacher on the student's latents; leave 'latent' out of teacher.takes"
            )
        self.score = self.teacher
        self.opponents: dict[str, Opponent] = {}
        if config.adversarial_weight:
            size = self.inputs.latent_shape()
            self.opponents[DISCRIMINATOR] = Discriminator(config, self.denoiser, self.teacher, size, platform)
        if config.critic_weight:
            if config.score_teacher is not None:
                beside = self.teacher if self.has_teacher else None
                fed = self.inputs, config.schedule, config.batch_size, platform
                self.score = Teacher(config.score_teacher, *fed, name="score_teacher", beside=beside)
            self.opponents[CRITIC] = Critic(
                config.critic_weight, config.critic_times, self.denoiser, self.role, self.score, self.time_weight
            )
        self.optimizers = {
            name: (settings, make_optimizer(settings, config.train_steps))
            for name, settings in ((DISCRIMINATOR, config.discriminator_optimizer), (CRITIC, config.critic_optimizer))
        }
        self.trains = {**self.trains, **{name: (opponent.role,) for name, opponent in self.opponents.items()}}

    def times(self) -> Sequence[float]:
        """Those of sampling."""
        return sampling_grid(self.config.schedule, self.config.sampling).t[:-1].tolist()

    # --- networks ---

    @property
    def has_teacher(self) -> bool:
        """Whether the losses, the discriminator or the critic ask the teacher."""
        config: AdversarialConfig = self.config
        as_trunk = config.adversarial_weight and config.trunk == "teacher"
        as_score = config.critic_weight and config.score_teacher is None
        return bool(self.loss_weights or as_trunk or as_score)

    @property
    def _other_score(self) -> Teacher | None:
        """The score teacher where it is not the teacher."""
        return None if self.score is self.teacher else self.score

    def networks(self) -> dict[str, Network]:
        """As for the distillation, those of the opponents, and the score teacher's."""
        networks = super().networks()
        for opponent in self.opponents.values():
            networks |= opponent.networks()
        return {**networks, **(self._other_score.networks() if self._other_score else {})}

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks as they are: `{role: parameters}`, those of the opponents too where they are given."""
        networks = super().weights(params, frozen)
        if DISCRIMINATOR in params:
            networks[DISCRIMINATOR] = params[DISCRIMINATOR]
        return {**networks, **prefixed(CRITIC, params.get(CRITIC, {}))}

    def init(self, key: jax.Array) -> TrainState:
        """As for the distillation, with the other players."""
        state = super().init(key)
        players, extra = dict(state.players), state.extra
        for name, opponent in self.opponents.items():
            if isinstance(opponent, Critic):
                players[name] = self._new_critic(players["model"].params)
            elif isinstance(opponent, Discriminator):
                heads = init(opponent.heads, jax.random.fold_in(key, 100))
                players[name] = new_player(heads, self.optimizers[name][1], ema=False)
        if self.config.generator_every > 1:
            extra = {**extra, LATEST: {name: jnp.float32(0) for name in self._generator_metrics}}
        return state.replace(players=players, extra=extra)

    def _new_critic(self, params: Tree) -> Player:
        """The critic begins as the generator."""
        copy = jax.tree.map(jnp.array, {self.role: params[self.role]})
        return new_player(copy, self.optimizers[CRITIC][1], ema=False)

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """The generator from an earlier stage, and the critic, if there is one, as it; the heads begin anew."""
        started = super().warm_start(state, earlier)
        players = {**state.players, **started.players}
        if CRITIC in self.opponents:
            players[CRITIC] = self._new_critic(players["model"].params)
        return started.replace(players=players)

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """As for the distillation; and to train the trunk and the score teacher."""
        frozen = super().load_frozen(mesh, use)
        if use == "generate":
            return frozen
        discriminator = self.opponents.get(DISCRIMINATOR)
        if isinstance(discriminator, Discriminator):
            frozen = {**frozen, **discriminator.load(mesh)}
        return {**frozen, **(self._other_score.load(mesh, frozen) if self._other_score else {})}

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """As for the distillation, and those of the score teacher."""
        if self._other_score is None or self.config.shard_student:
            return super().rules()
        return rules_of({**self.teacher.networks(), **self._other_score.networks()})

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """As for the distillation, and what the score teacher reads."""
        specs = super().batch_specs()
        return specs if self._other_score is None else self._other_score.batch_specs(specs)

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """As for the distillation, and those of the score teacher."""
        specs = super().tokenizers()
        return specs if self._other_score is None else merged_tokenizers(specs, self._other_score.tokenizers())

    # --- training ---

    def draw_untaught(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As for the distillation, for a turn of the generator."""
        drawn = super().draw_untaught(networks, batch, key, step)
        return {**drawn, **self.draw_turn(jax.random.fold_in(key, 100), drawn["x_0"].shape, step)}

    def draw_taught(self, networks: Tree, batch: Tree, key: jax.Array, kept: Tree) -> Tree:
        """As for the distillation, and for the score teacher: from the same key, so that what both draw is one."""
        drawn = super().draw_taught(networks, batch, key, kept)
        if self._other_score is None:
            return drawn
        own = self._other_score.draw(networks, batch, jax.random.fold_in(key, OWN_KEYS), kept)
        return {**drawn, self.score.name: own}

    def draw_turn(self, key: jax.Array, shape: tuple[int, ...], step: int | jax.Array = 0) -> Tree:
        """What is random about a turn, whatever the examples: their noise, one of the few times, whether they are to be
        the generator's own samples, and what each opponent looks through.

        Args:
            key: of this turn alone.
            shape: of the examples, `[B, ...]`.
            step: updates done.
        """
        keys = [jax.random.fold_in(key, i) for i in range(6)]
        size, own_samples = shape[:1], self.config.own_samples
        which = jax.random.randint(keys[0], size, 0, len(self.levels.t))
        level = Level(*(jnp.asarray(value)[which] for value in self.levels))
        turn = {"eps": jax.random.normal(keys[1], shape), "level": level}
        if own_samples:
            turn |= {"which": which, "own": jax.random.bernoulli(keys[2], own_samples, size)}
            turn["own_noise"] = jax.random.normal(keys[3], (*size, len(self.levels.t), *shape[1:]))
        for i, (name, opponent) in enumerate(sorted(self.opponents.items())):
            of_density = self.draw_level(jax.random.fold_in(keys[4], i), size, step)
            turn[name] = opponent.draw(jax.random.fold_in(keys[5], i), shape, jnp.asarray(level.t), of_density)
        return turn

    def start(self, networks: Tree, drawn: Tree, condition: Any) -> jax.Array:
        """On the path, or for some examples where the generator's own sampling leads. No gradient passes."""
        x_t = super().start(networks, drawn, condition)
        if not self.config.own_samples:
            return x_t
        states = self.own_states(networks, drawn["own_noise"], condition)
        own = states[drawn["which"], jnp.arange(x_t.shape[0])]
        return jnp.where(expand_like(drawn["own"], x_t), own, x_t)

    def own_states(self, networks: Tree, noise: jax.Array, condition: Any) -> jax.Array:
        """Where the generator is at each of its times in its own sampling from noise `[B, S, ...]`: `[S, B, ...]`."""
        params, condition = jax.lax.stop_gradient((networks[self.role], condition))

        def denoise(x_t: jax.Array, level: Level) -> jax.Array:
            return self.denoiser(params, x_t, level, condition)[0]

        return own_states(denoise, self.config.schedule, self.grid, noise)

    def task_loss(self, drawn: Tree, point: Point) -> jax.Array:
        """The squared error of the velocity, `[B]`; 0 of the generator's own samples, which no data belong to."""
        loss = super().task_loss(drawn, point)
        return jnp.where(drawn["own"], 0.0, loss) if self.config.own_samples else loss

    def generated(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, Any]:
        """What the generator makes of the drawn examples, and what it was told. No gradient passes."""
        point, _ = self.predict(networks, drawn)
        return jax.lax.stop_gradient((x0_from_velocity(point.x_t, point.v, drawn["level"].t), point.condition))

    def loss(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree]:
        """What the generator minimises."""
        losses, aux, point = self.examine(networks, drawn, extra)
        metrics = dict(aux.get("metrics", {}))
        x_0 = x0_from_velocity(point.x_t, point.v, drawn["level"].t)
        total = jnp.mean(losses)
        for opponent in self.opponents.values():
            value = jnp.mean(opponent.generator_loss(networks, drawn, x_0, point.condition))
            metrics[f"loss/{opponent.term}"] = value
            total = total + opponent.weight * value
        return total, {**aux, "metrics": metrics}

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """The opponents step, then the generator where it is its turn."""
        networks = self.current(state, frozen)
        drawn = self.draw_untaught(networks, batch, key, state.step)

        def taught() -> Tree:
            return {**drawn, **self.draw_taught(networks, batch, key, drawn["kept"])}

        turn = self.draw_turn(jax.random.fold_in(key, 101), drawn["x_0"].shape, state.step)
        before = taught() if self.config.trunk == "teacher" else drawn
        state, metrics = self.step_opponents(tuple(self.opponents), state, frozen, {**before, **turn})
        if self.config.generator_every == 1:
            state, more = self.step_generator(state, frozen, taught())
            return state, {**metrics, **more}

        def step(state: TrainState) -> tuple[Player, Tree]:
            new, found = self.step_generator(state, frozen, taught())
            latest = {name: jnp.asarray(found[name], jnp.float32) for name in self._generator_metrics}
            return new.players["model"], {**new.extra, LATEST: latest}

        def wait(state: TrainState) -> tuple[Player, Tree]:
            return state.players["model"], state.extra

        # A condition, not a choice of results: what is not taken is not computed.
        its_turn = (state.step + 1) % self.config.generator_every == 0
        player, extra = jax.lax.cond(its_turn, step, wait, state)
        return state.replace(players={**state.players, "model": player}, extra=extra), {**metrics, **extra[LATEST]}

    @property
    def _generator_metrics(self) -> tuple[str, ...]:
        """The names of what `step_generator` reports."""
        losses = (TASK, *self.loss_weights) if self.loss_weights else ()
        terms = [f"loss/{name}" for name in (*losses, *(opponent.term for opponent in self.opponents.values()))]
        return ("loss", "learning_rate", "grad_norm/model", *terms)

    def step_generator(self, state: TrainState, frozen: Tree, drawn: Tree) -> tuple[TrainState, Metrics]:
        """The step of the player "model" against the opponents as they are. Learning rate and average go by the number
        of its own steps."""
        own = state.replace(step=state.step // self.config.generator_every)
        new, metrics = self.learn(own, frozen, drawn)
        norm = metrics.pop("grad_norm")
        return new.replace(step=state.step), {**metrics, "grad_norm/model": norm}

    def step_opponents(
        self, names: Sequence[str], state: TrainState, frozen: Tree, drawn: Tree
    ) -> tuple[TrainState, Metrics]:
        """The steps of some opponents beside the generator as it is. What it makes is made once for all of them."""
        if not names:
            return state, {}
        others = {other: player.params for other, player in state.players.items()}

        def loss(params: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
            networks = self.weights({**others, **params}, frozen)
            x_0, condition = self.generated(networks, drawn)
            found = [self.opponents[name].loss(networks, drawn, x_0, condition) for name in names]
            # None has a parameter of another, so that the gradient of the sum is that of each by itself.
            total = jnp.sum(jnp.stack([value for value, _ in found]))
            return total, {k: v for _, metrics in found for k, v in metrics.items()}

        params = {name: state.players[name].params for name in names}
        grads, _, metrics = accumulate_gradients(loss, params, drawn, self.config.microbatches)
        players = dict(state.players)
        for name in names:
            settings, optimizer = self.optimizers[name]
            players[name], metrics[f"grad_norm/{name}"] = step_player(
                players[name], grads[name], optimizer, state.step, clip_norm=settings.clip_norm
            )
        return state.replace(players=players), metrics

    # --- measuring ---

    def validation_error(
        self, networks: Tree, x_0: jax.Array, eps: jax.Array, level: Level, condition: Any
    ) -> jax.Array:
        """`[B]`: the squared error of the jump to the data, `|| x0^ - x_0 ||^2 = t^2 || v - (eps - x_0) ||^2`."""
        return jnp.square(level.t) * super().validation_error(networks, x_0, eps, level, condition)

    def exposure(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """How far the generator's jump is from the teacher's on noised data, and on its own samples at the same times.

        In training without own samples it sees the first alone, in sampling but for the first time the second: what the
        second is above the first is the exposure gap.

        Args:
            params, frozen: as for `weights`; `frozen` with the teacher.
            batch: as for `update`.
            key: of noise; nothing is dropped.

        Returns:
            `|| x0^ - x0_T ||^2` `[B]`, as "noised/t=0.90" and "own/t=0.90" for each time.

        Raises:
            ConfigError: there is no teacher.
        """
        if not self.has_teacher:
            raise ConfigError("the exposure gap is a distance to the teacher, and there is none; set output_weight")
        networks, steps = self.weights(params, frozen), len(self.levels.t)
        x_0 = self.inputs.clean(networks, batch)
        told = self.inputs.draw_condition(networks, batch, jax.random.fold_in(key, 1), {})
        condition = self.inputs.condition(networks, told)
        asked = self.teacher.draw(networks, batch, jax.random.fold_in(key, 2), {})
        noise = jax.random.normal(key, (x_0.shape[0], steps, *x_0.shape[1:]))
        own = self.own_states(networks, noise, condition)
        noised = jnp.stack([interpolate(x_0, noise[:, i], t) for i, t in enumerate(self.levels.t)])

        def distance(point: tuple[Level, jax.Array]) -> jax.Array:
            level, x_t = point
            level = Level(*(jnp.full(x_t.shape[:1], value) for value in level))
            v, _ = self.denoiser(networks[self.role], x_t, level, condition)
            taught, _ = self.teacher.ask(networks, asked, x_t, level, condition)
            return jnp.square(level.t) * flow_matching_loss(v, taught)

        levels = jax.tree.map(jnp.asarray, self.levels)
        found = {name: jax.lax.map(distance, (levels, x)) for name, x in (("noised", noised), ("own", own))}
        times = [f"t={t:.2f}" for t in self.levels.t.tolist()]
        return {f"{name}/{time}": rows[i] for name, rows in found.items() for i, time in enumerate(times)}

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Also "exposure" where there is a teacher, when it is asked for."""
        has = [self.config.evaluation.spec("exposure", function=self.exposure)] if self.has_teacher else []
        return [*(spec for spec in super().evaluators() if spec.name != "exposure"), *has]

    def parts(self) -> Mapping[str, Part]:
        """Also the steps of the players, each without the others': "discriminator", "critic" and "generator"."""

        def drawn(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            return self.draw(self.current(state, frozen), batch, key, state.step)

        def of_opponent(name: str) -> Part:
            def step(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
                before = drawn(state, frozen, batch, key)
                turn = self.draw_turn(jax.random.fold_in(key, 101), before["x_0"].shape, state.step)
                new, metrics = self.step_opponents((name,), state, frozen, {**before, **turn})
                return new.players[name], metrics

            return step

        def generator(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            new, metrics = self.step_generator(state, frozen, drawn(state, frozen, batch, key))
            return new.players["model"], metrics

        return {**super().parts(), **{name: of_opponent(name) for name in self.opponents}, "generator": generator}


RECIPE = Adversarial
