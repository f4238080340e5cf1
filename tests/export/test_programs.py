"""One program of plain data says every order of calls: one call, several denoisers, a state, chunks, any guidance."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.conditions import chosen_options
from snapgen_jax.export import verify
from snapgen_jax.export.client import LiteRTGenerator, litert_unit
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.older import from_schema_1
from snapgen_jax.export.program import BundleError, parse
from snapgen_jax.export.sampler import Sampler
from snapgen_jax.export.storage import describe_storage
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import build
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes._flow_export import flow_plan
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportUnit, GoldenInputs, InputsExport, Stored
from snapgen_jax.training.keys import example_keys

from .conftest import PROMPTS, QUICK, resign
from .toys import SketchRecipe, array, flow

SCHEMA_1 = json.loads((pathlib.Path(__file__).parent / "scheduler_schema_1.json").read_text())


def manifest(exported):
    return json.loads((exported.folder / "manifest.json").read_text())


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_a_translator_is_one_call_from_picture_to_picture(sketch):
    images = np.random.default_rng(7).integers(0, 256, (3, 8, 8, 3), np.uint8)
    made = LiteRTGenerator(sketch.folder).run({"image": images})
    expected = sketch.recipe.generate(sketch.params, {}, {"image": images}, None, sketch.recipe.options)
    assert verify.grey_levels(made["image"], np.asarray(expected["image"])).max() <= 1
    np.testing.assert_allclose(made["edges"], expected["edges"], rtol=1e-5)
    assert made["image"].shape == (3, 8, 8, 3) and made["image"].std() > 10
    assert sketch.report.numbers["export.image.max_grey_to_generator"] <= 1
    assert sketch.report.numbers["export.edges.rel_l2_to_generator"] <= 1e-5
    assert not (sketch.folder / "tokenizer.json").exists() and not (sketch.folder / "golden" / "latents.npy").exists()


def test_a_translator_takes_no_prompt_and_no_steps(sketch):
    generator, image = LiteRTGenerator(sketch.folder), np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="takes no prompts; its inputs are image"):
        generator.generate(["a sketch"])
    with pytest.raises(ValueError, match="is one call, without steps"):
        generator.run({"image": image}, steps=3)
    with pytest.raises(ValueError, match="the inputs are image; got photo"):
        generator.run({"photo": image})
    with pytest.raises(ValueError, match=r"'image' is uint8 \(8, 8, 3\); got float64"):
        generator.run({"image": image / 2})


def test_two_denoisers_share_a_state_and_decode_in_chunks_as_in_jax(clip):
    """The reference runs in `diffusion.samplers.sample`, with a cache for either half of guidance in its carry."""
    numbers = clip.report.numbers
    assert numbers["export.image.max_grey_to_generator"] <= 1 and numbers["export.trajectory.rel_l2_f32"] < 1e-4
    labels = np.float32([[1, 0], [0, 1]])
    images = LiteRTGenerator(clip.folder).run({"label": labels}, seed=3)["image"]
    golden = np.load(clip.folder / "golden" / "outputs" / "image.npy")
    assert images.shape == (2, 4, 4, 4, 3) and verify.grey_levels(images, golden).max() <= 1
    other = LiteRTGenerator(clip.folder).run({"label": labels[::-1]}, seed=3)["image"]
    assert verify.grey_levels(other, golden).max() > 1


def test_every_unit_is_compared_at_calls_of_the_program_itself(clip):
    units = manifest(clip)["units"]
    assert {name: len(unit["rel_l2"]["f32"]) for name, unit in units.items()} == {"full": 8, "reuse": 8, "decoder": 4}
    low, high = units["reuse"]["inputs"]["cache"]["range"]
    assert low < -0.1 and high > 0.1  # a state that was written, not the zeros of the first call


@pytest.mark.parametrize(
    "change",
    [
        {"step": {"guidance": [3.0, 2.0, 2.0]}},
        {"step": {"guidance": [3.0, 2.0, 1.0], "rule": "renoise"}},
        {"initial_scale": 0.51},
    ],
)
def test_golden_values_notice_another_program(clip, tmp_path, change):
    folder = pathlib.Path(shutil.copytree(clip.folder, tmp_path / "bundle"))
    data = json.loads((folder / "program.json").read_text())
    data |= {name: {**data[name], **value} if name == "step" else value for name, value in change.items()}
    (folder / "program.json").write_text(json.dumps(data))
    resign(folder)
    assert any("golden" in check.name for check in verify.checks(folder) if not check.passed)


@pytest.mark.parametrize("backend", sorted({QUICK, "jax2tf"}))
def test_a_state_keeps_its_name_on_both_sides_of_a_file(tmp_path, backend):
    def step(weights, *, cache):
        return {"prediction": cache @ weights["w"], "cache": cache + 1}

    path = to_tflite(step, {"w": np.eye(3)}, {"cache": array(1, 3)}, "step", tmp_path / "step.tflite", backend)
    out = litert_unit(path, "step")(cache=np.float32([[1, 2, 3]]))
    np.testing.assert_array_equal(out["prediction"], [[1, 2, 3]])
    np.testing.assert_array_equal(out["cache"], [[2, 3, 4]])


def test_weights_of_few_values_are_listed_with_their_bits(sketch):
    stored = manifest(sketch)["units"]["translator"]["storage"]["net/conv/kernel"]
    assert stored == {"bits": 1, "shape": [3, 3, 3, 3], "scale_shape": [3], "levels": 3}


@pytest.mark.parametrize(
    "path, stored, message",
    [
        ("net/conv/weight", {}, "'net/conv/weight', which is no parameter of its roles net"),
        ("net/conv", {}, "'net/conv', which is no parameter"),
        ("net/conv/kernel", {"integers": SketchRecipe.INTEGERS[0]}, r"int64 \(3, 3, 3\); integers \(3, 3, 3, 3\)"),
        ("net/conv/kernel", {"integers": SketchRecipe.INTEGERS / 2}, "is float64"),
        ("net/conv/kernel", {"scale": np.ones(2)}, r"the scale \(2,\) of 'net/conv/kernel' does not broadcast"),
        ("net/conv/kernel", {"integers": 2 * SketchRecipe.INTEGERS}, r"leave -1\.\.1, the range of 1 bits"),
        ("net/conv/kernel", {"scale": 1.01 * SketchRecipe.SCALE}, "is not the weight that is exported"),
    ],
)
def test_stored_integers_that_are_not_the_weight_are_refused(path, stored, message):
    stored = Stored(**{"integers": SketchRecipe.INTEGERS, "scale": SketchRecipe.SCALE, "bits": 1, **stored})
    unit = ExportUnit("translator", SketchRecipe.translate, ("net",), {}, {path: stored})
    with pytest.raises(ValueError, match=message):
        describe_storage(unit, SketchRecipe().params())


# --- programs over functions -----------------------------------------------------------------------------------------


def run(data, unit, inputs=None, noise=(1.0, 1.0), **shapes):
    """The output of a program whose units are all `unit`."""
    program = parse(data)
    names = {"latent": (1, 2), **shapes}
    sampler = Sampler(program, dict.fromkeys(program.units(), unit), dict.fromkeys(program.units(), names))
    return sampler.run(inputs or {}, np.float32(noise))


def test_either_half_of_guidance_has_its_own_state_which_begins_anew_with_each_example():
    seen = []

    def unit(*, latent, label, count):
        seen.append((float(label[0, 0]), float(count[0, 0])))
        return {"prediction": 0 * latent, "count": count + 1}

    data = flow(
        {"guidance": 2.0},
        inputs={"label": {"shape": [1], "dtype": "float32", "null": -1}},
        state={"count": {"shape": [1], "dtype": "float32", "initial": "zeros"}},
        steps=[{}, {"guidance": 1.0}, {}],
        times=[1.0, 0.5, 0.2, 0.0],
    )
    for _ in range(2):
        run(data, unit, {"label": np.float32([5])}, label=(1, 1), count=(1, 1))
    once = [(5, 0), (-1, 0), (5, 1), (5, 2), (-1, 1)]
    assert seen == [*once, *once]


@pytest.mark.parametrize(
    ("rule", "asked"),
    [
        ("euler", [(5, 1.0), (5, 0.5), (-1, 0.5), (5, 0.25)]),
        ("heun", [(5, 1), (5, 0.5), (-1, 0.5), (5, 0.5), (-1, 0.5), (5, 0.25), (5, 0.25), (5, 0)]),
    ],
)
def test_outside_its_interval_of_times_guidance_makes_no_null_call(rule, asked):
    seen = []

    def unit(*, latent, label, time):
        seen.append((float(label[0, 0]), float(np.arccos(time[0, 0]))))
        return {"prediction": np.broadcast_to(label, latent.shape)}

    data = flow(
        {
            "guidance": 2.0,
            "guidance_interval": [0.3, 0.75],
            "rule": rule,
            "time": {"kind": "features", "dim": 2, "scale": 1.0, "max_period": 9.0, "order": "cos,sin"},
        },
        inputs={"label": {"shape": [1], "dtype": "float32", "null": -1}},
        times=[1.0, 0.5, 0.25, 0.0],
        steps=[{}] * 4,
    )
    out = run(data, unit, {"label": np.float32([5])}, label=(1, 1), time=(1, 2))
    np.testing.assert_allclose(seen, asked, atol=1e-3)
    moved = [5.0, 11.0, 5.0] if rule == "euler" else [8.0, 8.0, 5.0]  # 11 = -1 + 2 (5 - -1)
    np.testing.assert_allclose(out["latent"], 1 - np.dot(moved, [0.5, 0.25, 0.25]), rtol=1e-6)


def test_the_state_of_the_null_calls_goes_on_outside_the_interval():
    """As the activations of both halves do in JAX."""
    seen = []

    def unit(*, latent, label, count):
        seen.append((float(label[0, 0]), float(count[0, 0])))
        return {"prediction": 0 * latent, "count": count + 1}

    data = flow(
        {"guidance": 2.0, "guidance_interval": [0.0, 0.5]},
        inputs={"label": {"shape": [1], "dtype": "float32", "null": -1}},
        state={"count": {"shape": [1], "dtype": "float32", "initial": "zeros"}},
    )
    run(data, unit, {"label": np.float32([5])}, label=(1, 1), count=(1, 1))
    assert seen == [(5, 0), (-1, 0), (5, 1), (-1, 1)]


def test_an_interval_of_guidance_leaves_a_run_as_a_field_of_its_steps_and_all_times_as_none():
    def step(**changes):
        sampling = SamplingConfig(steps=4, guidance=2.0, **changes)
        recipe = FlowMatching(dataclasses.replace(FlowMatchingConfig(), sampling=sampling), "cpu")
        return recipe.exports().program["step"]

    assert "guidance_interval" not in step()
    assert step(guidance_interval=(0.1, 0.8))["guidance_interval"] == [0.1, 0.8]


def test_guidance_of_one_leaves_a_channel_to_the_condition():
    def unit(*, latent, label):
        return {"prediction": np.broadcast_to(label, latent.shape)}

    label = {"label": {"shape": [1], "dtype": "float32", "null": 10}}
    out = run(flow({"guidance": [3.0, 1.0]}, inputs=label), unit, {"label": np.float32([1])}, label=(1, 1))
    np.testing.assert_allclose(out["latent"], [1 - (10 + 3 * (1 - 10)), 1 - 1])


def test_an_input_that_is_kept_reaches_the_null_calls():
    seen = []

    def unit(*, latent, image, label):
        seen.append((float(image[0, 0]), float(label[0, 0])))
        return {"prediction": latent}

    one = {"shape": [1], "dtype": "float32"}
    data = flow({"guidance": 2.0}, inputs={"image": {**one, "null": "keep"}, "label": {**one, "null": 0}})
    for image in (7, 8):
        run(data, unit, {"image": np.float32([image]), "label": np.float32([1])}, image=(1, 1), label=(1, 1))
    assert seen[:2] == [(7, 1), (7, 0)] and seen[-1] == (8, 0)


def test_encoders_are_called_in_order_and_a_step_names_its_context():
    def unit(**arrays):
        if "x" in arrays:
            return {"y" if "y" not in arrays else "z": arrays["x"] + arrays.get("y", 0) + 1}
        return {"prediction": -np.ones((1, 2), np.float32) * arrays["z"]}

    data = flow(
        {"context": "short"},
        inputs={"x": {"shape": [1], "dtype": "float32"}},
        contexts={"short": ["second"], "long": ["first", "second"]},
        steps=[{}, {"context": "long"}],
    )
    program = parse(data)
    shapes = {"net": {"z": (1, 1)}, "first": {"x": (1, 1)}, "second": {"x": (1, 1), "y": (1, 1)}}
    sampler = Sampler(program, dict.fromkeys(program.units(), unit), shapes)
    with pytest.raises(BundleError, match="the unit 'second' needs y; there is only x"):
        sampler.run({"x": np.float32([1])}, np.zeros(2, np.float32))
    del data["contexts"]["short"]
    program = parse({**data, "step": {**data["step"], "context": "long"}})
    out = Sampler(program, dict.fromkeys(program.units(), unit), shapes).run({"x": np.float32([1])}, np.zeros(2, "f"))
    np.testing.assert_allclose(out["latent"], [4, 4])  # y = 2, z = 1 + 2 + 1


def test_heun_asks_as_the_next_entry_says():
    """The second call of interval i is at time i + 1, with its scale and its prediction."""
    asked = []

    def unit(*, latent, time):
        asked.append((int(time[0].argmax()), float(latent[0, 0])))
        return {"prediction": np.zeros((1, 2), np.float32)}

    entries = [{"scale": 1.0}, {"scale": 10.0}, {"scale": 100.0}]
    run(flow({"rule": "heun", "time": {"kind": "index", "size": 3}}, steps=entries), unit, time=(1, 3))
    assert asked == [(0, 1), (1, 10), (1, 10), (2, 100)]


def test_a_network_is_told_its_native_time_or_explicit_features():
    told = []

    def unit(*, latent, time):
        told.append(time)
        return {"prediction": latent}

    features = {"kind": "features", "dim": 4, "scale": 1.0, "max_period": 100.0, "order": "cos,sin"}
    entries = [{"time": features, "native": 981.0}, {"time": {"kind": "values", "values": [1, 2, 3, 4]}}]
    run(flow(steps=entries), unit, time=(1, 4))
    angles = 981 * np.array([1, 0.1])
    np.testing.assert_allclose(told[0], [[*np.cos(angles), *np.sin(angles)]], atol=1e-4)
    np.testing.assert_array_equal(told[1], [[1, 2, 3, 4]])


def test_a_step_may_give_the_denoiser_arrays_of_its_own():
    told = []

    def unit(*, latent, gates):
        told.append(gates.tolist())
        return {"prediction": latent}

    run(flow(steps=[{"arrays": {"gates": [1, 1, 0]}}, {"arrays": {"gates": [0, 1, 0]}}]), unit, gates=(1, 3))
    assert told == [[[1, 1, 0]], [[0, 1, 0]]]


# --- bundles of schema 1 ---------------------------------------------------------------------------------------------


def test_a_bundle_of_schema_1_draws_what_it_drew(toy, tmp_path):
    folder = pathlib.Path(shutil.copytree(toy.folder, tmp_path / "bundle"))
    (folder / "program.json").unlink()
    (folder / "scheduler.json").write_text(json.dumps(SCHEMA_1))
    (folder / "manifest.json").write_text(json.dumps({**manifest(toy), "schema": 1}))
    images = LiteRTGenerator(folder).generate(PROMPTS, seed=3)
    np.testing.assert_array_equal(images, LiteRTGenerator(toy.folder).generate(PROMPTS, seed=3))
    assert LiteRTGenerator(folder).generate(PROMPTS[:1], steps=7, guidance=1.0, method="heun").shape == (1, 4, 4, 3)
    with pytest.raises(BundleError, match=r"check it with the verify\.py that lies in it"):
        list(verify.checks(folder))


def test_a_bundle_of_schema_2_draws_what_it_drew(toy, tmp_path):
    folder = pathlib.Path(shutil.copytree(toy.folder, tmp_path / "bundle"))
    data = json.loads((folder / "program.json").read_text())
    del data["tokenizers"]
    before = {**data, "schema": 2, "tokenizer": {"tokens": "tokens", "mask": "mask"}}
    (folder / "program.json").write_text(json.dumps(before))
    (folder / "manifest.json").write_text(json.dumps({**manifest(toy), "schema": 2}))
    images = LiteRTGenerator(folder).generate(PROMPTS, seed=3)
    np.testing.assert_array_equal(images, LiteRTGenerator(toy.folder).generate(PROMPTS, seed=3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"guidance": None, "codec": None}, "lacks guidance, codec"),
        ({"kind": "ddpm"}, "is 'ddpm' of schema 1"),
        ({"schema": 2}, "of schema 2"),
        ({"codec": {"kind": "network"}}, "the codec is a network, and `units` names no decoder"),
        ({"method": "rk4"}, "rule is 'rk4'"),
        ({"text": {"length": 6, "null_tokens": [1, 2], "null_mask": [1, 1]}}, "inputs.tokens: the null"),
    ],
)
def test_a_broken_schedule_of_schema_1_is_refused(change, message):
    data = {name: value for name, value in {**SCHEMA_1, **change}.items() if value is not None}
    with pytest.raises(BundleError, match=message):
        parse(from_schema_1(data))


# --- the plan of flow matching ---------------------------------------------------------------------------------------


def test_without_a_text_encoder_the_caller_gives_the_text_states():
    config = UNetConfig.preset("smoke")
    width, pooled = config.context_width, config.pooled_width
    null = {"sequence": np.zeros((5, width), "f"), "mask": np.zeros(5, "f"), "pooled": np.zeros(pooled, "f")}
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), jnp.float32), null)
    plan = flow_plan(
        denoiser_role="teacher/unet",
        denoiser=Denoiser(build(config)[0]),
        sampling=SamplingConfig(steps=3),
        latent_shape=(8, 8, config.latent_channels),
        image_shape=(16, 16, 3),
        context=TextContext(**specs),
        inputs=InputsExport([], null, None),
        golden=GoldenInputs(arrays={name: np.ones((1, *x.shape), "f") for name, x in null.items()}),
    )
    program = parse(json.loads(json.dumps(plan.program)))
    assert set(program.inputs) == set(null) and not program.tokenizers and not program.contexts
    assert program.units() == {"teacher_unet"} and list(program.outputs) == ["latent"]
    assert plan.units[0].roles == ("teacher/unet",) and set(null) < set(plan.units[0].inputs)


def test_a_few_step_generator_of_given_times_leaves_with_them_and_draws_as_its_run_does():
    times = (1.0, 0.857692, 0.602151, 0.008929)
    recipe = FlowMatching(
        FlowMatchingConfig(
            network=UNetConfig.preset("smoke", latent_channels=12),
            inputs=CaptionsConfig(
                image_sizes=((8, 8),),
                text=ClipTextConfig.preset("smoke", vocab_size=40, max_tokens=6),
                codec=CodecConfig(patch=2),
            ),
            sampling=SamplingConfig(steps=4, guidance=1.0, method="renoise", times=times),
        ),
        "cpu",
    )
    plan = recipe.exports()
    program = parse(json.loads(json.dumps(plan.program)))
    np.testing.assert_array_equal(program.times, np.float32([*times, 0.0]))
    rng = np.random.default_rng(0)
    spec = {role: build(network.config)[1] for role, network in recipe.networks().items()}
    weights = jax.tree.map(lambda s: jnp.float32(0.3 * rng.normal(size=s.shape) + (len(s.shape) == 1)), spec)
    told = {"tokens": np.int32([[1, 7, 9, 2, 0, 0]]), "mask": np.float32([[1, 1, 1, 1, 0, 0]])}
    noise = rng.normal(size=(1, 4, 4, 4, 12)).astype("f")
    params = {"model": weights}
    drawn = recipe.generate(params, {}, {**told, "noise": noise}, example_keys(0, jnp.arange(1)), recipe.options)
    units = {unit.name: functools.partial(jax.jit(unit.function), unit.select(weights)) for unit in plan.units}
    shapes = {unit.name: {name: x.shape for name, x in unit.inputs.items()} for unit in plan.units}
    sampler = Sampler(program, units, shapes)
    contexts = sampler.contexts({name: array[0] for name, array in told.items()})
    latents = sampler.trajectory(noise[0], contexts, {})
    np.testing.assert_allclose(latents[-1], drawn["latent"][0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes 4 steps and no other number"):
        sampler.trajectory(noise[0], contexts, {}, steps=8)
    with pytest.raises(ConfigError, match="set steps to their number"):
        chosen_options(recipe.options, {"steps": 8})
