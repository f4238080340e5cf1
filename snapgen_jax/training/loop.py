"""The one training loop. Its order, for every recipe:

    save (the old state, before the iterator moves) -> evaluate -> look for preemption -> next batch -> update -> log

It knows recipes by their contract only, and waits for the device only to log, to save and to evaluate. On several hosts
every process runs it in step; the first one alone writes and prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from snapgen_jax.bounds import SEED, at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationResult
from snapgen_jax.parallel.chips import Roofline
from snapgen_jax.parallel.mesh import MeshConfig, check_batch, make_mesh, put_batch
from snapgen_jax.parallel.sharding import explain, summarize, tree_shardings
from snapgen_jax.training import progress
from snapgen_jax.training.checkpoint import CheckpointConfig, Checkpointer, complete_steps
from snapgen_jax.training.compile_times import CompileTimes
from snapgen_jax.training.exits import ConfigError, DamagedError, DivergedError, PreemptedError
from snapgen_jax.training.files import write_whole
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.lifetime import Lifetime
from snapgen_jax.training.metrics import MetricWriter, evaluated
from snapgen_jax.training.mirrors import NO_MIRROR, MirrorConfig
from snapgen_jax.training.profile import Profiler
from snapgen_jax.training.ravel import leaf_by_leaf
from snapgen_jax.training.recipe import Metrics, Recipe
from snapgen_jax.training.state import TrainState
from snapgen_jax.training.step import carry, lower_step, roofline

Tree = Any


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs to know.

    Attributes:
        seed: of everything random in the run, 0 to 2^31 - 1.
        train_steps: updates in the whole run.
        log_every_steps: cadence of the progress line and of writing metrics.
        max_skipped_steps: this many discarded updates in a row end the run.
        microbatches: gradient accumulation, for the check that the batch divides.
        tensorboard: mirror the JSON lines as TensorBoard event files.
        mirror: a service that shows them too.
        stall_seconds: a phase (one update, one wait for data, one evaluation) that lasts longer is reported with the
            stacks of all threads; 0 reports none.
        profile_steps: "100:110" traces updates 100 to 109 into `profiles/` of the workdir; "" none.
    """

    seed: int = 0
    train_steps: int = 1000
    log_every_steps: int = 50
    max_skipped_steps: int = 20
    microbatches: int = 1
    tensorboard: bool = True
    mirror: MirrorConfig = NO_MIRROR
    stall_seconds: float = 600.0
    profile_steps: str = ""
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        positive = at_least(1)
        check(self, seed=SEED, train_steps=at_least(1), log_every_steps=positive, max_skipped_steps=positive)
        check(self, microbatches=positive, stall_seconds=at_least(0))


class DrawnBatch(Protocol):
    """One global batch, or this host's share of it."""

    bucket: str
    arrays: dict[str, np.ndarray]
    source_index: np.ndarray


@dataclasses.dataclass(frozen=True)
class PlainBatch:
    """A `DrawnBatch` and no more."""

    bucket: str
    arrays: dict[str, np.ndarray]
    source_index: np.ndarray


class Batches(Protocol):
    """A stream of batches whose position is one integer."""

    def batches(self, position: int) -> Iterator[Any]:
        """The stream from global batch `position` on. Closing the iterator ends its workers."""
        ...


@dataclasses.dataclass(frozen=True)
class ScheduledEvaluator:
    """An evaluator with its cadence; `run(weights, frozen)` gets `{player: averaged or plain parameters}`."""

    name: str
    every_steps: int
    at_end: bool
    run: Callable[[Tree, Tree], EvaluationResult]

    def due(self, step: int, last: bool) -> bool:
        """Whether to run before the update number `step`."""
        if last:
            return self.at_end
        return self.every_steps > 0 and step > 0 and step % self.every_steps == 0


def inference_weights(state: TrainState) -> Tree:
    """`{player: average, or parameters where no average is kept}`."""
    return {name: p.params if p.ema is None else p.ema for name, p in state.players.items()}


class Run:
    """A run under way: a recipe, its state on the mesh, and where it writes. Use `train`."""

    def __init__(
        self, recipe: Recipe, config: LoopConfig, mesh: Mesh, workdir: epath.Path | None, began: float | None = None
    ):
        self.recipe, self.config, self.mesh, self.workdir = recipe, config, mesh, workdir
        self.specs = recipe.batch_specs()
        for spec in self.specs.values():
            try:
                check_batch(jax.tree.leaves(spec)[0].shape[0], config.microbatches, mesh)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if workdir is not None:
            config.mirror.check_installed()
        self.checkpointer = None if workdir is None else Checkpointer(workdir, config.checkpoint)
        goodput = None if workdir is None else workdir / "metrics" / "goodput.json"
        self.life = Lifetime(goodput, self.wait_for_save, stall_seconds=config.stall_seconds, began=began)
        self.first = jax.process_index() == 0
        self.profiler = Profiler(config.profile_steps, None if workdir is None else workdir / "profiles")
        self._compiled: dict[str, Any] = {}
        self.rooflines: dict[str, Roofline | None] = {}
        self.writer: MetricWriter | None = None
        self._on_record: tuple[int, set[str]] = (-1, set())
        self.frozen_fingerprint = ""
        self._unlogged: list[tuple[int, np.ndarray, Metrics]] = []
        self._skipped_in_a_row = 0
        self.saved_step = -1
        # CPU devices of one process share its threads: with more than 32 programs in flight, XLA lets one device wait
        # for a place and the others for it, in a collective, for ever.
        self._in_step = mesh.devices.flat[0].platform == "cpu" and len(mesh.local_devices) > 1

    def wait_for_save(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.wait()

    # --- start ---

    def start(self, earlier: Callable[[], Tree] | None) -> tuple[TrainState, int]:
        """Restores the newest checkpoint, or draws a first state straight into its sharded layout."""
        abstract = jax.eval_shape(self.recipe.init, key(self.config.seed, 0, "init"))
        self.shardings = tree_shardings(abstract, self.recipe.rules(), self.mesh)
        found = self._restore(abstract)
        if found is not None:
            return found
        state = jax.jit(self.recipe.init, out_shardings=self.shardings)(key(self.config.seed, 0, "init"))
        if earlier is not None:  # compiled, since operations on the arrays of all processes are
            weights = jax.tree.map(np.asarray, earlier())
            state = jax.jit(self.recipe.warm_start, out_shardings=self.shardings)(state, weights)
        return state, 0

    def _restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """State and position of the newest checkpoint, or of the newest intact one where the config says so."""
        if self.checkpointer is None or self.checkpointer.latest_step() is None:
            return None
        placed = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract, self.shardings
        )
        damaged: list[int] = []
        for step in reversed(complete_steps(self.checkpointer.directory.parent)):
            try:
                self._check_meta(self.checkpointer.meta(step), step)
                state, position = self.checkpointer.restore(placed, step)
            except DamagedError as error:
                if self.config.checkpoint.fallback == "refuse":
                    raise
                if jax.process_count() > 1:  # a process may read parts that are whole, and would not know
                    raise DamagedError(
                        f"{error}. Several processes fall back together only by hand: move that folder away, and start "
                        "again"
                    ) from error
                damaged.append(step)
                if self.first:
                    print(f"{error}", flush=True)
                continue
            if damaged:
                if self.first:
                    print(
                        f"going on from the intact checkpoint of step {step}; what came after is done again", flush=True
                    )
                    self.checkpointer.set_aside(damaged)
                self.life.together("the damaged checkpoints are set aside")
                self.checkpointer.reload()
            self.saved_step = step
            return state, position
        raise DamagedError(
            f"all checkpoints of {self.workdir} are damaged (steps {', '.join(map(str, damaged))}); restore one from a "
            "copy, or start in a new workdir"
        )

    def load_frozen(self) -> Tree:
        """The recipe's frozen networks on the mesh, and their fingerprint for `meta`."""
        frozen = self.recipe.load_frozen(self.mesh)
        self.frozen_fingerprint = fingerprint(frozen)
        return frozen

    def meta(self) -> dict[str, Any]:
        """Facts that a resumed run must agree with."""
        return {
            "seed": self.config.seed,
            "global_batch": {name: jax.tree.leaves(spec)[0].shape[0] for name, spec in self.specs.items()},
            "frozen": self.frozen_fingerprint,
        }

    def _check_meta(self, saved: dict[str, Any], step: int) -> None:
        if step > self.config.train_steps:
            raise ConfigError(
                f"the newest checkpoint of this workdir is of step {step}, the config asks for "
                f"{self.config.train_steps} steps in all; set train_steps to {step} or more, or start in a new workdir"
            )
        for name, now in self.meta().items():
            if saved[name] != now:
                what = " (the weights and the precision of each frozen network)" if name == "frozen" else ""
                raise ConfigError(
                    f"{name} of this workdir is {saved[name]} (checkpoint {step}), the config asks for {now}; "
                    f"it is fixed within a workdir: restore it{what}, or start in a new workdir"
                )

    def compile(self, state: TrainState, frozen: Tree, say: Callable[[str], None]) -> None:
        """Compiles the step for every bucket, before the first batch is drawn; the state is as `carry` gives it."""
        path = None if self.workdir is None or not self.first else self.workdir / "metrics" / "compile.json"
        times = CompileTimes(path)
        for bucket in self.specs:
            with times.timed(bucket, say):
                lowered = lower_step(self.recipe, self.config.seed, self.mesh, state, frozen, bucket)
                self._compiled[bucket] = lowered.compile()
            self.rooflines[bucket] = roofline(self._compiled[bucket])

    def open_records(self, state: TrainState, step: int) -> None:
        """Cuts the records of the workdir back to the step that a run begins with, and opens them."""
        if self.workdir is None:
            return
        self._on_record = (step, evaluated(self.workdir, step))
        if self.first:
            self.life.charge_lost_work(step)
            self.writer = MetricWriter(self.workdir, step, self.config.tensorboard, self.config.mirror)
            write_whole(self.workdir / "parameters.txt", explain(state) + "\n")

    # --- the parts of a step ---

    def save(self, state: TrainState, step: int, position: int) -> None:
        """Saves a state once per step, after everything that led to it is on record."""
        if self.checkpointer is None or step == self.saved_step:
            return
        with self.life.phase("checkpoint"):
            self.flush_metrics()
            self.checkpointer.save(leaf_by_leaf(state), position, self.meta())
            self.saved_step = step
            self.life.saved(step)
            self.life.store(step)

    def evaluate(self, state: TrainState, frozen: Tree, step: int, evaluators: Sequence[ScheduledEvaluator]) -> None:
        """Runs the evaluators that are due and not on record."""
        last = step == self.config.train_steps
        due = [e for e in evaluators if e.due(step, last)]
        done_at, done = self._on_record
        for evaluator in [e for e in due if step != done_at or e.name not in done]:
            with self.life.phase("evaluation"):
                result = evaluator.run(inference_weights(leaf_by_leaf(state)), frozen)
                self.life.together(f"{evaluator.name} at step {step}")
            if self.writer is not None:
                self.writer.evaluation(step, evaluator.name, result.numbers, result.pictures)
            if self.first:
                print(progress.evaluation_line(step, evaluator.name, result.numbers), flush=True)

    def update(self, state: TrainState, frozen: Tree, batch: Any, step: int) -> TrainState:
        """One update; its metrics stay on the device until they are logged."""
        compiled = self._compiled.get(batch.bucket)
        if compiled is None:
            raise ConfigError(f"the data gave bucket {batch.bucket!r}; the recipe knows {', '.join(self.specs)}")
        progress.check_batch_arrays(batch.arrays, self.specs[batch.bucket], jax.process_count())
        self.recipe.inputs.check_batch(batch.arrays)
        state, metrics = compiled(state, frozen, put_batch(batch.arrays, self.mesh))
        if self._in_step:
            jax.block_until_ready(metrics)
        self._unlogged.append((step, batch.source_index, metrics))
        return state

    def flush_metrics(self, leave: int = 0) -> dict[str, float]:
        """Fetches and records the metrics of all steps but the newest `leave`. Returns their means.

        Raises:
            DivergedError: names the step at which updates stopped being finite.
        """
        ready = self._unlogged[: len(self._unlogged) - leave]
        self._unlogged = self._unlogged[len(ready) :]
        records, means = progress.records(ready)
        if self.writer is not None and records:
            self.writer.train(records)
        for (step, source_index, _), record in zip(ready, records, strict=True):
            self._skipped_in_a_row = 0 if record["finite"] else self._skipped_in_a_row + 1
            if self._skipped_in_a_row >= self.config.max_skipped_steps:
                raise DivergedError(
                    f"{self._skipped_in_a_row} updates in a row were not finite, up to step {step} "
                    f"(examples {source_index.tolist()[:8]} ...); the checkpoint of step {self.saved_step} is intact. "
                    "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at those examples"
                )
        return means


def train(
    recipe: Recipe,
    data: Batches,
    config: LoopConfig,
    *,
    workdir: epath.PathLike | None = None,
    evaluators: Sequence[ScheduledEvaluator] = (),
    earlier: Callable[[], Tree] | None = None,
    mesh: Mesh | None = None,
    quiet: bool = False,
    began: float | None = None,
    accepted: Callable[[], None] = lambda: None,
) -> TrainState:
    """Trains from the newest checkpoint of `workdir`, or from nothing, to `config.train_steps`.

    Args:
        recipe: the method.
        data: the batches; its stream is entered at the restored position.
        workdir: local or object-store folder; None keeps everything in memory.
        evaluators: what to measure along the way.
        earlier: `{player: weights}` of an earlier stage for the recipe's `warm_start`; read once, never on resume.
        mesh: overrides the mesh that `config.mesh` describes.
        quiet: prints nothing but errors.
        began: when the process began that is there for this run, see `Lifetime`.
        accepted: runs once the config was compared with the checkpoint, before anything is compiled or written.

    Returns:
        The last state, on the mesh.

    Raises:
        ConfigError: the batch, the mesh, the checkpoint or the data do not fit.
        DivergedError: updates stopped being finite.
        PreemptedError: a signal asked the run to stop; its state is saved.
    """
    if mesh is None:
        try:
            mesh = make_mesh(config.mesh)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    run = Run(recipe, config, mesh, None if workdir is None else epath.Path(workdir), began)
    life = run.life
    with life.watch():
        frozen = run.load_frozen()
        state, position = run.start(earlier)
        step = start = int(state.step)
        life.saved(start)
        say = progress.Reporter(config.train_steps, step, quiet or not run.first)
        say.start(summarize(state, depth=4), run.mesh, step)
        accepted()
        run.open_records(state, start)
        with life.phase("compile"):
            if step < config.train_steps:
                state = carry(state, run.mesh)
                run.compile(state, frozen, say.line)
                say.peaks(list(run.rooflines.values()))
            life.together("start")
        life.store(step)
        stream = data.batches(position)
        try:
            while True:
                due = step == config.train_steps or step % config.checkpoint.every_steps == 0
                evaluation_due = any(e.due(step, step == config.train_steps) for e in evaluators)
                if step and (due or evaluation_due):
                    run.save(state, step, position)
                run.evaluate(state, frozen, step, evaluators)
                if step == config.train_steps:
                    break
                if not life.begin(step + 1):
                    if step > start:
                        run.save(state, step, position)
                    run.wait_for_save()
                    raise PreemptedError(f"stopped at step {step} with everything saved; run the same command to go on")
                run.profiler.before(step + 1, state)
                with life.phase("data"):
                    batch = next(stream)
                position += 1
                with life.phase("step"):
                    state = run.update(state, frozen, batch, step + 1)
                    step += 1
                    say.count(len(batch.source_index) * jax.process_count(), run.rooflines[batch.bucket])
                    if step % config.log_every_steps == 0 or step == config.train_steps:
                        # One interval behind: the device never waits for the host to fetch and write.
                        means = run.flush_metrics(leave=0 if step == config.train_steps else config.log_every_steps)
                        line, perf = say.interval(step, means, life.seconds(), run.saved_step)
                        if run.writer is not None and perf:
                            run.writer.perf(perf)
                        life.store(step)
                        say.line(line)
        finally:
            run.profiler.stop(state)
            progress.close(stream)
            if run.writer is not None:
                run.writer.close()
            if run.checkpointer is not None:
                run.checkpointer.close()
            life.store(step)
    return leaf_by_leaf(state)
