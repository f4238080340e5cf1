"""Every unit is right on LiteRT's GPU accelerator, where a Vulkan driver is found; its crash is no crash of ours."""

import json
import os
import sys

import numpy as np
import pytest

from snapgen_jax.export import gpu, runtime
from snapgen_jax.export.compare import VerificationError
from snapgen_jax.export.verify import relative_l2

from .conftest import Exported
from .files import binary_file
from .test_bundle import export_toy

X = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory):
    """Skips where there is none, with the reason."""
    path = binary_file(tmp_path_factory.mktemp("gpu") / "add.tflite", "ADD", (6, 8), (8,))
    try:
        gpu.run(path, "f", [{"x": X}])
    except gpu.NoGPUError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["smoke", "toy", "sketch", "clip"])
def test_every_unit_of_every_bundle_is_right_on_a_gpu(accelerator, name, request):
    exported: Exported = request.getfixturevalue(name)
    manifest = json.loads((exported.folder / "manifest.json").read_text())
    for unit, described in manifest["units"].items():
        assert described["gpu"]["checked"], described["gpu"]
        assert 0 <= exported.report.numbers[f"export.{unit}.rel_l2_gpu"] <= 1e-4
        assert {"f32", "f16"} <= described["gpu"]["rel_l2"].keys() == set(manifest["precisions"])


def test_the_pattern_that_the_gate_refuses_is_garbage_on_a_gpu(accelerator, tmp_path):
    path = binary_file(tmp_path / "add.tflite", "ADD", (6, 8), (1, 6, 8))
    table = np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32)
    run = gpu.run(path, "f", [{"x": X}])
    assert run.whole and relative_l2(run.outputs[0]["y"], X + table) > 0.1


def test_each_case_gets_its_own_outputs(accelerator, tmp_path):
    path = binary_file(tmp_path / "add.tflite", "MUL", (6, 8), (8,))
    table = np.random.default_rng(0).standard_normal(8).astype(np.float32)
    for x, outputs in zip((X, -X), gpu.run(path, "f", [{"x": X}, {"x": -X}]).outputs, strict=True):
        np.testing.assert_allclose(outputs["y"], x * table, rtol=1e-6)


def with_driver(monkeypatch, child):
    monkeypatch.setattr(runtime, "drivers", lambda **_: ("/some/icd.json",))
    monkeypatch.setattr(runtime, "_COMMAND", (sys.executable, "-c", child))


@pytest.mark.parametrize(
    "child, seconds, error, message",
    [
        ("import os; os.kill(os.getpid(), 11)", 60, gpu.GPURunError, "ended with signal 11"),
        ("import time; time.sleep(60)", 0.2, gpu.GPURunError, "not done after 0.2 seconds .driver /some/icd.json."),
        ("raise RuntimeError('no such operator')", 60, gpu.GPURefusedError, "no such operator"),
        (
            "import sys; print('No adapters found', file=sys.stderr); raise RuntimeError",
            60,
            gpu.NoGPUError,
            "there is no device .*apt-get install",
        ),
    ],
)
def test_what_a_driver_does_wrong_is_said(monkeypatch, tmp_path, child, seconds, error, message):
    with_driver(monkeypatch, child)
    monkeypatch.setattr(runtime, "SECONDS", seconds)
    with pytest.raises(error, match=message):
        gpu.run(tmp_path / "x.tflite", "f", [{"x": X}])


def test_without_a_driver_the_bundle_says_that_no_gpu_was_tried(monkeypatch, toy, tokenizer_json, tmp_path, caplog):
    monkeypatch.setattr(runtime, "drivers", lambda **_: ())
    with caplog.at_level("WARNING"):
        report = export_toy(toy, tokenizer_json, tmp_path / "bundle")
    assert "NOT checked on a GPU accelerator: no Vulkan driver was found" in caplog.text
    units = json.loads((report.folder / "manifest.json").read_text())["units"]
    assert not units["net"]["gpu"]["checked"] and "apt-get install chromium" in units["net"]["gpu"]["reason"]
    assert not any("rel_l2_gpu" in name for name in report.numbers)


def test_a_unit_that_is_wrong_on_a_gpu_fails_the_export_unless_told_otherwise(
    monkeypatch, toy, tokenizer_json, tmp_path
):
    def garbage(path, signature, cases):
        outputs = {"prediction": np.ones((1, 4, 4, 3), np.float32)}
        return gpu.Run(tuple(outputs for _ in cases), whole=True)

    monkeypatch.setattr(gpu, "run", garbage)
    with pytest.raises(VerificationError, match=r"net in f32: LiteRT.s GPU accelerator differs from JAX .* --gpu=skip"):
        export_toy(toy, tokenizer_json, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    report = export_toy(toy, tokenizer_json, tmp_path / "bundle", gpu_check="skip")
    units = json.loads((report.folder / "manifest.json").read_text())["units"]
    assert units["net"]["gpu"] == {"checked": False, "reason": "--gpu=skip"}


def test_the_driver_in_software_comes_alone_for_a_check_and_last_for_a_client(monkeypatch, tmp_path):
    for name in ("swift.json", "card.json"):
        (tmp_path / name).write_text("{}")
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.delenv(variable, raising=False)
    swift, card = (str(tmp_path / name) for name in ("swift.json", "card.json"))
    monkeypatch.setattr(runtime, "SOFTWARE", (swift,))
    monkeypatch.setattr(runtime, "HARDWARE", (str(tmp_path / "c*.json"),))
    assert runtime.drivers(software_first=True) == (swift,)
    assert runtime.drivers(software_first=False) == (card, swift)
    monkeypatch.setenv("VK_ICD_FILENAMES", f"{card}{os.pathsep}/gone.json")
    assert runtime.drivers(software_first=True) == (card,)
