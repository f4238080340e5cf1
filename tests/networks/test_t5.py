"""The T5 encoder is that of transformers, at every layer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build, count_parameters, flatten, init, unflatten
from snapgen_jax.networks.t5 import T5Config, distance_buckets
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import t5 as maps
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, published_shapes, relative_error


def assert_equals_reference(network, params, example, tolerance):
    """`example`: tokens, mask, the states with and without the mask, and those after every layer."""
    depth = network.config.layers
    run = jax.jit(lambda params, tokens, mask: apply(network, params, tokens, mask, method="states", taps=range(depth)))
    states, found = run(params, example["tokens"], example["mask"])
    assert states.dtype == jnp.float32
    for layer in range(depth):
        assert relative_error(found[layer], example[f"layer_{layer:02d}"]) <= tolerance, layer
    assert relative_error(states, example["states"]) <= tolerance
    unmasked = jax.jit(lambda params, tokens: apply(network, params, tokens).sequence)(params, example["tokens"])
    assert relative_error(unmasked, example["unmasked"]) <= tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["whole", "padded"])
def test_every_layer_equals_what_transformers_computed_with_and_without_a_mask(case, dtype):
    example = np.load(GOLDENS / "t5" / f"{case}.npz")
    assert (relative_error(example["unmasked"], example["states"]) > 0.01) == (case == "padded")
    assert_equals_reference(*load_checkpoint(GOLDENS / "t5", maps, dtype=dtype), example, TOLERANCE[dtype])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "lengths", "padded"),
    [
        ({"num_layers": 1}, (1, 1), 1),
        ({"num_layers": 5, "d_kv": 4, "num_heads": 7}, (150, 20, 3), 150),
        ({"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}, (200,), 200),
    ],
)
def test_live_checkpoints_of_transformers_load_and_run_alike(changes, lengths, padded, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import t5 as oracle

    model = oracle.make(seed=7, **changes)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    example = oracle.run(model, lengths, padded, seed=8)
    for dtype, tolerance in TOLERANCE.items():
        assert_equals_reference(*load_checkpoint(tmp_path, maps, dtype=dtype), example, tolerance)


@pytest.mark.oracle
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (20, 100)])
def test_distances_fall_into_the_buckets_of_transformers(buckets, max_distance):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(700)[None, :] - torch.arange(700)[:, None]
    theirs = T5Attention._relative_position_bucket(distance, True, buckets, max_distance).numpy()
    np.testing.assert_array_equal(distance_buckets(700, buckets, max_distance), theirs)


def test_distances_share_buckets_that_grow_until_the_largest_distance():
    row = distance_buckets(300, 32, 128)[0]
    assert list(row[:9]) == [0, *range(17, 25)]  # one bucket for each distance below 8
    assert row[127] == row[299] == 31
    assert (np.diff(row) >= 0).all()
    assert distance_buckets(300, 32, 128)[299, 0] == 15


def test_padding_changes_no_state_before_it_and_is_read_where_no_mask_is_given():
    network, _ = build(T5Config.preset("smoke"))
    tokens, mask = jnp.array([[5, 6, 7, 0, 0]]), jnp.array([[1.0, 1, 1, 0, 0]])

    @jax.jit
    def run(params):
        return (
            apply(network, params, tokens[:, :3], mask[:, :3]),
            apply(network, params, tokens, mask),
            apply(network, params, tokens),
        )

    short, long, unmasked = run(jax.jit(init, static_argnums=0)(network, jax.random.key(0)))
    np.testing.assert_allclose(long.sequence[:, :3], short.sequence, atol=1e-5)
    assert not np.allclose(unmasked.sequence[:, :3], short.sequence, atol=1e-3)
    assert long.pooled.shape == (1, 0)
    np.testing.assert_array_equal(long.mask, mask)
    np.testing.assert_array_equal(unmasked.mask, np.ones((1, 5)))


def test_zeroing_any_parameter_changes_the_states():
    network, _ = build(T5Config.preset("smoke"))
    params = jax.jit(init, static_argnums=0)(network, jax.random.key(0))
    run = jax.jit(lambda params: apply(network, params, jnp.array([[3, 1, 4, 1, 5]])).sequence)
    states, flat = run(params), flatten(params)
    for path, leaf in flat.items():
        changed = run(unflatten({**flat, path: jnp.zeros_like(leaf)}))
        assert not jnp.array_equal(states, changed), path


def test_the_full_size_encoder_expects_the_published_tensors():
    config = T5Config.preset("xxl")
    _, spec = build(config)
    assert count_parameters(spec) == 4_762_310_656
    published = published_shapes("t5")
    shared = published.pop("encoder.embed_tokens.weight")  # the same tensor under a second name
    assert shared == published["shared.weight"]
    assert reference_shapes(maps.weight_map(config), spec) == published


def test_a_sharded_encoder_on_eight_devices_gives_the_same_states():
    network, params = load_checkpoint(GOLDENS / "t5", maps)
    example = np.load(GOLDENS / "t5" / "padded.npz")
    tokens, mask = (np.tile(example[name], (4, 1)) for name in ("tokens", "mask"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = jax.device_put(params, tree_shardings(params, network.config.rules(), mesh))
    with jax.set_mesh(mesh):
        states = jax.jit(lambda *args: apply(network, *args).sequence)(params, *put_batch((tokens, mask), mesh))
    assert states.addressable_shards[0].data.shape[0] == 1
    real = mask == 1
    assert relative_error(np.asarray(states)[real], np.tile(example["states"], (4, 1, 1))[real]) <= 1e-5


def test_the_full_size_encoder_is_split_over_eight_devices():
    network, spec = build(T5Config.preset("xxl"))
    shardings = tree_shardings(spec, network.config.rules(), make_mesh(MeshConfig(data=1, fsdp=8)))
    for path, leaf in flatten(spec).items():
        if leaf.size > 100_000:
            assert np.prod(flatten(shardings)[path].shard_shape(leaf.shape)) * 8 == leaf.size, path


def test_a_t5_without_gates_is_refused():
    values = json.loads((GOLDENS / "t5" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"feed_forward_proj = 'relu'.*T5 v1\.1"):
        maps.read_config({**values, "feed_forward_proj": "relu"})
