"""A start that is refused leaves the workdir byte for byte as it was: compared first, written after."""

import hashlib
import json
import pathlib
import shutil

import pytest

from snapgen_jax.chain import load_chain
from snapgen_jax.chain_run import run_chain
from snapgen_jax.cli import main
from snapgen_jax.config import load_config, load_experiment, to_json
from snapgen_jax.experiment import Experiment
from snapgen_jax.training.exits import ExitCode
from tests.recipes_for_tests import ONE_STAGE

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SMALL = [
    "--config=configs/shapes/quickstart.py:runlocal",
    "--config.train_steps=2",
    "--config.tensorboard=False",
    "--config.evaluation.every_steps=0",
    "--config.evaluation.final=()",
    "--config.data.vocab_size=300",
    *(f"--config.network.{name}={value!r}" for name, value in ONE_STAGE.items()),
]


def contents(folder):
    """{file: digest} of all that is in a folder, and its folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts  # of a config that lies there
    }


def train(workdir, *options):
    return main(["train", f"--workdir={workdir}", *SMALL, *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_to_compile):
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert train(workdir) == ExitCode.DONE
    return workdir


REFUSALS = {
    "another seed": (["--config.seed=1"], "seed of this workdir is 0"),
    "another batch size": (["--config.batch_size=16"], "global_batch of this workdir is {'32x32': 8}"),
    "another architecture": (["--config.network.ffn_ratio=2"], "in the checkpoint, float32"),
    "fewer steps than it has": (["--config.train_steps=1"], "set train_steps to 2 or more"),
    "an unknown key": (["--config.network.chanels=(8,)"], "did you mean 'channels'?"),
    "missing data": (["--config.data.source=folder", "--config.data.path=/nowhere"], "/nowhere"),
    "an unknown evaluator": (["--config.evaluation.final=('compositionl',)"], "mean 'compositional'?"),
    "microbatches that do not divide": (["--config.microbatches=3"], "does not divide"),
    "a larger vocabulary": (["--config.data.vocab_size=310"], "data.vocab_size was 300, is now 310"),
}


@pytest.mark.parametrize("command", ["train", "quickstart"])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_start_changes_nothing_in_a_workdir(case, command, run, capsys):
    if command == "quickstart" and case == "an unknown key":
        pytest.skip("refused before the command is told apart")
    options, message = REFUSALS[case]
    before = contents(run)
    assert main([command, f"--workdir={run}", *SMALL, *options]) == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("case", ["an unknown key", "missing data", "microbatches that do not divide"])
def test_a_refused_start_makes_no_workdir(case, tmp_path):
    assert train(tmp_path / "run", *REFUSALS[case][0]) == ExitCode.BAD_CONFIG
    assert not (tmp_path / "run").exists()


def test_reading_batches_writes_nothing(tmp_path):
    assert main(["data", f"--workdir={tmp_path / 'run'}", *SMALL, "--batches=1"]) == ExitCode.DONE
    assert not (tmp_path / "run").exists()


def test_an_accepted_change_is_announced_and_written(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert train(tmp_path / "run", "--config.log_every_steps=7") == ExitCode.DONE
    assert "config changed since this run began: log_every_steps was" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["log_every_steps"] == 7


def test_a_stage_that_is_refused_leaves_the_old_one_in_its_place(tmp_path):
    stage = {"name": "clip", "config": f"{pathlib.Path('configs/shapes/clip.py').absolute()}:runlocal"}
    (tmp_path / "chain.py").write_text(f"def get_config(arg=None):\n    return {{'stages': [{stage!r}]}}\n")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "began.json").write_text(
        json.dumps({"clip": to_json(load_config(stage["config"], ["seed=5"]))})
    )
    (tmp_path / "clip" / "weights").write_text("of the old run")
    before = contents(tmp_path)
    chain, overrides = load_chain(str(tmp_path / "chain.py"), ["clip.data.source=folder", "clip.data.path=/nowhere"])
    with pytest.raises(ValueError, match="/nowhere"):
        run_chain(chain, overrides, tmp_path)
    assert contents(tmp_path) == before


def test_the_record_of_a_run_is_what_was_asked_for(tmp_path):
    resolved = load_experiment(SMALL[0].removeprefix("--config="), ["data.vocab_size=300"])
    experiment = Experiment(resolved, tmp_path)
    experiment.check()
    assert not list(tmp_path.iterdir())
    experiment.record()
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "run.json",
        "tokenizer.json",
        "tokenizer_source.json",
    }
