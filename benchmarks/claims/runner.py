"""Trains what the claims of papers need, and judges them: `python -m benchmarks.claims`.

    python -m benchmarks.claims --budget=ci               # the machinery alone, in minutes; its numbers mean nothing
    python -m benchmarks.claims --budget=short            # 2.5 hours of two cores for a paper's rows
    python -m benchmarks.claims --budget=night            # three seeds, longer
    python -m benchmarks.claims --budget=gpu              # the same and more, on a GPU
    python -m benchmarks.claims --budget=world            # at full length in the whole world, on a GPU
    python -m benchmarks.claims snapgen --budget=night --hours=2   # one paper, as far as it comes; run it again
    python -m benchmarks.claims --budget=night --jobs=2   # two trainings at a time, each in its own process
    python -m benchmarks.claims --budget=night --seed=1   # one seed alone
    python -m benchmarks.claims --budget=night --join=DIR # with the seeds that another machine left in its --out
    python -m benchmarks.claims --table                   # judges what is there; trains nothing

Every finished seed is a file under --out at once, and is not made again.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import get_args

import jax

from benchmarks.claims import landing, table
from benchmarks.claims.runs import Runs
from benchmarks.claims.trials import BUDGETS, paper, paper_names
from benchmarks.jobs import Job, make_all, make_at_once
from snapgen_jax.networks.depthwise import Form
from snapgen_jax.process import prepare

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"all by default: {', '.join(paper_names())}")
    parser.add_argument("--budget", choices=tuple(BUDGETS), help="what is made")
    parser.add_argument("--table", action="store_true", help="judge what is there, and train nothing")
    parser.add_argument("--workdir", default="runs/claims", help="where the runs are kept")
    parser.add_argument(
        "--out", type=pathlib.Path, help="where results go: benchmarks/results/claims; of ci, WORKDIR/ci"
    )
    parser.add_argument("--hours", type=float, default=math.inf, help="begin nothing after so many hours")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each in a process of its own")
    parser.add_argument("--seed", type=int, action="append", help="make this seed alone; --join adds those of others")
    parser.add_argument("--join", type=pathlib.Path, action="append", default=[], help="an --out of another machine")
    parser.add_argument("--together", action=argparse.BooleanOptionalAction, help="all seeds of a trial in one program")
    parser.add_argument("--depthwise", choices=get_args(Form), default="auto", help="form of it")
    parser.add_argument("--job", type=Job.from_json, help=argparse.SUPPRESS)  # what --jobs gives each process
    options = parser.parse_args(argv)
    options.papers = options.papers or paper_names()
    if unknown := set(options.papers) - set(paper_names()):
        parser.error(f"no paper {', '.join(sorted(unknown))}; there are {', '.join(paper_names())}")
    if not options.budget and not options.table:
        parser.error("choose --budget=short|night|gpu|world|ci, or --table to train nothing")
    if options.join and not options.budget:
        parser.error("--join adds the seeds of one budget; name it with --budget")
    root = pathlib.Path(options.workdir).absolute()
    options.workdir, options.out = root, options.out or (root / "ci" if options.budget == "ci" else RESULTS)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, judges and stores. Returns 1 where a job failed."""
    prepare()
    options = arguments(argv)
    deadline = time.monotonic() + 3600 * options.hours
    if options.jobs > 1 or options.job:  # they share an accelerator, and what they compile
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.workdir / "compiled"))
    papers = [paper(name) for name in options.papers]
    on_gpu = jax.default_backend() == "gpu"
    together = on_gpu if options.together is None else options.together
    failed: list[Job] = []
    try:
        if options.join:
            landing.join(options.join, options.out, papers, options.budget)
    except ValueError as error:
        print(f"--join: {error}", file=sys.stderr)
        return 2
    for one in papers if not options.table else ():
        choices = {"together": together, "images_at_once": 128 if on_gpu else 16, "depthwise": options.depthwise}
        runs = Runs(one, options.budget, options.workdir, options.out, only=options.seed, **choices)
        if options.job:
            runs.do(options.job)
            return 0
        if options.jobs > 1:
            failed += make_at_once(
                runs, options.jobs, deadline, lambda job, one=one: _command(options, one.name, together, job)
            )
        else:
            make_all(runs, deadline)
    print("\n" + table.write(papers, options.out))
    return 1 if failed else 0


def _command(options: argparse.Namespace, name: str, together: bool, job: Job) -> list[str]:
    """What makes a job in a process of its own, with the choices of this one."""
    asked = [
        name,
        f"--budget={options.budget}",
        f"--workdir={options.workdir}",
        f"--out={options.out.absolute()}",
        f"--{'' if together else 'no-'}together",
        f"--depthwise={options.depthwise}",
        *(f"--seed={seed}" for seed in options.seed or ()),
    ]
    return [sys.executable, "-m", "benchmarks.claims", *asked, "--job", job.to_json()]
