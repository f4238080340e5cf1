"""One process of a run of several, with the light recipe of `recipes_for_tests`, and ways to disturb it.

    python -m tests.host_process '{"workdir": ..., "processes": 2, "coordinator": "localhost:1234", "index": 0}'

It says on stdout what it does ("compiling", "evaluating", "step 3"), so that a test can choose its moment.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np

from snapgen_jax.cli_exit import run_to_exit_code
from snapgen_jax.evaluation.interfaces import EvaluationResult
from snapgen_jax.evaluation.unchanged import Unchanged
from snapgen_jax.generation import Generator
from snapgen_jax.parallel import hosts
from snapgen_jax.parallel.mesh import MeshConfig
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig
from tests.recipes_for_tests import Sequences, TwoPlayers


def say(*words):
    print(*words, flush=True)


class Slow(TwoPlayers):
    """Takes its time to compile, where asked to."""

    def __init__(self, compile_seconds):
        super().__init__()
        self.compile_seconds = compile_seconds

    def update(self, state, frozen, batch, key):
        if self.compile_seconds:
            say("compiling")
            time.sleep(self.compile_seconds)
        return super().update(state, frozen, batch, key)


class Disturbed(Sequences):
    """Batches that come slowly, not at all, or with an error."""

    def __init__(self, recipe, options, host, hosts):
        super().__init__(recipe, host, hosts, options.get("rows_of", 1))
        self.options, self.here = options, options.get("disturbed", 0) == host

    def batches(self, position):
        for batch in super().batches(position):
            step = self.drawn[-1] + 1
            time.sleep(self.options.get("batch_seconds", 0.0))
            if self.here and step == self.options.get("fail_at"):
                raise RuntimeError("the disk of this host is on fire")
            if self.here and step == self.options.get("die_at"):
                os._exit(9)
            if self.here and step == self.options.get("freeze_at"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.here and step == self.options.get("stall_at"):
                time.sleep(self.options["stall_seconds"])
            say("step", step, "examples", *batch.source_index)
            yield batch


def main(options):
    cluster = hosts.start(
        options["processes"], options.get("coordinator"), options.get("index"), options.get("start_timeout_seconds", 60)
    )
    recipe = Slow(options.get("compile_seconds", 0))
    config = loop.LoopConfig(
        train_steps=options.get("train_steps", 30),
        log_every_steps=1,
        tensorboard=False,
        stall_seconds=options.get("report_after_seconds", 0.0),
        mesh=MeshConfig(**options.get("mesh", {})),
        checkpoint=CheckpointConfig(every_steps=options.get("save_every_steps", 7)),
    )

    def evaluate(weights, frozen):
        say("evaluating")
        time.sleep(options.get("evaluation_seconds", 0))
        total = sum(float(np.abs(np.asarray(jax.device_get(x))).sum()) for x in jax.tree.leaves(weights["critic"]))
        return EvaluationResult({"total": total}, {})

    def unchanged(weights, frozen):
        return Unchanged(recipe.load_frozen)(Generator(recipe, weights, frozen, None))

    evaluators = [
        loop.ScheduledEvaluator("total", options.get("evaluate_every_steps", 0), False, evaluate),
        loop.ScheduledEvaluator("unchanged", 0, True, unchanged),
    ]
    data = Disturbed(recipe, options, cluster.index, cluster.count)
    loop.train(recipe, data, config, workdir=options["workdir"], evaluators=evaluators)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    sys.exit(run_to_exit_code("train", lambda: main(options)))
