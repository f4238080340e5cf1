"""The architectures that the claims of evolution compare: one that is searched for, and some by chance, of one budget.

    python -m benchmarks.evolution --run=WORKDIR                 # a run of configs/shapes/robust.py:quick
    python -m benchmarks.evolution --run=WORKDIR --table=        # multiply-adds in place of measured times

`benchmarks/results/evolution.json` then holds, for each, its blocks, where they come from, what it costs by the table,
and the actions that made it; and in `milliseconds` what each takes as TFLite, beside the network of the run. `python -m
benchmarks.claims snapfusion` trains and scores them. The budget and the table, that of `benchmarks/latency_table.py`,
are fixed before anything is searched.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from benchmarks.latency_table import measured_recipe, milliseconds, on_litert
from benchmarks.measuring import commit, machine
from snapgen_jax.derivations.evolution import evolve, random_architecture
from snapgen_jax.generation import load_recipe
from snapgen_jax.typed import build, plain

RESULTS = pathlib.Path(__file__).parent / "results"
OUT, TABLE = RESULTS / "evolution.json", RESULTS / "latency_table-cpu2.json"
SEARCHED, CHANCES = "evolved", 3


def latencies(recipe: Any, architectures: Mapping[str, Mapping[str, Any]], folder: pathlib.Path) -> dict[str, float]:
    """Milliseconds of one call as TFLite, of the network of a run, "whole", and of some that evolved from it."""
    network, latent, context = measured_recipe(recipe)
    evolved = {
        name: build(type(network), {**plain(network), **made["network"]}) for name, made in architectures.items()
    }
    found = milliseconds({"whole": network, **evolved}, lambda one: on_litert(one, latent, context, folder), rounds=300)
    return {name: round(ms, 4) for name, ms in found.items()}


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run of the recipe block_dropping")
    parser.add_argument("--table", default=str(TABLE), help="of latencies; '' for multiply-adds")
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
        times = latencies(load_recipe(run["from"]), found, pathlib.Path(scratch))
    made = {
        "options": {**options, "table": pathlib.Path(asked.table).name},
        "machine": machine(),
        "commit": commit(),
        "milliseconds": times,
        "architectures": found,
        "items": values,
    }
    text = json.dumps(made, indent=1)
    print(text)
    OUT.write_text(text + "\n")


if __name__ == "__main__":
    main()
