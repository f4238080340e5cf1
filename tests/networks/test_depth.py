"""A stack run by one scan is the loop over its layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snapgen_jax.networks import depth
from snapgen_jax.networks.layers import Linear
from snapgen_jax.networks.module import take_apart

LAYERS, WIDTH = 8, 16


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = Linear(WIDTH, 4 * WIDTH, rngs=rngs), Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.outer(jax.nn.gelu(self.inner(x)))


JOIN, PARAMS = take_apart(depth.stack(Layer, LAYERS, nnx.Rngs(0)))
X = jax.random.normal(jax.random.key(1), (4, 64, WIDTH))


def run(params, x, taps=(), remat="none"):
    return depth.scan(lambda layer, carry: layer(carry), JOIN(params), x, taps=taps, remat=remat)


def loss(x, params, taps, remat):
    y, found = run(params, x, taps, remat)
    return jnp.sum(y**2) + sum(jnp.sum(jnp.sin(feature)) for feature in found.values())


def test_layers_of_a_stack_are_drawn_one_by_one():
    kernel = PARAMS["inner"]["kernel"].get_value()
    assert kernel.shape == (LAYERS, WIDTH, 4 * WIDTH)
    assert len({float(k) for k in jnp.sum(kernel, axis=(1, 2))}) == LAYERS


def test_a_scan_is_the_loop_over_the_layers_and_a_tap_the_output_of_its_layer():
    y, found = run(PARAMS, X, taps=(6, 0, LAYERS - 1))
    assert list(found) == [6, 0, LAYERS - 1]
    expected = X
    for i in range(LAYERS):
        expected = JOIN(jax.tree.map(lambda p, i=i: p[i], PARAMS))(expected)
        if i in found:
            np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_recomputing_layers_changes_no_gradient():
    for argument in (0, 1):
        kept, again = (jax.grad(loss, argument)(X, PARAMS, (2, 5), remat) for remat in ("none", "block"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), kept, again)


@pytest.mark.parametrize("taps", [(3,), (1, 4, 6)])
def test_taps_cost_one_feature_each_forward_and_backward(taps):
    def memory(function, argument):
        return jax.jit(function).lower(argument).compile().memory_analysis().temp_size_in_bytes

    allowed = (len(taps) + 1) * X.nbytes + 1024  # and a few indices
    assert memory(lambda p: run(p, X, taps), PARAMS) <= memory(lambda p: run(p, X), PARAMS) + allowed
    for remat in ("none", "block"):
        plain, tapped = (jax.grad(functools.partial(loss, params=PARAMS, taps=t, remat=remat)) for t in ((), taps))
        assert memory(tapped, X) <= memory(plain, X) + allowed


def test_the_program_is_as_long_for_many_layers_as_for_few():
    def length(layers):
        join, params = take_apart(nnx.eval_shape(lambda: depth.stack(Layer, layers, nnx.Rngs(0))))
        function = jax.grad(lambda x, p: jnp.sum(depth.scan(lambda layer, carry: layer(carry), join(p), x)[0]))
        return str(jax.make_jaxpr(function)(X, params)).count("\n")

    assert length(2) == length(30)


def test_a_tap_outside_the_stack_is_refused():
    with pytest.raises(ValueError, match=r"taps \(8,\) of a stack of 8 layers.*0 to 7"):
        run(PARAMS, X, taps=(8,))
