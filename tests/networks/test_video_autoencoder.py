"""The autoencoder of Stable Video Diffusion is that of diffusers, for any number of frames."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.video_autoencoder import VideoAutoencoderConfig
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import svd_autoencoder as maps
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, published_shapes, relative_error

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def assert_equals_reference(network, params, example, tolerance):
    for method, given, expected in (("encode", "images", "encoded"), ("decode", "latents", "decoded")):
        run = jax.jit(functools.partial(apply, network, method=method))
        made = run(params, jnp.asarray(example[given]))
        assert made.dtype == jnp.float32
        assert relative_error(made, example[expected]) <= tolerance, method


@pytest.mark.parametrize("case", ["wide", "tall"])
def test_encoding_and_decoding_equal_what_diffusers_computed(case):
    network, params = load_checkpoint(GOLDENS / "svd_autoencoder", maps)
    with np.load(GOLDENS / "svd_autoencoder" / f"{case}.npz") as arrays:
        assert_equals_reference(network, params, arrays, TOLERANCE["float32"])


@pytest.mark.oracle
def test_live_checkpoints_of_diffusers_load_and_run_alike(tmp_path):
    pytest.importorskip("diffusers")
    from tests.oracles import svd_autoencoder as oracle

    model = oracle.make(seed=7, layers_per_block=1)
    model.save_pretrained(tmp_path)
    assert_equals_reference(
        *load_checkpoint(tmp_path, maps), oracle.run(model, 1, 5, 4, 6, seed=8), TOLERANCE["float32"]
    )


def test_the_full_size_network_expects_the_published_tensors():
    config = VideoAutoencoderConfig.preset("svd")
    _, spec = build(config)
    expected = reference_shapes(maps.weight_map(config), spec)
    assert expected == published_shapes("svd_autoencoder")
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 97_742_847


def test_another_autoencoder_is_refused():
    with pytest.raises(ValueError, match="AutoencoderKL"):
        maps.read_config({"_class_name": "AutoencoderKL", "block_out_channels": [8], "layers_per_block": 1})
