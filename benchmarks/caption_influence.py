"""Where in time captions steer a trained run: its validation loss with the right captions and with those of others.

    python -m benchmarks.caption_influence --workdir=quickstart

Prints one JSON line with, for each time, the loss with right and with permuted captions and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import jax
import numpy as np

from benchmarks.measuring import machine
from snapgen_jax.config import resolve
from snapgen_jax.experiment import Experiment, ValidationBatches
from snapgen_jax.generation import load, load_config


def main() -> None:
    """Measures one workdir."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--batches", type=int, default=16)
    arguments = parser.parse_args()
    workdir = arguments.workdir
    generator = load(workdir)
    experiment = Experiment(resolve(load_config(workdir)), workdir)
    recipe: Any = experiment.recipe
    loss = jax.jit(recipe.validation_loss)
    sums: dict[str, np.ndarray] = {}
    for n, batch in enumerate(itertools.islice(ValidationBatches(experiment), arguments.batches)):
        moved = {k: v if k == "image" else np.roll(v, 1, axis=0) for k, v in batch.arrays.items()}
        both = [loss(generator.params, generator.frozen, arrays, jax.random.key(n)) for arrays in (batch.arrays, moved)]
        for name in both[0]:
            sums[name] = sums.get(name, np.zeros(2)) + [float(values[name].mean()) for values in both]
    rows = {
        name: {"right": right, "permuted": permuted, "ratio": permuted / right}
        for name, (right, permuted) in ((name, total / arguments.batches) for name, total in sums.items())
    }
    print(json.dumps({"machine": machine(), "loss": rows}))


if __name__ == "__main__":
    main()
