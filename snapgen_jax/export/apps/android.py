"""An Android project around a bundle: a Kotlin core, an app on LiteRT's CompiledModel, and a desktop adapter."""

from __future__ import annotations

import json
import pathlib
import shutil
from xml.sax.saxutils import escape

from snapgen_jax.export.apps import copy_bundle
from snapgen_jax.export.packed import unpacked_bytes

TEMPLATE = pathlib.Path(__file__).with_name("android")
# An APK of more is refused by devices and by Play: a larger bundle is pushed to the phone.
LARGEST_IN_APK = 1_500_000_000
ASSETS = pathlib.PurePosixPath("app/src/main/assets/bundle")
STRINGS = pathlib.PurePosixPath("app/src/main/res/values/strings.xml")


def write(bundle: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the project into `out`, with the bundle inside.

    Args:
        bundle: the folder of an export bundle.
        out: a folder that is not there yet, or is empty. The bundle becomes an asset of the app; one of more than
            `LARGEST_IN_APK` bytes becomes `out/bundle`, which README.md says how to push to a phone.

    Raises:
        ConfigError: the bundle lists a file that is not there.
    """
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    shutil.copytree(TEMPLATE, out, dirs_exist_ok=True)
    size = unpacked_bytes(manifest)
    copy_bundle(bundle, out / (ASSETS if size <= LARGEST_IN_APK else "bundle"))
    strings = out / STRINGS
    strings.write_text(strings.read_text("utf-8").replace("SnapGen", app_name(manifest.get("model"))), "utf-8")


def app_name(model: str | None) -> str:
    """The app's name as the text of an Android string resource; "SnapGen" where the model has no name."""
    name = " ".join((model or "").split()) or "SnapGen"
    for letter in "\\'\"":  # which Android gives a meaning of their own
        name = name.replace(letter, "\\" + letter)
    return escape("\\" + name if name[0] in "@?" else name)
