"""The Gemma 2 encoder is that of transformers, at every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, init, unflatten
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import gemma2 as maps
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, published_shapes, relative_error


def assert_equals_reference(network, params, example, tolerance):
    """`example`: tokens, mask, the last states and those after every layer. States of padding are not compared."""
    depth, real = network.config.layers, example["mask"] == 1
    run = jax.jit(lambda params, tokens, mask: apply(network, params, tokens, mask, method="states", taps=range(depth)))
    states, found = run(params, example["tokens"], example["mask"])
    assert states.dtype == jnp.float32
    for layer in range(depth):
        assert relative_error(found[layer][real], example[f"layer_{layer:02d}"][real]) <= tolerance, layer
    assert relative_error(states[real], example["states"][real]) <= tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["short", "long"])
def test_every_layer_equals_what_transformers_computed_within_and_beyond_the_window(case, dtype):
    example = np.load(GOLDENS / "gemma2" / f"{case}.npz")
    network, params = load_checkpoint(GOLDENS / "gemma2", maps, dtype=dtype)
    assert (example["tokens"].shape[1] > network.config.window) == (case == "long")
    assert_equals_reference(network, params, example, TOLERANCE[dtype])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "lengths", "padded"),
    [
        ({"num_hidden_layers": 1, "query_pre_attn_scalar": 8}, (1, 1), 1),
        ({"num_hidden_layers": 6, "num_key_value_heads": 1}, (40, 9, 3), 40),
        ({"num_key_value_heads": 4, "sliding_window": 9, "attn_logit_softcapping": 50.0}, (33,), 33),
    ],
)
def test_live_checkpoints_of_transformers_load_and_run_alike(changes, lengths, padded, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import gemma2 as oracle

    model = oracle.make(seed=7, **changes)
    example = oracle.run(model, lengths, padded, seed=8)
    for name, part in (("whole", model), ("body", model.model)):  # names with and without the prefix
        part.save_pretrained(tmp_path / name, max_shard_size="20KB")
        for dtype, tolerance in TOLERANCE.items():
            assert_equals_reference(*load_checkpoint(tmp_path / name, maps, dtype=dtype), example, tolerance)


def test_a_state_knows_its_own_token_and_those_before_it_only():
    network, _ = build(Gemma2Config.preset("smoke"))
    tokens = jnp.array([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 20, 10, 11]])
    states, changed = jax.jit(lambda params: apply(network, params, tokens).sequence)(
        jax.jit(init, static_argnums=0)(network, jax.random.key(0))
    )
    np.testing.assert_allclose(changed[:4], states[:4], atol=1e-6)
    assert (jnp.abs(changed[4:] - states[4:]).max(axis=-1) > 1e-4).all()


def test_pooled_is_the_state_of_the_last_token_before_the_padding():
    network, _ = build(Gemma2Config.preset("smoke"))
    tokens, mask = jnp.array([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]]), jnp.array([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    run = jax.jit(lambda params: (apply(network, params, tokens, mask), apply(network, params, tokens)))
    context, whole = run(jax.jit(init, static_argnums=0)(network, jax.random.key(0)))
    np.testing.assert_array_equal(context.pooled, jnp.stack([context.sequence[0, 2], context.sequence[1, 4]]))
    np.testing.assert_allclose(context.sequence[0, :3], context.sequence[1, :3], atol=1e-6)
    np.testing.assert_array_equal(whole.pooled, whole.sequence[:, 4])


def test_zeroing_any_parameter_changes_the_states():
    network, spec = build(Gemma2Config.preset("smoke"))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.3 * random.standard_normal(s.shape, np.float32), spec)  # fresh norms hold zeros
    run = jax.jit(lambda params: apply(network, params, jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])).sequence)
    states, flat = run(params), flatten(params)
    for path, leaf in flat.items():
        changed = run(unflatten({**flat, path: jnp.zeros_like(leaf)}))
        assert not jnp.array_equal(states, changed), path


def test_the_full_size_encoder_expects_the_published_tensors():
    config = Gemma2Config.preset("gemma2_2b")
    _, spec = build(config)
    assert count_parameters(spec) == 2_614_341_888
    published = published_shapes("gemma2")
    assert reference_shapes(maps.weight_map(config), spec) == published


def test_a_sharded_encoder_on_eight_devices_gives_the_same_states():
    network, params = load_checkpoint(GOLDENS / "gemma2", maps)
    example = np.load(GOLDENS / "gemma2" / "long.npz")
    tokens, mask = (np.tile(example[name], (4, 1)) for name in ("tokens", "mask"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = jax.device_put(params, tree_shardings(params, network.config.rules(), mesh))
    with jax.set_mesh(mesh):
        states = jax.jit(lambda *args: apply(network, *args).sequence)(params, *put_batch((tokens, mask), mesh))
    assert states.addressable_shards[0].data.shape[0] == 1
    real = mask == 1
    assert relative_error(np.asarray(states)[real], np.tile(example["states"], (4, 1, 1))[real]) <= 1e-5


def test_the_full_size_encoder_is_split_over_eight_devices():
    network, spec = build(Gemma2Config.preset("gemma2_2b"))
    shardings = tree_shardings(spec, network.config.rules(), make_mesh(MeshConfig(data=1, fsdp=8)))
    for path, leaf in flatten(spec).items():
        if leaf.size > 100_000:
            assert np.prod(flatten(shardings)[path].shard_shape(leaf.shape)) * 8 == leaf.size, path


def test_the_published_config_file_is_the_preset_and_other_kinds_are_refused():
    published = {  # the fields of google/gemma-2-2b, in the form of the transformers that wrote it
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    }
    assert maps.read_config(published, query_scale=None) == Gemma2Config.preset("gemma2_2b")
    with pytest.raises(ValueError, match="model_type = 'gemma3'"):
        maps.read_config({**published, "model_type": "gemma3"})
    with pytest.raises(ValueError, match="layer_types"):
        maps.read_config({**published, "layer_types": ["full_attention"] * 26})
