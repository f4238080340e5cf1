"""TensorFlow's converter writes a mean as a sum, which overflows in float16; the file holds a mean again."""

import jax.numpy as jnp
import numpy as np

from snapgen_jax.export.client import litert_unit
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.flatbuffer import describe

from .conftest import array


def statistics(params, *, x):
    total = jnp.sum(x, axis=(2, 3))
    return {
        "mean": jnp.mean(x, axis=(1, 2)),
        "variance": jnp.square(x).mean(axis=2, keepdims=True) * params["gain"],
        "half_sum": jnp.sum(jnp.tanh(x), axis=1) * 0.5,  # is no mean
        "used_twice": total / 32 + jnp.tanh(total),  # its sum is needed
    }


def test_means_are_means_and_sums_stay_sums(tmp_path):
    params, x = {"gain": np.float32(3)}, np.random.default_rng(0).standard_normal((1, 6, 8, 4)).astype(np.float32)
    path = to_tflite(statistics, params, {"x": array(*x.shape)}, "f", tmp_path / "x.tflite", "jax2tf")
    assert describe(path).histogram["MEAN"] == 2
    assert describe(path).histogram["SUM"] == 2
    assert not describe(path).orphans
    found, expected = litert_unit(path, "f")(x=x), statistics(params, x=jnp.asarray(x))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
