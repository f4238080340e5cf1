"""Runs that are trained in one program learn what each learns by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.seeds import train_together
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.state import TrainState
from snapgen_jax.training.together import JoinedBatches, Together, stack
from tests.recipes_for_tests import Sequences, TwoPlayers

SEEDS = (0, 5, 9)
CONFIG = LoopConfig(
    train_steps=12, log_every_steps=4, tensorboard=False, checkpoint=CheckpointConfig(every_steps=5), seed=SEEDS[0]
)
pytestmark = pytest.mark.usefixtures("quick_to_compile")
ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


class Own(TwoPlayers):
    """One batch shape, and a frozen projection of its own."""

    def __init__(self, scale):
        super().__init__(lengths=(4,), train_steps=12)
        self.scale = scale

    def load_frozen(self, mesh, use="train"):
        return jax.tree.map(lambda x: self.scale * x, super().load_frozen(mesh, use))

    def warm_start(self, state, earlier):
        player = dataclasses.replace(state.players["predictor"], params=earlier["predictor"])
        return state.replace(players={**state.players, "predictor": player})


def earlier_weights(scale):
    return {
        "predictor": jax.tree.map(lambda x: scale * np.ones_like(x), {"kernel": np.ones((8, 8)), "bias": np.ones(8)})
    }


def alone(scale, seed, **options):
    recipe = Own(scale)
    config = dataclasses.replace(CONFIG, seed=seed)
    return loop.train(recipe, Sequences(recipe), config, mesh=ONE, quiet=True, **options)


def together(workdir=None, steps=12, **options):
    recipes = [Own(1.0 + i) for i in range(len(SEEDS))]
    made = Together(recipes, SEEDS)
    config = dataclasses.replace(CONFIG, train_steps=steps)
    streams = JoinedBatches([Sequences(recipe) for recipe in recipes])
    return made, loop.train(made, streams, config, mesh=ONE, quiet=True, workdir=workdir, **options)


def same(a: TrainState, b: TrainState, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("warm", [False, True], ids=["from nothing", "from earlier runs"])
def test_each_run_is_the_run_that_it_would_be_alone(warm):
    scales = [1.0 + i for i in range(len(SEEDS))]
    options = {"earlier": lambda: stack([earlier_weights(s) for s in scales])} if warm else {}
    made, state = together(**options)
    for i, (scale, seed) in enumerate(zip(scales, SEEDS, strict=True)):
        options = {"earlier": lambda scale=scale: earlier_weights(scale)} if warm else {}
        same(made.part(state, i), alone(scale, seed, **options), rtol=2e-4, atol=2e-5)
    first, second = (made.part(state, i).players["predictor"].params["kernel"] for i in (0, 1))
    assert not np.allclose(first, second), "every run has its own seed"


def test_together_in_two_parts_is_the_same_bit_for_bit(tmp_path):
    _, whole = together()
    together(tmp_path, steps=7)
    _, parts = together(tmp_path)
    same(whole, parts, rtol=0, atol=0)


def test_what_is_trained_together_are_ordinary_runs_in_the_end(tmp_path):
    made = []
    for seed in (0, 1):
        changes = [f"seed={seed}", "train_steps=3", "tensorboard=False", "evaluation.final=()"]
        resolved = load_experiment("configs/shapes/quickstart.py:runlocal", changes)
        made.append(Experiment(resolved, tmp_path / str(seed)))
    states = train_together(made, tmp_path / "both")
    assert [int(state.step) for state in states] == [3, 3]
    first, second = (load(tmp_path / str(seed)).generate(["a red circle"], seed=0) for seed in (0, 1))
    assert first.shape == (1, 32, 32, 3) and not np.array_equal(first, second)
    again = Experiment(load_experiment("configs/shapes/quickstart.py:runlocal", changes), tmp_path / "1").train()
    same(again, states[1], rtol=0, atol=0)  # it is finished, and restored as it is


def test_the_weights_of_all_runs_stand_side_by_side():
    recipes = [Own(1.0), Own(2.0)]
    made = Together(recipes, (0, 5))
    state = made.init(None)
    params = {name: player.params for name, player in state.players.items()}
    weights = made.weights(params, made.load_frozen(None))
    for i, recipe in enumerate(recipes):
        alone = {name: player.params for name, player in made.part(state, i).players.items()}
        one = jax.tree.map(lambda x, i=i: x[i], weights)
        jax.tree.map(np.testing.assert_array_equal, one, recipe.weights(alone, recipe.load_frozen(None)))


def test_runs_of_several_shapes_are_refused(tmp_path):
    resolved = load_experiment("configs/shapes/quickstart.py:runlocal", ["inputs.image_sizes=((32,32),(32,64))"])
    experiments = [Experiment(resolved, tmp_path / name) for name in "ab"]
    with pytest.raises(ConfigError, match="give all one image size"):
        train_together(experiments, tmp_path / "both")
