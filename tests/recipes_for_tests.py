"""A recipe that shares nothing with diffusion, to hold the loop to its contract.

Two players fit sequences `[B, L, D]`: "predictor" learns a frozen projection and steps every update, "critic" learns
the size of the predictor's error and steps every third. Their gradients are clipped jointly, and a running mean of the
loss lives in `extra`. Two batch shapes, no image, no time, no noise schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from snapgen_jax.training.optimizer import OptimizerConfig, clip_by_joint_norm, make_optimizer, new_player, step_player
from snapgen_jax.training.state import TrainState

WIDTH = 8


class TwoPlayers:
    """Implements `training.recipe.Recipe`."""

    def __init__(self, batch_size=16, lengths=(4, 6), train_steps=30, poison=None):
        self.batch_size, self.lengths, self.poison = batch_size, lengths, poison
        self.config = OptimizerConfig(learning_rate=3e-2, warmup_steps=0, clip_norm=0.5)
        self.optimizer = make_optimizer(self.config, train_steps)

    def batch_specs(self):
        return {
            f"length{n}": {"sequence": jax.ShapeDtypeStruct((self.batch_size, n, WIDTH), jnp.float32)}
            for n in self.lengths
        }

    def init(self, key):
        a, b = jax.random.split(key)
        predictor = {"kernel": jax.random.normal(a, (WIDTH, WIDTH)) * 0.1, "bias": jnp.zeros(WIDTH)}
        critic = {"kernel": jax.random.normal(b, (WIDTH, 1)) * 0.1}
        players = {
            "predictor": new_player(predictor, self.optimizer, ema=True),
            "critic": new_player(critic, self.optimizer, ema=False),
        }
        return TrainState(
            jnp.int32(0), jnp.int32(0), players, {"mean_loss": jnp.float32(0), "critic_steps": jnp.int32(0)}
        )

    def warm_start(self, state, earlier):
        return state

    def frozen_spec(self):
        return {"projection": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}

    def load_frozen(self, mesh):
        matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return {"projection": jax.device_put(matrix.astype(np.float32), where)}

    def update(self, state, frozen, batch, key):
        x = batch["sequence"]
        target = x @ frozen["projection"] + 0.01 * jax.random.normal(key, x.shape)

        def loss(params):
            prediction = x @ params["predictor"]["kernel"] + params["predictor"]["bias"]
            error = jnp.square(prediction - target).mean(axis=(1, 2))
            guess = (x @ params["critic"]["kernel"]).mean(axis=(1, 2))
            return error.mean() + jnp.square(guess - jax.lax.stop_gradient(error)).mean(), error.mean()

        params = {name: player.params for name, player in state.players.items()}
        (_, error), grads = jax.value_and_grad(loss, has_aux=True)(params)
        if self.poison is not None:
            bad = jnp.isin(state.step, jnp.asarray(self.poison))
            grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)
        critic_turn = state.step % 3 == 0
        grads["critic"] = jax.tree.map(lambda g: jnp.where(critic_turn, g, 0.0), grads["critic"])
        grads, norm = clip_by_joint_norm(grads, self.config.clip_norm)
        predictor = step_player(state.players["predictor"], grads["predictor"], self.optimizer, state.step, 0.9)
        stepped = step_player(state.players["critic"], grads["critic"], self.optimizer, state.step, 0.9)
        critic = jax.tree.map(lambda new, old: jnp.where(critic_turn, new, old), stepped, state.players["critic"])
        extra = {
            "mean_loss": 0.9 * state.extra["mean_loss"] + 0.1 * error,
            "critic_steps": state.extra["critic_steps"] + critic_turn.astype(jnp.int32),
        }
        new = state.replace(players={"predictor": predictor, "critic": critic}, extra=extra)
        return new, {"loss": error, "grad_norm": norm}

    def generate(self, params, frozen, conditions, key, **options):
        return {"sequence": conditions["sequence"] @ params["predictor"]["kernel"] + params["predictor"]["bias"]}

    def exports(self):
        raise NotImplementedError("a sequence model that no phone asks for")

    def evaluators(self):
        return []

    def rules(self):
        return [(r"predictor/.*kernel$", PartitionSpec(None, "fsdp"))]


@dataclasses.dataclass(frozen=True)
class Drawn:
    bucket: str
    arrays: dict
    source_index: np.ndarray


class Sequences:
    """Batches as a pure function of their position, or one host's share of them; the two lengths take turns.

    The rows of a global batch lie host after host; `rows_of` gives those of one host in the order of so many.
    """

    def __init__(self, recipe, host=0, hosts=1, rows_of=1):
        rows = np.arange(recipe.batch_size)[host::hosts]
        self.recipe, self.drawn, self.share = recipe, [], np.concatenate([rows[i::rows_of] for i in range(rows_of)])

    def batches(self, position):
        while True:
            rng = np.random.default_rng((7, position))
            length = self.recipe.lengths[position % len(self.recipe.lengths)]
            x = rng.normal(size=(self.recipe.batch_size, length, WIDTH)).astype(np.float32)
            self.drawn.append(position)
            index = np.arange(len(x)) + position * len(x)
            yield Drawn(f"length{length}", {"sequence": x[self.share]}, index[self.share])
            position += 1
