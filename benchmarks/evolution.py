"""The architectures that the claims of evolution compare: one that is searched for, and some by chance, of one budget.

    python -m benchmarks.evolution --run=WORKDIR                 # a run of configs/shapes/robust.py:quick
    python -m benchmarks.evolution --run=WORKDIR --table=latency.json

`benchmarks/results/evolution.json` then holds, for each, its blocks, where they come from, what it costs, and the
actions that made it, and `python -m benchmarks.claims snapfusion` trains and scores them. The budget and the table are
fixed before anything is searched.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from typing import Any

from etils import epath

from benchmarks.measuring import commit, machine
from snapgen_jax.derivations.evolution import evolve, random_architecture

OUT = pathlib.Path(__file__).parent / "results" / "evolution.json"
SEARCHED, CHANCES = "evolved", 3


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run of the recipe block_dropping")
    parser.add_argument("--table", default="", help="of latencies; without one multiply-adds count")
    parser.add_argument("--budget", type=float, default=0.8, help="share of the cost of the run's network")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--per_category", type=int, default=64)
    asked = parser.parse_args()
    options: dict[str, Any] = {
        **{name: getattr(asked, name) for name in ("table", "budget", "copies", "per_category")},
        "metric": "score",
        "categories": ("single_object", "colours"),
    }
    run = {"from": epath.Path(asked.run)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = epath.Path(scratch)
        found = {SEARCHED: evolve(run, folder / SEARCHED, options)}
        values = [json.loads(line) for line in (folder / SEARCHED / "items.jsonl").read_text().splitlines()]
        for seed in range(CHANCES):
            name = f"random {seed}"
            found[name] = random_architecture(run, folder / name, {**options, "seed": seed})
    made = {"options": options, "machine": machine(), "commit": commit(), "architectures": found, "items": values}
    text = json.dumps(made, indent=1)
    print(text)
    OUT.write_text(text + "\n")


if __name__ == "__main__":
    main()
