"""A config with everything that it names: recipe, tokenizer, data and evaluators, put together for the loop.

A researcher needs no workdir: see `in_memory.train`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from snapgen_jax.config import Resolved
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.sources import Source, build_source
from snapgen_jax.data.synthetic import SyntheticBatches
from snapgen_jax.data.tokenizer import CaptionTokenizer
from snapgen_jax.data.tokenizer_specs import OwnTokenizer, load_tokenizers, make_tokenizer
from snapgen_jax.evaluation import registry
from snapgen_jax.evaluation.interfaces import EvaluationResult, Evaluator
from snapgen_jax.generation import Generator, load_recipe, load_weights
from snapgen_jax.parallel.hosts import current, text_for_all
from snapgen_jax.training import loop, progress
from snapgen_jax.training.checkpoint import complete_steps
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import Batches, ScheduledEvaluator
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.state import TrainState
from snapgen_jax.workdir import prepare_workdir, recorded_config

Tree = Any
TOKENIZER = "tokenizer.json"

log = logging.getLogger(__name__)


class Experiment:
    """A config with everything that it names. Nothing is read or written before it is asked for.

    Attributes:
        resolved: the config, and the dataclasses that it fills.
        config: the part that every experiment has.
        recipe: the method.
    """

    def __init__(self, resolved: Resolved, workdir: epath.PathLike, backend: str | None = None):
        """`backend` is "cpu", "gpu" or "tpu", by default the one JAX runs on.

        Raises:
            ConfigError: the fields of the config do not fit each other.
        """
        self.workdir = epath.Path(workdir)
        self.resolved, self.config = resolved, resolved.experiment
        self.warned = False  # that validation repeats the training split
        self.recipe: Recipe = resolved.build(backend or jax.default_backend())

    @property
    def is_synthetic(self) -> bool:
        """Whether its batches are random numbers, which show speed alone."""
        return self.config.data.source == "synthetic" and not self.config.data.mixture

    @functools.cached_property
    def source(self) -> Source:
        """The training examples, by index."""
        return build_source(self.config.data, "train")

    @functools.cached_property
    def own_tokenizer(self) -> OwnTokenizer | None:
        """The run's `tokenizer.json`, made first where the workdir has none that fits; None for synthetic batches, and
        for a recipe that needs none. The first process makes it; `record` writes it.

        Raises:
            DataError: it was made of something else than the config says, or does not fit its text encoder.
        """
        specs = self.recipe.tokenizers()
        if self.is_synthetic or not any(spec.kind == "trained" for spec in specs.values()):
            return None
        made = None
        if current().index == 0:
            data, path, has_weights = self.config.data, self.workdir / TOKENIZER, bool(complete_steps(self.workdir))
            made = make_tokenizer(specs, data, self.source, path, self.config.init_from, has_weights)
        if current().count == 1:
            return made
        return OwnTokenizer(text_for_all(made.text if made else ""), made and made.source, made is None or made.kept)

    @functools.cached_property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Captions to ids; None for synthetic batches, and for a recipe that reads no text.

        Raises:
            DataError: one is missing, or does not fit its text encoder or what it was made of.
        """
        specs = self.recipe.tokenizers()
        return None if self.is_synthetic or not specs else load_tokenizers(specs, self.own_tokenizer)

    @functools.cached_property
    def data(self) -> Batches:
        """Training batches."""
        specs, seed = self.recipe.batch_specs(), self.config.seed
        share = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        if self.is_synthetic:
            words = {name: spec.vocab_size for name, spec in self.recipe.tokenizers().items()}
            return SyntheticBatches(specs, bounds={**words, **self.recipe.inputs.integer_bounds()}, seed=seed, **share)
        return Pipeline(self.config.data, specs, self.tokenizer, seed=seed, split="train", source=self.source, **share)

    def evaluators(self) -> list[ScheduledEvaluator]:
        """The recipe's evaluators, each run on a generator with the weights of the moment; none for synthetic batches,
        which show nothing."""
        if self.is_synthetic:
            return []
        generator = Generator(self.recipe, None, None, self.tokenizer)

        def scheduled(spec: Any) -> ScheduledEvaluator:
            evaluator = registry.create(spec)

            def run(weights: Tree, frozen: Tree) -> Any:
                generator.params, generator.frozen = weights, frozen
                return judge(self, spec.name, evaluator, generator)

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

    def check(self) -> None:
        """Opens data, tokenizer and evaluators, as `train` does before it restores anything; writes nothing.

        Raises:
            ConfigError: another version wrote the workdir, or the evaluators do not fit.
            DataError: the data or the tokenizer do not.
        """
        recorded_config(self.workdir)
        _ = self.data, self.evaluators()

    def record(self) -> None:
        """Writes what the workdir says of the run: `config.json`, `run.json`, `tokenizer.json`."""
        if current().index == 0:
            prepare_workdir(self.resolved.config, self.workdir)
            if self.own_tokenizer is not None:
                self.own_tokenizer.save(self.workdir / TOKENIZER)

    def train(self, began: float | None = None, accepted: Callable[[], None] = lambda: None) -> TrainState:
        """Runs the loop to the end of the config, from wherever the workdir stands.

        A start that is refused writes nothing.

        Args:
            began: when the process began, where it is there for this run alone; see `loop.train`.
            accepted: runs once nothing is left to refuse, before the first file is written.
        """

        def record() -> None:
            accepted()
            self.record()

        recorded_config(self.workdir)  # one of another version is told so before anything of it is looked at
        return loop.train(
            self.recipe,
            self.data,
            self.config,
            workdir=self.workdir,
            evaluators=self.evaluators(),
            earlier=self.earlier_weights if self.config.init_from else None,
            began=began,
            accepted=record,
        )


def judge(experiment: Experiment, name: str, evaluator: Evaluator, generator: Generator) -> EvaluationResult:
    """What an evaluator finds with the validation split of an experiment.

    Where it read a split that repeats the training split, the number `validation.held_out` is 0, and a warning says so.

    Raises:
        ConfigError: the run or its data do not have what the evaluator needs.
    """
    data = ValidationBatches(experiment)
    try:
        result = evaluator(generator, data)
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(f"evaluator {name!r}: {error}") from error
    if not data.repeats_training:
        return result
    if not experiment.warned:
        experiment.warned = True
        log.warning(
            "NOT HELD OUT: %s and the other evaluators read training examples, since the validation split repeats the "
            "%d there are; their numbers say nothing of what was not trained on. Raise data.validation_share, or name "
            "another data.validation_split, and train anew",
            name,
            len(data.source),
        )
    return dataclasses.replace(result, numbers={**result.numbers, "validation.held_out": 0.0})


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """The validation split of an experiment; the same batches each time that it is iterated."""

    experiment: Experiment

    @property
    def repeats_training(self) -> bool:
        """Whether training examples were read as this split; False where nothing was read."""
        return "source" in vars(self) and not self.source.held_out

    @functools.cached_property
    def source(self) -> Any:
        """The examples of the split, by index."""
        return build_source(self.experiment.config.data, "validation")

    def __iter__(self) -> Iterator[Any]:
        e = self.experiment
        data = dataclasses.replace(e.config.data, workers=0)
        specs = e.recipe.batch_specs()
        return Pipeline(data, specs, e.tokenizer, seed=0, split="validation", source=self.source).batches(0)
