"""GroupNorm on a phone: as exact as JAX over large images, and without numbers that float16 does not hold."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snapgen_jax.export import compare
from snapgen_jax.export.client import litert_unit
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.verify import relative_l2
from snapgen_jax.networks.layers import GroupNorm

from .conftest import QUICK, array

CHANNELS = 4
PARAMS = {"scale": np.linspace(0.5, 1.5, CHANNELS, dtype=np.float32), "bias": np.full(CHANNELS, 0.1, np.float32)}


def normalize(params, *, x):
    norm = GroupNorm(CHANNELS, 2)
    norm.scale, norm.bias = nnx.Param(jnp.asarray(params["scale"])), nnx.Param(jnp.asarray(params["bias"]))
    return {"y": norm(x)}


def reference(x):
    grouped = x.astype(np.float64).reshape(1, -1, 2, CHANNELS // 2)
    mean, variance = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    return y * PARAMS["scale"] + PARAMS["bias"]


def test_it_is_exact_in_litert_over_a_million_pixels(tmp_path):
    x = (3 + np.random.default_rng(0).standard_normal((1, 1024, 1024, CHANNELS))).astype(np.float32)
    path = to_tflite(normalize, PARAMS, {"x": array(*x.shape)}, "f", tmp_path / "norm.tflite", QUICK)
    assert relative_l2(litert_unit(path, "f")(x=x)["y"], reference(x)) < 3e-6


def test_what_it_squares_is_far_from_the_end_of_float16(tmp_path):
    x = np.zeros((1, 16, 16, CHANNELS), np.float32)
    x[0, 0, 0] = 500.0  # its square is 250000
    path = to_tflite(normalize, PARAMS, {"x": array(*x.shape)}, "f", tmp_path / "norm.tflite", QUICK)
    activations = compare.Activations(path, "f")
    activations.look({"x": x})
    assert 490 < activations.value < 500**2 / 60
