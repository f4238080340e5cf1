"""Exact sizes: the published networks, every reading of the paper, and the design ladder."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks import counting
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.depthwise import depthwise_grouped, depthwise_shifted
from snapgen_jax.networks.module import apply, build, count_parameters, flatten
from snapgen_jax.networks.registry import CONFIGS
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.networks.unet_blocks import TransformerBlock

# Readings of what the paper leaves open, and their millions of parameters by hand: ImageNet, text-to-image.
READINGS = {
    "R3": ({}, 371.78, 379.04),
    "R2": ({"mid": "rar", "pooled_width": None}, 375.02, 380.98),
    "R1": ({"first_stage": "res+tf", "mid": "rar", "pooled_width": None}, 376.62, 382.57),
    "R4": ({"first_stage": "res+tf", "mid": "rar", "pooled_width": None, "sampler": "sep"}, 365.5, 371.5),
    "R6": ({"expand_base": "in", "sampler": "sep", "mid": "rar", "pooled_width": None}, 391, 397),
    "R6, larger": ({"expand_base": "max", "sampler": "sep", "mid": "rar", "pooled_width": None}, 394, 400),
}


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_of_the_paper_has_its_size(reading):
    changes, imagenet, t2i = READINGS[reading]
    tolerance = 1e-3 if reading == "R3" else 3e-3
    for preset, millions in (("imagenet", imagenet), ("t2i", t2i)):
        assert counting.parameters(UNetConfig.preset(preset, **changes)) == pytest.approx(1e6 * millions, rel=tolerance)


def test_the_parts_of_the_text_to_image_network_have_their_sizes():
    parts = collections.Counter()
    for path, leaf in flatten(build(UNetConfig.preset("t2i"))[1]).items():
        stage = path[1].replace("block_", "") if path[0] in ("down", "up") else ""
        kind = next((part for part in path if part in ("residual", "transformer")), "")
        parts[f"{path[0]}{stage} {kind}".strip()] += leaf.size
    millions = {name: round(size / 1e6, 3) for name, size in parts.items()}
    expected = {
        "time": 1.313,
        "pooled": 3.148,
        "down00 transformer": 2.237,
        "down01 residual": 4.100,
        "down01 transformer": 13.661,
        "down02 residual": 9.928,
        "down02 transformer": 89.836,
        "mid_residual": 5.080,
        "mid_transformer": 44.918,
        "up02 residual": 23.873,
        "up02 transformer": 134.753,
        "up01 residual": 9.714,
        "up01 transformer": 20.491,
        "up00 residual": 3.385,
        "downsamplers": 0.590 + 2.360,
        "upsamplers": 7.226 + 2.360,
        "conv_in": 0.037,
        "conv_out": 0.037,
        "norm_out": 0.001,
    }
    assert millions == pytest.approx(expected, abs=1.1e-3)


def test_the_text_encoders_of_stable_diffusion_have_their_sizes():
    assert counting.parameters(ClipTextConfig.preset("clip_l")) == 123_650_304
    assert counting.parameters(ClipTextConfig.preset("clip_g")) == 694_659_840


@functools.cache
def ladder():
    return {row.step.name: row for row in counting.ladder_rows()}


def test_the_ladder_ends_at_the_imagenet_network_with_a_third_of_the_compute_of_dit():
    final = ladder()["G"]
    assert final.parameters == counting.parameters(UNetConfig.preset("imagenet"))
    assert final.macs_256 / 118.6e9 == pytest.approx(0.32, abs=0.002)


# change in percent of the default reading: parameters, multiply-adds at 1024 pixels
@pytest.mark.parametrize(
    ("step", "parameters", "macs"),
    [
        ("B", None, -17.2),
        ("C1", -20.4, None),
        ("C2", -16.3, -27.1),
        ("D", -12.9, -12.1),
        ("E", -16.5, -5.9),
    ],
)
def test_each_step_of_the_ladder_changes_what_the_paper_says(step, parameters, macs):
    row = ladder()[step]
    if parameters is not None:
        assert row.parameters_change == pytest.approx(parameters, abs=0.1)
        assert row.parameters_change == pytest.approx(row.step.parameters, abs=4)
    if macs is not None:
        assert row.macs_1024_change == pytest.approx(macs, abs=0.1)
        assert row.macs_1024_change == pytest.approx(row.step.macs, abs=1)


def test_the_ladder_table_has_a_row_a_step_with_the_published_changes(monkeypatch):
    monkeypatch.setattr(counting, "ladder_rows", lambda final=None: list(ladder().values()))
    lines = counting.ladder_table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["A", "B", "C1", "C2", "D", "E", "F", "G"]
    assert "-27.1%" in lines[5] and "-27%" in lines[5]
    assert len({len(line) for line in lines}) == 1


def test_every_network_and_preset_is_in_the_table_of_all():
    table = counting.all_counts_table()
    for config_class in CONFIGS:
        for preset in config_class.PRESETS:
            kind = config_class.preset(preset).kind
            assert any(line.split("|")[1:3] == [f" {kind} ", f" {preset} "] for line in _squeezed(table))
    assert "371,780,228" in table and "379,044,496" in table


def _squeezed(table):
    return ["|".join(f" {cell.strip()} " for cell in line.split("|")) for line in table.splitlines()]


@pytest.mark.parametrize("config_class", [c for c in CONFIGS if c.PRESETS], ids=lambda c: c.__name__)
def test_a_network_has_the_size_of_what_is_built_and_applied(config_class):
    config = config_class.preset("smoke")
    network, spec = build(config)
    calls = [config.input_spec(), config.input_spec(3)]
    expected = [counting.count_macs(lambda params, *args: apply(network, params, *args), spec, *args) for args in calls]
    assert counting.size(config, *calls) == (count_parameters(spec), *expected)


def test_equal_blocks_are_counted_each_and_traced_once(monkeypatch):
    traced, run = [], TransformerBlock.__call__
    monkeypatch.setattr(TransformerBlock, "__call__", lambda *args: traced.append(args) or run(*args))

    def size(depth):
        config = UNetConfig.preset("smoke", mid_depth=depth, ffn_ratio=7)
        return np.array(counting.size(config, config.input_spec()))

    two, once = size(2), len(traced)
    three, six = size(3), size(6)
    assert once > 0 and len(traced) == once
    assert ((six - three) == 3 * (three - two)).all() and (three > two).all()


def test_products_are_counted_inside_loops_branches_and_custom_rules():
    a, b = jnp.zeros((2, 3, 5)), jnp.zeros((5, 7))
    once = 2 * 3 * 5 * 7
    assert counting.count_macs(jnp.matmul, a, b) == once
    assert counting.count_macs(jax.jit(jax.checkpoint(jnp.matmul)), a, b) == once
    assert counting.count_macs(lambda a: jax.lax.scan(lambda c, _: (c, a @ b), 0.0, length=4), a) == 4 * once
    assert (
        counting.count_macs(lambda a: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: jnp.zeros((2, 3, 7))), a) == once
    )
    with pytest.raises(ValueError, match="while loop cannot be counted"):
        counting.count_macs(lambda a: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ jnp.zeros((5, 5)), a), a)


def test_products_are_counted_by_what_is_multiplied():
    x, w, kernel = jnp.zeros((2, 3, 5), jnp.int8), jnp.zeros((5, 7), jnp.int8), jnp.zeros((7, 7), jnp.bfloat16)

    def both(x):
        y = jax.lax.dot_general(x, w, (((2,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return jax.lax.scan(lambda c, _: (c @ kernel, None), y.astype(jnp.bfloat16), length=4)[0]

    assert counting.count_macs_by_dtype(both, x) == {"int8": 2 * 3 * 5 * 7, "bfloat16": 4 * 2 * 3 * 7 * 7}
    assert counting.count_macs(both, x) == counting.count_macs_by_dtype(both, x).total()


def test_convolutions_are_counted_by_their_window_and_group():
    x, kernel, depthwise = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 6, 4)), jnp.zeros((3, 3, 1, 6))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert counting.count_macs(conv, x, kernel) == 2 * 8 * 8 * 4 * 9 * 6
    for form in (depthwise_grouped, depthwise_shifted):
        assert counting.count_macs(form, x, depthwise) == 2 * 8 * 8 * 6 * 9


def test_both_forms_of_the_depthwise_convolution_count_the_same():
    def count(form):
        config = UNetConfig.preset("smoke", depthwise=form)
        return counting.macs(config, config.input_spec(height=8, width=8))

    assert count("shifted") == count("grouped")


def test_the_sharding_rules_of_a_network_split_nearly_all_of_it():
    """Rules are (pattern, PartitionSpec); the first that matches a path counts."""
    import re

    for config in (UNetConfig.preset("t2i"), ClipTextConfig.preset("clip_g")):
        name, rules = config.kind, config.rules()
        split, total, used = 0, 0, set()
        for path, leaf in flatten(build(config)[1]).items():
            total += leaf.size
            for pattern, spec in rules:
                if re.search(pattern, "/".join(path)):
                    used.add(pattern)
                    assert len(spec) == leaf.ndim, path
                    axis = tuple(spec).index("fsdp")
                    assert leaf.shape[axis] % 64 == 0, f"{path} {leaf.shape}: does not divide over a pod"
                    split += leaf.size
                    break
        assert split > 0.99 * total, name
        assert used == {pattern for pattern, _ in rules}, f"{name}: a rule that matches nothing"


def test_what_a_replaced_intermediate_spares_can_be_counted():
    config = UNetConfig.preset("smoke")
    network, spec = build(config)
    inputs = config.input_spec(1, 8, 8, 5)
    reuse = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)
    whole = counting.macs(config, inputs)
    rest = counting.count_macs(lambda p, a, h: apply(network, p, *a, reuse={"upsample_1": h})[0], spec, inputs, reuse)
    assert 0 < rest < 0.6 * whole
