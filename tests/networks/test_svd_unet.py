"""The UNet of Stable Video Diffusion is that of diffusers, at every block, for any number of frames."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.svd_unet import SVDUNetConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import svd_unet as maps
from tests.parity import (
    GOLDENS,
    TOLERANCE,
    assert_written_as_read,
    draw,
    load_checkpoint,
    published_shapes,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def assert_equals_reference(network, params, example, tolerance):
    """`example`: a mapping of inputs, output and every block's output, as the oracle writes it."""
    config, taps = network.config, network.config.tap_names()
    states, numbers = jnp.asarray(example["sequence"]), example["numbers"]
    pooled = time_features(jnp.asarray(numbers.ravel()), config.pooled_width // 3, 1.0).reshape(len(numbers), -1)
    context = TextContext(states, jnp.ones(states.shape[:2]), pooled)
    features = time_features(jnp.asarray(example["step"]), config.time_width, 1.0)
    inputs = jnp.asarray(example["x"]), features, context
    output, found = jax.jit(lambda params, *inputs: apply(network, params, *inputs, taps=taps))(params, *inputs)
    assert output.dtype == jnp.float32
    assert relative_error(output, example["output"]) <= tolerance
    for tap in taps:
        assert relative_error(found[tap], example[tap]) <= tolerance, tap


@pytest.mark.parametrize("case", ["wide", "tall"])
def test_every_block_and_the_output_equal_what_diffusers_computed(case):
    network, params = load_checkpoint(GOLDENS / "svd_unet", maps)
    with np.load(GOLDENS / "svd_unet" / f"{case}.npz") as arrays:
        assert_equals_reference(network, params, dict(arrays), TOLERANCE["float32"])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"layers_per_block": 2, "num_attention_heads": (1, 2)}, (1, 5, 2, 6)),
        ({"cross_attention_dim": 20, "in_channels": 4}, (3, 2, 4, 4)),
    ],
)
def test_live_checkpoints_of_diffusers_load_and_run_alike(changes, sizes, tmp_path):
    pytest.importorskip("diffusers")
    from tests.oracles import svd_unet as oracle

    model = oracle.make(seed=7, **changes)
    model.save_pretrained(tmp_path)
    example = oracle.run(model, *sizes, seed=8)
    for dtype, tolerance in (("float32", TOLERANCE["float32"]), ("bfloat16", 4e-2)):  # some 60 layers in bfloat16
        assert_equals_reference(*load_checkpoint(tmp_path, maps, dtype=dtype), example, tolerance)


def test_the_full_size_network_expects_the_published_tensors():
    config = SVDUNetConfig.preset("svd")
    _, spec = build(config)
    expected = reference_shapes(maps.weight_map(config), spec)
    assert expected == published_shapes("svd_unet")
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 1_524_623_082


def test_no_activation_inside_has_five_axes():
    config = SVDUNetConfig.preset("smoke")
    network, spec = build(config)
    x, time, context = config.input_spec(batch=2, height=4, width=4, frames=3)
    jaxpr = jax.make_jaxpr(lambda params, *inputs: apply(network, params, *inputs)[0])(spec, x, time, context)
    kernels = {leaf.shape for leaf in jax.tree.leaves(spec)}

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.shape for v in equation.outvars)
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from shapes(inner)

    five = {shape for shape in shapes(jaxpr.jaxpr) if len(shape) > 4} - kernels
    assert five <= {(2, 3, 4, 4, config.out_channels)}  # the output itself


def test_a_frame_sees_the_others_and_a_clip_no_other():
    config = SVDUNetConfig.preset("smoke")
    network, spec = build(config)
    random = np.random.default_rng(0)
    params = draw(random, spec)
    x, time, context = draw(random, config.input_spec(batch=2, height=4, width=4, frames=3))
    run = jax.jit(lambda x: apply(network, params, x, time, context)[0])
    a, b = run(x), run(x.at[0, 2].add(1.0))
    assert np.array_equal(a[1], b[1])
    assert all(float(jnp.abs(a[0, f] - b[0, f]).max()) > 1e-4 for f in range(3))


def test_what_this_unet_is_not_is_refused():
    smoke = SVDUNetConfig.preset("smoke")
    with pytest.raises(ValueError, match="projections of this UNet are linear"):
        dataclasses.replace(smoke, projection="conv")
    with pytest.raises(ValueError, match="CrossAttnDownBlock2D"):
        maps.read_config({"down_block_types": ["CrossAttnDownBlock2D"], "block_out_channels": [32]})


def test_written_tensors_are_what_was_read():
    assert_written_as_read(GOLDENS / "svd_unet", maps)
