"""Bundles with packed networks: what they unpack to is the file that was packed, and every client says what it does."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.cli_precisions import add_precisions, chosen_precisions
from snapgen_jax.export import unpacking, verify
from snapgen_jax.export.apps import copy_bundle
from snapgen_jax.export.bench import Asked, bench
from snapgen_jax.export.bundle import BundleReport, export_bundle
from snapgen_jax.export.client import PACKED_SCHEMA, Bundle, LiteRTGenerator, litert_unit
from snapgen_jax.export.compare import VerificationError
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.digits import PackedError, levels
from snapgen_jax.export.flatbuffer import constants
from snapgen_jax.export.judging import Limits
from snapgen_jax.export.levels import keep_levels
from snapgen_jax.export.packed import pack, unpacked_bytes
from snapgen_jax.export.packing import Original, write_packed
from snapgen_jax.export.precision import quantise
from snapgen_jax.export.program import BundleError
from snapgen_jax.export.unpacking import PackedFile
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import build, flatten
from snapgen_jax.networks.quantise import first_scales
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.quantised import SCALES, Quantised, QuantisedConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs, Stored
from tests.recipes_for_tests import random_like

from .conftest import QUICK
from .toys import SketchRecipe, array, conv

LOOSE = Limits(decibels=10)  # random weights of three levels, with activations of eight bits


def few(bits: int, *shape: int, seed: int = 0) -> Stored:
    rng, half = np.random.default_rng(seed), 2 ** (bits - 1) - (bits == 8)
    scale = rng.uniform(0.5, 1, shape[-1]).astype(np.float32) / np.float32(half * np.sqrt(np.prod(shape[:-1])))
    return Stored(rng.integers(-half, half + 1, shape).astype(np.int8), scale, bits)


def used(stored: Stored) -> np.ndarray:
    return stored.integers * stored.scale


STORAGE = {
    "net/first": few(8, 3, 3, 3, 24, seed=1),
    "net/depthwise": few(3, 3, 3, 1, 24, seed=2),
    "net/point": few(1, 1, 1, 24, 24, seed=3),
    "net/matrix": few(2, 24, 24, seed=4),
    "net/last": few(8, 1, 1, 24, 3, seed=5),
}


class MixedRecipe(SketchRecipe):
    """An image translator with a layer of every kind: a first and a last convolution of eight bits, a depthwise one, a
    1x1 one, a matrix, and one whose weights are of any value."""

    def __init__(self, storage: Mapping[str, Stored] | None = None) -> None:
        self.storage = STORAGE if storage is None else storage

    def params(self):
        plain = np.random.default_rng(6).standard_normal((24, 24)).astype(np.float32) / 5
        return {"net": {**{path[4:]: used(stored) for path, stored in STORAGE.items()}, "plain": plain}}

    @staticmethod
    def translate(weights, *, image):
        net = weights["net"]
        x = conv(image, net["first"])
        dimensions = ("NHWC", "HWIO", "NHWC")
        depthwise = jax.lax.conv_general_dilated(
            x, net["depthwise"], (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=24
        )
        x = jnp.tanh(x + conv(depthwise, net["point"]))
        x = jnp.tanh(x @ net["matrix"]) @ net["plain"]
        return {"image": jnp.tanh(conv(x, net["last"])), "edges": image[..., :1]}

    def exports(self) -> ExportPlan:
        plan = super().exports()
        unit = ExportUnit("translator", self.translate, ("net",), {"image": array(1, 8, 8, 3)}, self.storage)
        images = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), np.uint8)
        return dataclasses.replace(plan, units=[unit], golden=GoldenInputs(arrays={"image": images}))


def export(folder: pathlib.Path, recipe=None, **options) -> BundleReport:
    recipe = recipe or MixedRecipe()
    options = {"precisions": ("int8",), "gpu_check": "skip", "limits": LOOSE, "form": "packed", **options}
    return export_bundle(recipe, recipe.params(), {}, None, folder, backend=QUICK, **options)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> BundleReport:
    return export(tmp_path_factory.mktemp("packed") / "bundle")


@pytest.fixture
def bundle(report, tmp_path) -> pathlib.Path:
    """A copy that a test may change."""
    return shutil.copytree(report.folder, tmp_path / "bundle")


def manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# --- the file of eight bits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The translator in float32, in eight bits for integer and for float arithmetic."""
    folder, recipe = tmp_path_factory.mktemp("files"), MixedRecipe()
    unit = recipe.exports().units[0]
    made = {name: folder / f"{name}.tflite" for name in ("f32", "integer", "float")}
    to_tflite(unit.function, unit.select(recipe.params()), unit.inputs, unit.name, made["f32"], QUICK)
    quantise(made["f32"], made["integer"])
    quantise(made["f32"], made["float"], arithmetic="float")
    return made


def test_weights_of_few_levels_are_exact_in_the_file_of_eight_bits(files, tmp_path):
    target = tmp_path / "int8.tflite"
    target.write_bytes(files["integer"].read_bytes())
    kept = keep_levels(files["f32"], target, STORAGE)
    assert kept.missing == () and kept.axes.keys() == STORAGE.keys()
    assert target.stat().st_size == files["integer"].stat().st_size
    data, found = target.read_bytes(), {c.offset: c for c in constants(target)}
    for filling in kept.fillings:
        stored, order = STORAGE[filling.name], kept.axes[filling.name]
        if filling.fill == "scale":
            continue
        constant, integers = found[filling.offset], stored.integers.transpose(order)
        assert filling.fill == constant.dtype == ("float32" if filling.name == "net/depthwise" else "int8")
        raw = data[constant.offset :][: constant.bytes]
        if constant.dtype == "float32":
            assert raw == used(stored).transpose(order).astype("<f4").tobytes()
            continue
        assert raw == integers.tobytes()
        scales = np.frombuffer(data[constant.scale_offset :][: 4 * constant.scales], "<f4")
        assert np.array_equal(scales, stored.scale)


def test_the_file_computes_in_floats_what_jax_does_and_the_quantisers_own_does_not(files, tmp_path):
    """Weights alone are compared: a GPU multiplies them out, and rounds no activation."""
    target = tmp_path / "float.tflite"
    target.write_bytes(files["float"].read_bytes())
    keep_levels(files["f32"], target, STORAGE)
    recipe = MixedRecipe()
    image = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    exact = recipe.translate(recipe.params(), image=image)["image"]
    # All but the one matrix of any value, which the quantiser rounds in both.
    errors = [
        verify.relative_l2(litert_unit(path, "translator")(image=image)["image"], exact)
        for path in (target, files["float"])
    ]
    assert errors[0] < 0.7 * errors[1]
    every = STORAGE | {"net/plain": few(4, 24, 24)}
    params = {"net": {path[4:]: used(stored) for path, stored in every.items()}}
    unit = recipe.exports().units[0]
    to_tflite(unit.function, params, unit.inputs, unit.name, tmp_path / "f32.tflite", QUICK)
    quantise(tmp_path / "f32.tflite", target, arithmetic="float")
    assert keep_levels(tmp_path / "f32.tflite", target, every).missing == ()
    expected = recipe.translate(params, image=image)["image"]
    assert verify.relative_l2(litert_unit(target, "translator")(image=image)["image"], expected) < 1e-6


def test_weights_that_the_file_does_not_hold_are_named_and_left_to_the_quantiser(files, tmp_path):
    target = tmp_path / "int8.tflite"
    target.write_bytes(files["integer"].read_bytes())
    matrix = STORAGE["net/matrix"]
    by_row = Stored(np.ones((24, 24), np.int8), np.ones((24, 1), np.float32), 1)
    found = keep_levels(files["f32"], target, {"a": few(2, 24, 24, seed=9), "b": by_row, "net/matrix": matrix})
    assert found.missing == ("a", "b") and list(found.axes) == ["net/matrix"]


def test_a_scale_that_is_not_a_channels_own_and_an_integer_of_128_stay_with_the_quantiser(tmp_path):
    integers = np.random.default_rng(0).integers(-2, 3, (8, 8)).astype(np.int8)
    rows = Stored(integers, np.linspace(0.1, 0.2, 8, dtype=np.float32)[:, None], 2)
    wide = Stored(np.where(integers == 2, 128, integers), np.ones(8, np.float32), 8)
    one = Stored(integers, np.asarray(0.25, np.float32), 2)

    def function(weights, *, x):
        return {"y": jnp.tanh(jnp.tanh(x @ weights["rows"]) @ weights["wide"]) @ weights["one"]}

    storage = {"rows": rows, "wide": wide, "one": one}
    params = {name: np.asarray(used(stored), np.float32) for name, stored in storage.items()}
    to_tflite(function, params, {"x": array(4, 8)}, "f", tmp_path / "f32.tflite", QUICK)
    quantise(tmp_path / "f32.tflite", tmp_path / "int8.tflite")
    found = keep_levels(tmp_path / "f32.tflite", tmp_path / "int8.tflite", storage)
    assert found.missing == ("rows", "wide")
    assert [filling.fill for filling in found.fillings] == ["int8"]  # one scale for all channels is no hole
    packed = write_packed(
        tmp_path / "f.packed", {"one": one}, original=Original(tmp_path / "int8.tflite", found.fillings, found.axes)
    )
    with PackedFile(packed) as file:
        assert np.array_equal(file.integers("one"), integers) and file.scale("one") == np.float32(0.25)


def test_nothing_to_pack_is_an_error(files, tmp_path):
    (tmp_path / "int8.tflite").write_bytes(files["integer"].read_bytes())
    storage = {"a": few(2, 24, 24, seed=9)}
    kept = keep_levels(files["f32"], tmp_path / "int8.tflite", storage)
    with pytest.raises(VerificationError, match=r"none of the 1 weights .* Export without --packed"):
        pack(tmp_path, "int8.tflite", kept, storage)


def test_a_quantised_network_is_whole_in_its_packed_file(tmp_path):
    """A network of the recipe: of the packed file, with what is not quantised beside it, it computes the same."""
    network = UNetConfig.preset(
        "smoke", latent_channels=12, channels=(8,), down_depth=(1,), up_depth=(0,), mid_depth=0,
        self_attention=(False,), cross_attention=(True,),
    )  # fmt: skip
    label = LabelEmbeddingConfig(classes=4, width=16)
    inputs = ClassLabelsConfig(image_sizes=((8, 8),), codec=CodecConfig(patch=2), label=label)
    recipe = Quantised(QuantisedConfig(network=network, inputs=inputs, default_bits=3, init_from="base"), "cpu")
    params = random_like(build(network)[1], 1)
    params = {"model": {"unet": params, SCALES: first_scales(params, recipe.bits, rounds=0)}}
    weights = recipe.weights(params, {})
    unit = next(unit for unit in recipe.exports().units if unit.name == "unet")
    storage, used = unit.stored(weights), {f"unet/{'/'.join(p)}": x for p, x in flatten(weights["unet"]).items()}
    others = {path: np.asarray(x) for path, x in used.items() if path not in storage}
    with PackedFile(write_packed(tmp_path / "unet.packed", storage, others)) as packed:
        read = {path: packed.integers(path) * packed.scale(path) for path in packed.weights}
        read |= {path: packed.array(path) for path in packed.arrays}
        bits = {path: weight.bits for path, weight in packed.weights.items()}
        counts = {path: np.unique(packed.integers(path)).size for path in packed.weights}
    assert read.keys() == used.keys() and bits.keys() == storage.keys()
    assert all(np.array_equal(read[path], used[path]) for path in used)
    assert all(counts[path] <= levels(bits[path]) for path in bits)
    assert counts["unet/conv_in/kernel"] > counts["unet/mid_residual/conv_1/pointwise/kernel"] == 9
    # The converted file has all of these weights, whatever the converter has made of their names and axes.
    to_tflite(unit.function, unit.select(weights), unit.inputs, "unet", tmp_path / "f32.tflite", QUICK)
    quantise(tmp_path / "f32.tflite", tmp_path / "int8.tflite")
    assert keep_levels(tmp_path / "f32.tflite", tmp_path / "int8.tflite", storage).missing == ()


# --- the bundle -------------------------------------------------------------------------------------------------------


def test_a_packed_bundle_unpacks_to_the_file_that_was_packed(report, files, bundle, tmp_path):
    assert {path.name for path in report.folder.glob("translator*")} == {"translator_int8.packed"}
    found, told = manifest(bundle), []
    assert found["schema"] == PACKED_SCHEMA == 5 and (bundle / "PACKING.md").is_file()
    path = Bundle(bundle, unpacking=lambda *how: told.append(how)).network_file("translator", "int8")
    (tmp_path / "int8.tflite").write_bytes(files["integer"].read_bytes())
    keep_levels(files["f32"], tmp_path / "int8.tflite", STORAGE)
    assert path.read_bytes() == (tmp_path / "int8.tflite").read_bytes()
    assert path.parent == bundle.parent / "bundle.unpacked"
    whole = found["units"]["translator"]["packed"]["int8"]
    assert whole["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and whole["bytes"] == path.stat().st_size
    assert whole["weights"] == {"1": 576, "2": 576, "3": 216, "8": 720}
    assert told[-1] == ("translator", whole["bytes"], whole["bytes"])
    Bundle(bundle, unpacking=lambda *how: pytest.fail("it is there already")).network_file("translator", "int8")


def test_the_numbers_say_what_is_shipped_and_what_runs(report):
    packed = (report.folder / "translator_int8.packed").stat().st_size
    assert report.numbers["export.translator.bytes_packed"] == report.numbers["export.bytes_packed"] == packed
    assert packed < report.numbers["export.translator.bytes_int8"]
    assert unpacked_bytes(manifest(report.folder)) > sum(f["bytes"] for f in manifest(report.folder)["files"].values())
    assert f"{packed}" in (report.folder / "README.md").read_text("utf-8")


def test_verify_accepts_it_also_alone_and_with_a_folder_of_its_own(bundle, tmp_path):
    checks = {check.name: check for check in verify.checks(bundle)}
    assert all(check.passed for check in checks.values()) and "int8 translator unpacked" in checks
    command = [sys.executable, "verify.py", "--cache", str(tmp_path / "elsewhere")]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.suffix for path in (tmp_path / "elsewhere").iterdir()] == [".tflite"]


def test_verify_finds_an_unpacked_file_that_has_changed_since(bundle):
    path = Bundle(bundle).network_file("translator", "int8")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    failed = [check for check in verify.checks(bundle) if not check.passed]
    assert [check.name for check in failed] == ["int8 translator unpacked"] and "remove it" in failed[0].finding
    path.write_bytes(bytes(data[:-1]))  # of another length: it is unpacked again without a word
    assert all(check.passed for check in verify.checks(bundle))


def test_a_damaged_packed_file_is_an_error_and_leaves_nothing(bundle):
    path = bundle / "translator_int8.packed"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackedError, match="is damaged"):
        Bundle(bundle).network_file("translator", "int8")
    assert list((bundle.parent / "bundle.unpacked").iterdir()) == []
    assert any("translator_int8.packed" in check.name for check in verify.checks(bundle) if not check.passed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "../../x"}, "as the SHA-256"),
        ({"sha256": "0" * 64}, "is not the packed file that manifest.json describes"),
        ({"bytes": 7}, "is not the packed file that manifest.json describes"),
    ],
)
def test_a_manifest_that_does_not_fit_its_packed_file_is_an_error(bundle, change, message):
    found = manifest(bundle)
    found["units"]["translator"]["packed"]["int8"].update(change)
    (bundle / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(BundleError, match=message):
        Bundle(bundle).network_file("translator", "int8")


def test_a_folder_that_cannot_hold_it_says_which_option_names_another(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be unpacked into .*file.*--cache"):
        Bundle(bundle, cache=tmp_path / "file").network_file("translator", "int8")


def test_stopping_ends_the_unpacking(bundle):
    with pytest.raises(unpacking.Stopped):
        Bundle(bundle, unpacking=lambda *how: False).network_file("translator", "int8")


def test_bench_measures_what_it_unpacks_to(bundle, tmp_path):
    found = bench(bundle, Asked(threads=(1,), runs=2, rounds=1), cache=tmp_path / "cache")
    assert found["files"][0]["bytes"] == (Bundle(bundle).network_file("translator", "int8")).stat().st_size
    assert "error" not in found["rows"][0] and len(list((tmp_path / "cache").iterdir())) == 1


def test_apps_carry_the_unpacked_networks(report, tmp_path):
    bundle = tmp_path / "app"
    copy_bundle(report.folder, bundle)
    image = {"image": np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)}
    drawn = LiteRTGenerator(report.folder, precision="int8", cache=tmp_path).run(image)["image"]
    assert manifest(bundle)["schema"] == 4 and not (bundle / "translator_int8.packed").exists()
    assert all(check.passed for check in verify.checks(bundle))
    assert np.array_equal(LiteRTGenerator(bundle, precision="int8").run(image)["image"], drawn)
    assert not bundle.with_name("app.unpacked").exists()


def test_a_run_without_such_weights_and_other_precisions_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="int8 are what is packed, and the precisions are f32, f16; add int8"):
        export(tmp_path / "bundle", precisions=("f32", "f16"))
    with pytest.raises(ValueError, match="no network of this run has weights that were trained"):
        export(tmp_path / "bundle", MixedRecipe({}))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_names_the_precision_that_packing_needs():
    parser = argparse.ArgumentParser()
    add_precisions(parser)
    with pytest.raises(ConfigError, match="add it, as in --precisions=f32,f16,int8"):
        chosen_precisions(parser.parse_args(["--packed", "--precisions=f32,f16"]))
    assert chosen_precisions(parser.parse_args(["--packed"]))[0] is None
