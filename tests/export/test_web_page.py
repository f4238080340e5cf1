"""The browser app in headless Chromium, on LiteRT.js: what it draws, and what it says when something is wrong."""

import contextlib
import json
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest

from snapgen_jax.export.apps import serve, write_app
from snapgen_jax.export.apps.litertjs import UnavailableError, litert_js
from snapgen_jax.export.client import LiteRTGenerator
from snapgen_jax.export.verify import grey_levels

from .chromium import BROWSER, SWIFTSHADER, Page, launch
from .conftest import resign

pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium (apt-get install chromium, or make gpu-driver)")

STATE = "document.getElementById('stage')?.dataset.state"
STATUS = "document.getElementById('status').textContent"
PICTURE = """(() => {
    const canvas = document.getElementById("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.height, canvas.width, ...data];
})()"""


class Site:
    """Apps under one server."""

    def __init__(self, folder: pathlib.Path, address: str) -> None:
        self.folder, self.address = folder, address

    def variant(self, name: str) -> pathlib.Path:
        """The bundle of a copy of the app, to be changed; the copy's other files are links."""
        copy = self.folder / name
        copy.mkdir()
        for path in (self.folder / "app").iterdir():
            if path.name != "bundle":
                (copy / path.name).symlink_to(path)
        return pathlib.Path(shutil.copytree(self.folder / "app" / "bundle", copy / "bundle"))


@contextlib.contextmanager
def _serve(folder: pathlib.Path, threads: bool = False):
    httpd = serve.server(folder, "127.0.0.1", 0, threads)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://localhost:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture(scope="module")
def site(small_bundle, tmp_path_factory):
    try:
        litert_js()
    except UnavailableError as error:
        pytest.skip(f"needs LiteRT.js: {error}")
    folder = tmp_path_factory.mktemp("site")
    write_app("web", small_bundle, folder / "app")
    with _serve(folder) as address:
        yield Site(folder, address)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    elsewhere = "--host-resolver-rules=MAP elsewhere.test 127.0.0.1"
    with launch(tmp_path_factory.mktemp("profile"), [*SWIFTSHADER, elsewhere]) as found:
        yield found


@pytest.fixture
def page(browser):
    found = browser.page()
    yield found
    refused = [line for line in found.console if "Content Security Policy" in line or line.startswith("exception")]
    found.send("Page.close")
    assert not refused


def _opened(page: Page, address: str) -> dict:
    """{unit: where it runs}, once the page is ready."""
    page.open(address)
    page.wait(f"{STATE} === 'empty'")
    return json.loads(page.evaluate("document.documentElement.dataset.ready"))


def _failed(page: Page, address: str) -> str:
    page.open(address)
    page.wait(f"{STATE} === 'failed'")
    return page.evaluate("document.getElementById('stagetext').textContent")


def _check(page: Page) -> list[str]:
    page.evaluate("document.getElementById('check').click()")
    page.wait("!document.getElementById('check').disabled", 120)
    assert "checks passed" in page.evaluate(STATUS), page.text()
    return page.evaluate("[...document.querySelectorAll('#checks li.good')].map((line) => line.textContent)")


def _fill(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        page.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}")


def _click(page: Page, name: str) -> None:
    page.evaluate(f"document.getElementById('{name}').click()")


def _drawn(page: Page, **fields: object) -> np.ndarray:
    """The picture `[H, W, 3]` that the page draws."""
    _fill(page, **fields)
    _click(page, "draw")
    page.wait(f"{STATE} === 'drawn' && / s, seed /.test({STATUS})", 120)
    height, width, *pixels = page.evaluate(PICTURE)
    return np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]


@pytest.mark.parametrize("precision", ["f32", "f16", "int8"])
def test_every_golden_latent_comes_out_by_webassembly(site, page, precision):
    units = _opened(page, f"{site.address}/app/?accelerator=wasm&precision={precision}")
    assert {(way["accelerator"], way["precision"]) for way in units.values()} == {("wasm", precision)}
    checks = _check(page)
    assert len([check for check in checks if "latent after step" in check]) == 8
    assert len(checks) == 14


def test_a_bundle_of_several_sizes_draws_at_its_own(site, page, two_sizes):
    write_app("web", two_sizes, site.folder / "sizes")
    _opened(page, f"{site.address}/sizes/?accelerator=wasm&precision=int8")
    assert [check for check in _check(page) if "latent after step" in check]


def test_every_golden_latent_comes_out_by_webgpu(site, page):
    page.open(f"{site.address}/app/?accelerator=webgpu")
    if not page.evaluate("navigator.gpu?.requestAdapter().then((adapter) => adapter !== null) ?? false"):
        pytest.skip("this Chromium offers no WebGPU adapter")
    units = _opened(page, f"{site.address}/app/?accelerator=webgpu")
    assert (units["unet"]["accelerator"], units["unet"]["precision"]) == ("webgpu", "f16")
    assert units["text_encoder"]["accelerator"] == "wasm", "a GPU looks nothing up in a table of embeddings"
    assert len([check for check in _check(page) if "latent after step" in check]) == 8


def test_by_itself_it_takes_int8_on_the_cpu_where_the_gpu_is_software(site, page):
    units = _opened(page, f"{site.address}/app/")
    assert {(way["accelerator"], way["precision"]) for way in units.values()} == {("wasm", "int8")}


def test_a_typed_prompt_becomes_the_picture_of_the_python_client(site, page, small_bundle):
    _opened(page, f"{site.address}/app/?accelerator=wasm&precision=f32")
    generator = LiteRTGenerator(small_bundle)
    prompt = "Zwei GRÜNE Sterne <eos> ΑΣ \u00a0😀"
    expected = generator.generate([prompt], seed=2**32 - 1)[0]
    picture = _drawn(page, prompt=prompt, seed="4294967295")
    assert grey_levels(picture, expected).max() <= 1 and expected.std() > 10
    other = generator.generate([prompt], seed=3, steps=6, guidance=1.0)[0]
    assert grey_levels(_drawn(page, seed="3", steps="6", guidance="1"), other).max() <= 1
    assert grey_levels(other, expected).max() > 10


def test_with_threads_the_page_is_isolated_and_right(site, page):
    with _serve(site.folder, threads=True) as address:
        _opened(page, f"{address}/app/?accelerator=wasm&precision=f32")
        assert page.evaluate("crossOriginIsolated") and len(_check(page)) == 14
        assert page.evaluate("document.getElementById('fact-threads').textContent") == "yes"


def test_a_page_of_another_machine_by_plain_http_draws_without_gpu_and_cache(site, page):
    """As on a phone that opens the laptop's address: browsers keep these from it."""
    units = _opened(page, f"{site.address.replace('localhost', 'elsewhere.test')}/app/?accelerator=webgpu")
    assert not page.evaluate("isSecureContext") and not page.evaluate("'caches' in globalThis")
    assert {way["accelerator"] for way in units.values()} == {"wasm"}
    assert "offers no GPU" in page.evaluate("document.getElementById('notes').textContent")
    _click(page, "dice")
    assert _drawn(page).std() > 10 and page.evaluate("document.getElementById('seed').value") != "0"


def test_a_thousand_steps_leave_the_memory_as_it_was(site, page):
    _opened(page, f"{site.address}/app/?accelerator=wasm&precision=f32")
    memory = "document.getElementById('fact-memory').textContent"
    _drawn(page)
    before = page.evaluate(memory)
    _drawn(page, steps="1000")
    assert page.evaluate(memory) == before and before.endswith("MB of 2.0 GiB")


def test_what_cannot_be_drawn_is_said_and_the_page_goes_on(site, page):
    _opened(page, f"{site.address}/app/?accelerator=wasm&precision=f32")
    before = {"prompt": "two green stars", "seed": "0", "steps": "4", "guidance": "2"}
    for fields, said in (
        ({"seed": "4294967296"}, "from 0 to 4294967295"),
        ({"seed": "-1"}, "from 0 to 4294967295"),
        ({"seed": "1.5"}, "whole number"),
        ({"seed": ""}, "whole number"),
        ({"steps": "0"}, "from 1 to 1000"),
        ({"steps": "many"}, "from 1 to 1000"),
        ({"guidance": "x"}, "Guidance is a number"),
        ({"prompt": "x" * 1_000_000}, "at most 10000"),
    ):
        _fill(page, **{**before, **fields})
        _click(page, "draw")
        page.wait(f"{STATUS}.includes({json.dumps(said)}) && document.getElementById('status').className === 'bad'")
    page.evaluate("document.getElementById('prompt').value = 'half \\ud83d'")
    _click(page, "draw")
    page.wait(f"{STATUS}.includes('half of a character')")
    _drawn(page, **{**before, "prompt": "a red circle and " * 60})
    note = page.evaluate("document.getElementById('notes').textContent")
    assert "tokens are not read" in note
    assert _drawn(page, **{**before, "prompt": ""}).std() > 10


def test_two_clicks_draw_once_and_a_later_one_cancels(site, page):
    _opened(page, f"{site.address}/app/?accelerator=wasm&precision=f32")
    first = _drawn(page, steps="4")
    _fill(page, steps="1000", seed="5")
    page.evaluate("document.getElementById('draw').click(); document.getElementById('draw').click()")
    page.wait(f"/^Step [0-9]+ of 1000/.test({STATUS})")
    assert page.evaluate("document.getElementById('draw').textContent") == "Cancel"
    assert page.evaluate("document.getElementById('download').disabled")
    page.wait("new Promise((resolve) => setTimeout(() => resolve(true), 500))")
    _click(page, "draw")
    page.wait(f"{STATUS} === 'Cancelled.'", 10)
    height, width, *pixels = page.evaluate(PICTURE)
    earlier = np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]
    np.testing.assert_array_equal(earlier, first, "the picture from before is back")
    np.testing.assert_array_equal(_drawn(page, steps="4", seed="0"), first)


def test_a_call_that_does_not_end_is_ended_with_its_worker(site, page):
    _opened(page, f"{site.address}/app/?accelerator=wasm&precision=f32")
    page.evaluate("""
        (() => {
            const send = Worker.prototype.postMessage;
            Worker.prototype.postMessage = function (message, ...others) {
                if (!["draw", "cancel"].includes(message.type)) send.call(this, message, ...others);
            };
            globalThis.mend = () => (Worker.prototype.postMessage = send);
        })()
    """)
    _click(page, "draw")
    page.wait("new Promise((resolve) => setTimeout(() => resolve(true), 500))")
    _click(page, "draw")
    page.wait(f"{STATE} === 'empty' && {STATUS}.includes('loaded again')", 20)
    page.evaluate("mend()")
    assert _drawn(page, steps="4").std() > 10


def _cut(bundle: pathlib.Path) -> str:
    path = bundle / "unet_int8.tflite"
    path.write_bytes(path.read_bytes()[:-100])
    return "unet_int8.tflite is not the file"


def _altered(bundle: pathlib.Path) -> str:
    path = bundle / "unet_int8.tflite"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "unet_int8.tflite is not the file"


def _missing(bundle: pathlib.Path) -> str:
    (bundle / "unet_int8.tflite").unlink()
    return "no file unet_int8.tflite"


def _no_bundle(bundle: pathlib.Path) -> str:
    shutil.rmtree(bundle)
    return "no file manifest.json"


def _not_json(bundle: pathlib.Path) -> str:
    (bundle / "manifest.json").write_text("<html>")
    return "manifest.json is not readable JSON"


def _newer(bundle: pathlib.Path) -> str:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    return "newer than its page"


def _packed(bundle: pathlib.Path) -> str:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 5}))
    return "packed networks, which this page does not unpack"


def _unknown(bundle: pathlib.Path) -> str:
    path = bundle / "program.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hue": 1}))
    resign(bundle)
    return "has hue"


def _other_tokenizer(bundle: pathlib.Path) -> str:
    path = bundle / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"type": "Unigram"}}))
    resign(bundle)
    return "Unigram"


@pytest.mark.parametrize(
    "damage", [_cut, _altered, _missing, _no_bundle, _not_json, _newer, _packed, _unknown, _other_tokenizer]
)
def test_a_bundle_that_is_none_is_refused_by_name(site, page, damage):
    said = damage(site.variant(damage.__name__))
    assert said in _failed(page, f"{site.address}/{damage.__name__}/")
    assert page.evaluate("document.getElementById('draw').disabled")


def test_a_network_that_fails_its_self_test_gives_way_to_one_that_passes(site, page):
    """As where `run` resolves although it failed, or a GPU computes something else."""
    bundle = site.variant("wrong")
    shutil.copy(bundle / "text_encoder_f32.tflite", bundle / "text_encoder_int8.tflite")
    manifest = json.loads((bundle / "manifest.json").read_text())
    facts = json.loads((bundle / "golden" / "golden.json").read_text())
    facts["self_test"]["int8"] = 1e-9
    (bundle / "golden" / "golden.json").write_text(json.dumps(facts))
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    resign(bundle)
    units = _opened(page, f"{site.address}/wrong/")
    assert {way["precision"] for way in units.values()} == {"f32"}
    notes = page.evaluate("document.getElementById('notes').textContent")
    assert "unet by WebAssembly (int8): its self-test is off by" in notes and "runs by WebAssembly (float32)" in notes
    facts["self_test"] = dict.fromkeys(facts["self_test"], 1e-09)
    before = [path.stat() for path in (bundle / "golden" / "golden.json", bundle / "manifest.json")]
    (bundle / "golden" / "golden.json").write_text(json.dumps(facts))
    resign(bundle)
    for path, stat in zip((bundle / "golden" / "golden.json", bundle / "manifest.json"), before, strict=True):
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as where both were written in one second
    assert "does not run the bundle" in _failed(page, f"{site.address}/wrong/")


def test_a_file_that_is_no_network_gives_way_to_another_precision(site, page):
    path = site.variant("half") / "unet_int8.tflite"
    path.write_bytes(path.read_bytes()[:100_000])
    resign(path.parent)
    units = _opened(page, f"{site.address}/half/")
    assert (units["unet"]["precision"], units["text_encoder"]["precision"]) == ("f32", "int8")
    assert "does not run the bundle" in _failed(page, f"{site.address}/half/?precision=int8")


def test_after_a_trap_in_webassembly_the_page_begins_anew(site, page):
    _opened(page, f"{site.address}/app/?accelerator=wasm&precision=f32")
    page.evaluate("""
        (() => {
            const send = Worker.prototype.postMessage;
            Worker.prototype.postMessage = function ({ id }) {
                Worker.prototype.postMessage = send;
                const data = { type: "failed", id, message: "memory access out of bounds", broken: true };
                this.dispatchEvent(new MessageEvent("message", { data }));
            };
        })()
    """)
    _click(page, "draw")
    page.wait(f"{STATE} === 'empty' && {STATUS}.includes('out of bounds. The page began anew')", 20)
    assert _drawn(page).std() > 10


def test_networks_come_from_the_cache_the_second_time(site, page):
    bundle = site.variant("cached")
    _opened(page, f"{site.address}/cached/")
    for path in bundle.glob("*.tflite"):
        path.unlink()
    _opened(page, f"{site.address}/cached/?again")
    assert _drawn(page).std() > 10


def test_the_page_asks_nobody_else_and_runs_no_script_that_is_not_its_own(site, browser):
    page = browser.page()
    _opened(page, f"{site.address}/app/")
    refused = page.evaluate("""
        new Promise((resolve) => {
            const seen = new Set(); // the policies of page and server both speak
            document.addEventListener("securitypolicyviolation", (event) => {
                seen.add(event.effectiveDirective);
                if (seen.size === 2) resolve([...seen].sort());
            });
            const script = document.createElement("script");
            script.textContent = "globalThis.injected = true";
            document.body.append(script);
            fetch("https://example.invalid/").catch(() => {});
        })
    """)
    assert refused == ["connect-src", "script-src-elem"] and not page.evaluate("globalThis.injected === true")
    asked = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked and all(address.startswith(site.address) for address in asked)
    page.send("Page.close")


def test_on_a_phone_everything_is_within_the_screen(site, page, tmp_path):
    _opened(page, f"{site.address}/app/")
    _drawn(page)
    page.screenshot(tmp_path / "phone.png", 360, 740)
    page.evaluate("document.querySelector('details').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    bottom = page.evaluate("document.getElementById('draw').getBoundingClientRect().bottom + scrollY")
    assert bottom <= 740, "the button is on the first screen"
    small = page.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter((one) => one.offsetParent && "
        "one.getBoundingClientRect().height < 34).map((one) => one.id)"
    )
    assert not small, "too small for a finger"


def test_other_kinds_of_bundles_draw_too(site, page, sketch, clip):
    for name, exported in (("sketch", sketch), ("clip", clip)):
        bundle = site.variant(name)
        shutil.rmtree(bundle)
        shutil.copytree(exported.folder, bundle)
        _opened(page, f"{site.address}/{name}/?precision=f32")
        assert len(_check(page)) >= 4
    generator = LiteRTGenerator(clip.folder)
    frames = generator.run({"label": np.float32([[1, 0]])}, seed=9)["image"][0]
    page.evaluate("document.querySelector('#inputs input').value = '[1, 0]'")
    page.evaluate("globalThis.setInterval = () => 0")  # the clip stands still at its first frame
    assert grey_levels(_drawn(page, seed="9"), frames[0]).max() <= 1
    page.evaluate("document.querySelector('#inputs input').value = '[1, 0, 2]'")
    _click(page, "draw")
    page.wait(f"{STATUS}.includes('numbers [2]')")
