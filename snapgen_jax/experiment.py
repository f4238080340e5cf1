"""From a config to a trained workdir: puts recipe, data, evaluators and loop together.

A researcher needs no workdir: `train(recipe, batches, steps)` runs a recipe on any iterable of batches.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from snapgen_jax.config import Config, ExperimentConfig, build, from_json, recipe_class, to_json
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.synthetic import SyntheticBatches
from snapgen_jax.data.tokenizer import CaptionTokenizer, Tokenizer, build_tokenizer
from snapgen_jax.evaluation import registry
from snapgen_jax.evaluation.interfaces import EvaluationResult, EvaluatorSpec
from snapgen_jax.evaluation.pictures import png_bytes
from snapgen_jax.generation import Generator, load, load_recipe, load_weights, published_tokenizer
from snapgen_jax.parallel.hosts import current
from snapgen_jax.parallel.mesh import MeshConfig, check_batch, make_mesh
from snapgen_jax.parallel.plan import Plan, plan_step, topology
from snapgen_jax.training import loop, progress
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import on_object_store, write_whole
from snapgen_jax.training.loop import Batches, LoopConfig, PlainBatch, ScheduledEvaluator
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.state import TrainState
from snapgen_jax.training.together import JoinedBatches, Together, stack

Tree = Any
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "snapgen-jax")


class Experiment:
    """A config with everything that it names.

    Attributes:
        config: the whole config, as a dataclass.
        recipe: the method.
        tokenizer: captions to ids: those of the recipe's published text encoders, or one trained on the captions of the
            source at first, then kept in the workdir. None for synthetic batches, and for a recipe that reads no text.
        data: training batches.
    """

    def __init__(self, config: ConfigDict, workdir: epath.PathLike, backend: str | None = None):
        """`backend` is "cpu", "gpu" or "tpu", by default the one JAX runs on."""
        self.workdir = epath.Path(workdir)
        self.config: ExperimentConfig = build(ExperimentConfig, config)
        cls = recipe_class(self.config.recipe)
        try:
            self.recipe: Recipe = cls(build(cls.Config, config), backend or jax.default_backend())
        except ValueError as error:
            raise ConfigError(f"recipe {self.config.recipe!r}: {error}") from error
        self.tokenizer: CaptionTokenizer | None = None
        specs, share = self.recipe.batch_specs(), {"host_index": jax.process_index(), "host_count": jax.process_count()}
        if self.config.data.source == "synthetic":
            self.data: Batches = SyntheticBatches(specs, seed=self.config.seed, **share)
            return
        source = build_source(self.config.data, "train")
        self.tokenizer = published_tokenizer(self.recipe)
        if any("tokens" in spec for spec in specs.values()):
            self.tokenizer = self._tokenizer(source)
        self.data = Pipeline(
            self.config.data, specs, self.tokenizer, seed=self.config.seed, split="train", source=source, **share
        )

    def _tokenizer(self, source: Any) -> Tokenizer:
        path = self.workdir / "tokenizer.json"
        if not path.exists() and current().index == 0:
            self._make_tokenizer(source, path)
        current().barrier("tokenizer")
        return Tokenizer.load(path)

    def _make_tokenizer(self, source: Any, path: epath.Path) -> None:
        # A text encoder of an earlier run goes with the tokenizer of that run.
        earlier = getattr(self.recipe, "tokenizer_workdir", "") or self.config.init_from
        kept = epath.Path(earlier) / "tokenizer.json"
        tokenizer = Tokenizer.load(kept) if earlier and kept.exists() else build_tokenizer(self.config.data, source)
        room = getattr(self.recipe, "vocab_size", tokenizer.vocab_size)
        if tokenizer.vocab_size > room:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the text encoder takes {room}; "
                "set data.vocab_size to at most text.vocab_size"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)

    def evaluators(self) -> list[ScheduledEvaluator]:
        """The recipe's evaluators, each run on a generator with the weights of the moment; none for synthetic batches,
        which show nothing."""
        if self.config.data.source == "synthetic":
            return []
        generator = Generator(self.recipe, None, None, self.tokenizer)

        def scheduled(spec: Any) -> ScheduledEvaluator:
            evaluator = registry.create(spec)

            def run(weights: Tree, frozen: Tree) -> Any:
                generator.params, generator.frozen = weights, frozen
                return evaluator(generator, ValidationBatches(self))

            return ScheduledEvaluator(spec.name, spec.every_steps, spec.at_end, run)

        try:
            return [scheduled(spec) for spec in self.recipe.evaluators()]
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def earlier_weights(self) -> Tree:
        """`{player: weights}` of the stage that `init_from` names."""
        return load_weights(self.config.init_from, load_recipe(self.config.init_from))

    def read(self, batches: int) -> dict[str, float]:
        """Draws batches and computes nothing: what the input can do, without the device.

        Returns:
            `examples_per_second` of this process, and `first_batch_seconds`, before the clock of the former starts.
        """
        stream = self.data.batches(0)
        try:
            begin = time.perf_counter()
            next(stream)
            started = time.perf_counter()
            examples = sum(len(next(stream).source_index) for _ in range(batches))
            return {
                "first_batch_seconds": started - begin,
                "examples_per_second": examples / (time.perf_counter() - started),
            }
        finally:
            progress.close(stream)

    def train(self, began: float | None = None) -> TrainState:
        """Runs the loop to the end of the config, from wherever the workdir stands.

        Args:
            began: when the process began, where it is there for this run alone; see `loop.train`.
        """
        return loop.train(
            self.recipe,
            self.data,
            self.config,
            workdir=self.workdir,
            evaluators=self.evaluators(),
            earlier=self.earlier_weights if self.config.init_from else None,
            began=began,
        )


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
    state = loop.train(
        recipe,
        JoinedBatches([e.data for e in experiments]),
        first.config,
        workdir=workdir,
        earlier=(lambda: stack([e.earlier_weights() for e in experiments])) if first.config.init_from else None,
        mesh=mesh,
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


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """The validation split of an experiment; the same batches each time that it is iterated."""

    experiment: Experiment

    @functools.cached_property
    def source(self) -> Any:
        """The examples of the split, by index."""
        return build_source(self.experiment.config.data, "validation")

    def __iter__(self) -> Iterator[Any]:
        e = self.experiment
        data = dataclasses.replace(e.config.data, workers=0)
        specs = e.recipe.batch_specs()
        return Pipeline(data, specs, e.tokenizer, seed=0, split="validation", source=self.source).batches(0)


def evaluate(
    workdir: epath.PathLike, names: Sequence[str], step: int | None = None, **choices: Any
) -> dict[str, float]:
    """The numbers of evaluators run on a trained run, see `measure`."""
    return measure(workdir, names, step, **choices).numbers


def measure(
    workdir: epath.PathLike,
    names: Sequence[str],
    step: int | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    decoder: epath.PathLike | None = None,
    generator: Generator | None = None,
) -> EvaluationResult:
    """Runs evaluators on a trained run; their pictures go to `samples/`.

    Args:
        workdir: the run.
        names: evaluators, whether or not the run's config names them.
        step: which checkpoint; the newest by default.
        generation: options of the generator, such as `steps` and `guidance`, for the evaluators that draw.
        options: further options of evaluators, by name.
        decoder: a run of a tiny decoder that takes the place of the codec's decoder.
        generator: the run's, where it is loaded already; in place of `step` and `decoder`.

    Returns:
        What all of them found.
    """
    generator = generator or load(workdir, step, decoder=decoder)
    experiment = Experiment(from_json((epath.Path(workdir) / "config.json").read_text()), workdir)
    known = {spec.name: spec for spec in generator.recipe.evaluators()}
    found = EvaluationResult({}, {}, {})
    for name in names:
        try:
            evaluator = registry.create(_with_options(known.get(name, EvaluatorSpec(name)), generation, options))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        result = evaluator(generator, ValidationBatches(experiment))
        found.numbers.update(result.numbers)
        found.pictures.update(result.pictures)
        found.values.update(result.values)
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for title, picture in found.pictures.items():
        (folder / f"{title}.png").write_bytes(png_bytes(picture))
    return found


def _with_options(
    spec: EvaluatorSpec, generation: Mapping[str, Any] | None, options: Mapping[str, Mapping[str, Any]] | None
) -> EvaluatorSpec:
    chosen = {**spec.options, **(options or {}).get(spec.name, {})}
    if generation:
        chosen["options"] = {**chosen.get("options", {}), **generation}
    return dataclasses.replace(spec, options=chosen)


def export(
    workdir: epath.PathLike,
    out: epath.PathLike,
    backend: Literal["jax2tf", "litert"] = "jax2tf",
    decoder: epath.PathLike | None = None,
) -> dict[str, float]:
    """Exports a trained run as a bundle for phones, checked against JAX on the way.

    Args:
        workdir: the run.
        out: the bundle's folder.
        backend: which converter.
        decoder: a run of a tiny decoder that takes the place of the codec's decoder.

    Returns:
        What was measured, `export.*`.

    Raises:
        ConfigError: `out` is in an object store, or the run cannot be exported.
    """
    from snapgen_jax.export.bundle import export_bundle, generator_of

    if on_object_store(out):
        raise ConfigError(f"a bundle is made of local files, and {out} is not; give --out a local folder, and copy it")
    generator = load(workdir, platform="cpu", decoder=decoder)
    try:
        generator.recipe.exports()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    kept = epath.Path(workdir) / "tokenizer.json"
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = pathlib.Path(scratch) / "tokenizer.json" if kept.exists() else None
        if tokenizer:
            tokenizer.write_bytes(kept.read_bytes())
        report = export_bundle(
            generator.recipe,
            generator.params,
            generator.frozen,
            tokenizer,
            str(out),
            backend=backend,
            reference=generator_of(generator.recipe, generator.params, generator.frozen),
        )
    return report.numbers


def plan(config: ConfigDict, name: str, part: str = "") -> list[Plan]:
    """What a config's step needs and costs on chips that are not here: one plan for each batch shape.

    Args:
        config: the experiment.
        name: of the topology, "v5e:4x4"; see `parallel.plan.topology`.
        part: a piece of the step to plan by itself, see `training.recipe.parts_of`; "" for the whole.

    Raises:
        ConfigError: the topology is unknown, the mesh or the batch does not fit it, or there is no such part.
    """
    experiment: ExperimentConfig = build(ExperimentConfig, config)
    cls = recipe_class(experiment.recipe)
    try:
        recipe: Recipe = cls(build(cls.Config, config), "tpu")
        where = topology(name)
        mesh = make_mesh(experiment.mesh, where.devices)
        plans = []
        for bucket, spec in recipe.batch_specs().items():
            batch = jax.tree.leaves(spec)[0].shape[0]
            check_batch(batch, experiment.microbatches, mesh)
            lowered, state = loop.lower_abstract_step(recipe, experiment.seed, mesh, bucket, part)
            facts = {"part": part, "bucket": bucket, "global_batch": batch, "train_steps": experiment.train_steps}
            plans.append(plan_step(lowered, where, mesh, state=state, **facts))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return plans


def derive(earlier: epath.Path, name: str) -> tuple[dict[str, Any], list[Plan]]:
    """What earlier plans say of another topology, see `Plan.on`; with the config and overrides that they were made of.

    Raises:
        ConfigError: the file holds no plans, or plans that tell nothing of others.
    """
    try:
        records = json.loads(earlier.read_text())
        asked = {what: records[0][what] for what in ("config", "overrides")}
        return asked, [Plan.from_json(record).on(topology(name)) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{earlier}: {error!r}; give a file that `snapgen plan --json` wrote") from error


def prepare_workdir(config: ConfigDict, workdir: epath.PathLike, command: list[str] | None = None) -> None:
    """Writes `config.json` and `run.json`; names what changed if the workdir had another config.

    Of several processes the first one does.
    """
    if current().index:
        return
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if path.exists():
        for name, (old, new) in differences(from_json(path.read_text()), config).items():
            print(f"config changed since this run began: {name} was {old}, is now {new}")
    write_whole(path, to_json(config))
    run = {
        "command": command or sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "hosts": jax.process_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "flags": {name: os.environ[name] for name in FLAGS if os.environ.get(name)},
    }
    write_whole(workdir / "run.json", json.dumps(run, indent=2) + "\n")


def differences(old: Config, new: Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of all keys whose values differ."""
    out: dict[str, tuple[Any, Any]] = {}
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping | ConfigDict) and isinstance(b, Mapping | ConfigDict):
            out.update(differences(a, b, f"{prefix}{name}."))
        elif a != b:
            out[f"{prefix}{name}"] = (a, b)
    return out


def _commit() -> str:
    """The commit of the source tree, or "" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=epath.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Any iterable of `{name: array}` as batches; the bucket is found by shape."""

    iterable: Iterable[Mapping[str, Any]]
    specs: dict[str, Tree]

    def batches(self, position: int) -> Iterator[PlainBatch]:
        for n, arrays in enumerate(itertools.islice(iter(self.iterable), position, None)):
            arrays = {name: np.asarray(x) for name, x in arrays.items()}
            shapes = {name: x.shape for name, x in arrays.items()}
            fits = [b for b, spec in self.specs.items() if {k: s.shape for k, s in spec.items()} == shapes]
            size = len(next(iter(arrays.values())))
            yield PlainBatch(fits[0] if fits else next(iter(self.specs)), arrays, np.arange(n * size, (n + 1) * size))


def train(
    recipe: Recipe, batches: Iterable[Mapping[str, Any]], steps: int, *, seed: int = 0, quiet: bool = False
) -> TrainState:
    """Trains a recipe in memory, in a notebook say: no workdir, no flags.

    Args:
        recipe: any recipe.
        batches: `{name: array}` dicts with the shapes of `recipe.batch_specs()`.
        steps: updates.
        seed: of the run.
        quiet: prints nothing.

    Returns:
        The last state; `inference_weights(state)` are the weights that `recipe.generate` takes.
    """
    config = LoopConfig(seed=seed, train_steps=steps, log_every_steps=max(1, min(50, steps // 4)))
    return loop.train(recipe, _Stream(batches, recipe.batch_specs()), config, quiet=quiet)
