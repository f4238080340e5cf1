"""The contract of gates, on every network that they stand in; and a published DiT as what they stand in."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import complete
from snapgen_jax.diffusion.schedules import VPSchedule
from snapgen_jax.generation import load_system
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.lazy_gates import LazyGates, LazyGatesConfig, LazySamplingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.step import make_step
from snapgen_jax.weights.maps import dit as dit_map
from snapgen_jax.weights.maps import sd3_autoencoder
from tests.parity import GOLDENS
from tests.recipes_for_tests import random_like

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BATCH = 3
NETWORKS = {
    "unet": {
        "network": UNetConfig.preset("smoke", latent_channels=12, first_stage="res+tf"),
        "gate": ("attention", "ffn", "residual"),
    },
    "mmdit": {"network": MMDiTConfig.preset("smoke", latent_channels=12, depth=4, patch=1)},
    "dit": {
        "network": DiTConfig.preset("smoke", latent_channels=12, patch=1),
        "prediction": "eps",
        "schedule": VPSchedule.preset("dit"),
        # Of two steps of that schedule the first decides nearly all, and what the second skips is hardly seen.
        "sampling": LazySamplingConfig(steps=4, guidance=2.0),
    },
}
LABELS = np.arange(BATCH, dtype=np.int32)


class Case:
    """A recipe, its random network, and the programs that draw with it."""

    def __init__(self, name):
        label = LabelEmbeddingConfig(classes=4, width=16)
        fields = {
            "batch_size": BATCH,
            "inputs": ClassLabelsConfig(image_sizes=((8, 8),), codec=CodecConfig(patch=2), label=label),
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0),
            "sampling": LazySamplingConfig(steps=2, guidance=2.0),
        }
        self.recipe = LazyGates(LazyGatesConfig(**{**fields, **NETWORKS[name]}), "cpu")
        self.frozen = random_like(self.recipe.frozen_spec(), 1)
        self.state = self.recipe.init(key(0, 0, "init"))
        self.fresh = {"model": self.state.players["model"].params}

    @functools.cache  # noqa: B019  # one for each network, as long as the tests run
    def program(self, lazy):
        options = dataclasses.replace(self.recipe.options, lazy=lazy)

        def generate(params, labels, indices):
            keys = example_keys(jnp.uint32(7), indices)
            return self.recipe.generate(params, self.frozen, {"label": labels}, keys, options)

        return jax.jit(generate)

    def draw(self, params, rows, lazy=None):
        rows = np.asarray(rows)
        return jax.device_get(self.program(lazy)(params, LABELS[rows], rows.astype(np.uint32)))

    def undecided(self):
        """Gates that run about half of the modules, others for each example."""
        generator = np.random.default_rng(0)
        return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), self.fresh)


@functools.cache
def case_of(name):
    return Case(name)


@pytest.fixture(params=NETWORKS)
def case(request):
    return case_of(request.param)


def near(drawn, expected):
    return np.linalg.norm(drawn - expected) <= 2e-5 * np.linalg.norm(expected)


def test_gates_stand_at_every_module_and_are_as_wide_as_what_enters_it(case):
    widths = {m: gate["kernel"].shape for m, gate in case.fresh["model"]["gates"].items()}
    assert set(widths) == set(case.recipe.modules)
    assert {shape[0] for shape in widths.values()} == {len(case.recipe.may_skip)}
    assert {m.rsplit("_", 1)[-1] for m in widths} == set(case.recipe.config.gate)
    if case.recipe.role == "unet":  # an input on the way up is joined with one from the way down
        assert widths["up_1_0_residual"][1] == 32 and widths["up_1_0_block_0_ffn"][1] == 16


def test_fresh_gates_draw_what_the_network_draws_without_them(case):
    drawn, plain = case.draw(case.fresh, range(BATCH)), case.draw(case.fresh, range(BATCH), lazy=0.0)
    assert drawn["ran"].all() and "ran" not in plain
    assert near(drawn["latent"], plain["latent"])


def test_an_example_is_drawn_alike_alone_and_beside_others(case):
    gates = case.undecided()
    together = case.draw(gates, range(BATCH))
    ran, may_skip = together["ran"], case.recipe.may_skip
    assert ran.shape == (BATCH, 2, len(may_skip), len(case.recipe.modules)) and ran[:, :, ~may_skip].all()
    assert 0.2 < ran[:, :, may_skip].mean() < 0.95 and (ran != ran[:1]).any()
    assert not near(together["latent"], case.draw(case.fresh, range(BATCH))["latent"])
    for row in range(BATCH):
        alone = case.draw(gates, [row])
        np.testing.assert_array_equal(alone["ran"][0], ran[row])
        assert near(alone["latent"][0], together["latent"][row])


def test_an_update_changes_the_gates_of_steps_that_may_skip_and_nothing_else(case):
    batch = {"image": np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 3), np.uint8), "label": LABELS}
    state, metrics = jax.jit(make_step(case.recipe, 0))(case.state, case.frozen, batch)
    params = state.players["model"].params
    assert set(params) == {"gates"} and all(bool(jnp.isfinite(x)) for x in jax.tree.leaves(metrics))
    for name, gate in params["gates"].items():
        assert not gate["kernel"][::2].any() and gate["kernel"][1::2].any(), name


# --- a published DiT ---

FOLDER = GOLDENS / "pipeline_dit"


def published(**changes):
    values = {name: json.loads((FOLDER / name / "config.json").read_text()) for name in ("transformer", "vae")}
    codec = CodecConfig(
        kind="autoencoder", autoencoder=sd3_autoencoder.read_config(values["vae"]), workdir=str(FOLDER / "vae")
    )
    label = dit_map.read_label_config(values["transformer"])
    inputs = ClassLabelsConfig(image_sizes=((16, 16),), codec=codec, label=label)
    fields = {
        "network": dit_map.read_config(values["transformer"]),
        "inputs": inputs,
        "prediction": "eps",
        "schedule": VPSchedule.preset("dit"),
        "sampling": LazySamplingConfig(steps=4),
        "base": str(FOLDER / "transformer"),
    }
    return LazyGates(LazyGatesConfig(**{**fields, **changes}), "cpu")


def test_gates_stand_in_a_published_dit_with_its_classes_and_its_autoencoder():
    frozen = published().load_frozen(None)
    config = complete({"system": "dit", "size": "any", "image_size": (16, 16), "steps": 4, "dtype": "float32"})
    expected = load_system(config, FOLDER).params
    for role, part in {"dit": "transformer", "label": "labels", "codec": "autoencoder"}.items():
        jax.tree.map(np.testing.assert_array_equal, frozen[role], expected[part])
    assert set(frozen) == {"dit", "label", "codec"}


def test_a_published_dit_of_another_size_is_refused_by_name():
    network = dataclasses.replace(published().config.network, depth=4)
    with pytest.raises(ConfigError, match=r"transformer_blocks\.3"):
        published(network=network).load_frozen(None)
    inputs = published().config.inputs
    fewer = dataclasses.replace(inputs, label=dataclasses.replace(inputs.label, classes=9))
    with pytest.raises(ConfigError, match=r"class_embedder\.embedding_table"):
        published(inputs=fewer).load_frozen(None)
    with pytest.raises(ConfigError, match=r"of an MMDiT or a UNet alone or of a DiT and its classes: set network.kind"):
        published(network=UNetConfig.preset("smoke", context_width=24, pooled_width=24)).load_frozen(None)
