"""The heads judge every depth by its features, the time and the text, and hold no idle parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.networks.module import apply, build
from tests.networks.tiny import drawn, outputs_without_each_leaf

CONFIG = DiscriminatorConfig.preset("smoke")
NETWORK, _ = build(CONFIG)


def random_inputs(batch=3):
    specs, tree = jax.tree.flatten(CONFIG.input_spec(batch, 4, 4))
    generator = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(generator.normal(size=s.shape), jnp.float32) for s in specs])


def test_there_is_a_logit_for_every_cell_of_every_depth():
    features, time, pooled = random_inputs()
    features["down_0"] = jnp.tile(features["down_0"], (1, 2, 2, 1))
    logits = apply(NETWORK, drawn(NETWORK), features, time, pooled)
    assert {tap: x.shape for tap, x in logits.items()} == {"down_0": (3, 8, 8), "mid": (3, 4, 4)}


@pytest.mark.parametrize("permuted", ["features", "time", "pooled"])
def test_the_same_image_is_judged_otherwise_at_another_time_or_with_another_text(permuted):
    given = dict(zip(("features", "time", "pooled"), random_inputs(), strict=True))
    params = drawn(NETWORK)
    before = apply(NETWORK, params, *given.values())
    given[permuted] = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), given[permuted])
    after = apply(NETWORK, params, *given.values())
    for tap in CONFIG.taps:
        assert jnp.abs(after[tap] - before[tap]).max() > 1e-3


def test_every_parameter_changes_the_logits():
    inputs, params = random_inputs(), drawn(NETWORK)

    def logits(params):
        return jnp.concatenate([x.ravel() for x in apply(NETWORK, params, *inputs).values()])

    whole = logits(params)
    for name, without in outputs_without_each_leaf(logits, params).items():
        assert jnp.abs(without - whole).max() > 1e-6, name


def test_features_of_another_trunk_are_refused_with_both_widths():
    features, time, pooled = random_inputs()
    with pytest.raises(ValueError, match=r"'mid': 15.*'mid': 16"):
        apply(NETWORK, drawn(NETWORK), {**features, "mid": features["mid"][..., :15]}, time, pooled)
    with pytest.raises(ValueError, match="2 taps and 1 channels"):
        DiscriminatorConfig.preset("smoke", channels=(8,))
