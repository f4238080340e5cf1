"""A fixed description of small images in 128 numbers, without trained weights.

A frozen convolutional network with random weights: four stages, each halving the image, each read out as the mean of
its 32 channels over all positions. Fine stages see edges and colour, coarse ones whole shapes; none sees where in the
image they are. Random features serve where images are unlike those that known networks were trained on (Naeem et al.
2020, "Reliable Fidelity and Diversity Metrics for Generative Models"). Numbers from these features compare with each
other, and not with Inception's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

STAGES = 4
WIDTH = 32
FEATURES = STAGES * WIDTH
_CHUNK = 64  # one compilation serves any number of images
_SEED = 2412


def image_features(images: np.ndarray) -> np.ndarray:
    """Describes images: uint8 `[N, H, W, 3]` -> float32 `[N, 128]`, the same on every machine but for rounding."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"features are taken from uint8 images [N, H, W, 3], got {images.dtype} {images.shape}")
    count = len(images)
    padded = np.concatenate([images, np.zeros((-count % _CHUNK, *images.shape[1:]), np.uint8)])
    weights = _weights()
    chunks = [np.asarray(_describe(weights, chunk)) for chunk in np.split(padded, len(padded) // _CHUNK)]
    return np.concatenate(chunks)[:count]


@jax.jit
def _describe(weights: list[tuple[np.ndarray, np.ndarray]], images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 127.5 - 1
    features = []
    for kernel, bias in weights:
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        x = jax.nn.relu(x + bias)
        features.append(jnp.mean(x, axis=(1, 2)))
    return jnp.concatenate(features, axis=-1)


def _weights() -> list[tuple[np.ndarray, np.ndarray]]:
    # RandomState and not default_rng: NumPy promises that its stream, and with it the features, never change.
    random = np.random.RandomState(_SEED)
    weights, channels = [], 3
    for _ in range(STAGES):
        kernel = random.standard_normal((5, 5, channels, WIDTH)) * np.sqrt(2 / (25 * channels))  # He et al. 2015
        bias = 0.1 * random.standard_normal(WIDTH)
        weights.append((kernel.astype(np.float32), bias.astype(np.float32)))
        channels = WIDTH
    return weights
