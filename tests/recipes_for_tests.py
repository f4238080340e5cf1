"""A recipe that shares nothing with diffusion, to hold the loop to its contract.

Two players fit sequences `[B, L, D]`: "predictor" learns a frozen projection and steps every update, "critic" learns
the size of the predictor's error and steps every third. Their gradients are clipped jointly, and a running mean of the
loss lives in `extra`. Two batch shapes, no image, no time, no noise schedule; no network that nnx has built, and an
`Inputs` that hands its one array through. Below it, what the tests of the real recipes share.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from snapgen_jax.generation import Generator
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import OptimizerConfig, clip_by_joint_norm, make_optimizer, new_player, step_player
from snapgen_jax.training.recipe import NoOptions
from snapgen_jax.training.state import Player, TrainState

WIDTH = 8
ONE_STAGE = {  # what makes of the preset "smoke" a UNet of one stage, which compiles in less than half the time
    "channels": (8,),
    "down_depth": (0,),
    "up_depth": (0,),
    "self_attention": (False,),
    "cross_attention": (True,),
    "first_stage": "res",
}


@dataclasses.dataclass(frozen=True)
class OneArrayConfig:
    """Batches of one array: its name, its shape in each bucket without the batch axis, and its dtype."""

    name: str
    shapes: dict
    batch_size: int
    dtype: type = np.float32


class OneArray:
    """An array that is both example and condition, with no network, no text and no picture. Implements
    `inputs.interfaces.Inputs`."""

    def __init__(self, config):
        self.config = config

    def batch_specs(self):
        config = self.config
        return {
            bucket: {config.name: jax.ShapeDtypeStruct((config.batch_size, *shape), config.dtype)}
            for bucket, shape in config.shapes.items()
        }

    def latent_shape(self, size=None):
        return next(iter(self.config.shapes.values()))

    def conditions(self):
        return (self.config.name,)

    def networks(self):
        return {}

    def pretrained(self):
        return ()

    def load(self, roles, mesh):
        return {}

    def tokenizers(self):
        return {}

    def clean(self, networks, batch):
        return batch[self.config.name].astype(jnp.float32)

    def integer_bounds(self):
        return {}

    def unconditional_share(self):
        return 0.0

    def draw_kept(self, key, batch_size):
        return {}

    def draw_condition(self, networks, batch, key, kept):
        return {self.config.name: batch[self.config.name]}

    def condition(self, networks, drawn):
        return drawn[self.config.name]

    def null_condition(self, networks):
        return jnp.zeros((1, *self.latent_shape()), self.config.dtype)

    def decode(self, networks, x_0):
        return {self.config.name: x_0}

    def codec(self, networks):
        raise ConfigError(f"no codec makes {self.config.name!r}; take it as it is")

    def check_run(self, workdir, inputs, parts):
        pass

    def check_batch(self, arrays):
        pass

    def exports(self):
        raise ConfigError(f"no phone asks for {self.config.name!r}; export a run of pictures")


class Bare:
    """What a recipe says of itself that has `inputs` and nothing beside them to tell."""

    options = NoOptions()

    def batch_specs(self):
        return self.inputs.batch_specs()

    def tokenizers(self):
        return self.inputs.tokenizers()

    def conditions(self):
        return self.inputs.conditions()

    def warm_start(self, state, earlier):
        return state

    def weights(self, params, frozen):
        return {**frozen, **params}

    def codec(self, params, frozen):
        return self.inputs.codec(self.weights(params, frozen))

    def parts(self):
        return {}

    def exports(self):
        return self.inputs.exports()

    def evaluators(self):
        return []

    def rules(self):
        return []


class TwoPlayers(Bare):
    """Implements `training.recipe.Recipe`."""

    def __init__(self, batch_size=16, lengths=(4, 6), train_steps=30, poison=None):
        self.batch_size, self.lengths, self.poison = batch_size, lengths, poison
        self.config = OptimizerConfig(learning_rate=3e-2, warmup_steps=0, clip_norm=0.5)
        self.inputs = OneArray(OneArrayConfig("sequence", {f"length{n}": (n, WIDTH) for n in lengths}, batch_size))
        self.trains = {"predictor": ("predictor",), "critic": ("critic",)}
        self.optimizer = make_optimizer(self.config, train_steps)

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

    def frozen_spec(self):
        return {"projection": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}

    def load_frozen(self, mesh, use="train"):
        if use == "generate":  # the projection is what is learnt
            return {}
        matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
        one = SingleDeviceSharding(jax.devices()[0])  # as `weights.frozen` has it
        where = one if mesh is None else NamedSharding(mesh, PartitionSpec())
        return {"projection": jax.device_put(matrix.astype(np.float32), where)}

    def update(self, state, frozen, batch, key):
        params = {name: player.params for name, player in state.players.items()}
        x = self.inputs.clean(self.weights(params, frozen), batch)
        target = x @ frozen["projection"] + 0.01 * jax.random.normal(key, x.shape)

        def loss(params):
            networks = self.weights(params, frozen)
            prediction = x @ networks["predictor"]["kernel"] + networks["predictor"]["bias"]
            error = jnp.square(prediction - target).mean(axis=(1, 2))
            guess = (x @ networks["critic"]["kernel"]).mean(axis=(1, 2))
            return error.mean() + jnp.square(guess - jax.lax.stop_gradient(error)).mean(), error.mean()

        (_, error), grads = jax.value_and_grad(loss, has_aux=True)(params)
        if self.poison is not None:
            bad = jnp.isin(state.step, jnp.asarray(self.poison))
            grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)
        critic_turn = state.step % 3 == 0
        grads["critic"] = jax.tree.map(lambda g: jnp.where(critic_turn, g, 0.0), grads["critic"])
        grads, norm = clip_by_joint_norm(grads, self.config.clip_norm)
        old = state.players
        predictor, _ = step_player(old["predictor"], grads["predictor"], self.optimizer, state.step, ema_decay=0.9)
        stepped, _ = step_player(old["critic"], grads["critic"], self.optimizer, state.step, ema_decay=0.9)
        critic = jax.tree.map(lambda new, old: jnp.where(critic_turn, new, old), stepped, state.players["critic"])
        extra = {
            "mean_loss": 0.9 * state.extra["mean_loss"] + 0.1 * error,
            "critic_steps": state.extra["critic_steps"] + critic_turn.astype(jnp.int32),
        }
        new = state.replace(players={"predictor": predictor, "critic": critic}, extra=extra)
        return new, {"loss": error, "grad_norm": norm}

    def generate(self, params, frozen, conditions, keys, options):
        predictor = self.weights(params, frozen)["predictor"]
        x = conditions[self.inputs.config.name]
        return self.inputs.decode({}, x @ predictor["kernel"] + predictor["bias"])

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


# --- what the tests of the real recipes share ------------------------------------------------------------------------

GREY_TOKENS = 6


def greys(seed=0, size=8, side=8):
    """Pictures of one grey each, with the grey as the caption."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 8, size)
    tokens = np.zeros((size, GREY_TOKENS), np.int32)
    tokens[:, :3] = np.stack([np.full(size, 1), 3 + grey, np.full(size, 2)], axis=1)
    image = np.broadcast_to((grey * 36).astype(np.uint8)[:, None, None, None], (size, side, side, 3))
    return {"image": np.ascontiguousarray(image), "tokens": tokens, "mask": (tokens > 0).astype(np.float32)}


class ByPosition:
    """Batches that a function of their position makes."""

    def __init__(self, bucket, batch):
        self.bucket, self.batch = bucket, batch

    def batches(self, position):
        while True:
            arrays = self.batch(position)
            yield Drawn(self.bucket, arrays, np.arange(len(next(iter(arrays.values())))))
            position += 1


def random_like(spec, seed=0):
    """Weights away from zero: a fresh network's output is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) + (len(s.shape) == 1), s.dtype), spec)


def state_away_from_zero(made):
    """A recipe's first state, with such weights for every player."""
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    players = {
        name: dataclasses.replace(zeros.players[name], params=random_like(player.params, 1))
        for name, player in state.players.items()
    }
    return zeros.replace(players=players)


def train_and_read(made, batches, workdir, steps):
    """Trains on one device, or goes on; returns the last state and the lines of `train.jsonl`."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    config = LoopConfig(train_steps=steps, log_every_steps=1, tensorboard=False)
    state = loop.train(made, batches, config, workdir=workdir, mesh=mesh, quiet=True)
    return state, [json.loads(line) for line in (workdir / "metrics" / "train.jsonl").read_text().splitlines()]


@dataclasses.dataclass(frozen=True)
class AddsConfig:
    """What a call to `Adds` may choose, none of which changes the sum."""

    steps: int = 1
    guidance: float = 1.0


class Adds(Bare):
    """A recipe that draws its prompt's number, times a weight, plus one that is frozen; it learns nothing. Implements
    `training.recipe.Recipe`."""

    traced = 0

    def __init__(self, config=AddsConfig()):
        self.config = self.options = config
        self.trains = {"model": ("weight",)}
        self.inputs = OneArray(OneArrayConfig("tokens", {"1x1": (1,)}, batch_size=1, dtype=np.int32))

    def init(self, key):
        player = Player({"weight": jnp.int32(1)}, opt_state=(), ema=None)
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})

    def frozen_spec(self):
        return {"offset": jax.ShapeDtypeStruct((), jnp.int32)}

    def load_frozen(self, mesh, use="train"):
        return {"offset": jnp.int32(0)}

    def weights(self, params, frozen):
        return {**frozen, **params["model"]}

    def update(self, state, frozen, batch, key):
        return state, {"loss": jnp.float32(0), "grad_norm": jnp.float32(0)}

    def generate(self, params, frozen, conditions, keys, options):
        Adds.traced += 1
        networks = self.weights(params, frozen)
        return {"image": conditions["tokens"] * networks["weight"] + networks["offset"]}


class Digits:
    """Tokens that are the numbers which prompts spell."""

    names = ("tokens",)

    def arrays(self, prompts, lengths):
        return {"tokens": np.array([[int(prompt)] for prompt in prompts], np.int32)}


def adder(weight, frozen):
    """The generator of `Adds`; prompts are numbers."""
    params, frozen = {"model": {"weight": jnp.int32(weight)}}, {"offset": jnp.int32(frozen)}
    return Generator(Adds(), params, frozen, Digits())  # type: ignore[arg-type]  # all it needs


def save_run(state, workdir):
    """Saves a state as the first checkpoint of a run."""
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state, 0, {})
    checkpointer.close()


def saved_away_from_zero(method, workdir):
    """Saves a run of a network that was moved away from zero; its weights."""
    state, random = jax.jit(method.init)(key(0, 0, "init")), np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), state.players["model"].ema
    )
    state = state.replace(players={"model": state.players["model"].replace(ema=params)})
    save_run(state, workdir)
    return params
