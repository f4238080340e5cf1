"""The UNets of Stable Diffusion 1, 2 and XL are those of diffusers, at every block, and can be entered in parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build, init
from snapgen_jax.networks.sd_unet import Control, SDUNetConfig
from snapgen_jax.networks.taps import Reuse
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import sd_unet as maps
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

NAMES = ("sd15", "sd21", "sdxl")
SMOKE = SDUNetConfig.preset("smoke")


def context_of(example, pooled_width):
    states = jnp.asarray(example["sequence"])
    pooled = jnp.zeros((len(states), 0))
    if pooled_width:  # six numbers, each as features, after the pooled text
        rows, numbers = example["sizes"].shape
        width = (pooled_width - example["text"].shape[1]) // numbers
        features = time_features(jnp.asarray(example["sizes"].ravel()), width, 1.0).reshape(rows, -1)
        pooled = jnp.concatenate([jnp.asarray(example["text"]), features], axis=-1)
    return TextContext(states, jnp.ones(states.shape[:2]), pooled)


def assert_equals_reference(network, params, example, tolerance):
    """`example`: a mapping of inputs, output and every block's output, as the oracle writes it."""
    taps = network.config.tap_names()
    features = time_features(jnp.asarray(example["step"]), network.config.time_width, 1.0)
    inputs = jnp.asarray(example["x"]), features, context_of(example, network.config.pooled_width)
    output, found = jax.jit(lambda params, *inputs: apply(network, params, *inputs, taps=taps))(params, *inputs)
    assert output.dtype == jnp.float32
    assert relative_error(output, example["output"]) <= tolerance
    for tap in taps:
        assert relative_error(found[tap], example[tap]) <= tolerance, tap
    skips = tuple(jnp.asarray(example[name]) for name in sorted(example) if name.startswith("control_0"))
    if skips:
        control = Control(skips, jnp.asarray(example["control_mid"]))
        output, _ = jax.jit(lambda params, *inputs: apply(network, params, *inputs, control=control))(params, *inputs)
        assert relative_error(output, example["controlled"]) <= tolerance


@pytest.mark.parametrize("case", ["wide", "tall"])
@pytest.mark.parametrize("name", NAMES)
def test_every_block_and_the_output_equal_what_diffusers_computed(name, case):
    network, params = load_checkpoint(GOLDENS / f"unet_{name}", maps)
    with np.load(GOLDENS / f"unet_{name}" / f"{case}.npz") as arrays:
        assert_equals_reference(network, params, dict(arrays), TOLERANCE["float32"])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("sd15", {"layers_per_block": 1, "in_channels": 9}, (1, 4, 20, 5)),
        ("sd21", {"attention_head_dim": (2, 4, 8), "cross_attention_dim": 20}, (3, 8, 4, 1)),
        ("sdxl", {"transformer_layers_per_block": (1, 1, 3)}, (1, 8, 8, 9)),
        ("sdxl", {"layers_per_block": 3, "out_channels": 8}, (2, 4, 8, 2)),
    ],
)
def test_live_checkpoints_of_diffusers_load_and_run_alike(name, changes, sizes, tmp_path):
    pytest.importorskip("diffusers")
    from tests.oracles import sd_unet as oracle

    model = oracle.make(name, seed=7, **changes)
    model.save_pretrained(tmp_path)
    example = oracle.run(model, *sizes, seed=8, control=name == "sd15")
    assert_equals_reference(*load_checkpoint(tmp_path, maps), example, TOLERANCE["float32"])
    network, params = load_checkpoint(tmp_path, maps, dtype="bfloat16")
    assert_equals_reference(network, params, example, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(("name", "count"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)])
def test_full_size_networks_expect_the_published_tensors(name, count):
    config = SDUNetConfig.preset(name)
    _, spec = build(config)
    expected = reference_shapes(maps.weight_map(config), spec)
    assert expected == published_shapes(f"unet_{name}")
    assert sum(int(np.prod(shape)) for shape in expected.values()) == count


@functools.cache
def drawn(config):
    """A network none of whose parameters is at its initial zero or one, and inputs."""
    network, spec = build(config)
    random = np.random.default_rng(0)
    params = draw(random, spec)
    x, time, context = jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), config.input_spec(2, 8, 4, tokens=5)
    )
    mask = jnp.array([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return network, params, (x, time, TextContext(context.sequence, mask, context.pooled))


def test_the_ways_in_parts_make_the_whole():
    """HyperHuman gives the first and last stage to each of its outputs: the rest runs once between them."""
    network, params, (x, time, context) = drawn(SMOKE)
    call = functools.partial(apply, network, params)

    def parts(x):
        conditions = call(time, context, method="condition")
        h, first = call(call(x, method="enter"), conditions, 0, 1, method="way_down")
        h, second = call(h, conditions, 1, 2, method="way_down")
        h = call(call(h, conditions, method="middle"), [*first, *second], conditions, 1, 1, method="way_up")
        return call(call(h, first[: 1 + len(SMOKE.down[0])], conditions, 0, 0, method="way_up"), method="finish")

    whole, _ = jax.jit(lambda x: call(x, time, context))(x)
    # The way up of stage 1 takes the skip of the downsampler before it, and leaves the first stage's own.
    np.testing.assert_allclose(jax.jit(parts)(x), whole, rtol=1e-5, atol=1e-5)


def test_padding_is_left_out_where_the_config_says_so():
    _, params, (x, time, context) = drawn(SMOKE)
    other = dataclasses.replace(context, sequence=context.sequence.at[0, 3:].add(7.0))
    for text_mask, same in (("attend", True), ("ignore", False)):
        masked, _ = build(dataclasses.replace(SMOKE, text_mask=text_mask))
        run = jax.jit(lambda context, masked=masked: apply(masked, params, x, time, context)[0])
        a, b = run(context), run(other)
        assert np.array_equal(a[1], b[1])
        assert np.array_equal(a[0], b[0]) == same


def test_the_kernels_of_attention_and_recomputed_blocks_give_the_same():
    network, params, inputs = drawn(SMOKE)
    expected, _ = jax.jit(lambda p: apply(network, p, *inputs))(params)
    for changes in ({"attention": "chunked", "attention_chunk": 5}, {"remat": "blocks"}):
        other, _ = build(dataclasses.replace(SMOKE, **changes))
        given, _ = jax.jit(lambda p, other=other: apply(other, p, *inputs))(params)
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_any_block_can_be_replaced_by_its_own_output():
    network, params, inputs = drawn(SMOKE)
    names = SMOKE.block_names()
    assert len(names) == sum(len(layer) for way in (SMOKE.down, SMOKE.up) for stage in way for layer in stage) + 3
    expected, found = jax.jit(lambda p: apply(network, p, *inputs, taps=names))(params)

    def replaced(p, found):
        reuse = {name: Reuse(value) for name, value in found.items()}
        return apply(network, p, *inputs, reuse=reuse)[0]

    np.testing.assert_allclose(jax.jit(replaced)(params, found), expected, rtol=1e-5, atol=1e-5)


def test_layers_of_other_blocks_build_and_run():
    """SnapFusion removes blocks and adds others: no transformer in one stage, three after one residual block."""
    config = dataclasses.replace(SMOKE, down=(("r",), ("raa",)), mid="ra", up=(("r", "rr"), ("raaa", "r")))
    network, _ = build(config)
    params = init(network, jax.random.key(0))
    x, time, context = drawn(SMOKE)[2]
    assert jax.eval_shape(lambda p: apply(network, p, x, time, context)[0], params).shape == x.shape
    with pytest.raises(ValueError, match="published layout"):
        maps.weight_map(config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"down": (("ra",), ("a",))}, "not made of a residual block 'r', which changes the width"),
        ({"down": (("rx",), ("r",))}, "not made of blocks 'r' and transformers 'a'"),
        ({"up": (("ra", "a"), ("r", "r", "r"))}, "not made of a residual block"),
        ({"up": (("r",), ("r", "r", "r"))}, "needs one layer more"),
        ({"heads": (3, 2)}, "must divide"),
        ({"mid": "x"}, "mid='x'"),
        ({"depth": (1,)}, "depth has 1 stages"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SMOKE, **changes)


def test_inputs_that_do_not_fit_are_refused():
    network, params, (x, time, context) = drawn(SMOKE)
    for given, control, match in (
        (x[:, :7], None, "does not divide by 2"),
        (x[..., :3], None, "latent channels 3 given"),
        (x, Control((x,), x), "the control has 1 skips"),
    ):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda p: apply(network, p, given, time, context, control=control)[0], params)  # noqa: B023


def test_a_foreign_unet_is_refused_by_the_field_that_differs():
    values = {"cross_attention_dim": 12, "down_block_types": ["AttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
    with pytest.raises(ValueError, match="AttnDownBlock2D"):
        maps.read_config({**values, "block_out_channels": [8]})
    with pytest.raises(ValueError, match="class_embed_type"):
        maps.read_config({"class_embed_type": "timestep"})


def test_written_tensors_are_what_was_read():
    assert_written_as_read(GOLDENS / "unet_sdxl", maps)
