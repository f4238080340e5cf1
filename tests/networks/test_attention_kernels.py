"""The kernels of attention agree, each where it can run here; and each network gets the kernel of its platform.

cuDNN's kernel runs on NVIDIA GPUs alone. Here its calls are lowered for them, and JAX's own attention computes them in
its place, so that everything around it is exercised: order and number of the keys, padding, shares of devices.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from jax.sharding import NamedSharding, PartitionSpec

from snapgen_jax.config import load_experiment
from snapgen_jax.networks import attention_table, counting
from snapgen_jax.networks.attention import Attention
from snapgen_jax.networks.attention_kernels import Mask, attend_by, causal_bias, key_mask, real_first
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, build, for_platform, stand_in
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes._flow_export import denoiser_unit
from snapgen_jax.training.exits import ConfigError

ON_GPU = jax.default_backend() == "gpu"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Two texts one after the other with padding in between, a whole one, and one of which nothing is left.
MASK = np.array([[1, 1, 0, 0, 1, 1, 1, 0, 0], [1] * 9, [0] * 9], np.float32)


@pytest.fixture
def cudnn_by_jax(monkeypatch):
    """JAX's own attention in the place of cuDNN's; what it was called with is appended to the list."""
    calls, original = [], jax.nn.dot_product_attention

    def instead(q, k, v, *, key_value_seq_lengths=None, implementation):
        assert implementation == "cudnn"
        calls.append((q.shape, k.shape, key_value_seq_lengths is not None))
        return original(q, k, v, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return calls


@pytest.fixture
def cudnn_to_lower(monkeypatch):
    """As if cuDNN were there, so that programs can be lowered for GPUs."""
    if not ON_GPU:
        monkeypatch.setattr(
            fused_attention_stablehlo, "cuda_versions", type("", (), {"cudnn_get_version": lambda: 91000})
        )


def relative_error(given, expected):
    given, expected = (np.asarray(x, np.float64) for x in (given, expected))
    return np.linalg.norm(given - expected) / np.linalg.norm(expected)


def draw(queries, keys, heads, kv_heads, dim, dtype, batch=3):
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def value_and_gradients(kernel, q, k, v, mask=None, **options):
    """Of attention to keys of which `mask` says which count."""

    def loss(q, k, v):
        keys = v.shape[1], *v.shape[2:]
        joined = jnp.concatenate([k, v], axis=-1).reshape(*k.shape[:2], -1)
        counted = None
        if mask is not None:
            joined, real = real_first(kernel, joined, jnp.asarray(mask))
            counted = key_mask(kernel, real)
        k, v = jnp.split(joined.reshape(k.shape[0], *keys[:-1], -1), 2, axis=-1)
        y = attend_by(kernel, q, k, v, counted, **options).astype(jnp.float32)
        return jnp.sum(y**2), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


def assert_agree(given, expected, tolerance):
    for a, b in zip(given, expected, strict=True):
        assert relative_error(a, b) <= tolerance


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "mask"), [(4, None), (2, MASK), (1, MASK)])
def test_the_chunked_kernel_agrees_with_the_whole_one(kv_heads, mask):
    arrays = draw(10, 9, 4, kv_heads, 8, jnp.float32)
    expected = value_and_gradients("whole", *arrays, mask)
    assert_agree(value_and_gradients("chunked", *arrays, mask, chunk=3), expected, TOLERANCE["float32"])


def test_chunked_attention_holds_no_matrix_of_scores():
    q = jax.ShapeDtypeStruct((1, 1030, 2, 8), jnp.float32)
    scores = 1030 * 1030 * 2 * 4

    def memory(kernel):
        loss = jax.grad(lambda q, k, v: jnp.sum(attend_by(kernel, q, k, v, chunk=128)), (0, 1, 2))
        return jax.jit(loss).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert memory("chunked") < scores / 2 < scores <= memory("whole")


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "masked"),
    [((96, 260), 2, 2, 64, False), ((140, 150), 4, 1, 40, True)],
    ids=["cross", "multi-query, masked"],
)
def test_the_flash_kernel_agrees_with_the_others_where_no_tile_is_full(lengths, heads, kv_heads, dim, masked):
    """Interpreted, since it is compiled for TPUs alone."""
    arrays = draw(*lengths, heads, kv_heads, dim, jnp.float32, batch=2)
    mask = np.stack([np.arange(lengths[1]) % 50 < 30, np.zeros(lengths[1])]).astype(np.float32) if masked else None
    with force_tpu_interpret_mode():
        found = value_and_gradients("flash", *arrays, mask)
    # Where no key counts the scores of the whole form have MASKED in them, and four digits less.
    assert_agree(found, value_and_gradients("whole", *arrays, mask), 1e-3 if masked else TOLERANCE["float32"])


@pytest.mark.parametrize(("queries", "keys"), [(64, 9), (65, 65), (128, 128)])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cudnn_is_given_even_numbers_of_tokens_and_how_many_keys_count(cudnn_by_jax, queries, keys, kv_heads):
    arrays = draw(queries, keys, 4, kv_heads, 32, jnp.bfloat16)
    masks = [None] if keys != 9 else [None, MASK]
    for mask in masks:
        cudnn_by_jax.clear()
        found = value_and_gradients("cudnn", *arrays, mask)
        ((q, k, counted),) = cudnn_by_jax
        assert q[1] == queries + queries % 2 and k[1] == keys + keys % 2 and k[2] == kv_heads, "as many heads as given"
        assert counted == (keys != 128)
        assert_agree(found, value_and_gradients("whole", *arrays, mask), TOLERANCE["bfloat16"])


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("queries", "keys"), [(64, 9), (333, 333), (256, 64), (1024, 128)])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_cudnn_kernel_agrees_with_the_others(queries, keys, kv_heads):
    arrays = draw(queries, keys, 4, kv_heads, 64, jnp.bfloat16)
    for mask in [None] if keys != 9 else [None, MASK]:
        found, expected = (value_and_gradients(kernel, *arrays, mask) for kernel in ("cudnn", "whole"))
        assert_agree(found, expected, TOLERANCE["bfloat16"])


def test_keys_that_count_come_first_in_their_order_and_only_for_a_kernel_that_counts_them():
    states = jnp.arange(27.0).reshape(3, 9, 1)
    ordered, mask = real_first("cudnn", states, jnp.asarray(MASK))
    np.testing.assert_array_equal(ordered[0, :, 0], [0, 1, 4, 5, 6, 2, 3, 7, 8])
    np.testing.assert_array_equal(mask[0], [1, 1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(ordered[1:], states[1:])
    np.testing.assert_array_equal(key_mask("cudnn", mask).lengths, [5, 9, 9])
    for kernel in ("whole", "chunked", "flash"):
        assert real_first(kernel, states, mask) == (states, mask)
        assert key_mask(kernel, mask).lengths is None


# --- networks --------------------------------------------------------------------------------------------------------

ONE_STAGE = {
    "self_attention": (True,),
    "cross_attention": (True,),
    "down_depth": (1,),
    "up_depth": (0,),
    "mid_depth": 0,
}
NETWORKS = {
    "unet": UNetConfig.preset("smoke", channels=(16,), head_dim=8, remat="attention", **ONE_STAGE),
    "mmdit": MMDiTConfig.preset("smoke", text_mask="attend", depth=2, position_size=16),
}


def inputs_of(config):
    def like(i, spec):
        return jax.random.normal(jax.random.key(i), spec.shape)

    leaves, tree = jax.tree.flatten(config.input_spec(3, 16, 16, 9))
    x, time, context = jax.tree.unflatten(tree, [like(i, leaf) for i, leaf in enumerate(leaves)])
    return x, time, TextContext(context.sequence, jnp.asarray(MASK), context.pooled)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_by_cudnn_what_it_computes_by_whole_scores(name, cudnn_by_jax, quick_to_compile):
    """Its output, and the gradient of the text states."""
    config, found = for_platform(NETWORKS[name], "gpu"), {}
    x, time, context = inputs_of(config)
    for kernel in ("whole", "cudnn"):
        network, _ = build(dataclasses.replace(config, attention=kernel))
        params = jax.tree.map(lambda leaf: leaf + 0.05, stand_in(network, seed=3))

        def output(sequence, params, network=network):
            v = apply(network, params, x, time, dataclasses.replace(context, sequence=sequence))[0]
            return jnp.sum(jnp.sin(v)), v

        found[kernel] = jax.jit(jax.grad(output, has_aux=True))(context.sequence, params)
    assert cudnn_by_jax, "some call is taken"
    assert_agree(found["cudnn"], found["whole"], TOLERANCE["bfloat16"])


def test_the_blocks_of_stable_diffusion_are_told_which_text_counts():
    config = for_platform(SDUNetConfig.preset("smoke", text_mask="attend"), "gpu")
    network, spec = build(config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec)
    _, time, context = inputs_of(config)
    found = apply(network, params, time, context, method="condition")
    np.testing.assert_array_equal(found.mask.lengths, [5, 9, 9])
    ordered = np.asarray(context.sequence)[0, [0, 1, 4, 5, 6, 2, 3, 7, 8]]
    np.testing.assert_array_equal(found.states[0], ordered.astype(jnp.bfloat16))


def lower_for_gpu(config, batch, side, tokens, gradient=True):
    network, spec = build(config)

    def loss(params, *inputs):
        return jnp.sum(apply(network, params, *inputs)[0])

    function = jax.jit(jax.grad(loss) if gradient else loss)
    traced = function.trace(spec, *config.input_spec(batch, side, side, tokens))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def calls_of(text):
    return collections.Counter(re.findall(r"custom_call @([\w$.]+)", text))


def test_the_full_size_unet_forms_no_scores_on_a_gpu(cudnn_to_lower):
    """Each of its 36 blocks attends to the text, and the 24 of the lowest resolution to themselves."""
    text = lower_for_gpu(for_platform(UNetConfig.preset("t2i"), "gpu"), batch=4, side=32, tokens=333)
    assert calls_of(text) == {"__cudnn$fmhaSoftmax": 60, "__cudnn$fmhaSoftmaxBackward": 60}
    for heads, queries in ((4, 1024), (8, 256), (14, 64)):
        for keys in (333, 334, queries):
            assert not re.search(f"<4x{heads}x{queries}x{keys}xf32>", text)
    q, k = (jax.ShapeDtypeStruct((4, n, heads, 64), jnp.bfloat16) for n, heads in ((64, 14), (333, 1)))
    whole = jax.jit(functools.partial(attend_by, "whole")).lower(q, k, k).as_text()
    assert re.search("<4x14x64x333xf32>", whole), "the search finds scores where they are"


@pytest.mark.parametrize(("remat", "forward"), [("none", 2), ("products", 2), ("attention", 2), ("blocks", 4)])
def test_what_attention_made_is_not_made_again_where_it_is_kept(cudnn_to_lower, remat, forward):
    config = for_platform(dataclasses.replace(NETWORKS["unet"], remat=remat), "gpu")
    calls = calls_of(lower_for_gpu(config, batch=2, side=8, tokens=6))
    assert calls == {"__cudnn$fmhaSoftmax": forward, "__cudnn$fmhaSoftmaxBackward": 2}


@pytest.mark.skipif(ON_GPU, reason="cuDNN is there")
def test_shapes_of_a_network_for_gpus_are_known_without_cudnn():
    network, spec = build(for_platform(NETWORKS["unet"], "gpu"))
    assert network.config.attention == "cudnn"
    inputs = network.config.input_spec(2, 8, 8, 6)
    found = jax.eval_shape(lambda params, *inputs: apply(network, params, *inputs)[0], spec, *inputs)
    assert found.shape == inputs[0].shape


def test_calls_that_cudnn_does_not_take_run_by_whole_scores(cudnn_to_lower):
    """Heads of 4 are too narrow; 8 x 8 pixels are a tile, and 4 x 4 are not."""

    def calls(side, **changes):
        config = for_platform(dataclasses.replace(NETWORKS["unet"], **changes), "gpu")
        return calls_of(lower_for_gpu(config, batch=2, side=side, tokens=6, gradient=False))

    assert calls(side=8) == {"__cudnn$fmhaSoftmax": 2}, "to itself and to the text"
    assert not calls(side=4) and not calls(side=8, head_dim=4)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["multi-head", "multi-query"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_each_device_runs_a_kernel_on_its_share_of_the_batch_and_of_the_heads(heads, tensor, cudnn_to_lower):
    q, k = (jax.ShapeDtypeStruct((8, 128, n, 64), jnp.bfloat16) for n in heads)
    mask = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def attention(kernel, q, k, mask):
        return attend_by(kernel, q, k, k, key_mask(kernel, mask))

    with jax.set_mesh(make_mesh(MeshConfig(data=8 // tensor // 2, fsdp=2, tensor=tensor))):
        for kernel in ("cudnn", "flash"):
            program = jax.make_jaxpr(functools.partial(attention, kernel))(q, k, mask)
            (on_all,) = [equation for equation in program.eqns if equation.primitive.name == "shard_map"]
            shape = (tensor, 128, 4 // tensor, 64)
            assert on_all.params["jaxpr"].out_avals[0].shape == shape
        traced = jax.jit(functools.partial(attention, "cudnn")).trace(q, k, mask)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (operands,) = re.findall(r"custom_call @__cudnn\$fmhaSoftmax.*? : \((.*?)\) ->", text)
    keys = f"{tensor}x128x{1 if heads[1] == 1 else 4 // tensor}x64xbf16"
    assert operands.startswith(f"tensor<{tensor}x128x{4 // tensor}x64xbf16>, tensor<{keys}>, tensor<{keys}>, ")


def test_ordering_the_keys_moves_nothing_between_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    states, mask = (jax.ShapeDtypeStruct((8, *rest), jnp.float32, sharding=split) for rest in ((9, 16), (9,)))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda states, mask: jnp.sum(real_first("cudnn", states, mask)[0] ** 2)))
        text = gradient.lower(states, mask).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


# --- choice ----------------------------------------------------------------------------------------------------------


def test_the_platform_and_the_dtype_fix_the_kernel():
    def chosen(platform, **changes):
        return for_platform(UNetConfig.preset("smoke", **changes), platform).attention

    assert [chosen(platform) for platform in ("cpu", "gpu", "tpu")] == ["whole", "cudnn", "whole"]
    assert chosen("gpu", dtype="float32") == "whole"
    assert chosen("cpu", dtype="bfloat16") == "whole"
    assert chosen("tpu", attention="flash") == "flash" and chosen("gpu", attention="chunked") == "chunked"
    for config in (MMDiTConfig.preset("smoke"), DiTConfig.preset("smoke"), SDUNetConfig.preset("smoke")):
        assert config.attention == "auto" and for_platform(config, "gpu").attention == "cudnn"
    assert attention_table.kernel_of(UNetConfig.preset("smoke")) == "whole"
    assert for_platform(ClipTextConfig(attention="full"), "gpu").attention == "full", "which names no kernel"


def test_a_run_goes_on_where_its_kernel_does_not_run():
    named = UNetConfig.preset("smoke", attention="flash")
    assert for_platform(named, "cpu").attention == "whole" and for_platform(named, "gpu").attention == "cudnn"
    assert for_platform(UNetConfig.preset("smoke", attention="cudnn", dtype="float32"), "gpu").attention == "whole"


@pytest.mark.parametrize(("capability", "kernel"), [("9.0", "cudnn"), ("7.5", "whole"), ("gfx942", "whole")])
def test_a_card_without_cudnn_attention_gets_whole_scores(capability, kernel, monkeypatch):
    card = type("Card", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert for_platform(UNetConfig.preset("smoke"), "gpu").attention == kernel


QUICKSTART = "configs/shapes/quickstart.py"


@pytest.mark.parametrize(
    ("changes", "platform", "message"),
    [
        (
            ["network.attention=cudnn"],
            "cpu",
            'network.attention="cudnn" runs on NVIDIA GPUs, and this is for the platform "cpu"; set attention="auto", '
            'which is "whole" there',
        ),
        (["network.attention=flash"], "gpu", 'runs on TPUs, and this is for the platform "gpu"; .*"cudnn" there'),
        (
            ["network.attention=cudnn", "network.dtype=float32"],
            "gpu",
            'network.attention="cudnn" computes in bfloat16 or float16, and the dtype is float32; set dtype="bfloat16"',
        ),
    ],
)
def test_a_kernel_that_a_new_run_names_must_run_there(changes, platform, message):
    resolved = load_experiment(QUICKSTART, changes)
    with pytest.raises(ConfigError, match=message):
        resolved.start(platform)
    assert resolved.build("cpu").denoiser.network.config.attention == "whole", "a run that exists is drawn from"


@pytest.mark.parametrize("network", ["unet", "mmdit"])
def test_an_exported_denoiser_holds_the_einsum_whatever_it_was_trained_by(network):
    def text(**changes):
        config = dataclasses.replace(NETWORKS[network], **changes)
        spec, (_, _, context) = build(config)[1], config.input_spec(1, 8, 8, 6)
        unit = denoiser_unit("unet", config, (8, 8, config.latent_channels), context)
        return jax.jit(unit.function).lower({"unet": spec}, **unit.inputs).as_text()

    plain = text()
    assert "custom_call" not in plain
    for kernel in ("cudnn", "flash", "chunked"):
        assert text(attention=kernel, dtype="bfloat16") == plain


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["unet", "mmdit"])
def test_multiply_adds_do_not_depend_on_the_kernel(network):
    config = NETWORKS[network]
    sizes = {
        kernel: counting.size(dataclasses.replace(config, attention=kernel), config.input_spec(1, 16, 16, 9))
        for kernel in ("auto", *attention_table.KERNELS)
    }
    assert len(set(sizes.values())) == 1


def test_products_that_a_kernel_hides_are_not_counted_as_none(cudnn_to_lower):
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    for kernel in ("cudnn", "flash"):
        with pytest.raises(ValueError, match=r'inside a kernel .* count with attention="whole"'):
            counting.count_macs(lambda q, kernel=kernel: attend_by(kernel, q, q, q), q)


def test_a_causal_bias_is_taken_by_whole_scores_alone():
    x = jax.random.normal(jax.random.key(0), (2, 70, 16))
    layers = [Attention(16, 2, 8, kernel=kernel, rngs=nnx.Rngs(0)) for kernel in ("whole", "chunked")]
    a, b = (layer(x, mask=Mask(causal_bias(70))) for layer in layers)
    np.testing.assert_array_equal(a, b)
