"""Runs of several processes: one end for all, no work lost on the way, and the reason said everywhere.

Two processes with four fake devices each talk over gloo, as two hosts of a pod would.
"""

import collections
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from snapgen_jax.parallel import hosts
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ExitCode
from tests.flags import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 120


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Hosts:
    """The processes of one run of `tests.host_process`, and what they have said so far."""

    def __init__(self, workdir, processes=2, come=None, devices=4, **options):
        port = free_port()
        environment = {**os.environ, "XLA_FLAGS": xla_flags(devices)}
        self.said, self.processes, self.readers = [], [], []
        for index in range(processes if come is None else come):
            where = {"processes": processes, "coordinator": f"localhost:{port}", "index": index}
            options_here = {"workdir": str(workdir), **options, **(where if processes > 1 else {"processes": 1})}
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.host_process", json.dumps(options_here)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            lines = []
            reader = threading.Thread(target=self._read, args=(process.stdout, lines), daemon=True)
            reader.start()
            self.processes.append(process)
            self.said.append(lines)
            self.readers.append(reader)

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            lines.append(line.rstrip())

    def until(self, index, words):
        """Waits until a process has said a line that begins with these words."""
        deadline = time.monotonic() + TIMEOUT
        while not any(line.startswith(words) for line in self.said[index]):
            assert self.processes[index].poll() is None, self.text(index)
            assert time.monotonic() < deadline, self.text(index)
            time.sleep(0.005)

    def wait(self):
        """The exit codes."""
        deadline = time.monotonic() + TIMEOUT
        try:
            for process in self.processes:
                process.wait(max(1, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
            for reader in self.readers:
                reader.join()
        return [process.returncode for process in self.processes]

    def text(self, index):
        return "\n".join(self.said[index])

    def done(self):
        assert self.wait() == [ExitCode.DONE] * len(self.processes), self.text(0)
        return self

    def examples(self):
        """How often each example was drawn, by all processes together."""
        drawn = [line.split()[3:] for said in self.said for line in said if re.match(r"step \d+ examples", line)]
        return collections.Counter(int(index) for line in drawn for index in line)


def lines(workdir):
    return (workdir / "metrics/train.jsonl").read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Thirty steps of two processes without a break."""
    workdir = tmp_path_factory.mktemp("straight")
    run = Hosts(workdir).done()
    for index in (0, 1):
        assert f"process {index} of 2: 4 of 8 devices (cpu)" in run.text(index)
    assert "step 30/30" in run.text(0) and "step 30/30" not in run.text(1)  # the first process speaks for all
    return workdir


def test_two_hosts_hold_the_frozen_networks_of_their_run_to_the_files(straight):
    records = map(json.loads, (straight / "metrics/evaluation.jsonl").read_text().splitlines())
    (found,) = [record for record in records if record["evaluator"] == "unchanged"]
    assert found == {"step": 30, "evaluator": "unchanged", "frozen.unchanged": 1.0}


def stop(run, index):
    """Sends two signals to one process; returns the exit codes of all and the seconds that it took."""
    begin = time.monotonic()
    run.processes[index].send_signal(signal.SIGTERM)
    run.processes[index].send_signal(signal.SIGTERM)
    return run.wait(), time.monotonic() - begin


@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_either_process_ends_both_at_the_same_step_and_loses_nothing(tmp_path, straight, index):
    run = Hosts(tmp_path, batch_seconds=0.05)
    run.until(index, "step 9 ")
    codes, _ = stop(run, index)
    assert codes == [ExitCode.PREEMPTED] * 2, run.text(0)
    stopped = Checkpointer(tmp_path).latest_step()
    assert 9 <= stopped < 30
    for said in (run.text(0), run.text(1)):
        assert f"stopped at step {stopped} with everything saved" in said
    assert f"process {index} was told to stop" in run.text(1 - index)
    resumed = Hosts(tmp_path).done()
    assert f"resuming at step {stopped}" in resumed.text(0)
    assert lines(tmp_path) == lines(straight)


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ("compiling", {"compile_seconds": 30}),
        ("evaluating", {"evaluate_every_steps": 5, "evaluation_seconds": 30}),
    ],
)
def test_sigterm_where_nothing_is_unsaved_ends_both_within_ten_seconds(tmp_path, straight, moment, options):
    run = Hosts(tmp_path, **options)
    run.until(0, moment)
    run.until(1, moment)
    codes, seconds = stop(run, 1)
    assert codes == [ExitCode.PREEMPTED] * 2, run.text(0)
    assert seconds < 10
    assert Checkpointer(tmp_path).latest_step() == (5 if moment == "evaluating" else None)
    Hosts(tmp_path).done()
    assert lines(tmp_path) == lines(straight)


def test_two_hosts_then_one_then_two_see_every_example_once_and_learn_the_same(tmp_path, straight):
    drawn = collections.Counter()
    for processes, until_step in ((2, 10), (1, 20), (2, 30)):
        options = {"train_steps": until_step, "rows_of": 2 // processes}
        run = Hosts(tmp_path, processes=processes, devices=8 // processes, **options).done()
        drawn += run.examples()
    assert drawn == collections.Counter(range(30 * 16))
    changed, unchanged = ([json.loads(line)["loss"] for line in lines(at).splitlines()] for at in (tmp_path, straight))
    assert changed == pytest.approx(unchanged, rel=1e-5)


def test_the_failure_of_one_host_ends_both_and_both_say_why(tmp_path):
    run = Hosts(tmp_path, fail_at=4, disturbed=1)
    begin = time.monotonic()
    codes = run.wait()
    assert codes == [1, 1] and time.monotonic() - begin < 60
    for index in (0, 1):
        assert "RuntimeError: the disk of this host is on fire" in run.text(index)
    assert "process 1 of 2 failed, so process 0 ends too" in run.text(0)


def test_a_host_that_vanishes_does_not_leave_the_other_waiting(tmp_path):
    run = Hosts(tmp_path, freeze_at=4, disturbed=1)  # its connections stay open, as those of a host without power do
    run.processes[0].wait(TIMEOUT)
    run.processes[1].kill()
    assert run.wait() == [ExitCode.INFRASTRUCTURE, -signal.SIGKILL], run.text(0)
    assert "process 1 has not been heard of" in run.text(0)


def test_a_process_that_is_killed_does_not_leave_the_other_waiting(tmp_path):
    run = Hosts(tmp_path, die_at=4, disturbed=1)
    codes = run.wait()
    assert codes[1] == 9
    if codes[0] == -signal.SIGABRT:  # gloo, which stands for the links of a pod here, aborts now and then itself
        assert "gloo::EnforceNotMet" in run.text(0)
    else:
        assert codes[0] == ExitCode.INFRASTRUCTURE, run.text(0)
        assert "process 1 has not been heard of" in run.text(0)


def test_a_stall_is_reported_with_stacks_and_the_run_goes_on(tmp_path):
    run = Hosts(tmp_path, stall_at=4, stall_seconds=4, disturbed=1, report_after_seconds=2, train_steps=8).done()
    assert "process 1 of 2 has been in phase data (step 4) for 2 s" in run.text(1)
    assert "tests/host_process.py" in run.text(1)  # where it stands
    assert "process 0 of 2 has been in phase" in run.text(0)  # waiting for the other in a collective


def test_fewer_hosts_than_expected_stop_with_the_reason(tmp_path):
    run = Hosts(tmp_path, processes=2, come=1, start_timeout_seconds=5)
    assert run.wait() == [ExitCode.INFRASTRUCTURE]
    assert "the cluster of 2 processes did not form within 5 s" in run.text(0)
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"SLURM_NTASKS": "4"}, {"processes": 1}, "1 processes are expected and the environment announces 4"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, {"processes": 8}, "announces 4"),
        ({}, {"processes": 2}, "2 processes are expected and no cluster formed"),
        ({}, {"processes": 2, "index": 0}, "give all three"),
        ({}, {"coordinator": "localhost:1", "index": 0}, "give all three"),
    ],
)
def test_a_cluster_that_is_not_the_expected_one_is_refused(monkeypatch, environment, arguments, message):
    for name in ("SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hosts.ClusterError, match=message):
        hosts.start(**arguments)
    assert hosts.current().count == 1


def test_the_end_of_listening_takes_no_bytes_of_files_that_are_opened_after(tmp_path, monkeypatch):
    looking, go_on = threading.Event(), threading.Event()

    def select_late(*_):
        looking.set()
        go_on.wait(TIMEOUT)

    monkeypatch.setattr(hosts, "select", types.SimpleNamespace(select=select_late))
    cluster = hosts.Cluster()
    with cluster.listen(lambda notes, signals: None):
        assert looking.wait(TIMEOUT)
        thread = cluster._thread
    path = tmp_path / "train.jsonl"
    path.write_text("x" * 2000)
    files = [path.open() for _ in range(8)]  # one of them has the number of the pipe that was closed
    go_on.set()
    thread.join(TIMEOUT)
    for file in files:
        with file:
            assert len(file.read()) == 2000
