"""The whole of Stable Diffusion 3.5 draws what diffusers draws, from the folder that diffusers reads."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from snapgen_jax import cli
from snapgen_jax.config import complete, load_config
from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.generation import load_system
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.systems.sd35 import SD35, SD35Config, reference_times
from snapgen_jax.training.exits import ConfigError
from tests.flags import quick_environment
from tests.parity import GOLDENS

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = GOLDENS / "pipeline"
PROMPT = "a photo of two red circles left of a green star"
CASES = {"four": (4, 1.0), "four_guided": (4, 3.5), "many": (28, 1.0), "many_guided": (28, 4.5)}


def tiny(steps=4, guidance=1.0, **changes):
    values = {"system": "sd35", "size": "any", "image_size": (48, 64), "steps": steps, "guidance": guidance}
    return complete({**values, "t5_tokens": 16, "dtype": "float32", **changes})


@pytest.mark.parametrize("case", CASES)
def test_prompt_to_image_equals_the_pipeline_of_diffusers(case):
    golden = np.load(FOLDER / "images.npz")
    pixels = load_system(tiny(*CASES[case]), FOLDER).run([PROMPT], noise=golden["noise"])["pixels"]
    assert np.abs(np.clip(pixels / 2 + 0.5, 0, 1) - golden[case]).max() <= 1e-3


def test_the_golden_images_are_images():
    golden = np.load(FOLDER / "images.npz")
    for case in CASES:
        assert golden[case].shape == (1, 48, 64, 3)
        assert golden[case].std() > 0.05
    assert np.abs(golden["four"] - golden["four_guided"]).max() > 1e-2
    assert np.abs(golden["four"] - golden["many"]).max() > 1e-2


def test_the_sampler_s_times_are_those_of_the_reference():
    # FlowMatchEulerDiscreteScheduler(shift=3.0).set_timesteps(4).sigmas, as diffusers 0.42 prints them
    np.testing.assert_allclose(
        reference_times(4, 3.0), [1.0, 0.857725977, 0.602409422, 0.00892857090, 0.0], rtol=1e-3, atol=1e-6
    )


@pytest.mark.oracle
@pytest.mark.parametrize("with_t5", [True, False])
def test_live_pipelines_of_diffusers_draw_alike(with_t5, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import pipeline as oracle

    reference = oracle.make(tmp_path, seed=20, with_t5=with_t5)
    for steps, guidance in ((4, 3.5), (28, 1.0)):
        expected = oracle.run(reference, steps, guidance)
        ours = load_system(tiny(steps, guidance), tmp_path).run([PROMPT], noise=oracle.noise())["pixels"]
        assert np.abs(np.clip(ours / 2 + 0.5, 0, 1) - expected).max() <= 1e-3


@pytest.mark.oracle
@pytest.mark.parametrize(("steps", "shift"), [(4, 3.0), (28, 3.0), (7, 1.0)])
def test_times_equal_those_of_the_installed_scheduler(steps, shift):
    pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(reference_times(steps, shift), scheduler.sigmas.numpy(), atol=2e-7)


def test_the_seed_and_the_place_decide_the_image():
    generator = load_system(tiny(steps=1), FOLDER)
    pair = generator.generate([PROMPT, PROMPT], seed=3)
    assert pair.shape == (2, 48, 64, 3)
    assert pair.dtype == np.uint8
    assert (pair[0] != pair[1]).any()
    np.testing.assert_array_equal(pair[:1], generator.generate([PROMPT], seed=3))
    noise = np.stack([draw_noise(3, index, generator.system.latent_shape()) for index in range(2)])
    np.testing.assert_array_equal(pair, generator.run([PROMPT, PROMPT], noise=noise)["image"])
    with pytest.raises(ValueError, match="the seed is -1; it must"):
        generator.generate([PROMPT], seed=-1)


def test_the_command_of_the_readme_draws_with_a_folder(tmp_path, capsys):
    out = tmp_path / "fox.png"
    config = f"{ROOT}/configs/teacher/sd35_large.py:runlocal"
    arguments = ["sample", f"--config={config}", f"--weights={FOLDER}", "--prompt=a red fox", f"--out={out}"]
    assert cli.main([*arguments, "--steps=1", "--config.image_size=(48,48)", "--config.t5_tokens=16"]) == 0
    assert "1 image of 48 x 48 px" in capsys.readouterr().out
    assert out.stat().st_size > 500


def test_misuse_is_named(tmp_path, capsys):
    config = f"--config={ROOT}/configs/teacher/sd35_large.py"
    sample = ["sample", config, "--prompt=x", f"--out={tmp_path}/x.png"]
    assert cli.main([*sample, f"--weights={FOLDER}"]) == 78
    assert "not sd35_large (depth = 3" in capsys.readouterr().err
    assert cli.main([*sample, f"--weights={tmp_path}"]) == 78
    error = capsys.readouterr().err
    assert "no transformer/config.json" in error
    assert "hf download stabilityai/stable-diffusion-3.5-large" in error
    assert cli.main(["train", config, f"--workdir={tmp_path}/w"]) == 78
    assert "is not trained" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="multiples of 4"):
        load_system(tiny(image_size=(50, 64)), FOLDER)
    with pytest.raises(ConfigError, match="--weights wants one with `system`"):
        load_system(load_config(f"{ROOT}/configs/shapes/quickstart.py"), FOLDER)
    with pytest.raises(ConfigError, match=r"unknown config key 'steeps'; did you mean 'steps'"):
        complete({"system": "sd35", "steeps": 3})


def test_a_missing_part_is_named_with_where_to_get_it(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "sd")
    os.remove(next((tmp_path / "sd" / "vae").glob("*.safetensors")))
    with pytest.raises(ConfigError, match=r"Stable Diffusion 3\.5 autoencoder"):
        load_system(tiny(), tmp_path / "sd")


def test_the_published_sizes_count_as_published():
    system = SD35(SD35Config())
    counts = {name: count_parameters(spec) for name, spec in system.specs.items()}
    table = MMDiTConfig.preset("sd35_large")
    assert counts.pop("transformer") - table.position_size**2 * table.width == 8_056_627_520
    assert counts == {
        "autoencoder": 83_819_683,
        "clip_l": 123_650_304,
        "clip_g": 694_659_840,
        "t5": 4_762_310_656,
    }


WHOLE = {
    "autoencoder/encoder/conv_out/kernel",  # the rules leave it: its output is the latent
    "autoencoder/decoder/conv_out/kernel",
    "clip_l/position_embedding",
    "clip_g/position_embedding",
    "t5/distance_bias",
    # the tiny vocabularies do not divide by eight
    "clip_l/token_embedding",
    "clip_g/token_embedding",
    "t5/token_embedding",
}


def test_loading_over_eight_devices_leaves_nothing_of_size_replicated():
    code = """
import jax, json, pathlib
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.systems import sd35
folder = pathlib.Path(FOLDER)
system = sd35.SD35(sd35.SD35Config(size="any", dtype="float32"), sd35.read_configs(folder))
mesh = make_mesh(MeshConfig(data=1, fsdp=8))
params = system.load(folder, mesh)
assert jax.tree.structure(params) == jax.tree.structure(system.spec())
whole = []
for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
    assert len(x.sharding.device_set) == 8
    if x.sharding.is_fully_replicated and x.ndim > 1 and path[-1].key != "scale":
        whole.append("/".join(str(p.key) for p in path))
assert jax.tree.map(lambda x: x.sharding, params) == tree_shardings(system.spec(), system.rules(), mesh)
large = sd35.SD35(sd35.SD35Config())
places = jax.tree.leaves(tree_shardings(large.spec(), large.rules(), mesh))
sizes = [leaf.size for leaf in jax.tree.leaves(large.spec())]
replicated = sum(size for size, place in zip(sizes, places) if place.is_fully_replicated)
print(json.dumps({"whole": whole, "replicated_at_full_size": replicated / sum(sizes)}))
""".replace("FOLDER", repr(str(FOLDER)))
    environment = {**os.environ, **quick_environment(devices=8), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["whole"]) == WHOLE
    assert found["replicated_at_full_size"] < 2e-4
