"""Several processes on this machine as one run: a pod in miniature, to try a job before it costs anything.

    python -m launch.local --processes=2 --devices=4 --name=try --config=configs/shapes/quickstart.py:runlocal \\
        --workdir=/tmp/try

Each process gets `--devices` CPU devices. Ctrl-C, or SIGTERM to this program, reaches every process.

Checked against https://docs.jax.dev/en/latest/_autosummary/jax.distributed.initialize.html on 2026-11-21.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from launch.job import ROOT, LaunchError, add_job, job_of, main_of, parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of this launcher."""
    made = parser(__doc__)
    add_job(made)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--devices", type=int, default=4, help="CPU devices of each process (default: %(default)s)")
    made.add_argument("--port", type=int, help="of process 0 (default: a free one)")
    return made


def run(argv: Sequence[str]) -> None:
    """Parses, starts all processes and waits for them; a failing one decides the exit code."""
    options, rest = build_parser().parse_known_args(argv)
    if options.processes < 1 or options.devices < 1:
        raise LaunchError(f"--processes={options.processes}, --devices={options.devices}: both are at least 1")
    job = job_of(options, rest)
    port = options.port or _free_port()
    own = os.environ.get("XLA_FLAGS", "")
    flags = f"{own} --xla_force_host_platform_device_count={options.devices}".strip()
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    commands = [
        [*job.command(options.processes), f"--coordinator=localhost:{port}", f"--index={index}"]
        for index in range(options.processes)
    ]
    for command in commands:
        print(" ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command))
    if options.dry_run:
        return
    program = [sys.executable, "-m", "snapgen_jax.cli"]
    started = [
        subprocess.Popen([*program, *command[1:]], cwd=ROOT, env={**os.environ, **environment}) for command in commands
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: [process.send_signal(signal.SIGTERM) for process in started])
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(next(code for code in codes if code))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main_of(run))
