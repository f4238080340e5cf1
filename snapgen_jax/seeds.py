"""Experiments that differ in seed, trained as one program on one device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from etils import epath

from snapgen_jax.experiment import Experiment
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training import loop
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.state import TrainState
from snapgen_jax.training.together import JoinedBatches, Together, stack


def train_together(experiments: Sequence[Experiment], workdir: epath.PathLike) -> list[TrainState]:
    """Trains experiments that differ in seed and in the earlier runs that they name, as one program on one device.

    Args:
        experiments: as many runs. Each workdir is in the end that of a run that is finished.
        workdir: of the training itself: checkpoints of all of them, from which it goes on, and their mean metrics.

    Returns:
        The last state of each.

    Raises:
        ConfigError: their batches are not of one shape.
    """
    first = experiments[0]
    try:
        recipe = Together([e.recipe for e in experiments], [e.config.seed for e in experiments])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])

    def record() -> None:
        for experiment in experiments:
            experiment.record()

    state = loop.train(
        recipe,
        JoinedBatches([e.data for e in experiments]),
        first.config,
        workdir=workdir,
        earlier=(lambda: stack([e.earlier_weights() for e in experiments])) if first.config.init_from else None,
        mesh=mesh,
        accepted=record,
    )
    states = [recipe.part(state, i) for i in range(len(experiments))]
    for experiment, own in zip(experiments, states, strict=True):
        run = loop.Run(experiment.recipe, experiment.config, mesh, experiment.workdir)
        with run.life.watch():
            run.load_frozen()
            run.save(own, int(own.step), position=int(own.step))
            run.wait_for_save()
        if run.checkpointer is not None:
            run.checkpointer.close()
    return states
