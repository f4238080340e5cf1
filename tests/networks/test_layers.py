"""The shared layers equal flax's own, or their formula, without leaving four dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snapgen_jax.networks import layers


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def perturb(module):
    """Moves every parameter away from the zero or one that it starts at."""
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    leaves = [leaf + 0.3 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm_equals_flax(groups):
    x = 5 + 2 * normal(2, 4, 3, 12)
    ours = perturb(layers.GroupNorm(12, groups))
    theirs = nnx.GroupNorm(12, groups, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    theirs.scale[...], theirs.bias[...] = ours.scale[...], ours.bias[...]
    np.testing.assert_allclose(ours(x), theirs(x), atol=2e-6)


def test_layer_norm_equals_flax():
    x = 5 + 2 * normal(2, 3, 12)
    ours = perturb(layers.LayerNorm(12))
    theirs = nnx.LayerNorm(12, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    theirs.scale[...], theirs.bias[...] = ours.scale[...], ours.bias[...]
    np.testing.assert_allclose(ours(x), theirs(x), atol=2e-6)


def test_rms_norm_equals_flax():
    x = 5 + 2 * normal(2, 3, 12)
    ours = perturb(layers.RMSNorm(12))
    theirs = nnx.RMSNorm(12, epsilon=1e-5, rngs=nnx.Rngs(0))
    theirs.scale[...] = ours.scale[...]
    np.testing.assert_allclose(ours(x), theirs(x), atol=2e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", [6, 7])
def test_convolution_equals_flax_with_the_same_padding_on_both_sides(size, stride, height):
    x = normal(2, height, 8, 5)
    ours = perturb(layers.Conv(5, 4, size, stride=stride, rngs=nnx.Rngs(0)))
    padding = [(size // 2, size // 2)] * 2
    theirs = nnx.Conv(5, 4, (size, size), strides=stride, padding=padding, rngs=nnx.Rngs(0))
    theirs.kernel[...], theirs.bias[...] = ours.kernel[...], ours.bias[...]
    y = ours(x)
    assert y.shape == (2, -(-height // stride), 8 // stride, 4)
    np.testing.assert_allclose(y, theirs(x), atol=1e-5)


def test_geglu_gates_one_half_with_the_gelu_of_the_other():
    x = normal(2, 3, 4)
    network = perturb(layers.GEGLU(4, 6, rngs=nnx.Rngs(0)))
    h = x @ network.inner.kernel[...] + network.inner.bias[...]
    expected = (h[..., :6] * nnx.gelu(h[..., 6:])) @ network.outer.kernel[...] + network.outer.bias[...]
    np.testing.assert_allclose(network(x), expected, atol=1e-5)


def test_nearest_upsampling_repeats_pixels():
    x = normal(2, 3, 5, 4)
    np.testing.assert_array_equal(layers.upsample_nearest(x), x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("norm", [lambda d: layers.GroupNorm(8, 2, dtype=d), lambda d: layers.LayerNorm(8, dtype=d)])
def test_norms_take_their_statistics_in_float32(norm):
    x = (300 + normal(2, 4, 4, 8)).astype(jnp.bfloat16)  # in bfloat16 its mean would be off by more than its deviation
    y = norm(jnp.bfloat16)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), norm(jnp.float32)(x.astype(jnp.float32)), atol=0.02)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="32 groups do not divide 40 channels"):
        layers.GroupNorm(40)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (2, 3, 3, 8)])
def test_the_derivatives_of_a_product_are_those_of_the_dot_product(shape):
    x, kernel, dx, dkernel = normal(*shape), normal(8, 5, seed=1), normal(*shape, seed=2), normal(8, 5, seed=3)
    ours, theirs = (jax.jvp(f, (x, kernel), (dx, dkernel)) for f in (layers.product, jnp.dot))
    grads = [jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1))(x, kernel) for f in (layers.product, jnp.dot)]
    for a, b in zip(jax.tree.leaves((ours, grads[0])), jax.tree.leaves((theirs, grads[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_on_cpu_the_gradient_of_a_kernel_is_a_product_of_matrices_and_nothing_is_copied_transposed():
    """What it is of several axes: what led to the gradient of the output was computed again, transposed."""
    x, kernel = normal(4, 32, 64), normal(64, 64, seed=1)

    def copies(product):
        def loss(kernel):
            return (jnp.tanh(product(x, kernel)) ** 2).sum()

        text = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
        return text.count("f32[64,128]{1,0} fusion")

    assert copies(layers.product) == 0 < copies(jnp.dot)


def test_a_pointwise_convolution_has_matrix_products_for_derivatives():
    x, kernel, dx, dkernel = normal(2, 4, 6, 5), normal(1, 1, 5, 3), normal(2, 4, 6, 5), normal(1, 1, 5, 3)

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours, theirs = (jax.jvp(f, (x, kernel), (dx, dkernel)) for f in (layers.pointwise, convolution))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1))(x, kernel) for f in (layers.pointwise, convolution)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)
    backward = jax.jit(jax.vjp(layers.pointwise, x, kernel)[1]).lower(ours[0][..., :3] * 0).as_text()
    assert "dot_general" in backward and "convolution" not in backward
