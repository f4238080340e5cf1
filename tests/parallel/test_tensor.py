"""Networks whose parameters are split among `tensor` compute what they compute on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks import autoencoder, gemma2, mmdit, t5
from snapgen_jax.networks.module import apply, build
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.parallel.sharding import explain, tree_shardings

CASES = {
    "mmdit": (mmdit.MMDiTConfig.preset("smoke", heads=4), {"height": 8, "width": 8, "tokens": 5}),
    "t5": (t5.T5Config.preset("smoke", heads=4), {"tokens": 6}),
    "gemma2": (gemma2.Gemma2Config.preset("smoke"), {"tokens": 6}),
    "autoencoder": (autoencoder.AutoencoderConfig.preset("smoke"), {"height": 8, "width": 8}),
}
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
FULL_SIZE = {
    "mmdit": mmdit.MMDiTConfig.preset("sd35_large"),
    "t5": t5.T5Config.preset("xxl"),
    "gemma2": gemma2.Gemma2Config.preset("gemma2_2b"),
    "autoencoder": autoencoder.AutoencoderConfig(),
}


@pytest.mark.parametrize("name", CASES)
def test_split_among_tensor_a_network_gives_what_it_gives_on_one_device(name):
    config, sizes = CASES[name]
    network, spec = build(config)
    rng = np.random.default_rng(0)

    def draw(s):
        if jnp.issubdtype(s.dtype, jnp.integer):
            return rng.integers(0, config.vocab_size, s.shape, np.int32)
        return (0.3 * rng.standard_normal(s.shape)).astype(s.dtype)

    params = jax.tree.map(draw, spec)
    inputs = jax.tree.map(draw, config.input_spec(batch=8, **sizes))
    run = jax.jit(lambda params, *inputs: apply(network, params, *inputs))
    expected = jax.tree.leaves(run(params, *inputs))
    mesh = make_mesh(MIXED)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, tree_shardings(spec, config.rules(), mesh))
        found = jax.tree.leaves(run(split, *put_batch(inputs, mesh)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", [MIXED, MeshConfig(data=1, tensor=8)], ids=["mixed", "tensor alone"])
@pytest.mark.parametrize("name", CASES)
def test_at_full_size_a_device_holds_its_share_and_no_more(name, where):
    _, spec = build(FULL_SIZE[name])
    shardings = tree_shardings(spec, FULL_SIZE[name].rules(), make_mesh(where))
    placed = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), spec, shardings)
    whole, held = re.findall(r"([\d,]+) bytes", explain(placed))
    share = int(held.replace(",", "")) / int(whole.replace(",", ""))
    assert share == pytest.approx(1 / (where.fsdp * where.tensor), rel=2e-2)  # but for vectors
    back = [s for s in jax.tree.leaves(shardings) if s.spec[-2:] == ("tensor", "fsdp")]
    assert len(back) >= 2 or name == "autoencoder"  # out of attention, and out of the feed-forward network
