"""Functions that stages of a chain derive with, in the tests."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from snapgen_jax.bookkeeping import Items
from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment

calls: list[str] = []  # the items that were computed
stop_before: list[str] = []  # items at which the process is stopped
result: dict[str, Any] = {}  # takes the place of what `count` returns


def count(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Steps that grow with the rounds; each round is an item."""

    def one(name: str) -> Callable[[], int]:
        def compute() -> int:
            if name in stop_before:
                raise KeyboardInterrupt
            calls.append(name)
            return len(name)

        return compute

    items = Items(workdir)
    steps = sum(items.run(name, one(name)) for name in options["rounds"])
    return {"schedule": {"steps": steps, "started_from": sorted(stages)}, **result}


def shortest(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest steps of `options`, each trained by the loop in a run of its own."""

    def train(steps: int) -> int:
        config = load_experiment(options["config"], [f"train_steps={steps}", f"init_from={stages['from']}"])
        return int(Experiment(config, workdir / f"steps_{steps}").train().step)

    items = Items(workdir)
    return {"steps": min(items.run(f"train {n}", functools.partial(train, n)) for n in options["steps"])}


not_a_function = "not a function"


def of_two(stages: Any, workdir: Any) -> dict[str, Any]:
    """A function that does not take the options."""
    return {}
