import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from snapgen_jax.training.optimizer import Elementwise, OptimizerConfig, make_optimizer, new_player, step_player
from snapgen_jax.training.ravel import LARGEST_MEAN_LEAF, Layout, RavelledPlayer, gather, leaf_by_leaf
from snapgen_jax.training.state import TrainState

SHAPES = {"stem": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "bias": (2,), "scale": ()}}
CONFIG = OptimizerConfig(learning_rate=3e-3, warmup_steps=10, weight_decay=0.1, clip_norm=0.5)


def draw(seed):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)])


def state_of(player):
    return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_state_is_the_same_bit_for_bit_after_there_and_back():
    state = state_of(new_player(draw(0), make_optimizer(CONFIG, 100), ema=True))
    carried = gather(state)
    assert isinstance(carried.players["model"], RavelledPlayer)
    assert len(jax.tree.leaves(carried)) < len(jax.tree.leaves(state))
    same(leaf_by_leaf(carried), state)


def test_a_hundred_updates_in_vectors_are_those_leaf_by_leaf():
    """With clipping that bites, decay of kernels alone, warm-up and average."""
    optimizer = make_optimizer(CONFIG, 100)
    target = draw(1)

    @jax.jit
    def update(state):
        player = state.players["model"]
        grads = jax.grad(
            lambda p: sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))
        )(player.params)
        player, norm = step_player(player, grads, optimizer, state.step, clip_norm=CONFIG.clip_norm, ema_decay=0.95)
        return state.replace(step=state.step + 1, players={"model": player}), norm

    leaves = state_of(new_player(draw(0), optimizer, ema=True))
    vectors = gather(leaves)
    for _ in range(100):
        leaves, norm = update(leaves)
        vectors, _ = update(vectors)
    assert float(norm) > CONFIG.clip_norm  # clipping is part of what is compared
    back = leaf_by_leaf(vectors)
    assert jax.tree.structure(back) == jax.tree.structure(leaves)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(leaves), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_an_optimizer_that_looks_at_whole_arrays_keeps_its_leaves():
    state = state_of(new_player(draw(0), optax.adafactor(1e-3), ema=True))
    same(gather(state), state)
    assert isinstance(make_optimizer(CONFIG, 1), Elementwise)


def test_few_large_arrays_keep_their_leaves():
    """Copies of them would cost what the vectors save."""
    large = {"kernel": jnp.zeros(LARGEST_MEAN_LEAF + 1)}
    state = state_of(new_player(large, make_optimizer(CONFIG, 1), ema=True))
    same(gather(state), state)


def test_arrays_of_two_types_lie_in_vectors_of_their_own():
    tree = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.full(4, 2, jnp.bfloat16)}}
    layout = Layout.of(tree)
    vectors = layout.ravel(tree)
    assert {kind: {name: v.shape for name, v in of.items()} for kind, of in vectors.items()} == {
        "float32": {"kernel": (6,)},
        "bfloat16": {"kernel": (4,)},
    }
    same(layout.unravel(vectors), tree)


@pytest.mark.parametrize("empty", [(), {}])
def test_a_state_without_moments_stays(empty):
    layout = Layout.of(draw(0))
    assert layout.unravel_all(layout.ravel_all(empty)) == empty
