"""A workdir in a bucket: killed and stopped on the way, the run is that of a disk; no torn checkpoint is offered."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from snapgen_jax.training.exits import ExitCode
from tests.flags import quick_environment
from tests.object_store import object_store

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 20
OPTIONS = [
    "--config=configs/shapes/quickstart.py:runlocal",
    f"--config.train_steps={STEPS}",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=4",
    "--config.evaluation.every_steps=0",
    "--config.evaluation.final=('sample_grid',)",
]
# Commands in one process, which compiles once; then the facts that two runs are compared by.
COMMANDS = """
import json, sys
from etils import epath
from snapgen_jax.cli import main
from snapgen_jax.generation import load
from snapgen_jax.training.fingerprint import fingerprint
from tests.test_runs import state_hash

*commands, workdirs, steps = json.loads(sys.argv[1])
for command in commands:
    assert main(command) == 0, command
for name in workdirs:
    workdir = epath.Path(name)
    facts = {
        "state": state_hash(workdir, steps),
        "weights": fingerprint(load(workdir).params),
        "picture": hash((workdir / "samples" / f"samples_{steps:08d}.png").read_bytes()),
        "train": (workdir / "metrics" / "train.jsonl").read_text(),
    }
    print("facts", json.dumps(facts))
"""
# Forks, and so comes before anything that starts threads.
KILLS = """
import json
from etils import epath
import gcsfs, jax
from benchmarks import crash_in_save as crash
from snapgen_jax.training.checkpoint import Checkpointer

folder = epath.Path("gs://runs/killed")
window = crash.run(folder / "rehearsal", None)
for workdir in list(crash.kills(folder, 3, window)):
    torn, (step, state) = crash.is_torn(workdir), crash.restore(workdir)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(jax.tree.map(jax.numpy.asarray, crash.state(2)), 20, {"seed": 0})
    checkpointer.close()
    print("killed", json.dumps([torn, step, crash.restore(workdir)[0]]))
"""


@pytest.fixture(scope="module")
def store():
    with object_store() as store:
        yield store


def start(store, *arguments):
    environment = {**os.environ, **store.environment, **quick_environment(), "PYTHONUNBUFFERED": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipe)


def said(process, word):
    """What a process that went well has said in lines that begin so, as JSON."""
    text, _ = process.communicate(timeout=400)
    assert process.returncode == ExitCode.DONE, text
    return [json.loads(line.removeprefix(word)) for line in text.splitlines() if line.startswith(word)], text


def interrupt(store, step, number):
    """Trains in the bucket until the checkpoint of `step` is whole, then sends a signal; returns how it ended."""
    process = start(store, "-m", "snapgen_jax.cli", "train", "--workdir=gs://runs/run", *OPTIONS)
    deadline = time.monotonic() + 400
    while not store.read(f"run/checkpoints/{step}/commit_success.txt"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    return process.returncode, text


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_and_stopped_is_the_run_on_a_disk(store, tmp_path):
    code, text = interrupt(store, 4, signal.SIGKILL)
    assert code == -signal.SIGKILL, text
    code, text = interrupt(store, 8, signal.SIGTERM)
    assert code == ExitCode.PREEMPTED, text
    assert "resuming at step" in text
    workdirs = ["gs://runs/run", str(tmp_path)]
    commands = [["train", f"--workdir={workdir}", *OPTIONS] for workdir in workdirs]
    commands += [
        ["evaluate", f"--workdir={workdirs[0]}", "--names=sample_grid"],
        ["status", f"--workdir={workdirs[0]}"],
    ]
    (bucket, disk), text = said(start(store, "-c", COMMANDS, json.dumps([*commands, workdirs, STEPS])), "facts")
    assert bucket == disk
    assert len(disk["train"].splitlines()) == STEPS
    assert f"step        {STEPS} of {STEPS} (100.0%)\ncheckpoint  {STEPS}" in text
    assert store.read("run/samples/samples.png").startswith(b"\x89PNG")
    # A save to a bucket writes to the folder of its step from the first, and marks it at the end.
    store.delete(f"run/checkpoints/{STEPS}/commit_success.txt")
    _, text = said(start(store, "-m", "snapgen_jax.cli", "status", "--workdir=gs://runs/run"), "facts")
    assert "checkpoint  16" in text and "it resumes at step 16" in text


def test_a_save_to_a_bucket_that_was_killed_is_not_offered_and_can_be_made_again(store):
    killed, _ = said(start(store, "-c", KILLS), "killed")
    assert len(killed) == 3 and any(torn for torn, _, _ in killed)
    for torn, step, again in killed:
        assert step == (1 if torn else 2) and again == 2
