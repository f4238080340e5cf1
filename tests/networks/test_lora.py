"""Low-rank adapters: merged they compute what they compute beside the weight, and at first nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.lora import LoraConfig, adapted, adapter_shapes, init_adapters, kind_of, merge
from snapgen_jax.networks.module import flatten, unflatten

LINEAR, STACK, CONV, EMBEDDING = ("a", "kernel"), ("b", "kernel"), ("c", "kernel"), ("token_embedding",)
SHAPES = {LINEAR: (6, 5), STACK: (3, 6, 5), CONV: (3, 3, 6, 5), EMBEDDING: (9, 5), ("norm", "scale"): (6,)}
SPEC = {"net": unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()})}
LORA = LoraConfig(rank=2, alpha=3.0, targets=("",))


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


WEIGHTS = {"net": unflatten({path: normal(shape, i) for i, (path, shape) in enumerate(SHAPES.items())})}
ADAPTERS = jax.tree.map(lambda x: normal(x.shape, x.size), init_adapters(LORA, SPEC, jax.random.key(0)))


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def beside(path, a, b):
    """What an input, the same for weight and adapter, becomes by the weight and by the adapter beside it."""
    w, shape = flatten(WEIGHTS)["net", *path], SHAPES[path]
    if path == EMBEDDING:
        ids = jnp.array([0, 3, 8, 3])
        return w[ids] + LORA.scale * a.T[ids] @ b.T, lambda merged: merged[ids]
    if path == CONV:
        x = normal((2, 4, 4, 6), 77)
        low = convolve(x, a.transpose(2, 3, 1, 0))
        return convolve(x, w) + LORA.scale * low @ b[:, :, 0, 0].T, lambda merged: convolve(x, merged)
    x = normal((*shape[:-2], 4, 6), 77)
    unmerged = x @ w + LORA.scale * (x @ a.swapaxes(-1, -2)) @ b.swapaxes(-1, -2)
    return unmerged, lambda merged: x @ merged


@pytest.mark.parametrize("path", [LINEAR, STACK, CONV, EMBEDDING], ids="/".join)
def test_merged_equals_unmerged(path):
    merged, small = flatten(merge(WEIGHTS, ADAPTERS, LORA.scale)["net"]), flatten(ADAPTERS["net"])
    with jax.default_matmul_precision("highest"):
        unmerged, through = beside(path, small[*path, "lora_A"], small[*path, "lora_B"])
        given = through(merged[path])
    assert float(jnp.linalg.norm(given - unmerged) / jnp.linalg.norm(unmerged)) < 1e-6
    assert float(jnp.linalg.norm(given - through(flatten(WEIGHTS["net"])[path]))) > 1


def test_at_first_they_change_nothing_and_every_one_has_a_gradient():
    adapters = init_adapters(LORA, SPEC, jax.random.key(0))
    merged = merge(WEIGHTS, adapters, LORA.scale)
    jax.tree.map(np.testing.assert_array_equal, merged, WEIGHTS)
    targets = jax.tree.map(lambda x: normal(x.shape, 5), WEIGHTS)

    def loss(adapters):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), merge(WEIGHTS, adapters, 1.0), targets)))

    grads = flatten(jax.grad(loss)(adapters)["net"])
    for path in (LINEAR, STACK, CONV, EMBEDDING):
        moves = [bool(jnp.any(grads[*path, name] != 0)) for name in ("lora_A", "lora_B")]
        assert moves == ([True, False] if path == EMBEDDING else [False, True])  # the one that is zero


def test_frozen_weights_in_bfloat16_keep_small_changes():
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), WEIGHTS)
    merged = merge(frozen, jax.tree.map(lambda x: 1e-3 * x, ADAPTERS), 1.0)["net"]["a"]["kernel"]
    assert merged.dtype == jnp.float32
    assert jnp.all(merged != frozen["net"]["a"]["kernel"].astype(jnp.float32))


def test_only_what_a_target_finds_is_adapted_and_norms_never():
    assert set(adapted(LORA, SPEC)["net"]) == {LINEAR, STACK, CONV, EMBEDDING}
    assert adapted(LoraConfig(targets=("^net/a$", "embedding")), SPEC)["net"] == {LINEAR: (6, 5), EMBEDDING: (9, 5)}
    with pytest.raises(ValueError, match=r"targets: '\^unet/' finds no weight that can be adapted; there are net/a"):
        adapted(LoraConfig(targets=("a", "^unet/")), SPEC)
    assert kind_of(("depthwise", "kernel"), (3, 3, 1, 8)) is None
    with pytest.raises(ValueError, match="cannot be adapted"):
        adapter_shapes(("norm", "scale"), (6,), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0"), ({"targets": ("(",)}, "no regular expression")],
)
def test_a_config_that_nobody_can_mean_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


def test_adapters_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="adapters of 'other', and the networks are net"):
        merge(WEIGHTS, {"other": ADAPTERS["net"]}, 1.0)
    with pytest.raises(ValueError, match="adapter of net/z/kernel, which the network does not have"):
        merge(WEIGHTS, {"net": {"z": ADAPTERS["net"]["a"]}}, 1.0)
    with pytest.raises(ValueError, match=r"adapter of net/a/kernel has the shapes .* a weight of \(6, 5\) takes"):
        merge(WEIGHTS, {"net": {"a": {"kernel": {"lora_A": jnp.ones((2, 7)), "lora_B": jnp.ones((5, 2))}}}}, 1.0)
