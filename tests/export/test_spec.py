"""SPEC.md and spec.json say what the code does: each formula is computed from the data, and a tokenizer by the page."""

import itertools
import json
import pathlib
import re
import unicodedata

import numpy as np
import pytest
import regex
import tokenizers

from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.data.tokenizer import train
from snapgen_jax.diffusion import noise
from snapgen_jax.export import conformance, program, sampler, spec, verify
from tests import tiny_tokenizers

RANDOM = np.random.default_rng(3)
MATHS = {name: getattr(np, name) for name in ("exp", "log", "cos", "sin", "sqrt", "pi", "clip", "mean", "abs")}
MATHS |= {"norm": np.linalg.norm, "round_half_even": np.round}


def compute(formula, **symbols):
    """The value of an expression of spec.json."""
    return eval(formula, {"__builtins__": {}}, {**MATHS, "max": np.maximum, **symbols})


@pytest.fixture(scope="module")
def data(small_bundle):
    assert (small_bundle / "SPEC.md").read_text("utf-8") == spec.page()
    assert "`SPEC.md`" in (small_bundle / "README.md").read_text("utf-8")
    return json.loads((small_bundle / "spec.json").read_text("utf-8"))


def test_the_page_has_every_word_of_a_program_and_no_gap(data):
    page = spec.page()
    assert "{{" not in page and max(map(len, spec.TEXT.read_text("utf-8").splitlines())) <= 120
    words = data["program"]
    keys = {key for section in ("predictions", "times") for keys in words[section].values() for key in keys}
    names = [*words["kinds"], *words["rules"], *words["predictions"], *words["times"], *words["decoders"]]
    flow = ["latent_shape", "times", "initial_scale", "shift", "steps", "contexts", "null_contexts", "state", "decoder"]
    for word in (*names, *words["step"]["needed"], *words["step"]["optional"], *keys - {"x", "out"}, *flow, "chunk"):
        assert re.search(rf"\b{word}\b", page), word
    with pytest.raises(program.BundleError, match="this client knows euler, heun, renoise"):
        program.Step.read("step", {"unit": "a", "rule": "ddim", "prediction": {}, "guidance": 1})


def test_predictions_guidance_and_rules(data):
    formulas = data["formulas"]
    x, out, v_null, fresh = RANDOM.standard_normal((4, 2, 3)).astype(np.float32)
    t, s = np.float32(0.04), np.float32(0.01)
    kinds = {"velocity": {}, "x_0": {"t_min": 0.05}, "linear": {"x": 1.5, "out": -0.25}}
    assert kinds.keys() == formulas["prediction"].keys() == set(data["program"]["predictions"])
    for kind, keys in kinds.items():
        made = compute(formulas["prediction"][kind], x=x, out=out, t=t, a=1.5, b=-0.25, t_min=np.float32(0.05))
        np.testing.assert_allclose(made, sampler.as_velocity(out, x, t, {"kind": kind, **keys}), rtol=1e-6)

    def v(x, t):
        return np.sin(3 * x) + t

    assert formulas["rule"].keys() == set(data["program"]["rules"])
    for rule, lines in formulas["rule"].items():
        for end in (s, np.float32(0)):
            known = {"x": x, "t": t, "s": end, "v": v, "fresh": fresh}
            for name, line in lines.items():
                known[name] = compute(line, **known)
            last = rule == "renoise" and end == 0
            expected = sampler.advance(lambda x, t, end: v(x, t), x, t, end, rule, None if last else fresh)
            np.testing.assert_allclose(known["x_s at s = 0" if last else "x_s"], expected, rtol=1e-6)
    w = np.float32([3, 1, 0.5])
    calls = iter([out, v_null])
    step = {"unit": "n", "rule": "euler", "prediction": {"kind": "velocity"}, "guidance": w.tolist()}
    flow = program.parse(
        {
            "schema": 3, "kind": "flow", "inputs": {}, "outputs": {"latent": {"shape": [2, 3], "dtype": "float32"}},
            "latent_shape": [2, 3], "times": [1.0, 0.0], "step": step, "decoder": None,
        }
    )  # fmt: skip
    run = sampler.Sampler(flow, {"n": lambda **_: {"prediction": next(calls)}}, {"n": {}})
    (made,) = run.trajectory(x, {None: {}}, {None: {}})
    np.testing.assert_allclose(x - made, compute(formulas["guidance"], v=out, v_null=v_null, w=w), rtol=1e-5, atol=1e-6)


def test_times(data):
    formulas = data["formulas"]
    flow = program.parse(
        {
            "schema": 3, "kind": "flow", "inputs": {}, "outputs": {"latent": {"shape": [2], "dtype": "float32"}},
            "latent_shape": [2], "times": [1.0, 0.0], "shift": 3.0, "decoder": None,
            "step": {"unit": "n", "rule": "euler", "prediction": {"kind": "velocity"}, "guidance": 1.0},
        }
    )  # fmt: skip
    grid = [compute(formulas["grid"], shift=3.0, u=1 - i / 7) for i in range(8)]
    np.testing.assert_array_equal(sampler.with_options(flow, steps=7).times, np.float32(grid))
    time = {"dim": 10, "scale": 1000.0, "max_period": 100.0}
    lines, k = formulas["time_features"], np.arange(5)
    frequency = compute(lines["frequency"], k=k, **time)
    known = {"t": 0.3, "frequency": frequency, **time}
    made = np.concatenate([compute(lines["cosine"], **known), compute(lines["sine"], **known)])
    (expected,) = sampler.time_features(np.float32([0.3]), time)
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_pictures_and_codecs(data):
    formulas = data["formulas"]
    grey = np.arange(256, dtype=np.uint8)
    pixels = compute(formulas["picture"]["from_grey"], grey=grey.astype(np.float32))
    array = program.Array("image", (256,), "uint8")
    np.testing.assert_array_equal(array.of(grey), pixels)
    pixels = np.float32([*pixels, -3, 3, 2 / 255])
    made = compute(formulas["picture"]["to_grey"], pixel=pixels)
    np.testing.assert_array_equal(made, sampler.grey_levels(pixels))
    codec = {"kind": "patch", "patch": 2, "scale": 1.5, "shift": 0.1, "frequency_scale": [1.0, 2.0, 0.5, 3.0]}
    latent, p, lines = RANDOM.standard_normal((2, 3, 12)).astype(np.float32), 2, formulas["codec"]
    dct = [[compute(lines["dct"], k=k, n=n, p=p) for n in range(p)] for k in range(p)]
    image = np.zeros((4, 6, 3))
    for i, j, r, s, colour, k, m in np.ndindex(2, 3, p, p, 3, p, p):
        gain = compute(lines["gain"], k=k, l=m, p=p, **{n: codec[n] for n in ("scale", "frequency_scale")})
        image[i * p + r, j * p + s, colour] += latent[i, j, (k * p + m) * 3 + colour] / gain * dct[k][r] * dct[m][s]
    exact = sampler.CODECS["patch"](latent, codec)
    np.testing.assert_allclose(image + codec["shift"], exact, atol=1e-5)
    made = compute(lines["identity"], latent=latent, scale=1.5, shift=0.1)
    np.testing.assert_allclose(made, sampler.CODECS["identity"](latent, codec), rtol=1e-6)


def test_metrics(data):
    value, reference = RANDOM.integers(0, 256, (2, 5))
    metric = data["formulas"]["metric"]
    symbols = {"value": value, "reference": reference, "max": np.max}
    assert compute(metric["rel_l2"], **symbols) == pytest.approx(verify.relative_l2(value, reference))
    levels = verify.grey_levels(value, reference)
    assert compute(metric["max_grey"], **symbols) == levels.max()
    assert compute(metric["rms_grey"], **symbols) == pytest.approx(np.sqrt(np.mean(levels**2)))


def test_noise(data):
    words, lines = data["noise"], data["formulas"]["noise"]
    for seed, index in ((0, 0), (2**32 - 1, 12345)):
        expected = noise.draw_noise(seed, index, (400,))
        for i, value in enumerate(expected):
            k = (seed, index, seed ^ index ^ words["parity"])
            x, y = words["counter_word"] + k[0], i + k[1]
            for n in range(words["rounds"] // 4):
                for r in words["rotations"][n % 2]:
                    x, y = (x + y) % 2**32, y % 2**32
                    y = ((y << r | y >> (32 - r)) ^ x) % 2**32
                x, y = x + k[(n + 1) % 3], y + k[(n + 2) % 3] + n + 1
            u = compute(lines["u"], bits=x % 2**32)
            w = compute(lines["w"], u=u)
            part = "centre" if w < words["split"] else "tail"
            z, p = compute(lines[part], w=w), 0.0
            for c in words[part]:
                p = p * z + c
            assert compute(lines["normal"], u=u, p=p) == pytest.approx(value, abs=1e-6)


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in BYTES}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(BYTES)))}


class Port:
    """Section 4 of SPEC.md, as one would write it who has no `tokenizers` library."""

    WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, path):
        self.data = json.loads(path.read_text("utf-8"))
        self.model = self.data["model"]
        self.ranks = {tuple(pair): i for i, pair in enumerate(self.model["merges"])}
        self.added = {entry["content"]: entry["id"] for entry in self.data["added_tokens"]}

    def ids(self, text):
        names = sorted(self.added, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
        found = []
        for piece in pieces:
            if piece in self.added:
                found.append(self.added[piece])
            elif piece:
                for word in self.words(self.data["pre_tokenizer"], [self.normal(self.data["normalizer"], piece)]):
                    found += self.merged(word)
        return found

    def normal(self, rule, text):
        match rule["type"]:
            case "Sequence":
                for one in rule["normalizers"]:
                    text = self.normal(one, text)
                return text
            case "NFC":
                return unicodedata.normalize("NFC", text)
            case "Lowercase":
                return "".join(letter.lower() for letter in text)
            case "Replace":
                return pattern(rule).sub(lambda _: rule["content"], text)

    def words(self, rule, pieces):
        match rule["type"]:
            case "Sequence":
                for one in rule["pretokenizers"]:
                    pieces = self.words(one, pieces)
                return pieces
            case "Split" if rule["invert"] and rule["behavior"] == "Removed":
                return [word for piece in pieces for word in pattern(rule).findall(piece)]
            case "Split" if rule["behavior"] == "MergedWithPrevious":
                split = [regex.findall(f".*?(?:{pattern(rule).pattern})|.+$", piece, regex.S) for piece in pieces]
                return [word for words in split for word in words]
            case "ByteLevel":
                made = []
                for piece in pieces:
                    if rule["add_prefix_space"] and not piece.startswith(" "):
                        piece = f" {piece}"
                    made += white(self.WORDS).findall(piece) if rule["use_regex"] else [piece]
                return ["".join(LETTERS[byte] for byte in word.encode()) for word in made]

    def merged(self, word):
        if not word:
            return []
        symbols = [*word[:-1], word[-1] + (self.model["end_of_word_suffix"] or "")]
        known = []
        for symbol in symbols:
            if symbol in self.model["vocab"]:
                known.append(symbol)
                continue
            parts = [f"<0x{byte:02X}>" for byte in symbol.encode()]
            if self.model["byte_fallback"] and all(part in self.model["vocab"] for part in parts):
                known += parts
            elif unknown := self.model["unk_token"]:
                known += [] if self.model["fuse_unk"] and known[-1:] == [unknown] else [unknown]
        while pairs := [pair for pair in itertools.pairwise(known) if pair in self.ranks]:
            i = list(itertools.pairwise(known)).index(min(pairs, key=self.ranks.__getitem__))
            known[i : i + 2] = [known[i] + known[i + 1]]
        return [self.model["vocab"][symbol] for symbol in known]


def white(source):
    return regex.compile(source.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}"))


def pattern(rule):
    kind, source = next(iter(rule["pattern"].items()))
    return white(source) if kind == "Regex" else regex.compile(regex.escape(source))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train(tiny_tokenizers.CAPTIONS, 320).save(folder / "own.json")
    for kind in ("clip", "gemma"):
        published = getattr(tiny_tokenizers, f"write_{kind}")(folder / kind)
        PretrainedTokenizer.load(published).save(folder / f"{kind}.json")
    return folder


@pytest.mark.parametrize("kind", ["own", "clip", "gemma"])
def test_a_tokenizer_by_the_page_alone(files, kind):
    path: pathlib.Path = files / f"{kind}.json"
    port, model = Port(path), tokenizers.Tokenizer.from_file(str(path))
    special = conformance.special_strings(path)[:4]
    letters = [*special, *"".join(conformance.PROMPTS[:20])]
    strings = [*conformance.PROMPTS, *(f"a{one}B{one}{one}" for one in special)]
    strings += ["".join(RANDOM.choice(letters, RANDOM.integers(1, 30))) for _ in range(300)]
    for text in strings:
        assert port.ids(text) == model.encode(text, add_special_tokens=False).ids, repr(text)
