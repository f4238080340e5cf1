"""The golden suite that every client runs, in Python: conformance.json and golden/ of a bundle, read as plain data."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from snapgen_jax.data.tokenizer import Tokenizer as OwnTokenizer
from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export import conformance, conformance_runs, verify
from snapgen_jax.export import sampler as samplers
from snapgen_jax.export.client import tokenize
from snapgen_jax.export.frames import spelled_out
from snapgen_jax.export.program import Flow, Tokenizer, parse
from snapgen_jax.export.sampler import Sampler, with_options
from snapgen_jax.export.verify import relative_l2

from .conftest import resign


@pytest.fixture(scope="module")
def cases(small_bundle):
    return json.loads((small_bundle / "golden" / "conformance.json").read_text("utf-8"))


def array(plain, dtype=np.float32):
    return np.array(plain["values"], dtype).reshape(plain["shape"])


def test_noise(cases):
    far = 0
    for case in cases["noise"]:
        made = draw_noise(case["seed"], case["index"], case["shape"])
        np.testing.assert_array_equal(made, array(case))
        far += (np.abs(made) > 2.95).sum()
    assert far >= 2, "both polynomials of the inverse are used"


def test_time_features(cases):
    for case in cases["time_features"]:
        (made,) = samplers.time_features(np.float32([case["t"]]), case["time"])
        np.testing.assert_allclose(made, case["values"], atol=cases["tolerances"]["time_features"]["abs"])


def test_tokenizer(cases, small_bundle):
    made_mask = 0
    for case in cases["tokenizer"]:
        frame = Tokenizer(case["file"], "tokens", tuple(case["begin"]), tuple(case["end"]), case["pad"], "mask")
        tokens, mask = tokenize(small_bundle / case["file"], [case["prompt"]], frame, case["length"])
        assert (tokens[0].tolist(), mask[0].tolist()) == (case["tokens"], case["mask"]), case["prompt"]
        room = case["length"] - len(case["begin"]) - len(case["end"])
        assert case["tokens"][: int(sum(case["mask"]))] == [*case["begin"], *case["ids"][:room], *case["end"]]
        made_mask += case["ids"] != case["ids"][:room]
    assert made_mask >= 2, "some prompts are too long"
    prompts = " ".join(case["prompt"] for case in cases["tokenizer"])
    for special in conformance.special_strings(small_bundle / "tokenizer.json"):
        assert special in prompts


def test_a_bundle_spells_out_what_its_run_spells_out(small_bundle, tmp_path):
    run, path = small_bundle / "tokenizer.json", tmp_path / "tokenizer.json"
    path.write_text(spelled_out(run.read_text("utf-8")), "utf-8")
    prompts = ["a <eos> b<pad>", "<bos>", *conformance.PROMPTS]
    frame = Tokenizer("tokenizer.json", "tokens", (1,), (2,), 0, "mask")
    for made, expected in zip(
        tokenize(path, prompts, frame, 20), OwnTokenizer.load(run).encode(prompts, 20), strict=True
    ):
        np.testing.assert_array_equal(made, expected)
    assert (tokenize(run, prompts, frame, 20)[0] != tokenize(path, prompts, frame, 20)[0]).any()


def test_codec_and_rounding(cases):
    clipped = 0
    for case in cases["codec"]:
        latent = array(case["latent"])
        np.testing.assert_array_equal(samplers.decode(latent, case["decoder"]), array(case["image"], np.uint8))
        exact = samplers.CODECS[case["decoder"]["kind"]](latent, case["decoder"]) * 127.5 + 127.5
        assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-3, "a pixel that rounding could turn"
        clipped += (exact < 0).sum() + (exact > 255).sum()
    assert clipped
    for case in cases["rounding"]:
        np.testing.assert_array_equal(samplers.grey_levels(np.float32(case["pixels"])), case["grey"])


class Recorded:
    """Networks that know what they are asked next, and what they answer."""

    def __init__(self, calls, tolerances):
        self.left, self.tolerances = list(calls), tolerances

    def unit(self, name):
        def run(**inputs):
            call = self.left.pop(0)
            assert call["unit"] == name and call["inputs"].keys() == inputs.keys()
            for tensor, given in inputs.items():
                expected = array(call["inputs"][tensor])
                assert given.shape == expected.shape
                if tensor == "time":
                    np.testing.assert_allclose(given, expected, atol=self.tolerances["time_abs"])
                else:
                    assert relative_l2(given, expected) <= self.tolerances["inputs_rel_l2"], (name, tensor)
            return {tensor: array(plain) for tensor, plain in call["outputs"].items()}

        return run


def replay(run, tolerances):
    program = parse(run["program"])
    recorded = Recorded(run["calls"], tolerances)
    shapes = {name: unit["inputs"] for name, unit in run["units"].items()}
    sampler = Sampler(program, {name: recorded.unit(name) for name in shapes}, shapes)
    noise, latents = None, []
    if isinstance(program, Flow):
        noise = draw_noise(run["seed"], run["index"], with_options(program, **run["options"]).noise_shape())
    inputs = {name: array(plain, program.inputs[name].dtype) for name, plain in run["inputs"].items()}
    outputs = sampler.run(inputs, noise, on_step=lambda i, x: latents.append(x), **run["options"])
    assert not recorded.left, "calls that were not made"
    if run["latents"] is not None:
        for made, expected in zip(latents, array(run["latents"]), strict=True):
            assert relative_l2(made, expected) <= tolerances["latents_rel_l2"]
    for name, plain in run["outputs"].items():
        if program.outputs[name].dtype == "uint8":
            np.testing.assert_array_equal(outputs[name], array(plain, np.uint8))
        else:
            assert relative_l2(outputs[name], array(plain)) <= tolerances["outputs_rel_l2"]


def test_runs_replay(cases):
    for run in cases["runs"]:
        replay(run, cases["tolerances"]["runs"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_0 below t_min", {"prediction": {"kind": "x_0", "t_min": 0.02}}),
        ("guidance by channel, x_0", {"guidance": [3.0, 1.0, 1.0]}),
        ("a guidance interval of the program", {"guidance_interval": [0.32, 0.75]}),
        ("heun asks at the end of a step, too", {"rule": "euler"}),
        ("another number of steps", {"time": {**conformance_runs.FEATURES, "max_period": 1000.0}}),
    ],
)
def test_a_replay_notices_another_formula(cases, name, change):
    (run,) = (run for run in cases["runs"] if run["name"] == name)
    program = {**run["program"], "step": {**run["program"]["step"], **change}}
    with pytest.raises(AssertionError):
        replay({**run, "program": program}, cases["tolerances"]["runs"])


def test_the_runs_cover_every_word_of_a_program(cases):
    text = json.dumps([run["program"] for run in cases["runs"]])
    from snapgen_jax.export import program

    for word in (*program.RULES, *program.PREDICTIONS, *program.TIMES, *program.DECODERS, *program.OPTIONAL):
        assert f'"{word}"' in text, word
    options = {name for run in cases["runs"] for name in run["options"]}
    assert options == {"steps", "guidance", "method", "guidance_interval"}


def test_numbers_are_read_back_as_they_were():
    values = np.frombuffer(np.random.default_rng(0).bytes(400_000), np.float32)
    values = values[np.isfinite(values)]
    read = json.loads(json.dumps(conformance_runs.plain(values)))
    np.testing.assert_array_equal(array(read).view(np.uint32), values.view(np.uint32))


def test_golden_predictions_and_times_are_those_of_the_calls(small_bundle):
    golden = small_bundle / "golden"
    predictions, time = np.load(golden / "predictions.npy"), np.load(golden / "time.npy")
    assert predictions.shape == (2, 4, 2, 8, 8, 48) and time.shape[0] == 4
    assert np.abs(predictions[:, :, 0] - predictions[:, :, 1]).max() > 1e-3, "row 1 is the null call's"
    found = [check for check in verify.checks(small_bundle, ["f32"]) if "replayed" in check.name]
    assert len(found) == 2 and all(check.passed for check in found)


def test_other_predictions_and_another_recorded_call_are_noticed(small_bundle, tmp_path):
    copy = pathlib.Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    predictions = np.load(copy / "golden" / "predictions.npy")
    np.save(copy / "golden" / "predictions.npy", predictions * np.float32(1.001))
    path = copy / "golden" / "self_test" / "unet" / "outputs" / "prediction.npy"
    np.save(path, np.load(path) * np.float32(1.1))
    resign(copy)
    failed = {check.name for check in verify.checks(copy, ["f32"]) if not check.passed}
    assert failed == {*(f"golden {i} replayed from the denoiser's outputs" for i in (0, 1)), "f32 unet self-test"}
