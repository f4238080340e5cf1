"""Workdirs as short runs leave them, without training, and what the tests of folders of weights share."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment
from snapgen_jax.training.checkpoint import Checkpointer
from tests.recipes_for_tests import random_like, state_away_from_zero

QUIET = ["tensorboard=False", "evaluation.every_steps=0", "evaluation.final=()", "train_steps=2", "ema_decay=0.5"]


def experiment(spec, workdir, *overrides):
    return Experiment(load_experiment(f"configs/{spec}.py:runlocal", [*QUIET, *overrides]), workdir)


def saved(spec, workdir, *overrides):
    """A workdir as two updates leave it, but for weights that are random numbers; returns its state."""
    made = experiment(spec, workdir, *overrides)
    made.record()
    state = state_away_from_zero(made.recipe)
    players = {
        name: dataclasses.replace(player, ema=None if player.ema is None else random_like(player.ema, 2))
        for name, player in state.players.items()
    }
    state = state.replace(step=jnp.int32(2), players=players)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state, 2, {})
    checkpointer.close()
    return jax.device_get(state)


@dataclasses.dataclass(frozen=True)
class Released:
    """Attributes: the folder of each run's weights, its last state on the host, its workdir as it was moved to, the
    options that a run on the same latents and captions needs, and what the student and the encoder made before."""

    folders: dict
    states: dict
    moved: pathlib.Path
    on_them: list
    images: np.ndarray
    embeddings: np.ndarray


PROMPTS = ["a red circle", "two blue stars"]


def rewrite(file, **changes):
    """Changes values of a JSON file."""
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))
