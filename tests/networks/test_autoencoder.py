"""The autoencoder is that of Stable Diffusion 3, or of those before it, and a codec."""

import dataclasses
import gzip
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from snapgen_jax.networks.autoencoder import AutoencoderCodec, AutoencoderConfig
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, unflatten
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps.sd3_autoencoder import read_config, weight_map
from snapgen_jax.weights.sources import autoencoder_name
from tests.parity import published_shapes

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def relative_error(given, expected):
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(given - expected) / np.linalg.norm(expected)


def load_codec(folder, **changes):
    config = read_config(json.loads((folder / "config.json").read_text()), **changes)
    network, spec = build(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return AutoencoderCodec(network, load(folder, weight_map(config), spec=spec, shardings=here, dtype=jnp.float32))


@jax.jit
def run_all(codec, images, latents):
    mean, logvar = apply(codec.network, codec.params, images, method="moments")
    return {"mean": mean, "logvar": logvar, "encoded": codec.encode(images), "decoded": codec.decode(latents)}


def assert_equals_reference(codec, example, tolerance):
    """`example`: a mapping of arrays as the oracle writes it."""
    for name, given in run_all(codec, example["images"], example["latents"]).items():
        assert given.dtype == jnp.float32
        assert relative_error(given, example[name]) <= tolerance, name


@pytest.fixture(scope="module")
def codec():
    """The golden checkpoint, whose parameters are all off their initial values."""
    return load_codec(GOLDENS / "autoencoder")


@pytest.mark.parametrize(
    ("kind", "case", "dtype"),
    [
        ("autoencoder", "wide", "float32"),
        ("autoencoder", "tall", "float32"),
        ("autoencoder", "wide", "bfloat16"),
        ("autoencoder_sd1", "tall", "float32"),
    ],
)
def test_moments_latents_and_images_equal_what_diffusers_computed(kind, case, dtype):
    codec = load_codec(GOLDENS / kind, dtype=dtype)
    assert_equals_reference(codec, np.load(GOLDENS / kind / f"{case}.npz"), TOLERANCE[dtype])


def test_a_file_with_the_earlier_names_of_the_attention_holds_the_same_network(tmp_path):
    """As the published files of Stable Diffusion 1 and 2 do."""
    shutil.copy(GOLDENS / "autoencoder_sd1" / "config.json", tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    tensors, earlier = load_file(GOLDENS / "autoencoder_sd1" / name), {}
    now_then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key, tensor in tensors.items():
        for now, then in now_then.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        earlier[key] = tensor
    assert len(earlier.keys() - tensors.keys()) == 16
    save_file(earlier, tmp_path / name)
    given, expected = (load_codec(folder).params for folder in (tmp_path, GOLDENS / "autoencoder_sd1"))
    jax.tree.map(np.testing.assert_array_equal, given, expected)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"layers_per_block": 1}, (1, 20, 8)),
        ({"block_out_channels": (8, 16, 16, 24), "latent_channels": 3}, (2, 8, 32)),
        ({"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": 0.0}, (1, 20, 8)),
    ],
)
def test_live_checkpoints_of_diffusers_load_and_run_alike(changes, sizes, tmp_path):
    pytest.importorskip("diffusers")
    from tests.oracles import autoencoder as oracle

    stages = len(changes.get("block_out_channels", "123"))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    model = oracle.make(seed=7, **blocks, **changes)
    model.save_pretrained(tmp_path)
    example = oracle.run(model, *sizes, seed=8)
    for dtype, tolerance in TOLERANCE.items():
        assert_equals_reference(load_codec(tmp_path, dtype=dtype), example, tolerance)


def test_the_full_size_network_expects_the_published_tensors():
    config = AutoencoderConfig.preset("sd3")
    _, spec = build(config)
    assert count_parameters(spec["encoder"]) == 34_274_208
    assert count_parameters(spec["decoder"]) == 49_545_475
    published = json.loads(gzip.decompress((GOLDENS / "state_dict_shapes.json.gz").read_bytes()))["vae"]
    assert reference_shapes(weight_map(config), spec) == {key: tuple(shape) for key, shape in published.items()}


def test_the_scale_of_the_latents_tells_the_published_autoencoders_apart():
    names = {preset: autoencoder_name(AutoencoderConfig.preset(preset).scale) for preset in ("sd1", "sdxl", "sd3")}
    assert names == {"sd1": "sd1_vae", "sdxl": "sdxl_vae", "sd3": "sd3_vae"}


@pytest.mark.parametrize(("preset", "scale"), [("sd1", 0.18215), ("sdxl", 0.13025)])
def test_those_of_four_channels_expect_the_published_tensors(preset, scale):
    config = AutoencoderConfig.preset(preset)
    _, spec = build(config)
    assert count_parameters(spec) == 83_653_863 and (config.scale, config.shift) == (scale, 0)
    assert reference_shapes(weight_map(config), spec) == published_shapes("autoencoder_4_channels")


def test_a_checkpoint_with_a_quantisation_convolution_on_one_side_is_refused():
    values = json.loads((GOLDENS / "autoencoder" / "config.json").read_text())
    with pytest.raises(ValueError, match="use_post_quant_conv = False; Autoencoder can only read True"):
        read_config({**values, "use_quant_conv": True})


def test_zeroing_any_parameter_changes_the_moments_or_the_reconstruction(codec):
    images = np.load(GOLDENS / "autoencoder" / "tall.npz")["images"]
    run = jax.jit(lambda params: apply(codec.network, params, images))
    expected, flat = run(codec.params), flatten(codec.params)
    for path, leaf in flat.items():
        given = run(unflatten({**flat, path: jnp.zeros_like(leaf)}))
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), given, expected)
        assert not all(same), "/".join(path)


def test_the_codec_takes_any_leading_axes_and_says_its_shapes(codec):
    images = jax.random.uniform(jax.random.key(0), (2, 3, 8, 12, 3), minval=-1)
    encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)
    latents = encode(images)
    assert latents.shape == (2, 3, *codec.latent_shape((8, 12))) == (2, 3, 2, 3, 4)
    assert decode(latents).shape == images.shape
    np.testing.assert_allclose(latents[1], encode(images[1]), rtol=1e-4, atol=1e-5)
    assert json.loads(json.dumps(codec.describe())) == {"kind": "network", "reduction": 4, "latent_channels": 4}
    with pytest.raises(ValueError, match="8 x 10 px: both sides must be multiples of 4"):
        codec.encode(images[..., :10, :])


def test_measured_statistics_are_taken_out_of_the_latents_and_put_back_and_stay_out_of_training(codec):
    network, spec = build(dataclasses.replace(codec.network.config, normalisation="measured"))
    moved = {"bias": jnp.arange(4.0), "scale": jnp.arange(1.0, 5.0)}
    measured = AutoencoderCodec(network).bind({**codec.params, "statistics": moved})
    assert jax.tree.map(jnp.shape, measured.params) == jax.tree.map(jnp.shape, spec)
    example = np.load(GOLDENS / "autoencoder" / "tall.npz")
    latents = measured.encode(example["images"])
    np.testing.assert_allclose(latents * moved["scale"] + moved["bias"], example["mean"], rtol=1e-4, atol=1e-4)
    z = (example["latents"] / 1.5305 + 0.0609 - moved["bias"]) / moved["scale"]
    assert relative_error(measured.decode(z), example["decoded"]) <= 1e-5
    trained = jax.grad(lambda params: jnp.sum(jnp.square(apply(network, params, example["images"])[0])))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(trained(measured.params)["statistics"]))


def test_draws_with_a_key_have_the_moments_of_the_posterior(codec):
    example = np.load(GOLDENS / "autoencoder" / "tall.npz")
    encode = jax.jit(codec.encode)
    images = jnp.repeat(example["images"], 256, axis=0)
    draws = encode(images, jax.random.key(0))
    assert jnp.array_equal(draws, encode(images, jax.random.key(0)))
    z, deviation = draws / 1.5305 + 0.0609, np.exp(0.5 * example["logvar"][0])
    assert jnp.abs((z.mean(axis=0) - example["mean"][0]) / deviation).max() < 5 / 16  # five standard errors
    assert jnp.abs(z.std(axis=0) / deviation - 1).mean() < 0.1


def test_large_latents_are_decoded_in_tiles_close_to_the_whole():
    """Group statistics and attention see a tile only, so the two differ a little everywhere, and not at the seams."""
    whole, tiled = (load_codec(GOLDENS / "autoencoder", tile=tile, tile_overlap=8) for tile in (64, 24))
    latents = jax.random.normal(jax.random.key(3), (1, 32, 40, 4))
    a, b = (jax.jit(codec.decode)(latents) for codec in (whole, tiled))
    assert 0 < relative_error(b, a) <= 0.12
    for axis in (1, 2):
        roughness = [jnp.abs(jnp.diff(images, axis=axis)).mean() for images in (a, b)]
        assert abs(roughness[1] / roughness[0] - 1) < 0.03


def test_the_codec_splits_its_parameters_and_its_batch(codec):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shardings = tree_shardings(codec.params, codec.network.config.rules(), mesh)
    sizes = jax.tree.map(lambda leaf, s: 0 if s.is_fully_replicated else leaf.size, codec.params, shardings)
    assert sum(jax.tree.leaves(sizes)) > 0.9 * count_parameters(codec.params)
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32)
    expected = jax.jit(codec.encode)(images)
    with jax.set_mesh(mesh):
        params = jax.device_put(codec.params, shardings)
        given = jax.jit(AutoencoderCodec.encode)(AutoencoderCodec(codec.network, params), put_batch(images, mesh))
    assert not given.sharding.is_fully_replicated
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_widths_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"groups=32 do not divide stages of \[48\] channels"):
        AutoencoderConfig(channels=(32, 48))
