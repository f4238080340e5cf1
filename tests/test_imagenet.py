"""The ImageNet configs: the ladder's networks, and the whole way of the page docs/imagenet.md with small numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.cli import main
from snapgen_jax.config import load_experiment
from snapgen_jax.data.digits import WORDS
from snapgen_jax.networks.counting import ladder, parameters
from snapgen_jax.training.exits import ExitCode
from snapgen_jax.training.keys import key
from tests.recipes_for_tests import ONE_STAGE

ABLATION, FINAL = "configs/imagenet/ablation.py", "configs/imagenet/256.py"
BAND = ["--steps=2", "--guidance=1.5", "--guidance_interval=0.1,0.8"]
FEW = ["--config.train_steps=2", "--config.optimizer.warmup_steps=1", "--config.evaluation={}"]


@pytest.fixture(scope="module", autouse=True)
def quick(quick_to_compile):
    """See `quick_to_compile`."""


@pytest.mark.parametrize("step", ladder())
def test_a_step_of_the_ablation_is_the_network_of_the_ladder(step):
    recipe = load_experiment(f"{ABLATION}:{step}").recipe
    assert recipe.network == ladder()[step]
    small = load_experiment(f"{ABLATION}:{step},runlocal").recipe
    assert small.network == ladder(load_experiment(f"{ABLATION}:runlocal").recipe.network)[step]


def test_the_final_run_is_the_last_step_of_the_ladder_at_more_length():
    final, last = load_experiment(FINAL), load_experiment(f"{ABLATION}:G")
    assert parameters(final.recipe.network) == 371_780_228 and final.recipe.inputs.caption_dropout == 0.1
    assert final.recipe.schedule.density == "logit_normal"
    epochs = [made.recipe.train_steps * made.recipe.batch_size / 1_281_167 for made in (last, final)]
    assert epochs == pytest.approx([120, 800], rel=1e-5)
    same = dataclasses.replace(final.recipe, train_steps=last.recipe.train_steps)
    assert same == last.recipe


@pytest.mark.parametrize("spec", [f"{FINAL}:stored", f"{ABLATION}:C1,stored"])
def test_the_form_on_stored_latents_reads_latents_and_token_ids(spec):
    made = load_experiment(spec).build("cpu")
    (specs,) = made.batch_specs().values()
    assert {name: spec.shape[1:] for name, spec in specs.items()} == {"latent": (32, 32, 4), "clip_l": (77,)}


@pytest.mark.parametrize("spec", [f"{FINAL}:H", f"{ABLATION}:H", f"{ABLATION}:G,tiny"])
def test_an_unknown_argument_is_refused_with_those_there_are(spec, capsys):
    assert main(["config", f"--config={spec}"]) == ExitCode.BAD_CONFIG
    assert "stored and runlocal" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two updates of the final run's small form, of one stage in place of two."""
    workdir = tmp_path_factory.mktemp("run") / "imagenet"
    stage = [f"--config.network.{name}={value}" for name, value in ONE_STAGE.items()]
    assert main(["train", f"--config={FINAL}:runlocal", f"--workdir={workdir}", *FEW, *stage]) == ExitCode.DONE
    return workdir


def test_the_small_form_of_the_ablation_is_that_of_the_final_run_and_its_update_is_one():
    final, last = (load_experiment(f"{file}:runlocal") for file in (FINAL, ABLATION))
    assert final.recipe == last.recipe and final.experiment == last.experiment
    made = final.build("cpu")
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    (batch,) = made.batch_specs().values()
    after, metrics = jax.eval_shape(made.update, state, {}, batch, key(0, 0, "update"))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state) and metrics["loss"].shape == ()


def test_images_of_every_class_are_drawn_resumed_and_put_together(run, tmp_path, capsys):
    out, npz = tmp_path / "drawn", tmp_path / "drawn.npz"
    command = ["draw", f"--workdir={run}", f"--out={out}", "--count=20", "--classes=uniform", "--batch_size=5"]
    command += BAND
    assert main([*command, f"--npz={npz}"]) == ExitCode.DONE
    record = json.loads((out / "draw.json").read_text())
    assert record["options"]["guidance_interval"] == [0.1, 0.8] and record["told"]["texts"] == len(WORDS)
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert len(before) == 20 and np.load(npz)["arr_0"].shape == (20, 16, 16, 3)
    (out / "000013.png").unlink()
    capsys.readouterr()
    assert main(command) == ExitCode.DONE
    assert "drew 1 of 20 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before
    assert main([*command, "--guidance_interval=0,1"]) == ExitCode.BAD_CONFIG
    assert "drawn otherwise" in capsys.readouterr().err


def test_images_of_a_file_of_prompts_are_drawn_one_a_line(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a three\nthe digit nine\n")
    command = ["draw", f"--workdir={run}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'drawn'}"]
    assert main([*command, *BAND, "--batch_size=5"]) == ExitCode.DONE
    assert sorted(path.name for path in (tmp_path / "drawn").glob("*.png")) == ["000000.png", "000001.png"]
    assert Image.open(tmp_path / "drawn" / "000001.png").size == (16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes=uniform"], "how many images? give --count=50000"),
        (["--count=4", "--classes=uniform", "--guidance_interval=0.8,0.1"], "give (t_low, t_high) with 0 <= t_low"),
        (["--count=4", "--classes=uniform", "--guidance_interval=0.5"], "'guidance_interval' is 0.5"),
        (["--count=4", "--classes=uniform", "--steps=2", "--guidance_interval=0.1,0.2"], "none of the times"),
        (["--count=4"], "generation needs 'tokens', 'mask'"),
        (["--prompts=nowhere.txt"], "cannot be used: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_images(run, tmp_path, options, message, capsys):
    command = ["draw", f"--workdir={run}", f"--out={tmp_path / 'drawn'}", "--batch_size=5", *options]
    assert main(command) == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_an_evaluation_takes_the_interval_as_an_option(run, capsys):
    command = ["evaluate", f"--workdir={run}", "--names=sample_grid"]
    assert main([*command, *BAND]) == ExitCode.DONE
    assert main([*command, "--steps=2", "--guidance_interval=0.1,0.2"]) == ExitCode.BAD_CONFIG
    assert "none of the times" in capsys.readouterr().err
