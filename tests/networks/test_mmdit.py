"""The MMDiT is that of Stable Diffusion 3.5, at every block, and costs what it says."""

import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, init, unflatten
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps.sd3_mmdit import read_config, weight_map

pytestmark = pytest.mark.usefixtures("quick_to_compile")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
THREE_HEADS = {"num_attention_heads": 3, "attention_head_dim": 8, "caption_projection_dim": 24}
SMOKE = MMDiTConfig.preset("smoke")


def relative_error(given, expected):
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(given - expected) / np.linalg.norm(expected)


def load_checkpoint(folder, **changes):
    config = read_config(json.loads((folder / "config.json").read_text()), **changes)
    network, spec = build(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return network, load(folder, weight_map(config), spec=spec, shardings=here, dtype=jnp.float32)


def assert_equals_reference(network, params, example, tolerance):
    """`example`: a mapping with x, t, sequence, pooled, v and the taps, as the oracle writes it."""
    taps = network.config.block_names()
    context = TextContext(example["sequence"], jnp.zeros(example["sequence"].shape[:2]), example["pooled"])
    run = jax.jit(lambda params, *inputs: apply(network, params, *inputs, taps=taps))
    v, found = run(params, example["x"], time_features(example["t"]), context)
    assert v.dtype == jnp.float32
    assert relative_error(v, example["v"]) <= tolerance
    for tap in taps:
        b, h, w, c = found[tap].shape
        assert relative_error(found[tap].reshape(b, h * w, c), example[tap]) <= tolerance, tap


@functools.cache
def random_network(config):
    """A network none of whose parameters is at its initial zero or one, and inputs: `(network, params, inputs)`."""
    network, spec = build(config)
    random = np.random.default_rng(0)

    def draw(s):
        matrix = len(s.shape) > 1 and s.shape[-2] > config.depth  # not a stack of vectors
        scale = s.shape[-2] ** -0.5 if matrix else 0.3
        return jnp.asarray(scale * random.standard_normal(s.shape), s.dtype)

    params = jax.tree.map(draw, spec)
    x, time, context = jax.tree.map(draw, config.input_spec(batch=2, height=8, width=4, tokens=5))
    mask = jnp.array([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return network, params, (x, time, TextContext(context.sequence, mask, context.pooled))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["wide", "tall"])
@pytest.mark.parametrize("name", ["mmdit_large", "mmdit_medium"])
def test_every_block_and_the_velocity_equal_what_diffusers_computed(name, case, dtype):
    network, params = load_checkpoint(GOLDENS / name, dtype=dtype)
    assert bool(network.config.dual) == (name == "mmdit_medium")
    assert_equals_reference(network, params, np.load(GOLDENS / name / f"{case}.npz"), TOLERANCE[dtype])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"num_layers": 3}, (2, 4, 14, 1)),
        ({"num_layers": 5, "dual_attention_layers": (0, 1, 2)}, (1, 14, 6, 9)),
        ({"num_layers": 2, "dual_attention_layers": (0,), **THREE_HEADS}, (3, 2, 2, 4)),
        ({"num_layers": 2, "pos_embed_max_size": 10, "sample_size": 16, "patch_size": 1}, (1, 10, 9, 2)),
    ],
)
def test_live_checkpoints_of_diffusers_load_and_run_alike(changes, sizes, tmp_path):
    pytest.importorskip("diffusers")
    from tests.oracles import mmdit as oracle

    model = oracle.make("mmdit_large", seed=7, **changes)
    model.save_pretrained(tmp_path)
    example = oracle.run(model, *sizes, seed=8)
    arrays = {**vars(example), **example.taps}
    for dtype, tolerance in TOLERANCE.items():
        assert_equals_reference(*load_checkpoint(tmp_path, dtype=dtype), arrays, tolerance)


@pytest.mark.oracle
def test_a_fresh_position_table_is_that_of_diffusers():
    pytest.importorskip("diffusers")
    from tests.oracles import mmdit as oracle

    table = oracle.SD3Transformer2DModel(**oracle.COMMON, num_layers=1).pos_embed.pos_embed.numpy()
    config = MMDiTConfig(depth=1, heads=2, head_dim=16, position_size=7, position_base=4)
    fresh = init(build(config)[0], jax.random.key(0))["position"]
    np.testing.assert_allclose(fresh, table, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "name", "count", "positions"),
    [
        ("sd35_large", "sd35_large", 8_056_627_520, 89_653_248),
        ("sd35_large_turbo", "sd35_large", 8_056_627_520, 89_653_248),
        ("sd35_medium", "sd35_medium", 2_243_171_520, 226_492_416),
    ],
)
def test_full_size_networks_expect_the_published_tensors(preset, name, count, positions):
    config = MMDiTConfig.preset(preset)
    _, spec = build(config)
    assert spec["position"].size == positions
    assert count_parameters(spec) == count + positions
    published = json.loads(gzip.decompress((GOLDENS / "state_dict_shapes.json.gz").read_bytes()))[name]
    assert reference_shapes(weight_map(config), spec) == {key: tuple(shape) for key, shape in published.items()}


def test_checkpoints_of_other_kinds_are_refused():
    values = json.loads((GOLDENS / "mmdit_large" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"qk_norm = None.*can only read 'rms_norm'"):
        read_config({**values, "qk_norm": None})
    with pytest.raises(ValueError, match=r"dual_attention_layers = \(1, 2\)"):
        read_config({**values, "dual_attention_layers": [1, 2]})


def test_zeroing_any_parameter_changes_the_velocity_but_for_the_unread_queries_of_the_last_block():
    network, params, inputs = random_network(SMOKE)
    run = jax.jit(lambda params: apply(network, params, *inputs)[0])
    v, flat, dead = run(params), flatten(params), set()
    for path, leaf in flat.items():
        if jnp.array_equal(v, run(unflatten({**flat, path: jnp.zeros_like(leaf)}))):
            dead.add("/".join(path))
    attention = "last_block/text/attention"
    # The published checkpoints hold them: the last block's text tokens are read by the image tokens and end there.
    assert dead == {f"{attention}/query/kernel", f"{attention}/query/bias", f"{attention}/query_norm/scale"}


def test_one_call_on_a_doubled_batch_is_two_calls():
    network, params, (x, time, context) = random_network(SMOKE)
    null = TextContext(-context.sequence, context.mask[::-1], -context.pooled)
    run = jax.jit(lambda *inputs: apply(network, params, *inputs)[0])
    both = run(*jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x, time, context), (x, time, null)))
    separate = jnp.concatenate([run(x, time, context), run(x, time, null)])
    np.testing.assert_allclose(both, separate, rtol=1e-5, atol=1e-5)


def test_padding_is_hidden_or_read_as_the_config_says():
    for text_mask, hidden in (("attend", True), ("ignore", False)):
        network, params, (x, time, context) = random_network(MMDiTConfig.preset("smoke", text_mask=text_mask))
        run = jax.jit(lambda context, n=network, p=params, x=x, time=time: apply(n, p, x, time, context)[0])
        padding = (1 - context.mask)[:, :, None]
        v, other = (
            run(TextContext(sequence, context.mask, context.pooled))
            for sequence in (context.sequence, context.sequence + 3 * padding)
        )
        assert jnp.array_equal(v[0], other[0]) == hidden
        assert jnp.array_equal(v[1], other[1])  # the second text has no padding


def test_taps_come_in_any_choice_and_as_maps():
    network, params, inputs = random_network(SMOKE)
    run = jax.jit(lambda taps: apply(network, params, *inputs, taps=taps), static_argnums=0)
    v, every = run(SMOKE.block_names())
    assert list(every) == ["block_00", "block_01", "block_02"]
    for choice in (("block_02",), ("block_01", "block_00")):
        same, found = run(choice)
        np.testing.assert_allclose(same, v, rtol=1e-6, atol=1e-6)
        for tap in choice:
            assert found[tap].shape == (2, 4, 2, SMOKE.width)
            np.testing.assert_allclose(found[tap], every[tap], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [{"remat": "block"}, {"attention": "chunked", "attention_chunk": 3}])
def test_ways_to_save_memory_change_no_number(changes):
    def velocity_and_gradient(config):
        network, params, inputs = random_network(SMOKE)
        network, _ = build(config)

        def loss(x):
            v, taps = apply(network, params, x, *inputs[1:], taps=("block_00", "block_01"))
            return jnp.sum(v**2) + sum(jnp.sum(jnp.sin(tap)) for tap in taps.values()), v

        (_, v), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs[0])
        return v, gradient

    expected = velocity_and_gradient(SMOKE)
    given = velocity_and_gradient(MMDiTConfig.preset("smoke", **changes))
    for a, b in zip(given, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("what", ["forward", "input gradient", "input gradient, recomputed"])
def test_taps_cost_one_feature_each(what):
    config = MMDiTConfig.preset(
        "smoke", depth=7, dual=2, position_size=32, remat="block" if "recomputed" in what else "none"
    )
    network, params = build(config)
    x, *rest = config.input_spec(batch=2, height=64, width=64, tokens=8)
    every_stack = ("block_00", "block_03", "block_06")
    feature = 2 * 32 * 32 * config.width * 4

    def forward(x, params, rest, taps):
        return apply(network, params, x, *rest, taps=taps)

    def loss(*args):
        v, found = forward(*args)
        return jnp.sum(v**2) + sum(jnp.sum(tap**2) for tap in found.values())

    function = forward if what == "forward" else jax.grad(loss)
    plain, tapped = (
        jax.jit(function, static_argnums=3).lower(x, params, rest, taps).compile().memory_analysis().temp_size_in_bytes
        for taps in ((), every_stack)
    )
    assert tapped <= plain + (len(every_stack) + 1) * feature


def test_the_teacher_lies_sharded_over_eight_devices_and_computes_the_same():
    network, params, (x, time, context) = random_network(SMOKE)
    run = jax.jit(lambda params, *inputs: apply(network, params, *inputs)[0])
    v = run(params, x, time, context)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    shardings = tree_shardings(params, SMOKE.rules(), mesh)
    whole = ["/".join(path) for path, s in flatten(shardings).items() if s.is_fully_replicated]
    assert all(path.endswith(("query_norm/scale", "key_norm/scale")) for path in whole)

    repeated = jax.tree.map(lambda a: np.repeat(a, 4, axis=0), (x, time, context))
    with jax.set_mesh(mesh):
        sharded = run(jax.device_put(params, shardings), *put_batch(repeated, mesh))
    assert len(sharded.sharding.device_set) == 8 and not sharded.sharding.is_fully_replicated
    np.testing.assert_allclose(sharded, np.repeat(v, 4, axis=0), rtol=1e-4, atol=1e-5)

    large = tree_shardings(
        build(MMDiTConfig.preset("sd35_large"))[1], SMOKE.rules(), make_mesh(MeshConfig(data=1, fsdp=8))
    )
    whole = ["/".join(path) for path, s in flatten(large).items() if s.is_fully_replicated]
    assert all(path.endswith(("query_norm/scale", "key_norm/scale")) for path in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 7}, "a latent of 7 x 8; both sides must be multiples of 2 and at most 16"),
        ({"width": 18}, "at most 16"),
        ({"latent_channels": 3}, "latent channels 3 given, but the config says 4"),
        ({"context_width": 9}, "text state width 9 given"),
        ({"taps": ("block_3",)}, "unknown intermediate block_3; the network has block_00_attention_input, "),
    ],
)
def test_a_shape_or_tap_that_does_not_fit_is_refused(change, message):
    network, params = build(SMOKE)
    change = dict(change)
    sides = {key: change.pop(key, 8) for key in ("height", "width")}
    taps = change.pop("taps", ())
    inputs = MMDiTConfig.preset("smoke", **change).input_spec(**sides, tokens=4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params, inputs: apply(network, params, *inputs, taps=taps), params, inputs)


def test_the_last_block_cannot_be_dual():
    with pytest.raises(ValueError, match="dual=4 of depth=4"):
        MMDiTConfig(depth=4, dual=4)
