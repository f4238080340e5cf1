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
from tests.event_files import read_events
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
from snapgen_jax.training.metrics import read_lines
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
        "train": read_lines(workdir / "metrics" / "train.jsonl"),
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
workdirs = []
for round in range(5):  # another process may take the machine's time, and a kill then comes before or after the save
    workdirs += crash.kills(folder / f"round_{round}", 3, window)
    if any(map(crash.is_torn, workdirs)):
        break
for workdir in workdirs:
    torn, whole = crash.is_torn(workdir), (workdir / "checkpoints" / "2" / "commit_success.txt").exists()
    step, state = crash.restore(workdir)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(jax.tree.map(jax.numpy.asarray, crash.state(2)), 20, {"seed": 0})
    checkpointer.close()
    print("killed", json.dumps([torn, whole, step, crash.restore(workdir)[0]]))
"""
# The metrics of 10,000 updates, written as the loop does, in three lives: the first one is killed past its checkpoint.
METRICS = """
import json, sys
import numpy as np, psutil
from etils import epath
from snapgen_jax.training.metrics import MetricWriter, read_lines

def record(step):
    return {"step": step, "finite": True, "grad_norm": 1 / step, "loss": 0.1 * step / 7}

def received():  # by the store's server, which reads nothing but requests
    return psutil.Process(int(sys.argv[1])).io_counters().read_chars

workdir, begin = epath.Path("gs://runs/metrics"), received()
for first, last in (0, 2600), (2500, 5000), (5000, 10_000):
    writer = MetricWriter(workdir, first)
    for step in range(first + 100, last + 1, 100):
        writer.train([record(n) for n in range(step - 99, step + 1)])
        writer.perf({"step": step, "examples_per_second": step / 7, "step_seconds": 7 / step, "time": 0.5})
        if step % 2500 == 0:
            writer.evaluation(step, "grid", {"score": step / 3}, {"grid": np.full((16, 16, 3), step % 255, np.uint8)})
    if last != 2600:
        writer.close()
    assert read_lines(workdir / "metrics" / "train.jsonl") == [record(n) for n in range(1, last + 1)]
    evaluation = read_lines(workdir / "metrics" / "evaluation.jsonl")
    assert [line["step"] for line in evaluation] == list(range(2500, last + 1, 2500))
    print("received", received() - begin)
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
    assert len(disk["train"]) == STEPS
    assert f"step        {STEPS} of {STEPS} (100.0%)\ncheckpoint  {STEPS}" in text
    assert store.read("run/samples/samples.png").startswith(b"\x89PNG")
    # A save to a bucket writes to the folder of its step from the first, and marks it at the end.
    store.delete(f"run/checkpoints/{STEPS}/commit_success.txt")
    _, text = said(start(store, "-m", "snapgen_jax.cli", "status", "--workdir=gs://runs/run"), "facts")
    assert "checkpoint  16" in text and "it resumes at step 16" in text


@pytest.mark.skipif(sys.platform != "linux", reason="the bytes that a process has read are Linux's to tell")
def test_metrics_in_a_bucket_grow_linearly_and_tensorboard_reads_them(store, tmp_path):
    received, _ = said(start(store, "-c", METRICS, str(store.pid)), "received")
    assert received[2] < 2.5 * received[1], received  # a file that is written anew for each interval makes this 4
    names = store.names("metrics/")
    assert sum("train.jsonl" in name for name in names) <= 45
    # TensorBoard reads the segments as event files, one after another.
    for name in names:
        if "tfevents" in name:
            (tmp_path / name.rpartition("/")[2]).write_bytes(store.read(name))
    assert 0 < len(list(tmp_path.iterdir())) <= 45
    events = read_events(tmp_path)
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(100, 10_001, 100))
    assert losses[-1].value == pytest.approx(sum(0.1 * n / 7 for n in range(9901, 10_001)) / 100)
    assert [event.step for event in events.Images("grid")] == [2500, 5000, 7500, 10_000]


def test_a_save_to_a_bucket_that_was_killed_is_not_offered_and_can_be_made_again(store):
    killed, _ = said(start(store, "-c", KILLS), "killed")
    assert any(torn for torn, _, _, _ in killed)
    for torn, whole, step, again in killed:
        assert not (torn and whole)
        assert step == (2 if whole else 1) and again == 2  # one that left nothing had not begun
