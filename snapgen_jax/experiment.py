"""A config with everything that it names: recipe, tokenizer, data and evaluators, put together for the loop.

A researcher needs no workdir: see `in_memory.train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Generator as Generating
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from snapgen_jax.config import Resolved
from snapgen_jax.data.config import Split
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.mixture import domains_of
from snapgen_jax.data.pipeline import Batch, Pipeline
from snapgen_jax.data.sources import Source, build_source
from snapgen_jax.data.stored_source import StoredSource
from snapgen_jax.data.synthetic import SyntheticBatches
from snapgen_jax.data.tokenizer import CaptionTokenizer
from snapgen_jax.data.tokenizer_specs import OwnTokenizer, check_texts, load_tokenizers, make_tokenizer
from snapgen_jax.evaluation import registry
from snapgen_jax.evaluation.interfaces import EvaluationResult, Evaluator
from snapgen_jax.generation import Generator, load_start, on_every_host
from snapgen_jax.inputs.interfaces import StoredInputs, prefixed
from snapgen_jax.parallel.hosts import current, text_for_all
from snapgen_jax.parallel.mesh import make_mesh
from snapgen_jax.preparation.stored import Encoding, check_encoders, check_manifest, check_tokenizers
from snapgen_jax.training import loop, progress
from snapgen_jax.training.checkpoint import complete_steps
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import Batches, ScheduledEvaluator
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.state import TrainState
from snapgen_jax.workdir import prepare_workdir, recorded_config

Tree = Any
TOKENIZER = "tokenizer.json"
_DECODED_TOGETHER = 16  # images

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
            ConfigError: the fields of the config do not fit each other, or a kernel of attention that they name does
                not run there.
        """
        self.workdir = epath.Path(workdir)
        self.resolved, self.config = resolved, resolved.experiment
        self.warned = False  # that validation repeats the training split
        self.platform: Any = backend or jax.default_backend()
        self.recipe: Recipe = resolved.start(self.platform)

    @property
    def is_synthetic(self) -> bool:
        """Whether its batches are random numbers, which show speed alone."""
        return self.config.data.source == "synthetic" and not self.config.data.mixture

    @functools.cached_property
    def source(self) -> Source:
        """The training examples, by index.

        Raises:
            DataError: there are none, or they were encoded for another config.
        """
        return self.open_source("train")

    def open_source(self, split: Split) -> Source:
        """The examples of a split, by index. Raises as `source`."""
        source = build_source(self.config.data, split)
        for domain in domains_of(source):
            if isinstance(domain.source, StoredSource) and domain.source.manifest.kind == "encoded":
                check_manifest(domain.source.manifest, self.encoding, domain.source.folder)
        return source

    @functools.cached_property
    def encoding(self) -> Encoding:
        """What is stored for this config, and what makes it."""
        recipe, inputs = self.recipe, self.recipe.inputs
        return Encoding.of(self.resolved.recipe, recipe.batch_specs(), inputs.config.image_sizes, self.platform)

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
        """Captions to ids; None for synthetic batches, for a recipe that reads no text, and where the ids are stored
        and no tokenizer is named.

        Raises:
            DataError: one is missing, or does not fit its text encoder or what it was made of.
        """
        specs = self.recipe.tokenizers()
        if self.is_synthetic or not specs:
            return None
        unnamed = any(spec.kind == "pretrained" and not spec.folder for spec in specs.values())
        if unnamed and specs.keys() <= self.source.spec().keys():
            return None
        return load_tokenizers(specs, self.own_tokenizer)

    @functools.cached_property
    def data(self) -> Batches:
        """Training batches."""
        specs, seed = self.recipe.batch_specs(), self.config.seed
        share = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        if self.is_synthetic:
            words = {name: spec.vocab_size for name, spec in self.recipe.tokenizers().items()}
            return SyntheticBatches(specs, bounds={**words, **self.recipe.inputs.integer_bounds()}, seed=seed, **share)
        source, tokenizer = self.source, self.tokenizer
        pipeline = Pipeline(self.config.data, specs, tokenizer, seed=seed, split="train", source=source, **share)
        check_texts(self.recipe.tokenizers(), self.config.data.texts, source)
        return pipeline

    def evaluators(self) -> list[ScheduledEvaluator]:
        """The recipe's evaluators, each run on a generator with the weights of the moment; none for synthetic batches,
        which show nothing.

        A run on stored inputs is drawn from through their encoders, where its config names weights of these; else it
        has those evaluators alone that draw nothing."""
        if self.is_synthetic:
            return []
        generator = Generator(self.recipe, None, None, self.tokenizer)
        drawing = self.drawing if any(spec.function is None for spec in self.recipe.evaluators()) else None

        def scheduled(spec: Any) -> ScheduledEvaluator:
            evaluator = registry.create(spec)

            def run(weights: Tree, frozen: Tree) -> Any:
                if drawing is not None and spec.function is None:
                    drawing.params = weights
                    return judge(self, spec.name, evaluator, drawing)
                generator.params, generator.frozen = weights, frozen
                return judge(self, spec.name, evaluator, generator)

            return ScheduledEvaluator(spec.name, spec.every_steps, spec.at_end, run)

        specs = (self.recipe if drawing is None else drawing.recipe).evaluators()
        functions = {spec.name: spec for spec in self.recipe.evaluators() if spec.function is not None}
        chosen = [functions.get(spec.name, spec) for spec in specs]
        if drawing is None and isinstance(self.recipe.inputs, StoredInputs):
            if left_out := [spec.name for spec in chosen if spec.function is None]:
                log.warning(
                    "%s left out: what is stored holds no decoder. Name the folders of inputs.encoders (codec.workdir, "
                    "and a *_folder and *_tokenizer of each text encoder) to have them",
                    ", ".join(left_out),
                )
            chosen = [spec for spec in chosen if spec.function is not None]
        try:
            return [scheduled(spec) for spec in chosen]
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @functools.cached_property
    def drawing(self) -> Generator | None:
        """What draws from a run on stored inputs: the method with the encoders that these name, loaded and compared
        with those that made what is stored. None where inputs are not stored, or no weights are named.

        Raises:
            ConfigError: weights are named and are not there.
            DataError: they are others than those that made what is stored.
        """
        resolved = self.resolved.drawing()
        if resolved is self.resolved:
            return None
        recipe = resolved.build(self.platform)
        mesh = make_mesh(self.config.mesh)
        # All devices share them, whatever the mesh of the run: a replica would take the memory of the training state.
        shared = Mesh(mesh.devices.reshape(1, -1, 1), mesh.axis_names)
        frozen = recipe.load_frozen(shared, "generate")
        tokenizer = load_tokenizers(recipe.tokenizers(), None)
        for domain in domains_of(self.source):
            if isinstance(domain.source, StoredSource) and domain.source.manifest.kind == "encoded":
                manifest, folder = domain.source.manifest, domain.source.folder
                check_encoders(manifest, prefixed("student", frozen), folder)
                if tokenizer is not None:
                    check_tokenizers(manifest, tokenizer, self.encoding.token_lengths(), folder)
        return Generator(recipe, None, frozen, tokenizer)

    def stored_generator(self, generator: Generator) -> Generator:
        """A generator of this run as one on what is stored, for evaluators that read batches of it and draw nothing."""
        if not isinstance(self.recipe.inputs, StoredInputs) or isinstance(generator.recipe.inputs, StoredInputs):
            return generator
        return Generator(self.recipe, generator.params, self.recipe.load_frozen(None, "generate"), None)

    def earlier_weights(self) -> Tree:
        """`{player: weights}` of the stage that `init_from` names. What this run trains and that one did not, such as a
        published text encoder, is read from where the inputs say."""
        earlier = load_start(self.config.init_from)
        inputs = self.recipe.inputs
        for player, roles in self.recipe.trains.items():
            held = earlier.get(player, {})
            brought = tuple(role for role in roles if role in inputs.pretrained() and role not in held)
            earlier |= {player: {**held, **inputs.load(brought, None)}} if brought else {}
        return earlier

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
    stored = isinstance(experiment.recipe.inputs, StoredInputs)
    decoded = stored and not isinstance(generator.recipe.inputs, StoredInputs)
    data = ValidationBatches(experiment, generator if decoded else None)
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
    """The validation split of an experiment; the same batches each time that it is iterated.

    Attributes:
        experiment: whose.
        decoder: gives batches of stored latents the array `image` uint8 `[B, H, W, 3]`; None for batches as they are.
    """

    experiment: Experiment
    decoder: Generator | None = None

    @property
    def repeats_training(self) -> bool:
        """Whether training examples were read as this split; False where nothing was read."""
        return "source" in vars(self) and not self.source.held_out

    @functools.cached_property
    def source(self) -> Any:
        """The examples of the split, by index."""
        return self.experiment.open_source("validation")

    def __iter__(self) -> Iterator[Any]:
        e = self.experiment
        data = dataclasses.replace(e.config.data, workers=0)
        specs = e.recipe.batch_specs()
        batches = Pipeline(data, specs, e.tokenizer, seed=0, split="validation", source=self.source).batches(0)
        return batches if self.decoder is None else self._decoded(batches, self.decoder)

    def _decoded(self, batches: Generating[Batch, None, None], decoder: Generator) -> Iterator[Batch]:
        stored, drawing = self.experiment.recipe, decoder.recipe

        def decode(params: Tree, frozen: Tree, latents: jax.Array) -> jax.Array:
            return drawing.inputs.decode(drawing.weights(params, frozen), latents)["image"]

        decode = jax.jit(decode, out_shardings=on_every_host(decoder.params))
        with contextlib.closing(batches):
            for batch in batches:
                latents = np.asarray(stored.inputs.clean({}, batch.arrays))
                parts = [
                    np.asarray(decode(decoder.params, decoder.frozen, latents[i : i + _DECODED_TOGETHER]))
                    for i in range(0, len(latents), _DECODED_TOGETHER)
                ]
                yield dataclasses.replace(batch, arrays={**batch.arrays, "image": np.concatenate(parts)})
