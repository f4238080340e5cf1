"""The exposure gap of a few-step run: how far its jump is from its teacher's on noised data and on its own samples.

    python -m benchmarks.exposure --workdir=chain/student_few_step

Prints one JSON line with, for each time of sampling, both squared distances of the data ends and their ratio. A ratio
well above 1 is what `own_samples` is for.
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
from snapgen_jax.training.exits import ConfigError


def main() -> None:
    """Measures one workdir."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--batches", type=int, default=16)
    arguments = parser.parse_args()
    generator = load(arguments.workdir)
    experiment = Experiment(resolve(load_config(arguments.workdir)), arguments.workdir)
    recipe: Any = experiment.recipe
    if not hasattr(recipe, "exposure"):
        raise ConfigError(f"{arguments.workdir} is no run of the recipe 'adversarial', and so has no few steps")
    frozen = recipe.load_frozen(None)
    exposure = jax.jit(recipe.exposure)
    sums: dict[str, float] = {}
    for n, batch in enumerate(itertools.islice(ValidationBatches(experiment), arguments.batches)):
        for name, values in exposure(generator.params, frozen, batch.arrays, jax.random.key(n)).items():
            sums[name] = sums.get(name, 0.0) + float(np.mean(values))
    rows = {}
    for name, total in sums.items():
        kind, _, time = name.partition("/")
        rows.setdefault(time, {})[kind] = total / arguments.batches
    for row in rows.values():
        row["ratio"] = row["own"] / row["noised"]
    print(json.dumps({"machine": machine(), "exposure": rows}))


if __name__ == "__main__":
    main()
