"""The two forms of the depthwise convolution are one function, with one gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.depthwise import depthwise, depthwise_grouped, depthwise_shifted

SHAPES = [(2, 8, 8, 4), (3, 7, 9, 5), (1, 1, 1, 1), (4, 2, 3, 8), (6, 40, 16, 32)]


def value_and_gradients(form, x, kernel, weight, stride):
    """The output, and the gradients to image and kernel of a loss that is not linear in the output."""

    def loss(x, kernel):
        y = form(x, kernel, stride)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)) * weight), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)
    return y, *gradients


def draw(shape, stride, dtype=jnp.float32):
    b, h, w, c = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], (3, 3, 1, c), dtype)
    return x, kernel, jax.random.normal(keys[2], (b, -(-h // stride), -(-w // stride), c))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shifted_form_and_its_gradients_equal_the_grouped_form(shape, stride):
    x, kernel, weight = draw(shape, stride)
    run = jax.jit(value_and_gradients, static_argnums=(0, 4))
    expected = run(depthwise_grouped, x, kernel, weight, stride)
    actual = run(depthwise_shifted, x, kernel, weight, stride)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        np.testing.assert_allclose(a, e, atol=2e-5 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_inputs_are_summed_in_float32(stride):
    x, kernel, dy = draw((16, 16, 16, 8), stride, jnp.bfloat16)

    def run(form, x, kernel):
        y, pullback = jax.vjp(lambda x, k: form(x, k, stride), x, kernel)
        return y, *pullback(dy.astype(y.dtype))

    actual = jax.jit(run, static_argnums=0)(depthwise_shifted, x, kernel)
    exact = jax.jit(run, static_argnums=0)(depthwise_grouped, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - e) < 4e-3 * jnp.linalg.norm(e), "more than one rounding"


def test_second_derivatives_agree():
    x, kernel, weight = draw((2, 6, 6, 3), 1)

    def penalty(form, kernel):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(form(x, kernel)) * weight))(x)
        return jnp.sum(jnp.square(gradient))

    actual, expected = (
        jax.jit(jax.grad(penalty, 1), static_argnums=0)(f, kernel) for f in (depthwise_shifted, depthwise_grouped)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_stride_of_three_is_refused():
    with pytest.raises(ValueError, match="must be 1 or 2"):
        depthwise(jnp.zeros((1, 6, 6, 1)), jnp.zeros((3, 3, 1, 1)), stride=3)
