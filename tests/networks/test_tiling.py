"""Tiles, blended, are the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.layers import upsample_nearest
from snapgen_jax.networks.tiling import decode_tiled

LATENTS = jax.random.normal(jax.random.key(0), (2, 13, 22, 3))


def double(latents):
    """A decoder that looks at one pixel."""
    return upsample_nearest(jnp.tanh(latents))


def blur(latents):
    """A decoder that looks two latent pixels far, with zeros outside."""
    kernel = jnp.ones((5, 5, 1, 3)) / 25
    y = jax.lax.conv_general_dilated(
        latents, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    return upsample_nearest(y)


@pytest.mark.parametrize(("tile", "overlap"), [(6, 0), (6, 2), (7, 5), (13, 4), (20, 1)])
def test_a_decoder_that_looks_at_one_pixel_gives_the_same_image_in_tiles(tile, overlap):
    tiled = decode_tiled(double, LATENTS, tile=tile, overlap=overlap)
    np.testing.assert_allclose(tiled, double(LATENTS), rtol=1e-5, atol=1e-6)


def test_the_image_differs_only_within_sight_of_the_tile_edges():
    latents = LATENTS[:, :8, :18]
    tiled, whole = decode_tiled(blur, latents, tile=10, overlap=2), blur(latents)
    # Tiles are the columns 0 to 9 and 8 to 17; each sees zeros in place of the other within two columns of its edge.
    differs = jnp.abs(tiled - whole).max(axis=(0, 1, 3)) > 1e-5
    assert list(np.flatnonzero(differs)) == [16, 17, 18, 19]  # pixels of the columns 8 and 9


def test_a_latent_that_fits_is_decoded_whole():
    assert jnp.array_equal(decode_tiled(blur, LATENTS, tile=22, overlap=3), blur(LATENTS))


def test_memory_follows_the_tile():
    def memory(tile):
        function = jax.jit(
            lambda z: decode_tiled(lambda z: jnp.sin(blur(jnp.tile(z, 16)[..., :3] ** 2)), z, tile=tile, overlap=8)
        )
        return (
            function.lower(jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    image = 512 * 512 * 3 * 4
    assert memory(32) < memory(256)
    assert memory(32) <= 3 * image


def test_an_overlap_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match="tiles of 4 cannot overlap by 4"):
        decode_tiled(double, LATENTS, tile=4, overlap=4)
