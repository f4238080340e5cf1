"""The forms of the depthwise convolution are one function, with one gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.depthwise import depthwise, depthwise_flipped, depthwise_grouped, depthwise_shifted

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
def test_every_form_and_its_gradients_equal_the_grouped_form(shape, stride):
    x, kernel, weight = draw(shape, stride)
    run = jax.jit(value_and_gradients, static_argnums=(0, 4))
    expected = run(depthwise_grouped, x, kernel, weight, stride)
    for form in (depthwise_shifted, depthwise_flipped):
        actual = run(form, x, kernel, weight, stride)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape and a.dtype == e.dtype
            np.testing.assert_allclose(a, e, atol=2e-5 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_inputs_are_summed_in_float32(stride):
    x, kernel, dy = draw((16, 16, 16, 8), stride, jnp.bfloat16)

    def run(form, x, kernel):
        y, pullback = jax.vjp(lambda x, k: form(x, k, stride), x, kernel)
        return y, *pullback(dy.astype(y.dtype))

    run = jax.jit(run, static_argnums=0)
    exact = run(depthwise_grouped, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for form in (depthwise_shifted, depthwise_flipped):
        for a, e in zip(run(form, x, kernel), exact, strict=True):
            assert a.dtype == jnp.bfloat16
            assert jnp.linalg.norm(a.astype(jnp.float32) - e) < 4e-3 * jnp.linalg.norm(e), "more than one rounding"


@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivatives_agree(stride):
    x, kernel, weight = draw((2, 6, 6, 3), stride)

    def penalty(form, x, kernel):
        gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(form(*a, stride)) * weight), argnums=(0, 1))(x, kernel)
        return sum(jnp.sum(jnp.square(g)) for g in gradients)

    second = jax.jit(jax.grad(penalty, (1, 2)), static_argnums=0)
    expected = second(depthwise_grouped, x, kernel)
    for form in (depthwise_shifted, depthwise_flipped):
        for a, e in zip(second(form, x, kernel), expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gpu_form_is_forward_the_program_that_an_export_holds(stride):
    x, kernel, _ = draw((2, 6, 6, 3), stride)
    forward, exported = (
        jax.jit(lambda x, k, f=f: f(x, k, stride)).lower(x, kernel) for f in (depthwise_flipped, depthwise_grouped)
    )
    assert forward.as_text() == exported.as_text()


def test_a_stride_of_three_is_refused():
    with pytest.raises(ValueError, match="must be 1 or 2"):
        depthwise(jnp.zeros((1, 6, 6, 1)), jnp.zeros((3, 3, 1, 1)), stride=3)
