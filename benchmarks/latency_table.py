"""What each block of a UNet costs as TFLite: the table that evolution reads, held against whole networks.

    python -m benchmarks.latency_table --out=benchmarks/results/latency_table-cpu2.json
    python -m benchmarks.latency_table --config=configs/shapes/robust.py:runlocal --out=latency.json
    python -m benchmarks.latency_table --table=phone.json           # holds a table of a phone against this machine
    python -m benchmarks.latency_table --config=configs/snapfusion/robust.py --form --out=phone.json

A block is measured in its place: the network as it is, with two further copies of each block, and without each. The
times of blocks, and `rest`, that of all else, are those whose sums come nearest to all of these (non-negative least
squares). Then networks of random blocks are measured, and Spearman's rank correlation of their times with the table's
is in the file, as `spearman`; 0.9 or more is what a search needs. `docs/snapfusion.md` has the form of the file, for
tables that are measured elsewhere; the last line measures nothing and writes that form, to be filled in.

A time is that below which a fifth of the calls stay, of several interpreters for each network: where one happens to lie
in memory changes it by five percent. All take turns, in another order every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from scipy.optimize import nnls
from scipy.stats import rankdata

from benchmarks.measuring import by_turns, commit, machine
from snapgen_jax.config import load_experiment
from snapgen_jax.derivations.evolution import LatencyTable, described
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.runtime import litert_unit
from snapgen_jax.networks.evolved import Evolving, candidates, changed, kind, kinds
from snapgen_jax.networks.module import build, stand_in
from snapgen_jax.recipes._flow_export import denoiser_unit

COPIES = 2  # of a block, for a difference that stands out
INTERPRETERS, FASTER = 4, 0.2
CONFIG = "configs/shapes/robust.py:quick"


def on_litert(
    network: Evolving, latent: tuple[int, ...], context: Any, folder: pathlib.Path, threads: int = 1
) -> list[Callable[[], Any]]:
    """Calls of a network with stand-in weights as a TFLite file, which is made where the folder has it not; one for
    each of some interpreters."""
    built, _ = build(dataclasses.replace(network, dtype="float32"))
    unit = denoiser_unit(network.kind, built.config, latent, context)
    path = folder / f"{hashlib.sha256(repr((built.config, latent)).encode()).hexdigest()[:16]}.tflite"
    if not path.exists():
        weights = jax.jit(lambda: stand_in(built, 0))()
        made = folder / f"{path.stem}.part"
        to_tflite(unit.function, unit.select({network.kind: weights}), unit.inputs, "run", made, "litert").rename(path)
    generator = np.random.default_rng(0)
    arrays = {key: generator.normal(size=spec.shape).astype(spec.dtype) for key, spec in unit.inputs.items()}
    calls = [litert_unit(path, "run", threads) for _ in range(INTERPRETERS)]
    return [lambda call=call: call(**arrays) for call in calls]


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


def calibrating(network: Evolving) -> dict[str, Evolving]:
    """The networks whose times the table is fitted to."""
    blocks = candidates(network)
    return {
        "whole": network,
        **{f"+ {block}": repeated(network, block) for block in blocks},
        **{f"- {block}": changed(network, block, "remove")[0] for block in blocks},
    }


def milliseconds(
    networks: Mapping[str, Evolving], prepare: Callable[[Evolving], Sequence[Callable[[], Any]]], rounds: int
) -> dict[str, float]:
    """Of one call of each network; `prepare` gives the calls of one."""
    prepared = {name: prepare(network) for name, network in networks.items()}
    times = by_turns({f"{name}/{i}": call for name, calls in prepared.items() for i, call in enumerate(calls)}, rounds)
    return {
        name: 1000 * float(np.quantile(np.concatenate([times[f"{name}/{i}"] for i in range(len(calls))]), FASTER))
        for name, calls in prepared.items()
    }


def table_of(
    network: Evolving,
    networks: Mapping[str, Evolving],
    times: Mapping[str, float],
    latent: Sequence[int],
    tokens: int,
) -> LatencyTable:
    """The table of a network that comes nearest to the times of some that evolve from it.

    Raises:
        SystemExit: the nearest time of a block is 0.
    """
    names = kinds(network)

    def counts(one: Evolving) -> list[int]:
        stand = [kind(one, block) for block in one.droppable_blocks()]
        return [1, *(stand.count(name) for name in names)]

    rest, *blocks = nnls(np.array([counts(one) for one in networks.values()], float), [times[n] for n in networks])[0]
    found = {name: round(float(ms), 5) for name, ms in zip(names, blocks, strict=True)}
    if lost := [name for name, ms in found.items() if not ms]:
        raise SystemExit(f"the times of {', '.join(lost)} do not stand out from the noise; give more --rounds")
    return LatencyTable(described(network), [*latent], tokens, found, round(rest, 5))


def form_of(network: Evolving, latent: Sequence[int], tokens: int) -> dict[str, Any]:
    """A table of a network without its times."""
    blank = {"blocks": dict.fromkeys(kinds(network)), "rest": None}
    return {"network": described(network), "latent": [*latent], "tokens": tokens, **blank}


def measured_recipe(recipe: Any) -> tuple[Evolving, tuple[int, ...], Any]:
    """The network of a run, and the shapes of its latents and of what it attends to."""
    players = jax.eval_shape(recipe.init, jax.random.key(0)).players
    params = {name: player.params for name, player in players.items()}
    context = jax.eval_shape(recipe.inputs.null_condition, recipe.weights(params, recipe.frozen_spec()))
    return recipe.denoiser.network.config, recipe.inputs.latent_shape(), context


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="of a run whose network is measured")
    parser.add_argument("--table", default="", help="a table to hold against whole networks, in place of a new one")
    parser.add_argument("--out", default="", help="file to write; by default it is printed alone")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random", type=int, default=12, help="networks of random blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="", help="folder that keeps the TFLite files, and may have some")
    parser.add_argument("--form", action="store_true", help="measure nothing: write the form of a table")
    asked = parser.parse_args()
    network, latent, context = measured_recipe(load_experiment(asked.config).start("cpu"))
    sizes = latent[:2], context.sequence.shape[1]
    if asked.form:
        put(form_of(network, *sizes), asked.out)
        return
    whole = random_networks(network, asked.random, asked.seed)
    fitted = {} if asked.table else calibrating(network)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(asked.files or scratch)
        folder.mkdir(parents=True, exist_ok=True)

        def prepare(network: Evolving) -> list[Callable[[], Any]]:
            return on_litert(network, latent, context, folder, asked.threads)

        times = milliseconds({**fitted, **whole}, prepare, asked.rounds)
    table = LatencyTable.read(asked.table, network, *sizes) if asked.table else table_of(network, fitted, times, *sizes)
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
    put(found, asked.out)


def put(found: Mapping[str, Any], out: str) -> None:
    """Prints a table, and writes it where a file is named."""
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if out:
        pathlib.Path(out).write_text(text)


if __name__ == "__main__":
    main()
