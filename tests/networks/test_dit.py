"""DiT is that of its paper and of diffusers, at every block and module, in both published layouts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file

from snapgen_jax.networks.counting import count_macs
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, unflatten
from snapgen_jax.networks.patches import to_map
from snapgen_jax.networks.taps import Reuse
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import reference_shapes, to_reference
from snapgen_jax.weights.maps import dit as maps
from tests.networks.tiny import drawn, inputs
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, published_shapes, relative_error

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMOKE = DiTConfig.preset("smoke")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
VALUES = {"sample_size": 8, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 8}


def load_label(folder, config, layout="diffusers"):
    network, spec = build(config)
    return network, load(folder, maps.label_map(config, layout), spec, HERE, dtype=jnp.float32)


def assert_equals_reference(network, params, label, example, tolerance):
    """`example`: a mapping with x, step, label, output and the taps, as the oracle writes it."""
    taps = [name for name in network.config.tap_names() if not name.endswith("_input")]  # diffusers shows outputs
    time = time_features(jnp.asarray(example["step"]), network.config.time_width, 1.0, shift=1)

    def run(params, table, x, time, labels):
        return apply(network, params, x, time, apply(label[0], table, labels), taps=taps)

    output, found = jax.jit(run)(params, label[1], example["x"], time, example["label"])
    assert output.dtype == jnp.float32
    assert relative_error(output, example["output"][..., : output.shape[-1]]) <= tolerance
    assert list(found) and set(found) == set(taps)
    for tap in taps:
        assert relative_error(found[tap], example[tap]) <= tolerance, tap


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["square", "wide", "tall"])
def test_every_module_and_the_output_equal_what_diffusers_computed(case, dtype):
    network, params = load_checkpoint(GOLDENS / "dit", maps, dtype=dtype)
    label = load_label(GOLDENS / "dit", LabelEmbeddingConfig(classes=10, width=24))
    with np.load(GOLDENS / "dit" / f"{case}.npz") as example:
        assert example["output"].shape[-1] == 2 * network.config.latent_channels
        assert_equals_reference(network, params, label, dict(example), TOLERANCE[dtype])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"num_layers": 1, "patch_size": 4, "num_attention_heads": 3}, (2, 8, 16)),
        ({"num_layers": 2, "out_channels": 4, "attention_head_dim": 16, "sample_size": 12}, (3, 12, 12)),
        ({"num_layers": 2, "patch_size": 1, "in_channels": 3, "out_channels": 6, "norm_eps": 1e-2}, (1, 3, 7)),
    ],
)
def test_live_checkpoints_of_diffusers_load_and_run_alike(changes, sizes, tmp_path):
    pytest.importorskip("diffusers")
    from tests.oracles import dit as oracle

    model = oracle.make(seed=7, **changes)
    model.save_pretrained(tmp_path)
    example = oracle.run(model, *sizes, seed=8)
    label = load_label(tmp_path, maps.read_label_config(dict(model.config)))
    for dtype, tolerance in TOLERANCE.items():
        assert_equals_reference(*load_checkpoint(tmp_path, maps, dtype=dtype), label, example, tolerance)


def renamed(tensors, concatenate):
    """The tensors of diffusers' layout by the names of facebookresearch/DiT, all but the positions."""
    embedding = "transformer_blocks.0.norm1.emb"
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{embedding}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{embedding}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    for i in blocks:
        names[f"blocks.{i}.adaLN_modulation.1"] = f"transformer_blocks.{i}.norm1.linear"
        names[f"blocks.{i}.attn.proj"] = f"transformer_blocks.{i}.attn1.to_out.0"
        names[f"blocks.{i}.mlp.fc1"] = f"transformer_blocks.{i}.ff.net.0.proj"
        names[f"blocks.{i}.mlp.fc2"] = f"transformer_blocks.{i}.ff.net.2"
    new = {f"{a}.{part}": tensors[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}
    for i in blocks:
        for part in ("weight", "bias"):
            new[f"blocks.{i}.attn.qkv.{part}"] = concatenate(
                [tensors[f"transformer_blocks.{i}.attn1.to_{which}.{part}"] for which in "qkv"]
            )
    table = "embedding_table.weight"
    return {**new, f"y_embedder.{table}": tensors[f"{embedding}.class_embedder.{table}"]}


def test_the_first_published_layout_loads_as_the_same_network(tmp_path):
    network, params = load_checkpoint(GOLDENS / "dit", maps)
    held = load_file(GOLDENS / "dit" / "diffusion_pytorch_model.safetensors")
    original = renamed(held, np.concatenate)
    save_file({**original, "pos_embed": np.zeros((1, 16, 24), np.float32)}, tmp_path / "dit.safetensors")
    assert maps.layout_of(original) == "original" and maps.layout_of(held) == "diffusers"
    _, spec = build(network.config)
    weight_map = maps.weight_map(network.config, "original")
    again = load(tmp_path, weight_map, spec, HERE, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    config = LabelEmbeddingConfig(classes=10, width=24)
    tables = [load_label(GOLDENS / "dit", config)[1], load_label(tmp_path, config, "original")[1]]
    jax.tree.map(np.testing.assert_array_equal, *tables)
    written = {**to_reference(weight_map, params), **to_reference(maps.label_map(config, "original"), tables[0])}
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name].astype(np.float32)) for name in original)


# Millions of parameters of the paper's table 4, positions and classes counted.
PUBLISHED = {"s_2": 33, "b_2": 130, "l_2": 458, "xl_2": 675}


@pytest.mark.parametrize("preset", [f"{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)])
def test_full_size_networks_expect_the_published_tensors(preset):
    config = DiTConfig.preset(preset)
    label = LabelEmbeddingConfig(width=config.width)
    (_, spec), (_, table) = build(config), build(label)
    published = published_shapes(f"dit_{preset}")
    weight_map = maps.weight_map(config)
    expected = {**reference_shapes(weight_map, spec), **reference_shapes(maps.label_map(label), table)}
    assert expected.items() <= published.items()
    assert all(weight_map.is_ignored(name) for name in published.keys() - expected.keys())

    original = renamed(published, lambda parts: (3 * parts[0][0], *parts[0][1:]))
    first = maps.weight_map(config, "original"), maps.label_map(label, "original")
    assert {**reference_shapes(first[0], spec), **reference_shapes(first[1], table)} == original
    positions = (32 // config.patch) ** 2 * config.width
    total = count_parameters(spec) + count_parameters(table) + positions
    assert total == sum(map(math.prod, original.values())) + positions
    if preset in PUBLISHED:
        assert total / 1e6 == pytest.approx(PUBLISHED[preset], abs=0.6)
    if preset == "xl_2":
        assert (count_parameters(spec), count_parameters(table), positions) == (673_681_568, 1_153_152, 294_912)
        assert total == 675_129_632


def test_the_largest_network_computes_what_its_paper_says():
    config = DiTConfig.preset("xl_2")
    network, spec = build(config)
    macs = count_macs(lambda p, *args: apply(network, p, *args)[0], spec, *config.input_spec())
    assert macs == pytest.approx(118.64e9, rel=1e-3)


def test_checkpoints_of_other_kinds_and_depths_are_refused(tmp_path):
    for change, message in (
        ({"norm_type": "ada_norm_single"}, "norm_type = 'ada_norm_single'; DiT can only read 'ada_norm_zero'"),
        ({"out_channels": 5}, "out_channels = 5; DiT can only read 8"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.read_config({**VALUES, **change})
    config = maps.read_config({**VALUES, "num_layers": 2})
    with pytest.raises(WeightsError, match=r"surplus: transformer_blocks\.2\.attn1"):
        load(GOLDENS / "dit", maps.weight_map(config), build(config)[1], HERE)
    fields = [DiTConfig.preset("xl_2", base=16, ffn_epsilon=1e-5), LabelEmbeddingConfig(width=1152)]
    values = {"out_channels": 8, "num_embeds_ada_norm": 1000}  # what facebook/DiT-XL-2-256 has beyond the defaults
    assert [maps.read_config(values), maps.read_label_config(values)] == fields


# --- the network by itself --------------------------------------------------------------------------------------------


@functools.cache
def tiny(config=SMOKE):
    network, _ = build(config)
    return network, drawn(network), inputs(config, 2, 8, 4)


def output_of(network, params, args, reuse=None):
    return jax.jit(lambda params, args, reuse: apply(network, params, *args, reuse=reuse)[0])(params, args, reuse)


def test_every_parameter_changes_the_output_but_those_of_the_variance():
    network, params, args = tiny()
    output, flat = output_of(network, params, args), flatten(params)
    run = jax.jit(lambda params: apply(network, params, *args)[0])
    for path, leaf in flat.items():
        assert not jnp.array_equal(output, run(unflatten({**flat, path: jnp.zeros_like(leaf)}))), "/".join(path)
    # Of each pixel of a patch the output holds the first half of the channels.
    kernel = params["out"]["kernel"].reshape(SMOKE.width, 4, 8).at[:, :, 4:].add(1.0).reshape(SMOKE.width, 32)
    other = {**params, "out": {**params["out"], "kernel": kernel}}
    np.testing.assert_array_equal(run(other), output)


def test_only_the_pooled_vector_of_a_context_is_read():
    network, params, (x, time, context) = tiny()
    output = output_of(network, params, (x, time, context))
    other = TextContext(context.sequence + 1, 1 - context.mask, context.pooled)
    np.testing.assert_array_equal(output_of(network, params, (x, time, other)), output)


def test_positions_of_another_grid_count_on_or_are_stretched():
    counted, params, args = tiny()
    output = output_of(counted, params, args)  # 4 x 2 patches
    stretched, _ = build(dataclasses.replace(SMOKE, base=4))
    assert relative_error(output_of(stretched, params, args), output) > 1e-3
    square = jax.tree.map(jnp.asarray, (jnp.concatenate([args[0]] * 2, axis=2), *args[1:]))
    np.testing.assert_allclose(
        output_of(stretched, params, square), output_of(counted, params, square), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("changes", [{"remat": "block"}, {"attention": "chunked", "attention_chunk": 3}])
def test_ways_to_save_memory_change_no_number(changes):
    def output_and_gradient(config):
        network, (_, params, args) = build(config)[0], tiny()

        def loss(x):
            output, taps = apply(network, params, x, *args[1:], taps=("block_00_ffn", "block_01"))
            return jnp.sum(output**2) + sum(jnp.sum(jnp.sin(tap)) for tap in taps.values()), output

        gradient, output = jax.jit(jax.grad(loss, has_aux=True))(args[0])
        return output, gradient

    expected, given = output_and_gradient(SMOKE), output_and_gradient(dataclasses.replace(SMOKE, **changes))
    for a, b in zip(given, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_module_is_replaced_by_what_enters_it(remat):
    """LazyDiT: what enters a module is modulated, and decides whether it runs; what leaves it is not gated yet."""
    network, _ = build(dataclasses.replace(SMOKE, remat=remat))
    _, params, args = tiny()
    names = SMOKE.tap_names()
    modules = ("block_00_attention_input", "block_00_attention", "block_00_ffn_input", "block_00_ffn")
    assert names[:5] == (*modules, "block_00") and len(names) == 5 * SMOKE.depth
    expected, own = jax.jit(lambda: apply(network, params, *args, taps=names))()
    zeros = jax.tree.map(jnp.zeros_like, own)
    for role in ("attention", "ffn"):
        name = f"block_01_{role}"
        flat = flatten(params)
        back = {"attention": ("attention", "back"), "ffn": ("ffn", "outer")}[role]
        without = {
            path: 0 * leaf if path[2:4] == back and path[1] == "block_01" else leaf for path, leaf in flat.items()
        }
        silent = output_of(network, unflatten(without), args)
        entered = []

        def run(z, entered=entered):
            entered.append(z.shape)
            return jnp.array([True, False])

        np.testing.assert_allclose(output_of(network, params, args, {name: zeros[name]}), silent, rtol=1e-5, atol=1e-6)
        rows = jax.jit(
            lambda name=name, run=run: apply(network, params, *args, reuse={name: Reuse(zeros[name], run)})[0]
        )()
        np.testing.assert_allclose(rows, jnp.stack([expected[0], silent[1]]), rtol=1e-4, atol=1e-5)
        assert set(entered) == {own[name].shape}
        # A function is given what the tap of the input returns, and what replaces that input.
        entering = jnp.sum(own[f"{name}_input"])
        told = Reuse(zeros[name], lambda z, entering=entering: jnp.abs(jnp.sum(z) - entering) < 1e-3)
        np.testing.assert_allclose(output_of(network, params, args, {name: told}), expected, rtol=1e-4, atol=1e-5)
        other = {name: told, f"{name}_input": own[f"{name}_input"] + 1}
        np.testing.assert_allclose(output_of(network, params, args, other), silent, rtol=1e-4, atol=1e-5)
    # Both in a block and the block itself: each tap is what its module gives or is given.
    reuse = {"block_00": zeros["block_00"], "block_00_ffn": Reuse(own["block_00_ffn"], jnp.array(False))}
    _, found = jax.jit(lambda reuse: apply(network, params, *args, taps=names, reuse=reuse))(reuse)
    np.testing.assert_array_equal(found["block_00"], zeros["block_00"])
    np.testing.assert_allclose(found["block_00_attention"], own["block_00_attention"], rtol=1e-5, atol=1e-6)


def test_what_is_replaced_is_not_computed():
    network, spec = build(SMOKE)
    args = SMOKE.input_spec(2, 8, 4)
    value = jax.ShapeDtypeStruct((2, 4, 2, SMOKE.width), jnp.float32)

    def cost(*names):
        given = dict.fromkeys(names, value)
        return count_macs(lambda p, a, r: apply(network, p, *a, reuse=r)[0], spec, args, given)

    whole, tokens, width = cost(), 2 * 8, SMOKE.width
    ffn, attention = 2 * 4 * tokens * width**2, 4 * tokens * width**2 + 2 * tokens * 8 * width
    assert whole - cost("block_01_ffn") == ffn
    assert whole - cost("block_01_attention") == attention
    modulation = 2 * 6 * width**2
    assert whole - cost("block_01") > ffn + attention + modulation  # nothing before it is needed either


def test_the_network_lies_sharded_over_eight_devices_and_computes_the_same():
    network, params, args = tiny()
    output = output_of(network, params, args)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    shardings = tree_shardings(params, SMOKE.rules(), mesh)
    assert not any(s.is_fully_replicated for s in flatten(shardings).values())
    repeated = jax.tree.map(lambda a: np.repeat(a, 4, axis=0), args)
    run = jax.jit(lambda params, *inputs: apply(network, params, *inputs)[0])
    with jax.set_mesh(mesh):
        sharded = run(jax.device_put(params, shardings), *put_batch(repeated, mesh))
    np.testing.assert_allclose(sharded, np.repeat(output, 4, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 7}, "a latent of 7 x 8; both sides must be multiples of 2"),
        ({"latent_channels": 3}, "latent channels 3 given, but the config says 4"),
        ({"time_width": 8}, "time features 8 given"),
        ({"heads": 3}, "pooled width 24 given, but the config says 16"),
        ({"taps": ("block_9",)}, "unknown intermediate block_9; the network has block_00_attention"),
        ({"reuse": {"block_01_ffn": jnp.zeros((2, 8, 16))}}, "intermediate block_01_ffn has shape"),
    ],
)
def test_a_shape_or_tap_that_does_not_fit_is_refused(change, message):
    network, params = build(SMOKE)
    fields = dict(change)
    options = {key: fields.pop(key) for key in ("taps", "reuse") if key in fields}
    height = fields.pop("height", 8)
    args = DiTConfig.preset("smoke", **fields).input_spec(2, height, 8)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params, args: apply(network, params, *args, **options), params, args)


def test_a_config_that_nobody_can_mean_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        DiTConfig(heads=3, head_dim=6)
    with pytest.raises(ValueError, match="base is 0"):
        DiTConfig(base=0)


def test_tokens_become_a_map_by_arrays_of_four_axes():
    tokens = jnp.arange(2 * 12 * 20, dtype=jnp.float32).reshape(2, 12, 20)
    expected = rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=3, p=2, q=2)
    np.testing.assert_array_equal(to_map(tokens, 3, 2), expected)
    steps = jax.make_jaxpr(lambda x: to_map(x, 3, 2))(tokens).eqns
    assert all(len(out.aval.shape) <= 4 for step in steps for out in step.outvars)
