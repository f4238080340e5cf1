"""The browser app: a static page on LiteRT.js that draws with a bundle."""

from __future__ import annotations

import pathlib
import shutil

from snapgen_jax.export.apps import copy_bundle
from snapgen_jax.export.apps.litertjs import litert_js, version
from snapgen_jax.export.client import MANIFEST_SCHEMA, PACKED_SCHEMA, Bundle
from snapgen_jax.export.program import BundleError
from snapgen_jax.training.exits import ConfigError

TEMPLATE = pathlib.Path(__file__).with_name("web")
SERVER = pathlib.Path(__file__).with_name("serve.py")
# With threads, without, and for browsers without relaxed SIMD; the fourth, for JSPI, is not used.
BUILDS = ("litert_wasm_internal", "litert_wasm_threaded_internal", "litert_wasm_compat_internal")
CHANGED = "// Changed by snapgen_jax: it imports wasm-utils.js beside it, by a path that a browser finds.\n"

README = """\
# {model} in a browser

    python serve.py          # then open http://localhost:8000

The page draws on the device that opens it: nothing is sent anywhere. It runs on LiteRT.js {version}.

- `serve.py` needs Python alone. `--port=8001` takes another port, `--open` opens the browser, and `--threads` lets
  WebAssembly use several cores (it sends the headers COOP and COEP).
- Any server of static files will do: upload this folder. Browsers give GPU, cache and threads to `https://` and to
  `localhost` alone; on other addresses the page draws on the CPU.
- On a phone: by USB, `adb reverse tcp:8000 tcp:8000` makes `http://localhost:8000` of the phone this server. In the
  same network, `python serve.py --host=0.0.0.0` and the address of this machine, without the GPU.
- The page chooses WebGPU where a recorded call comes out right there, and WebAssembly otherwise; "Options" says what
  it found, and checks the bundle's golden examples. `?accelerator=wasm` and `?precision=f32` choose for it.

| file | |
|---|---|
| `index.html`, `page.js`, `page.css`, `inputs.js`, `show.js` | the page |
| `worker.js`, `client.js`, `choice.js`, `files.js`, `litert.js` | what runs a bundle: where, from which files |
| `program.js`, `sampler.js`, `codec.js`, `noise.js`, `tokenizer.js`, `npy.js`, `arrays.js` | the arithmetic, no DOM |
| `verify.js` | the golden examples |
| `bundle/` | the bundle; its README.md says what is in it |
| `litert/` | LiteRT.js |

Licences: the page is part of snapgen_jax, and LiteRT.js (`litert/`, by Google, npm package `@litertjs/core`) comes
unchanged but for one import; both are under the Apache License 2.0, `litert/LICENSE`. {licence}
"""


def write(bundle: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the app into an empty folder.

    Args:
        bundle: of the current schema, since the page tests the accelerator with the bundle's recorded calls.
        out: the folder.

    Raises:
        ConfigError: the bundle is none, or of an earlier schema.
        UnavailableError: LiteRT.js cannot be fetched.
    """
    try:
        opened = Bundle(bundle)
    except BundleError as error:
        raise ConfigError(f"{bundle}: {error}") from error
    if opened.schema not in (MANIFEST_SCHEMA, PACKED_SCHEMA):
        raise ConfigError(
            f"{bundle} is a bundle of schema {opened.schema}, and the page needs {MANIFEST_SCHEMA}, which has recorded "
            "calls to test a browser with; export the run again"
        )
    library = litert_js()
    shutil.copytree(TEMPLATE, out, dirs_exist_ok=True)
    shutil.copyfile(SERVER, out / "serve.py")
    _copy_library(library, out / "litert")
    copy_bundle(bundle, out / "bundle")
    licence = opened.manifest.get("licence")
    page = README.format(
        model=opened.manifest.get("model") or "SnapGen",
        version=version(),
        licence=f"The weights: {licence}."
        if licence
        else "The manifest of the bundle names no licence of the weights.",
    )
    (out / "README.md").write_text(page, "utf-8")


def _copy_library(library: pathlib.Path, place: pathlib.Path) -> None:
    """LiteRT.js as a folder that a browser loads: a worker has no map from package names to files."""
    place.mkdir(exist_ok=True)
    for build in BUILDS:
        for ending in (".js", ".wasm"):
            shutil.copyfile(library / "core" / "wasm" / (build + ending), place / (build + ending))
    code = (library / "core" / "dist" / "index.js").read_text("utf-8")
    package = '"@litertjs/wasm-utils"'
    if code.count(package) != 1:
        raise RuntimeError(f"LiteRT.js {version()} imports {package} {code.count(package)} times; once was expected")
    code = code.replace(package, '"./wasm-utils.js"')
    (place / "index.js").write_text(CHANGED + _without_map(code), "utf-8")
    utilities = (library / "wasm-utils" / "dist" / "index.js").read_text("utf-8")
    (place / "wasm-utils.js").write_text(_without_map(utilities), "utf-8")


def _without_map(code: str) -> str:
    """The code without the name of a source map, which is not copied."""
    return "".join(line for line in code.splitlines(True) if not line.startswith("//# sourceMappingURL="))
