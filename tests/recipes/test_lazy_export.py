"""Gates on a phone: a bundle in which a static schedule says what runs."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from snapgen_jax.export import verify
from snapgen_jax.export.bundle import export_bundle, generator_of
from snapgen_jax.export.client import Bundle, LiteRTGenerator
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.runtime import AcceleratorError
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.recipes.lazy_gates import LazyGates, LazyGatesConfig, LazySamplingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from tests.export.conftest import QUICK
from tests.recipes_for_tests import random_like

SCHEDULE = "1111,0110,1111,0000,1111,0110"
CONFIG = LazyGatesConfig(
    batch_size=8,
    network=DiTConfig.preset("smoke", latent_channels=12, patch=1, sigma="none", head_dim=32),
    inputs=ClassLabelsConfig(
        image_sizes=((8, 8),), codec=CodecConfig(patch=2), label=LabelEmbeddingConfig(classes=4, width=64)
    ),
    sampling=LazySamplingConfig(steps=6, guidance=2.0, shift=3.0),
)


def lazy(depth=2, **changes):
    sampling = dataclasses.replace(CONFIG.sampling, **changes)
    network = dataclasses.replace(CONFIG.network, depth=depth)
    return LazyGates(dataclasses.replace(CONFIG, sampling=sampling, network=network), "cpu")


@functools.cache
def frozen(depth=2):
    """Small enough for pictures that are not black and white, in which a rounded bit would be seen or not by chance."""
    return jax.tree.map(lambda leaf: 0.4 * leaf, random_like(lazy(depth).frozen_spec(), 1))


def weights_of(recipe):
    return {"model": jax.jit(recipe.init)(key(0, 0, "init")).players["model"].params}


def exported(recipe, params, folder, **options):
    networks = frozen(recipe.config.network.depth)
    reference = generator_of(recipe, params, networks)
    options = {"backend": QUICK, "precisions": ("f32",), **options}
    return export_bundle(recipe, params, networks, None, folder, gpu_check="skip", reference=reference, **options)


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    recipe = lazy(schedule=SCHEDULE)
    return exported(recipe, weights_of(recipe), tmp_path_factory.mktemp("scheduled") / "bundle")


def test_a_schedule_is_a_graph_for_each_mask_in_one_file_of_one_set_of_weights(scheduled, tmp_path):
    program = json.loads((scheduled.folder / "program.json").read_text())
    assert [step.get("unit", "dit") for step in program["steps"]] == ["dit", "dit_1", "dit", "dit_2", "dit", "dit_1"]
    assert set(program["state"]) == {f"block_0{n}_{role}" for n in (0, 1) for role in ("attention", "ffn")}
    manifest = json.loads((scheduled.folder / "manifest.json").read_text())
    assert {unit["files"]["f32"] for name, unit in manifest["units"].items() if "dit" in name} == {"dit_f32.tflite"}
    dense = exported(lazy(lazy=0.0), weights_of(lazy()), tmp_path / "dense")
    size, alone = (report.numbers["export.dit.bytes_f32"] for report in (scheduled, dense))
    assert size < 1.3 * alone
    found = describe(scheduled.folder / "dit_f32.tflite")
    products = [found.histogram_of(name)["FULLY_CONNECTED"] for name in ("dit", "dit_1", "dit_2")]
    assert products == [products[0], products[0] - 6, products[0] - 12]  # attention has four, a feed-forward two
    assert scheduled.numbers["export.bytes_f32"] < size + alone


def test_what_a_graph_passes_on_is_what_the_next_step_reuses(scheduled):
    units = json.loads((scheduled.folder / "manifest.json").read_text())["units"]
    modules = {f"block_0{n}_{role}" for n in (0, 1) for role in ("attention", "ffn")}
    assert set(units["dit"]["outputs"]) == {"prediction", *modules}
    assert set(units["dit_1"]["outputs"]) == {"prediction"}  # the step behind it runs whole
    assert {"block_00_attention", "block_01_ffn"} == {name for name in units["dit_1"]["inputs"] if "block" in name}


def test_the_client_draws_what_jax_draws_by_the_same_schedule_each_time_anew(scheduled):
    assert scheduled.numbers["export.image.max_grey_to_generator"] <= 1
    assert all(check.passed for check in verify.checks(scheduled.folder))
    labels = {"label": np.array([3, 1], np.int32)}
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 12)).astype(np.float32)
    recipe = lazy(schedule=SCHEDULE)
    expected = generator_of(recipe, weights_of(recipe), frozen())(labels, noise)["image"]
    generator = LiteRTGenerator(scheduled.folder)
    first, second = (generator.run(labels, noise=noise)["image"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert verify.grey_levels(first, expected).max() <= 1
    turned = LiteRTGenerator(scheduled.folder, residency="in turn").run(labels, noise=noise)["image"]
    np.testing.assert_array_equal(turned, first)
    plain = generator_of(lazy(lazy=0.0), weights_of(recipe), frozen())(labels, noise)["image"]
    assert verify.grey_levels(first, plain).max() > 1  # skipping is seen


@pytest.fixture(scope="module")
def undecided():
    """Gates that run about half of the modules, other ones for each example."""
    generator = np.random.default_rng(3)
    gates = {
        name: {**gate, "kernel": generator.normal(size=gate["kernel"].shape).astype(np.float32)}
        for name, gate in weights_of(lazy(1))["model"]["gates"].items()
    }
    return {"model": {"gates": gates}}


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory, undecided):
    recipe = lazy(1, halves="separate")
    return exported(recipe, undecided, tmp_path_factory.mktemp("adaptive") / "bundle", backend="jax2tf")


def test_gates_decide_in_one_graph_with_a_branch_for_each_module(adaptive):
    found = describe(adaptive.folder / "dit_f32.tflite")
    assert list(found.graphs) == ["dit"] and found.histogram["IF"] == 2
    manifest = json.loads((adaptive.folder / "manifest.json").read_text())
    unit = manifest["units"]["dit"]
    assert unit["cpu_only"] and not unit["gpu"]["checked"] and "CPU only" in unit["gpu"]["reason"]
    assert unit["accelerators_verified"] == {"cpu": ["f32"], "gpu": []}
    assert not manifest["units"]["label_embedding"]["cpu_only"]
    with pytest.raises(AcceleratorError, match="branches"):
        Bundle(adaptive.folder)._on_gpu("dit", "f32", adaptive.folder / "dit_f32.tflite", "dit")


def test_the_gates_of_a_bundle_decide_as_those_of_jax(adaptive, undecided):
    assert adaptive.numbers["export.image.max_grey_to_generator"] <= 1
    recipe, labels = lazy(1, halves="separate"), {"label": np.array([2, 0], np.int32)}
    noise = np.random.default_rng(5).normal(size=(2, 4, 4, 12)).astype(np.float32)
    made = generator_of(recipe, undecided, frozen(1))(labels, noise)
    assert (made["ran"] != made["ran"][:1, :1]).any() and 0.5 < made["ran"].mean() < 0.95
    generator = LiteRTGenerator(adaptive.folder)
    ran, call = [], generator.sampler.units["dit"]

    def watched(**inputs):
        out = call(**inputs)
        ran.append([not np.array_equal(inputs[name], out[name]) for name in generator.program.state])
        return out

    sampler = dataclasses.replace(generator.sampler, units={**generator.sampler.units, "dit": watched})
    for i in range(2):
        ran.clear()
        image = sampler.run({"label": labels["label"][i]}, noise[i])["image"]
        assert verify.grey_levels(image, made["image"][i]).max() <= 1
        # The null call comes second here, and first among JAX's halves.
        halves = np.array(ran).reshape(6, 2, 2)[:, ::-1]
        np.testing.assert_array_equal(halves, np.moveaxis(made["ran"][i], 0, 1))


def test_what_cannot_be_exported_is_refused_and_nothing_to_skip_is_the_network_alone():
    plan = lazy(lazy=0.0).exports()
    assert [unit.name for unit in plan.units] == ["dit", "label_embedding"] and "state" not in plan.program
    with pytest.raises(ConfigError, match="set halves='separate', or give a schedule"):
        lazy().exports()
    unit = lazy(1, halves="separate").exports().units[0]
    with pytest.raises(ValueError, match="'litert' writes no branches; use the backend 'jax2tf'"):
        to_tflite(unit.function, {}, unit.inputs, "dit", "none.tflite", "litert")
