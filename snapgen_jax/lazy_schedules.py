"""The static schedule of a run of gates, for `snapgen export`: the one that most of some samples agree with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from snapgen_jax.conditions import chosen_options
from snapgen_jax.config import resolve
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load, load_config, load_recipe
from snapgen_jax.recipes.lazy_gates import LazyGates, majority_schedule, masks_of
from snapgen_jax.training import progress
from snapgen_jax.training.exits import ConfigError

EXAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A schedule, and how well it stands for gates that decide for each sample.

    Attributes:
        schedule: the majority of all decisions, see `majority_schedule`.
        examples: over how many samples.
        agreement: share of the gates' decisions that are the schedule's, of those that are not the same for all
            samples by the recipe's own rule, such as at the steps at which everything runs.
        skipped, skipped_by_gates: share of all module calls that the schedule skips, and that the gates skip.
    """

    schedule: str
    examples: int
    agreement: float
    skipped: float
    skipped_by_gates: float

    @classmethod
    def of(cls, ran: np.ndarray, may_skip: np.ndarray) -> Calibration:
        """Of decisions bool `[N, halves, T, modules]` and the steps bool `[T]` at which the gates decide."""
        schedule = majority_schedule(ran)
        masks = masks_of(schedule, ran.shape[-1])
        agreement = np.mean((ran == masks)[:, :, may_skip])
        return cls(schedule, len(ran), float(agreement), float(1 - masks.mean()), float(1 - ran.mean()))


def calibrate(workdir: epath.PathLike, examples: int = EXAMPLES, **options: Any) -> Calibration:
    """Draws samples with the gates of a run, for the conditions of its training data.

    Args:
        workdir: a run of the recipe `lazy_gates`.
        examples: how many.
        options: of the run's generator, such as `lazy=0.3`.

    Raises:
        ConfigError: the run has no gates, an option does not fit them, or its data is random.
    """
    if examples < 1:
        raise ConfigError(f"--calibration is {examples}; give 1 or more")
    generator = load(workdir)
    if not isinstance(generator.recipe, LazyGates):
        raise ConfigError(f"{workdir} trained no gates; train some with the recipe 'lazy_gates'")
    experiment = Experiment(resolve(load_config(workdir), name=str(workdir)), workdir)
    if experiment.is_synthetic:
        raise ConfigError(f"the data of {workdir} is random, and says nothing of what is drawn; give --schedule")
    names, batches = generator.recipe.conditions(), -(-examples // generator.recipe.config.batch_size)
    stream = experiment.data.batches(0)
    try:
        drawn = [batch.arrays for batch in itertools.islice(stream, batches)]
    finally:
        progress.close(stream)
    if missing := [name for name in names if name not in drawn[0]]:
        raise ConfigError(f"the data of {workdir} do not say {', '.join(missing)} of a sample; give --schedule")
    conditions = {name: np.concatenate([arrays[name] for arrays in drawn])[:examples] for name in names}
    try:
        ran = generator.run(conditions=conditions, **options)["ran"]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Calibration.of(ran, generator.recipe.may_skip)


def for_bundle(
    workdir: epath.PathLike, options: Mapping[str, Any], examples: int = EXAMPLES, *, adaptive: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run's generator that a bundle has, given those that were asked for: of gates that nothing else
    says the schedule of, the calibrated one.

    Args:
        workdir: any run.
        options: those that were asked for.
        examples: of the calibration.
        adaptive: whether the bundle's gates decide at each call, in place of a schedule.

    Returns:
        The options, and what the bundle's manifest says of the calibration, `{}` where there was none.

    Raises:
        ConfigError: as `calibrate`; or there is nothing to adapt.
    """
    recipe = load_recipe(workdir, "cpu")
    if not isinstance(recipe, LazyGates):
        if adaptive:
            raise ConfigError(f"--adaptive is for gates, and {workdir} trained none; leave it out")
        return dict(options), {}
    chosen = chosen_options(recipe.options, options)
    if adaptive and (chosen.schedule or not chosen.is_lazy):
        raise ConfigError("--adaptive lets the gates decide, and the options leave them nothing; leave one out")
    if chosen.schedule or not chosen.is_lazy:
        return dict(options), {}
    if adaptive:
        return {**options, "halves": "separate"}, {}
    found = calibrate(workdir, examples, **options)
    return {**options, "schedule": found.schedule, "lazy": None}, {
        "schedule": {**dataclasses.asdict(found), "lazy": chosen.lazy}
    }
