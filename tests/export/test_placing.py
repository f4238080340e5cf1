"""Where a client's units run: on LiteRT's CompiledModel, with a self-test, a reason for each fallback, and progress."""

import gc
import json
import os
import shutil
import time

import numpy as np
import psutil
import pytest

from snapgen_jax.cli import main
from snapgen_jax.export import client, runtime, verify
from snapgen_jax.export.client import Cancelled, LiteRTGenerator, Placed
from snapgen_jax.export.runtime import AcceleratorError, CompiledUnit, litert_unit
from snapgen_jax.export.verify import grey_levels

from .conftest import PROMPTS


@pytest.fixture(scope="module")
def images(small_bundle):
    return LiteRTGenerator(small_bundle).generate(PROMPTS)


def unit_of(folder, name="unet"):
    inputs = {path.stem: np.load(path) for path in (folder / "golden" / "self_test" / name / "inputs").iterdir()}
    return folder / f"{name}_f32.tflite", inputs


def test_a_compiled_model_on_the_cpu_draws_what_the_interpreter_draws(small_bundle, images):
    generator = LiteRTGenerator(small_bundle, accelerator="cpu", residency="in turn")
    assert grey_levels(generator.generate(PROMPTS), images).max() <= 1
    assert generator.bundle.placed == {"text_encoder": Placed("cpu"), "unet": Placed("cpu")}
    path, inputs = unit_of(small_bundle)
    compiled, plain = CompiledUnit(path, "unet", "cpu", num_threads=1), litert_unit(path, "unet", 1)
    np.testing.assert_allclose(compiled(**inputs)["prediction"], plain(**inputs)["prediction"], rtol=1e-5, atol=1e-5)


def test_a_gpu_passes_the_golden_suite_and_auto_leaves_one_in_software_alone(small_bundle, monkeypatch):
    found = runtime.drivers(software_first=True)
    monkeypatch.setenv("VK_DRIVER_FILES", os.pathsep.join(found))
    checks = list(verify.checks(small_bundle, ["f32"], accelerator="gpu"))
    if "Vulkan" in checks[-1].finding:
        pytest.skip(checks[-1].finding)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert sum("latent after step" in check.name or "self-test" in check.name for check in checks) == 4
    if "swiftshader" in found[0]:
        bundle = LiteRTGenerator(small_bundle, accelerator="auto").bundle
        assert bundle.placed["unet"].reason.startswith("the only GPU is a driver in software")


def test_without_a_gpu_auto_says_why_and_gpu_is_refused(small_bundle, images, monkeypatch, caplog, capsys, tmp_path):
    monkeypatch.setattr(runtime, "drivers", lambda **_: ())
    with caplog.at_level("WARNING", logger=client.__name__):
        generator = LiteRTGenerator(small_bundle, accelerator="auto")
    np.testing.assert_array_equal(generator.generate(PROMPTS), images)
    assert "unet runs on the CPU: no Vulkan driver was found" in caplog.text
    assert "text_encoder runs on the CPU: it reads token ids" in caplog.text
    assert generator.bundle.placed["unet"].reason.startswith("no Vulkan driver was found")
    with pytest.raises(AcceleratorError, match="no Vulkan driver was found"):
        LiteRTGenerator(small_bundle, accelerator="gpu")
    assert verify.main([str(small_bundle), "--precision=f32", "--accelerator=gpu"]) == 1
    assert "FAIL  f32 on the accelerator gpu: no Vulkan driver was found" in capsys.readouterr().out
    sample = ["sample", f"--bundle={small_bundle}", "--prompt=a ring", f"--out={tmp_path / 'a.png'}"]
    assert main([*sample, "--accelerator=gpu"]) == 78
    assert "--accelerator=gpu: no Vulkan driver was found" in capsys.readouterr().err
    assert main([*sample, "--accelerator=auto", "--precision=int8"]) == 0
    with pytest.raises(ValueError, match="the accelerator is 'cpu', 'gpu' or 'auto'"):
        LiteRTGenerator(small_bundle, accelerator="npu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x, ""),
        (lambda x: x * np.nan, "unet in f32 fails its self-test on LiteRT's GPU: .* is NaN or infinity"),
        (lambda x: -x, "fails its self-test .* is off by 2 .* at most 0.02"),
    ],
)
def test_a_gpu_that_computes_garbage_is_not_used(small_bundle, images, monkeypatch, change, reason):
    calls = []

    class GPU:
        software = False

        def __init__(self, path, signature, accelerator, num_threads=None):
            assert accelerator == "gpu"
            self.unit = litert_unit(path, signature)

        def __call__(self, **inputs):
            calls.append(1)
            return {name: change(array) for name, array in self.unit(**inputs).items()}

    monkeypatch.setattr(client, "CompiledUnit", GPU)
    generator = LiteRTGenerator(small_bundle, accelerator="auto", residency="in turn")
    np.testing.assert_array_equal(generator.generate(PROMPTS), images)
    placed = generator.bundle.placed["unet"]
    assert placed.accelerator == ("cpu" if reason else "gpu")
    assert len(calls) == (1 if reason else 17), "the self-test once, then two calls for each step of each example"
    if reason:
        with pytest.raises(AcceleratorError, match=reason):
            raise AcceleratorError(placed.reason)


def test_verify_runs_on_a_compiled_model(small_bundle, capsys):
    assert verify.main([str(small_bundle), "--precision=int8", "--accelerator=cpu"]) == 0
    assert "int8 unet self-test" in capsys.readouterr().out


def test_a_process_that_dies_is_an_error_and_one_that_is_not_used_ends(small_bundle):
    path, inputs = unit_of(small_bundle)
    units = [CompiledUnit(path, "unet", "cpu") for _ in range(2)]
    processes = [unit._process.pid for unit in units]
    psutil.Process(processes[0]).kill()
    with pytest.raises(AcceleratorError, match="its process ended with signal 9"):
        units[0](**inputs)
    del units
    gc.collect()
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, processes))


def test_progress_names_each_step_and_can_cancel(small_bundle, sketch):
    generator, seen = LiteRTGenerator(small_bundle), []
    expected = generator.generate(PROMPTS, steps=3)
    images = generator.generate(PROMPTS, steps=3, progress=seen.append)
    np.testing.assert_array_equal(images, expected)
    assert [(one.example, one.examples, one.step, one.steps) for one in seen] == [
        (example, 2, step, 3) for example in (0, 1) for step in (1, 2, 3)
    ]
    assert all(one.latent.shape == (8, 8, 48) for one in seen)
    with pytest.raises(Cancelled, match="after step 2 of 3 of example 1 of 2"):
        generator.generate(PROMPTS, steps=3, progress=lambda one: one.step < 2)
    np.testing.assert_array_equal(generator.generate(PROMPTS, steps=3), expected)
    pictures = np.load(sketch.folder / "golden" / "inputs" / "image.npy")
    seen.clear()
    LiteRTGenerator(sketch.folder).run({"image": pictures}, progress=seen.append)
    assert [(one.example, one.step, one.steps, one.latent) for one in seen] == [(0, 1, 1, None), (1, 1, 1, None)]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            6,
            r"this bundle is newer than its client: .* has schema 6, and this client knows 1 to 5\. Update snapgen-jax",
        ),
        ("4", "has schema '4'; a whole number from 1"),
        (0, "has schema 0; a whole number from 1"),
    ],
)
def test_a_manifest_of_another_schema(small_bundle, tmp_path, schema, message):
    manifest = json.loads((small_bundle / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema": schema}))
    with pytest.raises(client.BundleError, match=message):
        client.Bundle(tmp_path)


def test_a_bundle_of_schema_3_draws_what_it_drew(small_bundle, images, tmp_path):
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": 3}))
    golden = json.loads((folder / "golden" / "golden.json").read_text())
    del golden["self_test"]
    (folder / "golden" / "golden.json").write_text(json.dumps(golden))
    np.testing.assert_array_equal(LiteRTGenerator(folder).generate(PROMPTS), images)
    with pytest.raises(client.BundleError, match="no recorded calls to try an accelerator with; export it anew"):
        LiteRTGenerator(folder, accelerator="cpu")


def test_the_order_of_a_files_tensors_is_that_of_its_buffers(small_bundle):
    from ai_edge_litert.compiled_model import CompiledModel

    for name, unit in json.loads((small_bundle / "manifest.json").read_text())["units"].items():
        for file in unit["files"].values():
            (found,) = CompiledModel.from_file(str(small_bundle / file)).get_signature_list().values()
            assert (found["inputs"], found["outputs"]) == (unit["input_order"], unit["output_order"]), (name, file)
        assert unit["input_order"] != sorted(unit["input_order"])
