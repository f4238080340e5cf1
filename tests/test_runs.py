"""Whole runs as processes: a crash and a signal lose nothing, and bad input gets one clear error and its exit code."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from snapgen_jax.generation import load, load_recipe
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ExitCode
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from tests.flags import quick_environment

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    "--config=configs/shapes/quickstart.py:runlocal",
    "--config.train_steps=30",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=5",
    "--config.evaluation.every_steps=0",
    "--config.evaluation.final=()",
    "--config.tensorboard=False",
]


def command(*arguments):
    return [sys.executable, "-m", "snapgen_jax.cli", *map(str, arguments)]


def environment():
    return {**os.environ, **quick_environment(), "PYTHONUNBUFFERED": "1"}


def snapgen(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def start(*arguments, group=False):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


def last_step(workdir):
    path = workdir / "metrics" / "train.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def goodput(workdir):
    return json.loads((workdir / "metrics" / "goodput.json").read_text())


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 240
    while last_step(workdir) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state_hash(workdir, step):
    recipe = load_recipe(workdir)
    abstract = jax.eval_shape(recipe.init, key(0, 0, "init"))
    shardings = tree_shardings(abstract, [], make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    placed = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), abstract, shardings)
    state, position = Checkpointer(workdir).restore(placed, step)
    assert position == step
    return fingerprint(state)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Thirty steps without a break."""
    workdir = tmp_path_factory.mktemp("straight")
    done = snapgen("train", f"--workdir={workdir}", *SMALL)
    assert done.returncode == ExitCode.DONE, done.stderr
    return workdir


def assert_same_run(workdir, straight):
    assert (workdir / "metrics/train.jsonl").read_bytes() == (straight / "metrics/train.jsonl").read_bytes()
    assert state_hash(workdir, 30) == state_hash(straight, 30)


def test_a_run_killed_after_eleven_steps_resumes_to_the_same_bits(tmp_path, straight):
    process = start("train", f"--workdir={tmp_path}", *SMALL)
    wait_for_step(process, tmp_path, 11)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and last_step(tmp_path) < 30
    told = goodput(tmp_path)
    resumed = snapgen("train", f"--workdir={tmp_path}", *SMALL)
    assert resumed.returncode == ExitCode.DONE, resumed.stderr
    assert "resuming at step" in resumed.stdout
    assert_same_run(tmp_path, straight)
    spent = goodput(tmp_path)
    assert told["steps_done"] > 10 and told["lost"] == 0 < spent["lost"] < told["step"]
    assert all(spent[name] > told[name] > 0 for name in ("init", "compile", "data", "checkpoint"))


def test_sigterm_in_training_saves_the_very_step_and_says_so(tmp_path, straight):
    process = start("train", f"--workdir={tmp_path}", *SMALL)
    wait_for_step(process, tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a second one changes nothing
    _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.PREEMPTED, errors
    stopped = Checkpointer(tmp_path).latest_step()
    assert 7 <= stopped < 30 and f"stopped at step {stopped} with everything saved" in errors
    assert last_step(tmp_path) == stopped
    assert snapgen("train", f"--workdir={tmp_path}", *SMALL).returncode == ExitCode.DONE
    assert_same_run(tmp_path, straight)


def test_sigterm_before_the_first_step_exits_within_ten_seconds(tmp_path):
    process = start("train", f"--workdir={tmp_path}", *SMALL)
    while not (tmp_path / "parameters.txt").exists():  # written just before compilation
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == ExitCode.PREEMPTED
    assert time.monotonic() - begin < 10


def test_ctrl_c_saves_the_very_step(tmp_path):
    long = [option.replace("train_steps=30", "train_steps=100000") for option in SMALL]
    workers = "--config.data.workers=1"  # which a terminal interrupts too
    process = start("train", f"--workdir={tmp_path}", *long, workers, group=True)
    wait_for_step(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.PREEMPTED, errors
    stopped = Checkpointer(tmp_path).latest_step()
    assert last_step(tmp_path) == stopped and f"stopped at step {stopped} with everything saved" in errors
    assert "signal SIGINT" in errors and "press Ctrl-C again to quit at once" in errors and "Traceback" not in errors


def test_the_finished_run_reports_itself_and_draws(straight, tmp_path):
    report = snapgen("status", f"--workdir={straight}")
    assert report.returncode == ExitCode.DONE
    assert "step        30 of 30 (100.0%)" in report.stdout and "finished: snapgen sample" in report.stdout
    generator = load(straight)
    two = generator.generate(["a red circle", "two blue stars"], seed=3)
    assert two.shape == (2, 32, 32, 3) and two.dtype == np.uint8
    alone = generator.generate(["two blue stars"], seed=3, indices=[1])
    assert np.abs(two[1].astype(int) - alone[0].astype(int)).max() <= 1  # an image does not depend on its batch
    assert (generator.generate(["a red circle"], seed=4) != two[:1]).any()
    run = json.loads((straight / "run.json").read_text())
    assert run["packages"]["jax"] == jax.__version__


def test_a_changed_global_batch_is_refused(straight):
    refused = snapgen("train", f"--workdir={straight}", *SMALL, "--config.batch_size=16")
    assert refused.returncode == ExitCode.BAD_CONFIG
    assert "global_batch of this workdir is {'32x32': 8}" in refused.stderr and "16" in refused.stderr


def test_a_changed_network_is_refused_leaf_by_leaf(straight):
    refused = snapgen("train", f"--workdir={straight}", *SMALL, "--config.network.ffn_ratio=2")
    assert refused.returncode == ExitCode.BAD_CONFIG
    assert "ffn/inner/kernel: float32[8, 48] in the checkpoint, float32[8, 32] in the config" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--workdir=W", "--config=configs/folder.py", "--config.data.path=W"], "W"),
        (["sample", "--workdir=W", "--prompt=a red circle"], "is not a workdir"),
        (["status", "--workdir=W"], "is not a workdir"),
        (["export", "--workdir=W"], "is not a workdir"),
        (["export", "--workdir=W", "--out=/usr"], "holds files and is no bundle; name another folder"),
        (["export", "--workdir=gs://bucket/run"], "give --out a local folder"),
        (["train", "--workdir=W", *SMALL, "--config.network.chanels=(8,)"], "did you mean 'channels'?"),
        (["train", "--workdir=W", *SMALL, "--config.microbatches=3"], "a global batch of 8 does not divide over"),
        (["train", "--workdir=W", *SMALL, "--config.evaluation.final=('compositionl',)"], "mean 'compositional'?"),
        (["train", "--workdir=W", *SMALL, "--config.network.latent_channels=4"], "inputs give 48 latent channels"),
        (["train", "--workdir=W", *SMALL, "--config.inputs.text.vocab_size=64"], "set data.vocab_size to at most"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_line_and_its_exit_code(tmp_path, arguments, message, capsys):
    from snapgen_jax.cli import main

    code = main([a.replace("=W", f"={tmp_path / 'W'}") for a in arguments])
    captured = capsys.readouterr()
    assert code == ExitCode.BAD_CONFIG, captured
    assert message in captured.err and "Traceback" not in captured.err
