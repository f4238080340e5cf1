"""The perceptual distance is LPIPS on VGG-16, and a distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.networks.module import apply, build, init
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.maps.lpips import weight_map
from tests.networks.tiny import drawn, outputs_without_each_leaf
from tests.parity import GOLDENS, TOLERANCE, relative_error

SMALL = {"channels": (4, 8, 8), "layers": (2, 1, 2)}  # of the golden weights


def loaded(folder, **fields):
    network, spec = build(LPIPSConfig(**fields))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return network, load(folder, weight_map(network.config), spec, here, dtype=jnp.float32)


def distance(network, params, images, others):
    return jax.jit(lambda params, x, y: apply(network, params, x, y))(params, images, others)


@pytest.mark.parametrize(("case", "dtype"), [("wide", "float32"), ("tall", "float32"), ("wide", "bfloat16")])
def test_distances_equal_those_of_a_vgg_written_in_torch(case, dtype):
    network, params = loaded(GOLDENS / "lpips", **SMALL, dtype=dtype)
    example = np.load(GOLDENS / "lpips" / f"{case}.npz")
    given = distance(network, params, example["images"], example["others"])
    assert given.dtype == jnp.float32
    assert relative_error(given, example["distance"]) <= TOLERANCE[dtype]


@pytest.mark.oracle
@pytest.mark.parametrize("names", ["torchvision", "lpips"])
def test_a_live_vgg16_of_full_size_gives_the_same_distances(names, tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import save_file

    from tests.oracles import lpips as oracle

    state = oracle.make(**oracle.VGG16, seed=3)
    example = oracle.run(state, oracle.VGG16["layers"], 2, 64, 48, seed=4)
    if names == "lpips":
        slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
        numbers = {f"features.{n}.": f"net.slice{i}.{n}." for n, i in slices.items()}
        renamed = {a + part: b + part for a, b in numbers.items() for part in ("weight", "bias")}
        state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "lpips.safetensors")
    network, params = loaded(tmp_path)
    assert relative_error(distance(network, params, example["images"], example["others"]), example["distance"]) <= 1e-5


def test_the_full_size_is_that_of_vgg16_without_its_classifier():
    assert parameters(LPIPSConfig.preset("vgg16")) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_it_is_zero_between_equals_grows_with_the_change_and_is_symmetric():
    network, _ = build(LPIPSConfig.preset("shapes"))
    params = init(network, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    noise = jax.random.normal(jax.random.key(2), x.shape)
    near, far = (distance(network, params, x, x + size * noise) for size in (0.05, 0.5))
    assert np.all(distance(network, params, x, x) < 1e-12)
    assert np.all(near > 1e-6) and np.all(4 * near < far)
    np.testing.assert_allclose(distance(network, params, x + 0.5 * noise, x), far, rtol=1e-5)


def test_its_gradient_is_finite_where_no_feature_responds():
    network, _ = build(LPIPSConfig.preset("smoke"))
    params = jax.tree.map(lambda leaf: -jnp.abs(leaf), drawn(network))
    x = jnp.full((1, 8, 8, 3), 1.0)
    gradient = jax.grad(lambda x: apply(network, params, x, x - 1e-3).sum())(x)
    assert np.all(np.isfinite(gradient))


def test_every_parameter_has_an_effect():
    network, _ = build(LPIPSConfig.preset("smoke"))
    params = drawn(network)
    x, y = jax.random.uniform(jax.random.key(0), (2, 1, 8, 8, 3), minval=-1)
    whole = distance(network, params, x, y)
    for name, without in outputs_without_each_leaf(lambda p: apply(network, p, x, y), params).items():
        assert jnp.abs(without - whole).max() > 1e-6, f"{name} has no effect"


def test_images_that_are_too_small_are_refused():
    network, spec = build(LPIPSConfig.preset("vgg16"))
    with pytest.raises(ValueError, match="8 x 8 px are too small for this distance, which takes 16 px"):
        jax.eval_shape(lambda p, x: apply(network, p, x, x), spec, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    with pytest.raises(ValueError, match="has 2 entries and `channels` 3"):
        LPIPSConfig(channels=(4, 4, 4), layers=(1, 1))
