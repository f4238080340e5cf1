"""What each block of a UNet costs as TFLite: the table that evolution reads, held against whole networks.

    python -m benchmarks.latency_table --out=latency.json
    python -m benchmarks.latency_table --config=configs/shapes/robust.py:runlocal --out=latency.json
    python -m benchmarks.latency_table --table=phone.json           # holds a table of a phone against this machine

A block is measured in its place: the network with two further copies of it, less the network, over two. All networks
take turns on LiteRT, and the fastest call of each counts, which other work on the machine changes least. `rest` is the
network less its blocks. Then networks of random blocks are measured too, and Spearman's rank correlation of their times
with the table's is in the file, as `spearman`; 0.9 or more is what a search needs. `docs/snapfusion.md` has the form of
the file, for tables that are measured elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from scipy.stats import rankdata

from benchmarks.measuring import commit, fastest, machine
from snapgen_jax.config import load_experiment
from snapgen_jax.derivations.evolution import LatencyTable, described
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.runtime import litert_unit
from snapgen_jax.networks.evolved import Evolving, candidates, changed, kind
from snapgen_jax.networks.module import build, stand_in
from snapgen_jax.recipes._flow_export import denoiser_unit

COPIES = 2  # of a block, for a difference that stands out
CONFIG = "configs/shapes/robust.py:quick"


def on_litert(
    name: str, network: Evolving, latent: tuple[int, ...], context: Any, folder: pathlib.Path, threads: int
) -> Callable[[], Any]:
    """A call of a network with stand-in weights as a TFLite file."""
    built, _ = build(dataclasses.replace(network, dtype="float32"))
    unit = denoiser_unit(network.kind, built.config, latent, context)
    weights = jax.jit(lambda: stand_in(built, 0))()
    path = to_tflite(unit.function, unit.select({network.kind: weights}), unit.inputs, "run", folder / f"{name}.tflite")
    call = litert_unit(path, "run", threads)
    generator = np.random.default_rng(0)
    arrays = {key: generator.normal(size=spec.shape).astype(spec.dtype) for key, spec in unit.inputs.items()}
    return lambda: call(**arrays)


def repeated(network: Evolving, block: str) -> Evolving:
    """The network with further copies of a block."""
    for _ in range(COPIES):
        network = changed(network, block, "copy")[0]
    return network


def random_networks(network: Evolving, count: int, seed: int) -> dict[str, Evolving]:
    """Networks after some random actions, all different."""
    generator, found = np.random.default_rng(seed), {network}
    while len(found) < count + 1:
        one = network
        for _ in range(generator.integers(1, 6)):
            blocks = candidates(one)
            action = "copy" if len(blocks) < 3 or generator.random() < 0.5 else "remove"
            one = changed(one, str(generator.choice(blocks)), action)[0]
        found.add(one)
    return {f"random {i}": one for i, one in enumerate(sorted(found - {network}, key=repr))}


def measured(networks: Mapping[str, Evolving], prepare: Callable[..., Any], rounds: int) -> dict[str, float]:
    """Milliseconds of each network."""
    calls = {name: prepare(name.replace(" ", "_"), network) for name, network in networks.items()}
    return {name: 1000 * seconds for name, seconds in fastest(calls, rounds).items()}


def table_of(network: Evolving, times: Mapping[str, float]) -> LatencyTable:
    """The table, of the times of the network, "whole", and of those in which a block is repeated, by its name."""
    blocks: dict[str, float] = {}
    for block in candidates(network):
        blocks[kind(network, block)] = max(0.0, (times[block] - times["whole"]) / COPIES)
    standing = sum(blocks[kind(network, block)] for block in network.droppable_blocks())
    return LatencyTable(described(network), blocks, times["whole"] - standing)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="of a run whose network is measured")
    parser.add_argument("--table", default="", help="a table to hold against whole networks, in place of a new one")
    parser.add_argument("--out", default="", help="file to write; by default it is printed alone")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random", type=int, default=12, help="networks of random blocks")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    recipe: Any = load_experiment(asked.config).start("cpu")
    network: Any = recipe.denoiser.network.config
    latent = recipe.inputs.latent_shape()
    networks = jax.eval_shape(recipe.init, jax.random.key(0)).players["model"].params
    context = jax.eval_shape(recipe.inputs.null_condition, networks)
    with tempfile.TemporaryDirectory() as scratch:

        def prepare(name: str, network: Evolving) -> Any:
            return on_litert(name, network, latent, context, pathlib.Path(scratch), asked.threads)

        whole = random_networks(network, asked.random, asked.seed)
        if asked.table:
            table, times = LatencyTable.read(asked.table, network), measured(whole, prepare, asked.rounds)
        else:
            blocks = {block: repeated(network, block) for block in candidates(network)}
            times = measured({"whole": network, **blocks, **whole}, prepare, asked.rounds)
            table = table_of(network, times)
    pairs = {name: [round(table(one), 4), round(times[name], 4)] for name, one in whole.items()}
    found = {
        **dataclasses.asdict(table),
        "unit": "milliseconds of one call",
        "machine": machine(),
        "commit": commit(),
        "threads": asked.threads,
        "whole networks, by the table and measured": pairs,
        "spearman": round(float(np.corrcoef([rankdata(column) for column in np.array([*pairs.values()]).T])[0, 1]), 4),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if asked.out:
        pathlib.Path(asked.out).write_text(text)


if __name__ == "__main__":
    main()
