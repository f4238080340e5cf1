"""The Android project that is written around a bundle: whole, with the bundle inside, and of one version throughout."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from snapgen_jax.cli import main
from snapgen_jax.export.apps import android, write_app
from snapgen_jax.export.manifest import MINIMUM_RUNTIME, fingerprints
from snapgen_jax.training.exits import ConfigError, ExitCode

from .kotlin_build import PROBE, STUBS

STRINGS = "app/src/main/res/values/strings.xml"


def bundle_in(folder, **manifest):
    """A folder that looks like a bundle, as far as the writer looks."""
    (folder / "golden").mkdir(parents=True)
    (folder / "golden" / "noise.npy").write_bytes(b"noise")
    (folder / "unet_f16.tflite").write_bytes(b"TFL3" * 100)
    written = {"schema": 4, "precisions": ["f16"], "units": {}, **manifest, "files": fingerprints(folder)}
    (folder / "manifest.json").write_text(json.dumps(written))
    return folder


def test_the_project_holds_all_of_the_template_and_the_bundle(tmp_path):
    bundle, out = bundle_in(tmp_path / "bundle"), tmp_path / "phone"
    out.mkdir()
    android.write(bundle, out)
    assert fingerprints(out / android.ASSETS) == fingerprints(bundle)
    written = {name: found for name, found in fingerprints(out).items() if not name.startswith(str(android.ASSETS))}
    assert written == fingerprints(android.TEMPLATE)
    modules = re.findall(r"include\((.*)\)", (out / "settings.gradle.kts").read_text())
    for module in re.findall(r'":(\w+)"', " ".join(modules)):
        assert (out / module / "build.gradle.kts").is_file() and list((out / module).rglob("*.kt"))


def test_the_command_writes_a_project_and_never_over_one_that_may_have_been_changed(tmp_path, capsys):
    bundle, out = bundle_in(tmp_path / "bundle"), tmp_path / "phone"
    command = ["export", "--app=android", f"--bundle={bundle}", f"--out={out}"]
    assert main(command) == ExitCode.DONE
    assert f"wrote the app to {out}; open that folder in Android Studio" in capsys.readouterr().out
    screen = next(out.rglob("StudioScreen.kt"))
    screen.write_text("// mine")
    assert main(command) == ExitCode.BAD_CONFIG
    assert "never replaced: it may hold changes of yours. Name another folder, or move" in capsys.readouterr().err
    assert screen.read_text() == "// mine"
    (bundle / "unet_f16.tflite").unlink()
    with pytest.raises(ConfigError, match=r"lists 'unet_f16\.tflite' and has no such file; export it again"):
        write_app("android", bundle, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "model, name, shown",
    [
        ("quickstart", "quickstart", "quickstart"),
        (
            'Tom\'s "<best> & fast" \\ net',
            r"Tom\'s \"&lt;best&gt; &amp; fast\" \\ net",
            r"Tom\'s \"<best> & fast\" \\ net",
        ),
        ("@string/evil", r"\@string/evil", r"\@string/evil"),
        ("two\n lines", "two lines", "two lines"),
        ("", "SnapGen", "SnapGen"),
        (None, "SnapGen", "SnapGen"),
    ],
)
def test_the_app_has_the_name_of_the_model_whatever_it_holds(tmp_path, model, name, shown):
    android.write(bundle_in(tmp_path / "bundle", model=model), tmp_path / "phone")
    text = (tmp_path / "phone" / STRINGS).read_text("utf-8")
    assert f">{name}<" in text
    (entry,) = ElementTree.fromstring(text)
    assert entry.text == shown


def test_a_bundle_that_is_too_large_for_an_apk_lies_beside_the_app(tmp_path, monkeypatch):
    monkeypatch.setattr(android, "LARGEST_IN_APK", 300)
    bundle, out = bundle_in(tmp_path / "bundle"), tmp_path / "phone"
    android.write(bundle, out)
    assert fingerprints(out / "bundle") == fingerprints(bundle)
    assert not (out / android.ASSETS).exists()
    assert "adb push bundle" in (out / "README.md").read_text("utf-8")


def test_the_project_names_the_versions_that_are_tested(tmp_path):
    versions = (android.TEMPLATE / "gradle" / "libs.versions.toml").read_text()
    locked = json.loads((PROBE / "package-lock.json").read_text())["packages"]["node_modules/kotlin-compiler"]
    assert f'kotlin = "{locked["version"]}"' in versions and locked["integrity"].startswith("sha512-")
    assert "package com.google.ai.edge.litert" in (STUBS / "LiteRt.kt").read_text()
    setup = (android.TEMPLATE.parents[3] / "setup.py").read_text()
    (litert,) = re.findall(r'"ai-edge-litert==([\d.]+)"', setup)
    assert f'litert = "{litert}"' in versions and litert == MINIMUM_RUNTIME["android"]
    for module in ("litert", "litert-gpu"):  # without the second everything runs on the CPU, in silence
        assert f'module = "com.google.ai.edge.litert:{module}"' in versions
        assert (
            f"implementation(libs.{module.replace('-', '.')})"
            in (android.TEMPLATE / "app" / "build.gradle.kts").read_text()
        )


def test_every_xml_file_is_well_formed_and_names_what_is_there():
    for path in android.TEMPLATE.rglob("*.xml"):
        ElementTree.parse(path)
    manifest = (android.TEMPLATE / "app/src/main/AndroidManifest.xml").read_text()
    for kind, name in re.findall(r'"@(xml|string)/(\w+)"', manifest):
        place = android.TEMPLATE / "app/src/main/res"
        assert (place / kind / f"{name}.xml").is_file() or f'name="{name}"' in (
            place / "values/strings.xml"
        ).read_text()
    assert (android.TEMPLATE / "app/src/main/kotlin/dev/snapgen/app/MainActivity.kt").is_file()
