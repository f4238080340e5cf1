"""A bundle of several image sizes: one file of weights, a signature, a program and golden data for each size."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.cli import main
from snapgen_jax.config import load_experiment
from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export import convert, verify
from snapgen_jax.export.client import Bundle, LiteRTGenerator
from snapgen_jax.export.compat import Requirements, check
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.precision import weights_of
from snapgen_jax.export.program import BundleError
from snapgen_jax.export.run import at_sizes, image_sizes
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.state import Player

from .conftest import PROMPTS, QUICK, TallToy, ToyRecipe, random_params, resign


@pytest.mark.parametrize("precision", ["f32", "f16", "int8"])
def test_a_file_has_a_signature_for_each_size_and_the_weights_once(two_sizes, toy, precision):
    found, alone = (describe(folder / f"net_{precision}.tflite") for folder in (two_sizes, toy.folder))
    assert sorted(found.inputs) == ["net", "net_6x4"]
    kinds = ("float32", "float16", "int8")
    assert {k: weights_of(found).get(k) for k in kinds} == {k: weights_of(alone).get(k) for k in kinds}
    assert list(describe(two_sizes / f"text_{precision}.tflite").inputs) == ["text"]  # prompts have no size


def test_the_bundles_own_size_is_what_it_is_without_others(two_sizes, toy):
    assert "sizes" not in json.loads((toy.folder / "manifest.json").read_text())
    manifest = json.loads((two_sizes / "manifest.json").read_text())
    assert {name: size["program"] for name, size in manifest["sizes"].items()} == {
        "4x4": "program.json",
        "6x4": "programs/6x4.json",
    }
    assert (two_sizes / "program.json").read_bytes() == (toy.folder / "program.json").read_bytes()
    names = [path.relative_to(toy.folder) for path in (toy.folder / "golden").rglob("*.npy")]
    assert all((two_sizes / name).read_bytes() == (toy.folder / name).read_bytes() for name in names)
    assert manifest["units"]["net"]["inputs"]["latent"]["shape"] == [1, 4, 4, 3]


def test_the_client_draws_at_each_size_what_jax_draws(two_sizes, toy):
    recipe = TallToy()
    generator = LiteRTGenerator(two_sizes, size=(6, 4))
    assert generator.bundle.sizes == ("4x4", "6x4")
    made = generator.generate(PROMPTS, seed=5)
    noise = np.stack([draw_noise(5, i, (6, 4, 3)) for i in range(2)])
    conditions = {**generator.bundle.tokenize(PROMPTS), "noise": noise}
    expected = recipe.generate(recipe.params(), {}, conditions, jax.random.split(jax.random.key(0), 2), None)
    assert made.shape == (2, 6, 4, 3)
    assert verify.grey_levels(made, np.asarray(expected["image"])).max() <= 1
    own = LiteRTGenerator(two_sizes, size=(4, 4)).generate(PROMPTS, seed=5)
    np.testing.assert_array_equal(own, LiteRTGenerator(toy.folder).generate(PROMPTS, seed=5))


def test_verify_holds_the_golden_data_of_every_size(two_sizes, tmp_path):
    names = [check.name for check in verify.checks(two_sizes)]
    own = [name for name in names if name.startswith(("f32 ", "int8 "))]
    assert own and {f"6x4: {name}" for name in own} <= set(names)
    folder = shutil.copytree(two_sizes, tmp_path / "bundle")
    latents = folder / "golden" / "6x4" / "latents.npy"
    np.save(latents, np.load(latents) + np.float32(0.1))
    resign(folder)
    failed = [check.name for check in verify.checks(folder) if not check.passed]
    assert failed and all(name.startswith("6x4: ") for name in failed)


def test_a_size_that_a_bundle_lacks_is_refused_by_name(two_sizes, toy):
    with pytest.raises(BundleError, match="no image size 6x6 in this bundle; it has 4x4, 6x4"):
        Bundle(two_sizes, (6, 6))
    with pytest.raises(BundleError, match="its own alone; leave out the size"):
        LiteRTGenerator(toy.folder, size=(4, 4))


@pytest.mark.skipif(QUICK != "litert", reason="litert-converter is published for Linux only")
def test_the_unet_shares_its_weights_over_sizes_and_runs_whole_on_a_gpu_at_each(tmp_path):
    recipe = load_experiment("configs/shapes/quickstart.py:runlocal", []).build("cpu")
    unit = recipe.exports().units[0]
    other = at_sizes(recipe, image_sizes("32x32,48x32")).others["48x32"].exports().units[0]
    weights = unit.select(recipe.weights(random_params(recipe), {}))
    further = {"unet_48x32": (other.function, other.inputs)}
    convert.to_tflite(unit.function, weights, unit.inputs, "unet", tmp_path / "unet.tflite", "litert", further)
    found = check(tmp_path / "unet.tflite", Requirements(gpu=True))
    assert found.inputs["unet_48x32"]["latent"].shape == (1, 12, 8, 48)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert weights_of(found)["float32"] < 1.25 * count  # tables of positions are those of a size


def test_the_command_line_draws_and_measures_at_a_size(two_sizes, tmp_path, capsys):
    out, figures = tmp_path / "star.png", tmp_path / "bench.json"
    assert main(["sample", f"--bundle={two_sizes}", "--size=6x4", f"--prompt={PROMPTS[1]}", f"--out={out}"]) == 0
    assert "of 4 x 6 px" in capsys.readouterr().out
    line = [
        "bench",
        f"--bundle={two_sizes}",
        "--units=net",
        "--precisions=f32",
        "--threads=1",
        "--runs=1",
        "--rounds=1",
    ]
    for size in ("4x4", "6x4"):
        assert main([*line, f"--size={size}", f"--json={figures.with_stem(size)}"]) == 0
    (own,), (tall,) = (json.loads(figures.with_stem(size).read_text())["files"] for size in ("4x4", "6x4"))
    assert tall["macs"] > own["macs"] > 0  # of the graph of that size alone
    assert tall["bytes"] == own["bytes"]


@pytest.mark.parametrize(("size", "message"), [("6x6", "it has 4x4, 6x4"), ("6", "'6' is no image size")])
@pytest.mark.parametrize("command", [["sample", "--prompt=x"], ["bench"]], ids=["sample", "bench"])
def test_a_size_that_is_none_is_refused_on_the_command_line(two_sizes, command, size, message, capsys):
    assert main([*command, f"--bundle={two_sizes}", f"--size={size}"]) == 78
    assert message in capsys.readouterr().err


def test_tensorflow_writes_the_weights_of_several_sizes_once_too(tmp_path):
    recipe = ToyRecipe()
    (unit, _), (tall, _) = recipe.exports().units, TallToy().exports().units
    weights, path = unit.select(recipe.weights(recipe.params(), {})), tmp_path / "net.tflite"
    convert.to_tflite(
        unit.function, weights, unit.inputs, "net", path, "jax2tf", {"net_6x4": (tall.function, tall.inputs)}
    )
    found = describe(path)
    assert found.inputs["net_6x4"]["latent"].shape == (1, 6, 4, 3)
    convert.to_tflite(unit.function, weights, unit.inputs, "net", tmp_path / "own.tflite", "jax2tf")
    assert weights_of(found) == weights_of(describe(tmp_path / "own.tflite"))


@pytest.mark.parametrize("text", ["", "64", "64x", "0x64", "64x64,", "64 x 64", "-8x8"])
def test_what_is_no_list_of_sizes_is_refused(text):
    with pytest.raises(ConfigError, match="write height and width, as in 96x64"):
        image_sizes(text)


def test_a_size_that_the_run_cannot_draw_is_refused_by_name():
    recipe = load_experiment("configs/shapes/quickstart.py:runlocal", []).build("cpu")
    with pytest.raises(ConfigError, match="does not draw images of 33x32"):
        at_sizes(recipe, [(33, 32)])


@dataclasses.dataclass(frozen=True)
class Inputs:
    image_sizes: tuple[tuple[int, int], ...] = ((32, 32),)


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: Inputs = Inputs()


class Flattened(ToyRecipe):
    """Its network has a weight for each row of the image."""

    def __init__(self, config, platform):
        super().__init__()
        self.config = config

    def init(self, key):
        rows = self.config.inputs.image_sizes[0][0]
        return types.SimpleNamespace(players={"model": Player({"net": {"rows": jnp.zeros(rows)}}, ())})


def test_weights_that_depend_on_the_size_are_refused():
    with pytest.raises(ConfigError, match="weights of net depend on the image size, and those of 32x32 are none of 64"):
        at_sizes(Flattened(Config(), "cpu"), [(64, 32)])
