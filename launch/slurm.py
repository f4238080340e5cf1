"""SLURM on GPU clusters: one task a node, a save before the time limit, and a requeue.

    python -m launch.slurm --name=t2i-256 --nodes=4 --gpus=8 --time=24:00:00 --partition=PARTITION \\
        --config=configs/pretrain/t2i_256.py --workdir=/shared/t2i_256

SIGTERM comes five minutes before the time limit and at a preemption; the job saves, and SLURM queues it again.

Checked against https://slurm.schedmd.com/sbatch.html and https://slurm.schedmd.com/srun.html on 2026-11-21.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from launch.job import AGAIN, LaunchError, Shell, add_job, flags, job_of, main_of, parser

SCRIPT = """#!/usr/bin/env bash
# On the first node: starts the job on every node, hands it the signal, and queues it again if there is more to do.
set -uo pipefail
export XLA_FLAGS={flags}
srun --kill-on-bad-exit=0 {command} &
job=$!
trap 'kill -TERM "$job"' TERM
wait "$job"
code=$?
while kill -0 "$job" 2>/dev/null; do  # a signal ends `wait`, and the job still saves
    wait "$job"
    code=$?
done
case $code in
    {again}) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of this launcher."""
    made = parser(__doc__)
    add_job(made)
    made.add_argument("--nodes", type=int, required=True)
    made.add_argument("--gpus", type=int, required=True, help="on each node")
    made.add_argument("--time", default="24:00:00", help="limit of one stay in the cluster (default: %(default)s)")
    made.add_argument("--partition")
    made.add_argument("--account")
    made.add_argument("--flags", default="gpu", help="set under launch/flags (default: %(default)s)")
    return made


def run(argv: Sequence[str]) -> None:
    """Parses and submits."""
    options, rest = build_parser().parse_known_args(argv)
    if options.nodes < 1 or options.gpus < 1:
        raise LaunchError(f"--nodes={options.nodes}, --gpus={options.gpus}: both are at least 1")
    job, shell = job_of(options, rest), Shell(options.dry_run)
    script = SCRIPT.format(
        flags=shlex.quote(flags(options.flags)),
        command=shlex.join(job.command(options.nodes)),
        again="|".join(map(str, AGAIN)),
    )
    path = f"/tmp/{job.name}.sbatch"
    print(f"# {path}\n{script}")
    if not options.dry_run:
        with open(path, "w") as file:
            file.write(script)
    shell.run(
        [
            "sbatch",
            f"--job-name={job.name}",
            f"--nodes={options.nodes}",
            "--ntasks-per-node=1",
            f"--gpus-per-node={options.gpus}",
            "--exclusive",
            f"--time={options.time}",
            *([f"--partition={options.partition}"] if options.partition else []),
            *([f"--account={options.account}"] if options.account else []),
            "--signal=B:TERM@300",
            "--requeue",
            "--open-mode=append",
            f"--output={job.name}-%j.log",
            path,
        ],
        "one task a node; SIGTERM 300 s before the limit",
    )


if __name__ == "__main__":
    sys.exit(main_of(run))
