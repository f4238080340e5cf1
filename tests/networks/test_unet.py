"""The SnapGen UNet: no idle parameter, intermediates that can be read and replaced, and fit for a phone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build, flatten, for_platform, init, unflatten
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from tests.networks.tiny import drawn, inputs, outputs_without_each_leaf

pytestmark = pytest.mark.usefixtures("quick_to_compile")
CONFIG = for_platform(UNetConfig.preset("smoke"), "cpu")
READINGS = {
    "residual and transformer first": {"first_stage": "res+tf"},
    "residual first": {"first_stage": "res"},
    "two residual blocks in the middle": {"mid": "rar"},
    "ordinary convolutions": {"convolution": "ordinary", "expand_ratio": 1},
    "expanded from the input": {"expand_base": "in"},
    "expanded from the larger": {"expand_base": "max"},
    "separable samplers": {"sampler": "sep"},
    "as many key heads": {"kv_heads": None},
    "two key heads": {"kv_heads": 2},
    "no norms of queries and no positions": {"qk_norm": False, "rope": False},
    "attention everywhere": {"self_attention": (True, True), "up_depth": (1, 2)},
    "no transformer at the bottom": {"down_depth": (1, 0), "mid_depth": 0, "up_depth": (0, 0)},
    "no cross-attention": {"cross_attention": (False, False)},
    "absolute positions": {"absolute_positions": True},
    "no pooled text": {"pooled_width": None},
    "one stage": {
        "channels": (8,),
        "down_depth": (1,),
        "up_depth": (1,),
        "self_attention": (True,),
        "cross_attention": (True,),
    },
    "four stages": {
        "channels": (8, 8, 16, 16),
        "down_depth": (1, 1, 0, 1),
        "up_depth": (0, 0, 0, 1),
        "self_attention": (False, False, False, True),
        "cross_attention": (True, True, True, True),
    },
}


@pytest.fixture(scope="module")
def tiny():
    """The smoke network away from its start values, its inputs, and a compiled call."""
    network, _ = build(CONFIG)
    return network, drawn(network), inputs(CONFIG)


def velocity(network, params, args, **kwargs):
    return jax.jit(lambda params, args: apply(network, params, *args, **kwargs)[0])(params, args)


def test_the_output_and_the_last_map_of_every_branch_start_at_zero():
    """So that a fresh network predicts zero, and each residual branch begins as the identity."""
    network, spec = build(CONFIG)
    last = re.compile(r"(conv_out|conv_2/pointwise|project_out)/kernel$")
    names = ["/".join(path) for path in flatten(spec)]
    fresh = jax.jit(lambda key: dict(zip(names, flatten(init(network, key)).values(), strict=True)))
    zeros = jax.jit(lambda key: {n: leaf for n, leaf in fresh(key).items() if last.search(n)})(jax.random.key(0))
    assert len(zeros) == 1 + 6 + 5 and not any(leaf.any() for leaf in zeros.values())


def test_every_parameter_has_an_effect(tiny):
    network, params, args = tiny

    def output(params):
        return apply(network, params, *args)[0]

    whole = jax.jit(output)(params)
    for name, without in outputs_without_each_leaf(output, params).items():
        assert jnp.abs(without - whole).max() > 1e-5 * jnp.abs(whole).max(), f"{name} has no effect"


@pytest.mark.parametrize("changes", READINGS.values(), ids=READINGS)
def test_every_reading_of_the_paper_is_a_network(changes):
    config = UNetConfig.preset("smoke", **changes)
    network, spec = build(config)
    shapes = config.input_spec(3, 16, 8, 5)
    v, found = jax.eval_shape(lambda p, a: apply(network, p, *a, taps=config.tap_names()), spec, shapes)
    assert v.shape == (3, 16, 8, 4) and set(found) == set(config.tap_names())


def test_the_text_matters_and_its_padding_does_not(tiny):
    network, params, (x, time, context) = tiny
    call = jax.jit(lambda context: apply(network, params, x, time, context)[0])
    before = call(context)
    in_padding = context.sequence.at[:, -1].add(10.0)
    np.testing.assert_array_equal(call(dataclasses.replace(context, sequence=in_padding)), before)
    for changed in (
        dataclasses.replace(context, sequence=context.sequence.at[:, 0].add(1.0)),
        dataclasses.replace(context, pooled=context.pooled + 1.0),
        dataclasses.replace(context, mask=jnp.ones_like(context.mask)),
    ):
        assert jnp.abs(call(changed) - before).max() > 1e-4


def test_an_intermediate_replaced_by_itself_changes_nothing_and_by_zeros_changes_the_output(tiny):
    network, params, args = tiny
    names = CONFIG.tap_names()
    whole, found = jax.jit(lambda: apply(network, params, *args, taps=names))()
    assert set(found) == set(names)

    @functools.partial(jax.jit, static_argnames="replaced")
    def with_scaled(scale, replaced):
        return apply(network, params, *args, reuse={name: scale * found[name] for name in replaced})[0]

    np.testing.assert_allclose(with_scaled(1.0, replaced=names), whole, atol=1e-5)
    for name in ("down_0", "mid", "up_0"):
        assert jnp.abs(with_scaled(0.0, replaced=(name,)) - whole).max() > 1e-3, name


def test_what_only_fed_a_replaced_intermediate_is_not_computed(tiny):
    network, params, args = tiny
    spec = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
    whole = jax.jit(lambda a: apply(network, params, *a)[0]).lower(args).compile()
    reused = jax.jit(lambda a, h: apply(network, params, *a, reuse={"upsample_1": h})[0]).lower(args, spec).compile()
    flops = [compiled.cost_analysis()["flops"] for compiled in (whole, reused)]
    assert flops[1] < 0.6 * flops[0]


def test_both_forms_of_the_depthwise_convolution_give_one_network(tiny):
    network, params, args = tiny
    grouped, _ = build(dataclasses.replace(CONFIG, depthwise="grouped"))
    np.testing.assert_allclose(velocity(grouped, params, args), velocity(network, params, args), atol=1e-4)


def test_bfloat16_computes_and_hands_out_float32_close_to_float32(tiny):
    network, params, args = tiny
    rounded, _ = build(dataclasses.replace(CONFIG, dtype="bfloat16"))
    v, exact = velocity(rounded, params, args), velocity(network, params, args)
    assert v.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(v - exact) / jnp.linalg.norm(exact) < 0.05


def test_nothing_has_more_than_four_dimensions_and_no_value_is_gathered():
    """What mobile GPU delegates ask for (the export takes the grouped form)."""
    config = dataclasses.replace(UNetConfig.preset("smoke", kv_heads=2), depthwise="grouped")
    network, spec = build(config)
    jaxpr = jax.make_jaxpr(lambda p, a: apply(network, p, *a))(spec, config.input_spec(1, 8, 8, 5))

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    yield from equations(inner)

    found = list(equations(jaxpr.jaxpr))
    assert max(v.aval.ndim for equation in found for v in equation.outvars) == 4
    convolutions = [e for e in found if e.primitive.name == "conv_general_dilated"]
    assert any(e.params["feature_group_count"] > 1 for e in convolutions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_depth": (1,)}, "up_depth = .* has 1 entries, but `channels` has 2 stages"),
        ({"channels": (8, 18)}, "18 channels must be a multiple of groups=4 and of head_dim=4"),
        ({"down_depth": (0, 1)}, "leaves the first stage empty"),
    ],
)
def test_a_config_that_makes_no_network_says_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.preset("smoke", **changes)


def test_inputs_that_do_not_fit_say_what_to_change(tiny):
    network, params, (x, time, context) = tiny

    def call(x=x, time=time, context=context, **kwargs):
        return apply(network, params, x, time, context, **kwargs)

    wide = TextContext(jnp.zeros((2, 5, 17)), context.mask, context.pooled)
    pooled = dataclasses.replace(context, pooled=jnp.zeros((2, 3)))
    for kwargs, message in (
        ({"x": jnp.zeros((2, 7, 8, 4))}, "7 x 8 does not divide by 2"),
        ({"x": jnp.zeros((2, 8, 8, 3))}, "3 channels, but latent_channels=4"),
        ({"time": jnp.zeros((2, 8))}, "8 time features given, but time_width=16"),
        ({"context": wide}, "17 wide, but context_width=16"),
        ({"context": pooled}, "3 wide, but pooled_width=16"),
        ({"taps": ["middle"]}, "unknown intermediate middle; the network has conv_in"),
        ({"reuse": {"mid": jnp.zeros((2, 8, 8, 16))}}, "mid has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda kwargs=kwargs: call(**kwargs))


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'tiny'; the presets are smoke, shapes, imagenet, t2i"):
        UNetConfig.preset("tiny")


@pytest.mark.parametrize("absolute", [False, True])
def test_absolute_positions_tell_left_from_right(absolute):
    """Of an even picture that each cell sees alone: the convolutions are cut to their centre, so that only positions
    can tell cells apart."""
    config = for_platform(UNetConfig.preset("smoke", absolute_positions=absolute), "cpu")
    network, _ = build(config)
    params = drawn(network)
    cut = {
        path: jnp.zeros_like(leaf).at[1, 1].set(leaf[1, 1]) if leaf.ndim == 4 and leaf.shape[0] == 3 else leaf
        for path, leaf in flatten(params).items()
    }
    x, time, context = inputs(config)
    v = velocity(network, unflatten(cut), (jnp.ones_like(x), time, context))
    spread = float(jnp.abs(v - v[:, :1, :1]).max())
    assert spread > 1e-3 if absolute else spread < 1e-5


@pytest.mark.parametrize(("first_stage", "sees"), [("tf", False), ("res", True), ("res+tf", True)])
def test_the_first_stage_sees_the_time_in_its_residual_blocks_alone(first_stage, sees):
    config = dataclasses.replace(CONFIG, first_stage=first_stage)
    network, _ = build(config)
    x, _, context = inputs(config)
    params = drawn(network)

    @jax.jit
    def features(t):
        time = time_features(jnp.full(x.shape[:1], t), config.time_width)
        return apply(network, params, x, time, context, taps=("down_0", "mid"))[1]

    early, late = features(0.1), features(0.9)
    assert bool(jnp.array_equal(early["down_0"], late["down_0"])) is not sees
    assert float(jnp.abs(early["mid"] - late["mid"]).max()) > 1e-3
