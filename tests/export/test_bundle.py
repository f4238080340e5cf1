"""A bundle is whole, verified and self-contained; or it is not there."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from snapgen_jax.export import bundle as bundle_module
from snapgen_jax.export import compare, verify
from snapgen_jax.export.bundle import export_bundle, generator_of
from snapgen_jax.export.client import LiteRTGenerator
from snapgen_jax.export.compare import VerificationError
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.training.exports import GoldenInputs

from .conftest import PROMPTS, QUICK, Exported, resign

# Finds only the standard library, numpy and ai-edge-litert with what it needs, and runs a script as `python` would.
ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Alone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        outside = spec and spec.origin and "site-packages" in spec.origin
        return None if outside and name.split(".")[0] not in {"numpy", "ai_edge_litert", "flatbuffers"} else spec

sys.path[0] = sys.argv[1]
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Alone]
for name in ("jax", "tensorflow", "snapgen_jax", "tokenizers"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was not blocked")
import runpy
sys.argv = sys.argv[1:2]
runpy.run_path(sys.argv[0] + "/verify.py", run_name="__main__")
"""


def failures(folder: pathlib.Path) -> list[str]:
    return [check.name for check in verify.checks(folder) if not check.passed]


@pytest.fixture
def copy(toy, tmp_path) -> pathlib.Path:
    """A bundle to damage."""
    return pathlib.Path(shutil.copytree(toy.folder, tmp_path / "bundle"))


def test_the_files_compute_what_jax_computes(smoke):
    numbers = smoke.report.numbers
    for unit in ("unet", "text_encoder"):
        assert 0 < numbers[f"export.{unit}.rel_l2_f32"] <= 1e-5
        assert 1e-5 < numbers[f"export.{unit}.rel_l2_f16"] <= 2e-3  # it holds float16 weights indeed
        assert numbers[f"export.{unit}.bytes_f16"] < numbers[f"export.{unit}.bytes_f32"]
        assert 0 < numbers[f"export.{unit}.max_activation"] < compare.FLOAT16_HEADROOM
    assert numbers["export.flex_ops"] == 0
    assert numbers["export.bytes_f16"] == sum(numbers[f"export.{unit}.bytes_f16"] for unit in ("unet", "text_encoder"))
    manifest = json.loads((smoke.folder / "manifest.json").read_text())
    assert list(manifest["units"]["unet"]["rel_l2"]["f32"]) == ["t=0", "t=0.25", "t=0.5", "t=0.75", "t=1"]


def test_litert_and_jax_make_the_same_image_to_one_grey_level(smoke):
    assert smoke.report.numbers["export.image.max_grey_to_generator"] <= 1
    noise = np.random.default_rng(5).standard_normal((2, 8, 8, 12)).astype(np.float32)
    inputs = {name: np.load(smoke.folder / "golden" / "inputs" / f"{name}.npy") for name in ("tokens", "mask")}
    images = LiteRTGenerator(smoke.folder).run(inputs, noise=noise)["image"]
    expected = generator_of(smoke.recipe, smoke.params, {})(inputs, noise)["image"]
    assert verify.grey_levels(images, expected).max() <= 1
    assert images.std() > 10  # a picture, not a constant


def test_the_unet_has_real_depthwise_convolutions_and_only_what_a_gpu_runs(smoke):
    operators = smoke.report.operators["unet"]
    assert operators["MEAN"] == 154 and "SUM" not in operators
    assert operators["DEPTHWISE_CONV_2D"] == 12  # a separable block has one at each of its two convolutions
    assert describe(smoke.folder / "unet_f16.tflite").max_rank == 4


@pytest.mark.skipif(QUICK != "litert", reason="litert-converter is not installed")
def test_both_backends_compute_the_same(smoke, tmp_path):
    from snapgen_jax.export.client import litert_unit
    from snapgen_jax.export.golden import denoiser_cases, inputs_of

    sampler, root = LiteRTGenerator(smoke.folder).sampler, smoke.folder / "golden"
    golden = {path.relative_to(root).with_suffix("").as_posix(): np.load(path) for path in root.rglob("*.npy")}
    texts = {f"prompt {i}": {name: x[i : i + 1] for name, x in inputs_of(golden).items()} for i in range(2)}
    cases = {"unet": denoiser_cases(sampler, golden), "text_encoder": texts}
    for unit in smoke.recipe.exports().units:
        path = tmp_path / f"{unit.name}.tflite"
        to_tflite(unit.function, unit.select(smoke.params["model"]), unit.inputs, unit.name, path, "litert")
        errors = compare.compare(sampler.units[unit.name], litert_unit(path, unit.name), cases[unit.name])
        assert max(errors.values()) <= 1e-5, (unit.name, errors)
        assert describe(path).histogram.keys() == smoke.report.operators[unit.name].keys()


@pytest.mark.parametrize("name", ["smoke", "toy", "sketch", "clip"])
def test_the_bundle_verifies_with_numpy_and_litert_alone(name, request):
    exported: Exported = request.getfixturevalue(name)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported.folder)],
        capture_output=True,
        text=True,
        env={},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    latents = () if name == "sketch" else ("f32 golden 0 latent after step",)
    for line in ("f32 golden 1 image", "f16 golden 1 image", *latents):
        assert line in done.stdout
    assert "FAIL" not in done.stdout and "tokenizer:" not in done.stdout


@pytest.fixture
def snapshot(toy, tmp_path) -> pathlib.Path:
    """The bundle in the layout of the Hugging Face hub's cache: every file is a link to a blob named by its hash."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1a2b", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    for path in toy.folder.rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(toy.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_of_links_into_a_cache_draws_and_verifies_itself(snapshot, toy, tmp_path):
    assert (snapshot / "golden" / "noise.npy").readlink().parts[:4] == ("..", "..", "..", "blobs")
    images = LiteRTGenerator(snapshot).generate(PROMPTS)
    np.testing.assert_array_equal(images, LiteRTGenerator(toy.folder).generate(PROMPTS))
    (tmp_path / "linked").symlink_to(snapshot)
    for folder, argument in ((tmp_path, "cache/snapshots/1a2b/verify.py"), (tmp_path / "linked", "verify.py")):
        done = subprocess.run([sys.executable, argument, "--precision=f32"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "checks passed" in done.stdout and "FAIL" not in done.stdout


def test_the_client_of_a_bundle_of_links_finds_its_neighbours(snapshot):
    code = "print(Bundle(sys.path[0]).manifest['schema'], draw_noise(0, 0, (1,)))"
    done = subprocess.run([sys.executable, "-i", snapshot / "client.py"], input=code, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "[-0.52292746]"], done.stderr


def test_every_file_is_in_the_manifest(toy):
    files = json.loads((toy.folder / "manifest.json").read_text())["files"]
    on_disk = {path.relative_to(toy.folder).as_posix() for path in toy.folder.rglob("*") if path.is_file()}
    assert {name for name in on_disk if "__pycache__" not in name} == {*files, "manifest.json"}


def test_a_changed_byte_is_found(copy):
    path = copy / "net_f16.tflite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert failures(copy) == ["file net_f16.tflite"]


def test_a_missing_file_is_found(copy):
    (copy / "golden" / "latents.npy").unlink()
    assert failures(copy) == ["file golden/latents.npy"]


def test_a_manifest_that_points_outside_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert failures(copy) == ["file ../../etc/passwd"]


@pytest.mark.parametrize(
    "change",
    [{"step": {"guidance": 2.2}}, {"times": [1.0, 0.7, 0.3, 0.0]}, {"decoder": {"scale": 2.1}}],
)
def test_golden_values_notice_another_sampler(copy, change):
    program = json.loads((copy / "program.json").read_text())
    for name, value in change.items():
        program[name] = {**program[name], **value} if isinstance(value, dict) else value
    (copy / "program.json").write_text(json.dumps(program))
    resign(copy)
    assert any("golden" in name for name in failures(copy))


def test_golden_values_notice_other_weights(copy, toy):
    params = {"net": {**toy.params["net"], "conv": toy.params["net"]["conv"] * 1.001}}
    unit = toy.recipe.exports().units[0]
    to_tflite(unit.function, params, unit.inputs, unit.name, copy / "net_f32.tflite", QUICK)
    resign(copy)
    assert {name.split(" latent")[0] for name in failures(copy)} >= {"f32 golden 0", "f32 golden 1"}


def export_toy(toy, tokenizer_json, folder, **options):
    options = {"backend": QUICK, "golden_inputs": GoldenInputs(prompts=PROMPTS[:1]), **options}
    return export_bundle(toy.recipe, toy.params, {}, tokenizer_json, folder, **options)


def test_a_failed_export_leaves_nothing_and_keeps_the_earlier_bundle(toy, tokenizer_json, tmp_path, monkeypatch):
    def wrong(inputs, noise):
        return generator_of(toy.recipe, toy.params, {})(inputs, 1.1 * noise)

    with pytest.raises(VerificationError, match=r"differ by \d+ grey levels"):
        export_toy(toy, tokenizer_json, tmp_path / "bundle", reference=wrong)
    assert list(tmp_path.iterdir()) == []

    export_toy(toy, tokenizer_json, tmp_path / "bundle", reference=generator_of(toy.recipe, toy.params, {}))
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    monkeypatch.setitem(compare.LIMITS, "f16", 1e-7)
    with pytest.raises(VerificationError, match="net in f16: LiteRT differs from JAX by"):
        export_toy(toy, tokenizer_json, tmp_path / "bundle", precisions=("f32", "f16"))
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before
    assert failures(tmp_path / "bundle") == []
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_and_may_hold_float16_alone(toy, tokenizer_json, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(toy.folder, folder)
    report = export_toy(toy, tokenizer_json, folder, precisions=("f16",))
    assert sorted(path.name for path in folder.glob("*.tflite")) == ["net_f16.tflite", "text_f16.tflite"]
    assert "export.bytes_f32" not in report.numbers
    assert failures(folder) == []


def test_a_folder_with_other_files_is_not_overwritten(toy, tokenizer_json, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds files and is no bundle"):
        export_toy(toy, tokenizer_json, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file; give --out a folder"):
        export_toy(toy, tokenizer_json, tmp_path / "thesis.txt")


def test_large_activations_are_refused_or_named(toy, tokenizer_json, tmp_path, caplog):
    params = {**toy.params, "net": {**toy.params["net"], "conv": toy.params["net"]["conv"] * 1e4}}
    with pytest.raises(VerificationError, match=r"net: .* reaches .*, and float16 ends at 65504"):
        export_bundle(toy.recipe, params, {}, tokenizer_json, tmp_path / "b", backend=QUICK)
    with caplog.at_level("WARNING", logger=bundle_module.__name__):
        report = export_bundle(toy.recipe, params, {}, tokenizer_json, tmp_path / "b", backend=QUICK, gpu_check="skip")
    assert report.numbers["export.net.max_activation"] > 32_768
    assert "float16 ends at 65504" in caplog.text


def test_activations_are_looked_at_over_other_prompts_and_all_steps(toy):
    seen = json.loads((toy.folder / "manifest.json").read_text())["units"]["net"]["max_activation"]
    assert seen["calls"] >= bundle_module.ACTIVATION_EXAMPLES * toy.recipe.STEPS


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_in_any_output_fails(bad):
    good = {"first": np.ones(3, np.float32), "second": np.ones(3, np.float32)}
    for outputs, expected in ((good, {**good, "second": np.full(3, bad)}), ({**good, "second": np.full(3, bad)}, good)):
        errors = compare.compare(lambda e=expected: e, lambda o=outputs: o, {"a case": {}})
        with pytest.raises(VerificationError, match=r"inf at a case.*NaN or infinity"):
            compare.hold("net", "f32", errors)


def test_verify_finds_a_network_that_gives_no_number(copy, toy):
    params = {"net": {**toy.params["net"], "time": toy.params["net"]["time"] * np.nan}}
    unit = toy.recipe.exports().units[0]
    to_tflite(unit.function, params, unit.inputs, unit.name, copy / "net_f32.tflite", QUICK)
    resign(copy)
    found = failures(copy)
    assert "f32 every output of every unit" in found and "f16 every output of every unit" not in found
    assert any("f32 golden 0 latent after" in name for name in found)


def test_verify_finds_nan_in_an_output_that_a_picture_hides(sketch, tmp_path):
    copy = pathlib.Path(shutil.copytree(sketch.folder, tmp_path / "bundle"))
    unit = sketch.recipe.exports().units[0]

    def one_pixel(weights, *, image):
        made = unit.function(weights, image=image)
        hole = np.zeros((1, 8, 8, 1), np.float32)
        hole[0, 0, 0] = np.nan
        return {**made, "edges": made["edges"] + hole}

    for precision in ("f32", "f16"):
        path = copy / f"translator_{precision}.tflite"
        to_tflite(one_pixel, unit.select(sketch.params), unit.inputs, unit.name, path, QUICK)
    resign(copy)
    assert {"f32 every output of every unit", "f16 every output of every unit"} <= set(failures(copy))
