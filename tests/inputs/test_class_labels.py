"""Class labels: what stands for none, and that flow matching learns from them without a line of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import inference_weights, train
from snapgen_jax.export import golden
from snapgen_jax.export.program import parse
from snapgen_jax.generation import Generator
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import flatten, init
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from tests.recipes_for_tests import ONE_STAGE

CLASSES = 10
CONFIG = FlowMatchingConfig(
    batch_size=8,
    train_steps=2,
    network=UNetConfig.preset("smoke", latent_channels=12, **ONE_STAGE),
    inputs=ClassLabelsConfig(
        image_sizes=((8, 8),), codec=CodecConfig(patch=2), label=LabelEmbeddingConfig.preset("smoke")
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
)


def labels(**changes):
    return dataclasses.replace(CONFIG.inputs, **changes).build(8, "cpu")


def batch(seed=0):
    """Pictures of one grey each, which the class tells."""
    label = np.random.default_rng(seed).integers(0, CLASSES, 8).astype(np.int32)
    image = np.broadcast_to((label * 25).astype(np.uint8)[:, None, None, None], (8, 8, 8, 3))
    return {"image": np.ascontiguousarray(image), "label": label}


@pytest.fixture(scope="module")
def networks():
    return {"label": init(labels().networks()["label"], jax.random.key(0))}


def test_a_dropped_label_becomes_the_class_after_the_last(networks):
    kept = {"label": np.arange(8) % 2 == 0}
    told = labels().draw_condition(networks, batch(), jax.random.key(0), kept)
    np.testing.assert_array_equal(told["label"], np.where(kept["label"], batch()["label"], CLASSES))
    everything = labels(label_dropout=1.0).draw_condition(networks, batch(), jax.random.key(0), {})
    np.testing.assert_array_equal(everything["label"], batch()["label"])


def test_the_null_condition_is_the_state_of_that_class(networks):
    made = labels()
    dropped = made.draw_condition(networks, batch(), jax.random.key(0), {"label": np.zeros(8, bool)})
    table = networks["label"]["table"]
    told, null = made.condition(networks, dropped), made.null_condition(networks)
    jax.tree.map(lambda x, none: np.testing.assert_array_equal(x, np.broadcast_to(none, x.shape)), told, null)
    np.testing.assert_array_equal(made.null_condition(networks).pooled[0], table[CLASSES])
    assert table.shape[0] == CLASSES + 1


def test_labels_are_dropped_at_the_given_rate():
    kept = labels(label_dropout=0.25).draw_kept(jax.random.key(0), 4096)["label"]
    assert abs(1 - np.asarray(kept).mean() - 0.25) < 0.03


def test_flow_matching_trains_on_labels_and_draws_from_them():
    made = FlowMatching(CONFIG, "cpu")
    assert made.trains == {"model": ("unet", "label")} and not made.tokenizers()
    state = train(made, (batch(n) for n in range(9)), steps=2, quiet=True)
    fresh, trained = (flatten(s.players["model"].params) for s in (jax.jit(made.init)(key(0, 0, "init")), state))
    assert not np.array_equal(fresh["unet", "conv_out", "kernel"], trained["unet", "conv_out", "kernel"])
    assert not np.array_equal(fresh["label", "table"], trained["label", "table"])
    generator = Generator(made, inference_weights(state), {}, None)
    assert not generator.takes_prompts and generator.condition_names == ("label",)
    images = generator.generate(conditions={"label": [3, 7, 3]}, indices=[0, 0, 1], steps=2, guidance=2.0)
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8


def test_a_class_has_a_say_in_the_picture():
    made = FlowMatching(CONFIG, "cpu")
    params = {
        "model": jax.tree.map(
            lambda s: 0.3 * jnp.cos(jnp.arange(s.size, dtype=s.dtype)).reshape(s.shape),
            jax.eval_shape(made.init, key(0, 0, "init")).players["model"].params,
        )
    }
    latent = Generator(made, params, {}, None).run(
        conditions={"label": [3, 7, 3]}, indices=[0, 0, 0], steps=2, guidance=2.0
    )["latent"]
    assert not np.allclose(latent[0], latent[1], atol=1e-5)
    np.testing.assert_allclose(latent[0], latent[2], atol=1e-5)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class_is_refused_in_training_and_when_drawing(label):
    made, message = FlowMatching(CONFIG, "cpu"), f"label {label} is no class: there are {CLASSES}, from 0 to 9;"
    wrong = batch() | {"label": np.full(8, label, np.int32)}
    with pytest.raises(ConfigError, match=message):
        train(made, [wrong], steps=1, quiet=True)
    with pytest.raises(ConfigError, match=message):
        Generator(made, {}, {}, None).generate(conditions={"label": [3, label]})


def test_a_bundle_of_labels_has_examples_of_them():
    plan = FlowMatching(CONFIG, "cpu").exports()
    inputs, noise = golden.begin(parse(plan.program), plan.golden, None)
    np.testing.assert_array_equal(inputs["label"], [0, 1])
    assert noise is not None and len(noise) == 2


def test_an_embedding_of_another_width_than_the_network_attends_to_is_refused():
    inputs = dataclasses.replace(CONFIG.inputs, label=LabelEmbeddingConfig.preset("smoke", width=20))
    with pytest.raises(
        ValueError, match=r"the context is 20 wide, but network.context_width is 16; .*, or change inputs.label"
    ):
        FlowMatching(dataclasses.replace(CONFIG, inputs=inputs), "cpu")
