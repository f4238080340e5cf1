"""What the backward pass of the UNet finds computed is a matter of memory: no value and no gradient depends on it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.residuals import RESULT, kept, kept_by
from snapgen_jax.networks.module import apply, build, flatten, for_platform
from snapgen_jax.networks.unet import UNetConfig
from tests.networks.tiny import drawn, inputs

pytestmark = pytest.mark.usefixtures("quick_to_compile")
ONE_STAGE = {
    "channels": (8,),
    "down_depth": (1,),
    "mid_depth": 0,
    "up_depth": (0,),
    "self_attention": (True,),
    "cross_attention": (True,),
    "pooled_width": None,
}
CONFIG = for_platform(UNetConfig.preset("smoke", **ONE_STAGE), "cpu")
REMATS = ("none", "products", "attention", "blocks")


def network_of(remat, config=CONFIG):
    return build(dataclasses.replace(config, remat=remat))[0]


@pytest.mark.parametrize(("depthwise", "remats"), [("shifted", REMATS[:2]), ("grouped", REMATS)], ids=["cpu", "phone"])
def test_remembering_less_changes_no_gradient_and_holds_fewer_bytes(depthwise, remats):
    config = dataclasses.replace(CONFIG, depthwise=depthwise)
    params, args = drawn(network_of("none", config)), inputs(config)
    gradients, held = {}, {}
    for remat in remats:
        network = network_of(remat, config)

        def loss(params, network=network):
            return jnp.square(apply(network, params, *args)[0]).sum()

        gradients[remat] = flatten(jax.jit(jax.grad(loss))(params))
        for name, leaf in gradients[remat].items():
            np.testing.assert_allclose(leaf, gradients["none"][name], rtol=2e-4, atol=2e-4, err_msg=str(name))
        held[remat] = sum(kept(loss, params).values())
    assert held["products"] < 0.5 * held["none"]
    assert [held[remat] for remat in remats] == sorted(held.values(), reverse=True), held


def test_computing_again_what_products_leave_gives_the_same_second_derivatives():
    """A gradient penalty differentiates the network twice."""
    config = dataclasses.replace(CONFIG, self_attention=(False,))
    params, (x, *rest) = drawn(network_of("none", config)), inputs(config)

    def penalty(params, remat):
        network = network_of(remat, config)
        gradient = jax.grad(lambda x: jnp.square(apply(network, params, x, *rest)[0]).sum())(x)
        return jnp.square(gradient).sum()

    expected, again = (flatten(jax.jit(jax.grad(penalty), static_argnums=1)(params, r)) for r in ("none", "products"))
    assert all(bool(jnp.any(expected[path])) for path in expected if path[0] == "down")
    for path, leaf in again.items():
        assert jnp.linalg.norm(leaf - expected[path]) <= 1e-4 * jnp.linalg.norm(expected[path]), path


def test_the_value_is_computed_by_the_same_operations_whatever_is_remembered():
    """So that an export of a run holds the same operators, in the same order; constants are spread elsewhere."""
    spec, args, found = build(CONFIG)[1], CONFIG.input_spec(), {}
    for remat in REMATS:
        network = network_of(remat)
        text = jax.jit(lambda params, args, n=network: apply(n, params, *args)[0]).lower(spec, args).as_text()
        found[remat] = [
            op for op in re.findall(r"stablehlo\.(\w+)", text) if op not in ("constant", "broadcast_in_dim")
        ]
    assert found["none"].count("dot_general") > 10
    assert all(operations == found["none"] for operations in found.values())


def test_products_are_kept_in_the_compute_dtype_and_are_a_quarter_of_all():
    """Bytes an image of the shapes network at 256 px. Nothing of the size of an image is kept in float32."""
    found = {
        remat: kept_by(for_platform(UNetConfig.preset("shapes", remat=remat), "tpu"), 256, 4)
        for remat in ("none", "products")
    }
    none, products = (sum(by_dtype.values()) for by_dtype in found.values())
    assert products < 0.25 * none, found
    assert found["products"]["float32"] < 0.001 * products < found["none"]["float32"], found


def test_the_full_network_keeps_what_the_stored_table_says():
    (stored,) = (
        record
        for record in json.loads(RESULT.read_text())["kept"]
        if (record["pixels"], record["remat"]) == (1024, "products")
    )
    config = for_platform(UNetConfig.preset("t2i", remat="products"), "tpu")
    assert sum(kept_by(config, 1024, 1).values()) <= stored["bytes"]
